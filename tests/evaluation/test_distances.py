"""Neighbours and balls against scipy's distances, which are computed by differences in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ddpm_hf.evaluation import distances
from ddpm_hf.evaluation.distances import nearest_neighbours, nearest_others, within
from ddpm_hf.evaluation.metrics import frechet_statistics


def squared(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return cdist(a.double().numpy(), b.double().numpy(), "sqeuclidean")


def clusters(seed: int, count: int, size: int, spread: float, copies: int) -> torch.Tensor:
    """Three tight clusters far from each other, where float32 products know no digit of the near distances."""
    draw = np.random.default_rng(seed)
    middle = draw.normal(size=(3, size))
    points = middle[draw.integers(0, 3, count)] + spread * draw.normal(size=(count, size))
    points[:copies] = points[0]
    return torch.tensor(points, dtype=torch.float32)[torch.from_numpy(draw.permutation(count))]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 1e-3, 1e-6]),
    st.sampled_from([0, 4, 30]),  # of one image: fewer and more than are computed by differences
    st.sampled_from([1.0, 1e-25, 1e12, 1e17]),
    st.sampled_from([0.0, 100.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_neighbours_are_those_of_differences(seed, spread, copies, scale, offset, dtype):
    everything = ((clusters(seed, 130, 40, spread, copies) + offset) * scale).to(dtype)
    points, queries = everything[:90], everything[90:]
    expected = squared(points, points)
    np.fill_diagonal(expected, math.inf)
    expected.sort(axis=1)
    found = nearest_others(points, 5)
    # What is left of the norms in float64: see `distances`.
    rounding = 1e-13 * squared(points, points.double().mean(0)[None]).max()
    assert np.allclose(found, expected[:, :5], rtol=1e-12, atol=rounding)
    between = squared(queries, points)
    near, index = nearest_neighbours(queries, points, 3)
    assert np.allclose(near, np.sort(between, axis=1)[:, :3], rtol=1e-12, atol=rounding)
    assert np.allclose(np.take_along_axis(between, index.numpy(), 1), near, rtol=1e-12)
    radii = torch.tensor(expected[:, 2])
    assert np.array_equal(within(queries, points, radii), (between <= expected[:, 2]).any(1))


def test_the_bounds_in_float32_are_not_the_answer():
    """Without the second look, in float64, some of these neighbours are other ones."""
    points = clusters(0, 400, 40, 1e-6, 0)
    expected = squared(points, points)
    np.fill_diagonal(expected, math.inf)
    cloud = distances.Points.about(distances.centre(points), points, torch.float32)
    bounds = cloud.at_least(cloud).fill_diagonal_(math.inf)
    assert (bounds.numpy() <= expected).all()  # they are bounds all the same
    assert (bounds + cloud.slack(cloud)).numpy().clip(0).min() >= 0
    assert ((bounds + cloud.slack(cloud)).numpy() >= expected * (1 - 1e-6)).all()
    assert (bounds.argmin(1).numpy() != expected.argmin(1)).mean() > 0.2
    assert np.allclose(nearest_others(points, 1)[:, 0], expected.min(1), rtol=1e-9)


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_parts_of_any_size_give_the_same(rows, monkeypatch):
    points = clusters(1, 200, 10, 0.5, 3)
    expected = squared(points, points)
    np.fill_diagonal(expected, math.inf)
    monkeypatch.setattr(distances, "ROWS", rows)
    assert np.allclose(nearest_others(points, 4), np.sort(expected, axis=1)[:, :4], rtol=1e-12)


def test_reduced_precision_of_products_is_not_used():
    points = clusters(2, 100, 10, 0.5, 0)
    torch.set_float32_matmul_precision("medium")
    try:
        assert distances.precisions(points) == [torch.float64]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert distances.precisions(points) == [torch.float32, torch.float64]


def test_precisions_of_products_that_were_set_by_backend():
    """As PyTorch recommends it; `get_float32_matmul_precision` raises then."""
    points, backends = clusters(2, 100, 10, 0.5, 0), (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    cuda, cpu = (backend.fp32_precision for backend in backends)
    try:
        backends[0].fp32_precision = "tf32"
        assert distances.precisions(points) == [torch.float32, torch.float64]  # these are on the CPU
        backends[1].fp32_precision = "bf16"
        assert distances.precisions(points) == [torch.float64]
    finally:
        backends[0].fp32_precision, backends[1].fp32_precision = cuda, cpu
    assert torch.get_float32_matmul_precision() == "highest"


def test_gaussians_of_many_parts_have_the_covariance_of_numpy():
    features = np.random.default_rng(0).normal(size=(5000, 3)) @ np.diag([1, 1e-4, 10]) + 7
    found = frechet_statistics(torch.tensor(features))
    assert np.allclose(found.mean, features.mean(0), rtol=1e-14)
    assert np.allclose(found.factor.T @ found.factor, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-18)
