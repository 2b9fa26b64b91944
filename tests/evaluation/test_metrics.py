"""Numbers from given features against other computations: scipy, mpmath with 50 digits, closed forms, by hand."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from ddpm_hf.data.datasets import load_digits
from ddpm_hf.evaluation.distances import nearest_neighbours
from ddpm_hf.evaluation.metrics import (
    FrechetStatistics,
    frechet_distance,
    frechet_statistics,
    inception_score,
    jackknife,
    kernel_distance,
    leaving_out,
    memorisation,
    precision_recall,
)


def fid(a, b) -> float:
    return frechet_distance(frechet_statistics(torch.as_tensor(a)), frechet_statistics(torch.as_tensor(b)))


def fid_50_digits(a: np.ndarray, b: np.ndarray) -> float:
    """From the definition, with mpmath: the root of S_a^(1/2) S_b S_a^(1/2) by eigenvalues."""
    with mpmath.workdps(50):

        def moments(x):
            x = mpmath.matrix(x.tolist())
            mean = [mpmath.fsum(x[:, j]) / x.rows for j in range(x.cols)]
            centred = mpmath.matrix(x.rows, x.cols)
            for i in range(x.rows):
                for j in range(x.cols):
                    centred[i, j] = x[i, j] - mean[j]
            return mean, centred.T * centred / (x.rows - 1)

        def root(matrix):
            values, vectors = mpmath.eigsy(matrix)
            return vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T

        (m_a, s_a), (m_b, s_b) = moments(a), moments(b)
        middle = root(root(s_a) * s_b * root(s_a))
        trace = sum(s_a[i, i] + s_b[i, i] - 2 * middle[i, i] for i in range(s_a.rows))
        return float(sum((x - y) ** 2 for x, y in zip(m_a, m_b, strict=True)) + trace)


@pytest.mark.parametrize(
    ("n", "m", "rank"),
    [
        (40, 30, 6),  # more images than features
        (4, 5, 6),  # fewer images than features
        (4, 40, 6),
        (40, 30, 3),  # features that depend on each other
        (2, 2, 6),
    ],
)
def test_frechet_distance_equals_the_definition_with_50_digits(n, m, rank):
    draw = np.random.default_rng(0)
    mix = draw.normal(size=(rank, 6)) if rank < 6 else np.eye(6)
    a, b = draw.normal(size=(n, rank)) @ mix, (1.3 * draw.normal(size=(m, rank)) + 0.2) @ mix
    assert fid(a, b) == pytest.approx(fid_50_digits(a, b), rel=1e-10)


def test_frechet_distance_equals_scipys():
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=(300, 40)) @ draw.normal(size=(40, 40)), draw.normal(size=(200, 40))
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * sqrtm(s_a @ s_b).real)
    assert fid(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_in_closed_form():
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = x.square().sum().item()
    assert abs(fid(x, x)) < 1e-12 * scale
    assert fid(x, x + 0.5) == pytest.approx(200 * 0.25, rel=1e-9)
    x = x - x.mean(0)
    assert fid(x, 3 * x) == pytest.approx(4 * x.square().sum().item() / 49, rel=1e-9)  # (3 - 1)^2 tr S
    # Orthogonal covariances: the root of their product is 0, and the traces remain.
    a, b = x.clone(), x.clone()
    a[:, 100:], b[:, :100] = 0, 0
    assert fid(a, b) == pytest.approx((a.square().sum() + b.square().sum()).item() / 49, rel=1e-9)


def test_the_covariance_itself_instead_of_its_factor_misses_it():
    """The known-wrong way, which the oracle has to tell from ours: eigenvalues of a singular product in float32."""
    draw = np.random.default_rng(2)
    a, b = (draw.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    s_a, s_b = np.cov(a, rowvar=False, dtype=np.float32), np.cov(b, rowvar=False, dtype=np.float32)
    root = np.sqrt(np.linalg.eigvals(s_a @ s_b).astype(np.complex64)).real.sum()
    naive = float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * root)
    exact = fid_50_digits(a.astype(float), b.astype(float))
    assert abs(naive / exact - 1) > 1e-6
    assert fid(a, b) == pytest.approx(exact, rel=1e-10)


def test_two_halves_of_the_digits_are_near_and_noise_is_far():
    pixels = load_digits("all").images.flatten(1) / 255
    halves = fid(pixels[::2], pixels[1::2])
    noise = fid(pixels[::2], torch.rand(900, 64, generator=torch.Generator().manual_seed(0)))
    assert 0 < halves < 0.1
    assert noise > 100 * halves
    near, _ = kernel_distance(pixels[::2], pixels[1::2])
    far, _ = kernel_distance(pixels[::2], torch.rand(900, 64, generator=torch.Generator().manual_seed(0)))
    assert abs(near.value) < 4 * near.standard_error
    assert far.value > 100 * abs(near.value)


def test_jackknife_of_a_mean_is_the_textbook_error():
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    estimate, bias = jackknife([part.mean().item() for part in leaving_out(x)])
    tenths = np.array([x[g::10].mean().item() for g in range(10)])
    assert estimate.value == x.mean().item()
    assert estimate.standard_error == pytest.approx(tenths.std(ddof=1) / math.sqrt(10), rel=1e-9)
    assert abs(bias) < 1e-12
    assert len(list(leaving_out(x[:19]))) == 1
    assert math.isnan(jackknife([1.0])[0].standard_error)


def test_jackknife_finds_the_bias_of_few_samples():
    """Samples of the reference Gaussian itself are at distance 0, so all of the number is bias."""
    truth = FrechetStatistics(torch.zeros(10, dtype=torch.float64), torch.eye(10, dtype=torch.float64), 10**9)
    x = torch.randn(400, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    estimate, bias = jackknife([frechet_distance(frechet_statistics(part), truth) for part in leaving_out(x)])
    assert estimate.value > 0.03
    assert abs(estimate.value - bias) < 0.25 * estimate.value


def test_inception_score():
    classes = torch.eye(4)[torch.arange(80) % 4] * 1000  # certain, all classes alike; exp(-1000) is 0
    assert inception_score(classes, splits=5)[0].value == pytest.approx(4, rel=1e-12)
    assert inception_score(torch.zeros(30, 7))[0].value == pytest.approx(1, rel=1e-12)
    logits = 2 * torch.randn(103, 9, generator=torch.Generator().manual_seed(5))  # parts of unequal size
    estimate, deviation = inception_score(logits)
    theirs = isc_features_to_metric(logits.double(), splits=10, shuffle=False)
    assert estimate.value == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def mmd_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / (n * (n - 1))
    return within - 2 * sum(k(a, b) for a in x for b in y) / n**2


def test_kernel_distance():
    draw = torch.Generator().manual_seed(6)
    x, y = torch.randn(12, 5, generator=draw), 1.2 * torch.randn(12, 5, generator=draw) + 0.3
    whole, size = kernel_distance(x, y, subsets=3, subset_size=12)
    assert size == 12
    assert whole.value == pytest.approx(mmd_by_hand(x.double().numpy(), y.double().numpy()), rel=1e-9)
    x, y = torch.randn(70, 30, generator=draw, dtype=torch.float64), torch.randn(50, 30, generator=draw).double()
    ours, _ = kernel_distance(x, y, subset_size=20)
    theirs = kid_features_to_metric(x, y, kid_subset_size=20, kid_subsets=100, rng_seed=2020, verbose=False)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    deviation = theirs["kernel_inception_distance_std"]
    assert ours.standard_error == pytest.approx(deviation * math.sqrt(20 / 30), rel=1e-9)
    assert kernel_distance(x, y)[1] == 25
    assert kernel_distance(torch.zeros(2500, 1), torch.zeros(2000, 1), subsets=1)[1] == 1000


def test_the_error_of_the_kernel_distance_is_that_of_other_draws():
    draw = torch.Generator().manual_seed(7)
    runs = [
        kernel_distance(torch.randn(100, 3, generator=draw), 1.5 * torch.randn(100, 3, generator=draw), subsets=50)[0]
        for _ in range(60)
    ]
    spread = np.std([run.value for run in runs])
    assert np.mean([run.standard_error for run in runs]) == pytest.approx(spread, rel=0.3)


def test_precision_and_recall():
    draw = np.random.default_rng(8)
    samples, real = draw.normal(size=(60, 4)), draw.normal(size=(80, 4)) * [0.5, 1, 2, 1] + 7

    def share(points, centres, k):
        own = np.sort(cdist(centres, centres), axis=1)[:, k]  # column 0 is the centre itself
        return (cdist(points, centres) <= own).any(1).mean()

    samples += 7
    precision, recall = precision_recall(torch.tensor(samples), torch.tensor(real), k=2)
    assert precision.value == pytest.approx(share(samples, real, 2))
    assert recall.value == pytest.approx(share(real, samples, 2))
    assert 0 < precision.value < 1
    assert precision.standard_error == pytest.approx(math.sqrt(precision.value * (1 - precision.value) / 60))
    # A model that repeats one real image is precise and recalls nothing but its surroundings.
    repeated = torch.tensor(real[:1]).repeat(50, 1)
    precision, recall = precision_recall(repeated, torch.tensor(real))
    assert (precision.value, recall.value) == (1.0, 1 / 80)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 3.5, 1024.0]), st.integers(4, 8))
@settings(max_examples=60, deadline=None)
def test_precision_and_recall_with_copies_and_ties_are_the_definition(seed, offset, copies):
    """By differences, on a grid of 1/8 (exact in float64), where copies are at distance 0 and ties are ties."""
    draw = np.random.default_rng(seed)
    real, samples = draw.integers(-9, 9, (30, 5)) / 8, draw.integers(-9, 9, (24, 5)) / 8
    real[:copies], samples[:copies] = real[0], samples[0]
    samples[-3:] = real[0]  # copies of an image that is there four times or more, whose radius is 0
    real[-2:] = samples[0]
    real, samples = torch.tensor(real) + offset, torch.tensor(samples) + offset

    def squared(a, b):
        return (a[:, None] - b[None]).square().sum(2)

    def share(points, centres):
        radii = squared(centres, centres).fill_diagonal_(math.inf).sort(1).values[:, 2]
        return (squared(points, centres) <= radii).any(1).double().mean().item()

    precision, recall = precision_recall(samples, real)
    assert precision.value == share(samples, real)
    assert recall.value == share(real, samples)
    # Nothing but copies, in numbers that a product of matrices does not meet exactly.
    images = torch.tensor(draw.normal(size=(5, 2048))).repeat_interleave(copies, 0)
    assert [x.value for x in precision_recall(images, images[torch.randperm(len(images))])] == [1.0, 1.0]


def test_nearest_neighbours():
    draw = np.random.default_rng(9)
    queries, candidates = draw.normal(size=(7, 5)) + 100, draw.normal(size=(50, 5)) + 100
    queries[3] = candidates[20]
    distances, indices = nearest_neighbours(torch.tensor(queries), torch.tensor(candidates), k=4)
    expected = cdist(queries, candidates)
    assert np.array_equal(indices, np.argsort(expected, axis=1)[:, :4])
    assert np.allclose(distances.sqrt(), np.sort(expected, axis=1)[:, :4], rtol=1e-12)
    assert distances[3, 0] == 0


def test_memorisation_is_the_mann_whitney_statistic():
    draw = np.random.default_rng(10)
    samples, held_out = draw.normal(1, 0.3, 70).round(1), draw.normal(1.1, 0.3, 45).round(1)  # rounded: with ties
    samples[:3] = 0
    closer = memorisation(torch.tensor(samples), torch.tensor(held_out))
    assert closer.value == pytest.approx(mannwhitneyu(held_out, samples).statistic / (70 * 45), rel=1e-12)
    # DeLong's error against what other draws give.
    runs = [memorisation(torch.tensor(draw.normal(size=40)), torch.tensor(draw.normal(size=60))) for _ in range(200)]
    spread = np.std([run.value for run in runs])
    assert np.mean([run.standard_error for run in runs]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frechet_statistics(torch.zeros(1, 4)), "at least 2 images, got 1"),
        (lambda: frechet_statistics(torch.zeros(4)), r"\[N, D\]"),
        (lambda: frechet_statistics(torch.full((4, 2), math.nan)), "not finite"),
        (lambda: fid(np.zeros((5, 3)), np.zeros((5, 4))), "differ in size, 3 and 4"),
        (lambda: kernel_distance(torch.zeros(9, 3), torch.zeros(9, 4)), "differ in size, 3 and 4"),
        (lambda: kernel_distance(torch.zeros(3, 3), torch.zeros(9, 3)), "at least 4 images, got 3"),
        (lambda: kernel_distance(torch.zeros(9, 3), torch.zeros(9, 3), subset_size=10), "between 2 and 9"),
        (lambda: inception_score(torch.zeros(9, 3)), "at least 10 images, got 9"),
        (lambda: precision_recall(torch.zeros(3, 3), torch.zeros(9, 3)), "at least 4 images, got 3"),
        (lambda: precision_recall(torch.zeros(9, 3), torch.zeros(9, 2)), "differ in size, 3 and 2"),
        (lambda: nearest_neighbours(torch.zeros(9, 3), torch.zeros(2, 3), k=3), "at least 3 images, got 2"),
        (lambda: memorisation(torch.zeros(3), torch.zeros(0)), "got 3 and 0"),
    ],
)
def test_what_cannot_be_computed_gets_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
