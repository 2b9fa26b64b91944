"""Closed forms, definitions written out pair by pair, and SciPy are the oracles."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from ddpm_hf.evaluation.further_metrics import (
    authentic_share,
    density_coverage,
    frechet_distance_infinity,
    gaussian_kernel_distance,
    sliced_wasserstein,
)
from ddpm_hf.evaluation.metrics import frechet_distance, frechet_statistics
from ddpm_hf.utils.errors import UserError


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def written_out(samples, real, k):
    """Density and coverage with one loop per sum of Naeem et al. 2020, Eqs. 3 and 4."""
    pairs = np.linalg.norm(real[:, None] - real[None], axis=-1)
    balls = [np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(pairs)]
    inside = np.array([[np.linalg.norm(y - x) <= r for x, r in zip(real, balls, strict=True)] for y in samples])
    return inside.sum() / (k * len(samples)), np.mean(inside.any(0))


@pytest.mark.parametrize(("k", "shift"), [(1, 0.0), (5, 0.0), (5, 1.5)])
def test_density_and_coverage_are_their_definitions(k, shift):
    samples, real = normal(0, 70, 3) + shift, normal(1, 90, 3)
    density, coverage = density_coverage(samples, real, k)
    assert (density.value, coverage.value) == pytest.approx(written_out(samples.numpy(), real.numpy(), k), rel=1e-12)


def test_density_and_coverage_far_from_the_middle():
    """Two clouds so far apart that products in float64 round by as much as decides."""
    far = torch.tensor([1e5, -1e5]).double().repeat(30)[:, None]
    samples, real = normal(0, 60, 700) + far, normal(1, 60, 700) + far
    found = density_coverage(samples, real, 5)
    assert [estimate.value for estimate in found] == pytest.approx(written_out(samples.numpy(), real.numpy(), 5))


def test_coverage_of_new_real_images_has_its_closed_form():
    # Naeem et al. 2020, Eq. 13: 1 - (N - 1) ... (N - k) / ((N + M - 1) ... (N + M - k)), whatever the distribution.
    k, N, M = 3, 60, 40
    expected = 1 - math.prod((N - i) / (N + M - i) for i in range(1, k + 1))
    values = [density_coverage(normal(2 * s, M, 2), normal(2 * s + 1, N, 2), k) for s in range(200)]
    coverage = np.array([c.value for _, c in values])
    assert abs(coverage.mean() - expected) < 4 * coverage.std() / math.sqrt(200)
    density = np.array([d.value for d, _ in values])
    assert abs(density.mean() - 1) < 4 * density.std() / math.sqrt(200)


def test_fd_infinity_has_no_bias_where_fd_has_one():
    # Gaussian features of one distribution: the distance is 0, that of N samples about D^2 / (2 N) and more.
    real, values, plain = normal(0, 20_000, 8), [], []
    for seed in range(1, 21):
        samples = normal(seed, 400, 8)
        values.append(frechet_distance_infinity(samples, real).value)
        plain.append(frechet_distance(frechet_statistics(samples), frechet_statistics(real)))
    assert np.mean(plain) > 0.05
    assert abs(np.mean(values)) < 0.2 * np.mean(plain)


def test_cmmd_is_its_definition():
    samples, real = normal(0, 30, 5), normal(1, 40, 5) + 1

    def kernel(a, b):
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        return math.exp(-np.sum((a - b) ** 2) / 200)

    def mean(p, q):
        return np.mean([[kernel(a, b) for b in q] for a in p])

    x, y = samples.numpy(), real.numpy()
    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert gaussian_kernel_distance(samples, real).value == pytest.approx(expected, rel=1e-9)
    for scale in (3, 1e-20):  # unit vectors
        assert gaussian_kernel_distance(scale * samples, real).value == pytest.approx(expected, rel=1e-9)
    assert gaussian_kernel_distance(samples, samples).value == pytest.approx(0, abs=1e-9)


def test_cmmd_of_features_of_no_length():
    features = normal(0, 20, 5)
    features[3] = 0  # the pixels of a black image
    unit = features.double() / features.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
    kernel = np.exp(-(cdist(unit, unit, "sqeuclidean")) / 200)
    expected = 1000 * (kernel[:10, :10].mean() + kernel[10:, 10:].mean() - 2 * kernel[:10, 10:].mean())
    assert gaussian_kernel_distance(features[:10], features[10:]).value == pytest.approx(expected, rel=1e-9)


def test_the_error_of_cmmd_is_its_spread():
    estimates = [gaussian_kernel_distance(normal(2 * s, 100, 4) + 1, normal(2 * s + 1, 150, 4)) for s in range(100)]
    spread = np.std([e.value for e in estimates])
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 80), (7, 120)])
def test_the_wasserstein_distance_of_a_line(n, m):
    """In one dimension every direction is the line, and the distance the integral over quantiles."""
    a, b = normal(0, n, 1), 2 * normal(1, m, 1) + 1
    u = (np.arange(200_000 * 7) + 0.5) / (200_000 * 7)
    quantiles = (np.sort(s.numpy()[:, 0])[np.ceil(u * len(s)).astype(int) - 1] for s in (a, b))
    expected = np.mean((next(quantiles) - next(quantiles)) ** 2)
    found = sliced_wasserstein(a, b, directions=3)
    assert found.value == pytest.approx(expected, rel=1e-4)
    if n == m:
        assert stats.wasserstein_distance(a[:, 0], b[:, 0]) ** 2 <= found.value  # W_1 <= W_2


def test_a_shift_is_its_squared_length_away():
    x, v = normal(0, 200, 16), normal(1, 16)
    # Projected: (theta . v)^2, of which the mean over directions is |v|^2 / D.
    found = sliced_wasserstein(x + v, x)
    assert abs(found.value - v.square().sum().item()) < 4 * found.standard_error
    assert sliced_wasserstein(x, x).value == 0


def test_copies_are_not_authentic():
    train, new = normal(0, 300, 6), normal(1, 200, 6)
    pairs = np.linalg.norm(train.numpy()[:, None] - train.numpy()[None], axis=-1)
    np.fill_diagonal(pairs, np.inf)
    to_train = np.linalg.norm(new.numpy()[:, None] - train.numpy()[None], axis=-1)
    expected = np.mean([row.min() > pairs[row.argmin()].min() for row in to_train])
    assert authentic_share(new, train).value == expected
    copies = torch.cat([new[:100], train[:100]])
    assert authentic_share(copies, train).value == pytest.approx(authentic_share(new[:100], train).value / 2)


@pytest.mark.parametrize("metric", [density_coverage, frechet_distance_infinity, gaussian_kernel_distance,
                                    sliced_wasserstein, authentic_share])  # fmt: skip
def test_what_cannot_be_compared_is_refused(metric):
    with pytest.raises(UserError, match="needs at least"):
        metric(normal(0, 1, 3), normal(1, 50, 3))
    with pytest.raises(UserError, match="not finite"):
        metric(normal(0, 50, 3) / 0, normal(1, 50, 3))
    with pytest.raises(UserError, match="differ in size"):
        metric(normal(0, 50, 3), normal(1, 50, 4))
