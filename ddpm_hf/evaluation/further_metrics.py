"""Metrics that reviewers ask for beside the paper's: from features to numbers, in float64, as `metrics` does it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..utils.progress import in_parts
from .distances import ROWS, Points, centre, checked, nearest_neighbours, nearest_others
from .metrics import Estimate, frechet_distance, frechet_statistics, mean_estimate, share


def density_coverage(
    samples: Tensor, real: Tensor, k: int = 5, radii: Tensor | None = None
) -> tuple[Estimate, Estimate]:
    """Compute density and coverage (Naeem et al. 2020) of `samples` `[M, D]` and `real` `[N, D]`.

    Density: in how many of the real images' k-neighbour balls a sample lies, divided by k; about 1 for new real
    images, and not bounded by 1. Coverage: the share of these balls with a sample in them; for M = N new real images
    about 1 - 1 / 2^k. `radii` are the balls' squared ones, `[N]`, where they are known.
    """
    samples, real = checked("density and coverage", k + 1, samples, real)
    radii = nearest_others(real, k)[:, -1] if radii is None else radii
    origin = centre(real)
    balls = Points.about(origin, real, torch.float64)
    counts, covered = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in in_parts(samples.split(ROWS), "density and coverage"):
        points = Points.about(origin, part, torch.float64)
        bounds = points.at_least(balls)  # [rows, N]
        inside = bounds <= radii
        close = inside & (bounds.add_(points.slack(balls)) >= radii)  # what rounding decides
        for pairs in close.nonzero().split(ROWS):
            i, j = pairs.T
            inside[i, j] = (part[i].double() - real[j].double()).square().sum(1) <= radii[j]
        counts.append(inside.sum(1).double() / k)
        covered |= inside.any(0)
    return mean_estimate(torch.cat(counts)), share(covered)


def frechet_distance_infinity(samples: Tensor, real: Tensor, points: int = 15, seed: int = 0) -> Estimate:
    """Extrapolate the Frechet distance to infinitely many samples (FD-infinity, Chong & Forsyth 2020).

    Its bias is of order 1/N: a line in 1/N through the distances of N/10, ..., N random samples meets 1/N = 0 there.
    Returns the intercept, and its standard error in the fit, which knows nothing of the real images' own number.
    """
    samples, real = checked("FD-infinity", 20, samples, real)
    reference, draw = frechet_statistics(real), np.random.RandomState(seed)
    sizes = np.linspace(max(2, len(samples) // 10), len(samples), points).astype(int)
    distances = []
    for size in in_parts([range(size) for size in sizes], "FD-infinity"):
        subset = torch.from_numpy(draw.permutation(len(samples))[: len(size)]).to(samples.device)
        distances.append(frechet_distance(frechet_statistics(samples[subset]), reference))
    (_, intercept), covariance = np.polyfit(1 / sizes, distances, 1, cov=True)
    return Estimate(float(intercept), math.sqrt(covariance[1, 1]))


def gaussian_kernel_distance(samples: Tensor, real: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> Estimate:
    """Compute the squared MMD of a Gaussian kernel between unit vectors; of CLIP features the CMMD.

    Jayasumana et al. 2024: k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), all pairs (also of an image with itself), times
    1000. The error is that of a sum over independent samples and real images.
    """
    samples, real = checked("the kernel distance", 2, samples, real)
    # Of a black image 0; all others are longer than 1e-300.
    x, y = (functional.normalize(features.double(), eps=1e-300) for features in (samples, real))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T) / (2 * sigma**2))

    def own_means(a: Tensor) -> Tensor:  # of the kernel of each with all; each pair is computed once
        sums = a.new_zeros(len(a))
        for rows in in_parts(torch.arange(len(a)).split(ROWS), "kernel distance"):
            start, stop = int(rows[0]), int(rows[-1]) + 1
            pairs = kernel(a[start:stop], a[start:])
            sums[start:stop] += pairs.sum(1)
            sums[stop:] += pairs[:, stop - start :].sum(0)
        return sums / len(a)

    across_real, across_samples = [], x.new_zeros(len(y))
    for part in in_parts(x.split(ROWS), "kernel distance"):
        pairs = kernel(part, y)
        across_real.append(pairs.mean(1))
        across_samples += pairs.sum(0) / len(x)
    of_samples, of_real = own_means(x) - torch.cat(across_real), own_means(y) - across_samples
    error = 2 * math.sqrt(of_samples.var().item() / len(x) + of_real.var().item() / len(y))
    return Estimate(scale * (of_samples.mean() + of_real.mean()).item(), scale * error)


def sliced_wasserstein(samples: Tensor, real: Tensor, directions: int = 1024, seed: int = 0) -> Estimate:
    """Compute the mean squared 2-Wasserstein distance of features projected onto random directions, times D.

    Of Inception features that is what MIND averages (Berthet et al. 2026). With the factor D, a set that is shifted by
    v is at |v|^2, as in the Frechet distance. Returns it with the error of the directions.
    """
    samples, real = (x.double() for x in checked("the sliced Wasserstein distance", 2, samples, real))
    D = samples.shape[1]
    draw = torch.Generator().manual_seed(seed)
    theta = torch.randn(directions, D, generator=draw, dtype=torch.float64).to(samples.device)
    theta = theta / theta.norm(dim=1, keepdim=True)
    # In one dimension the best plan joins quantiles. Both are steps, of 1/N and 1/M: between two of all the steps'
    # ends both are constant.
    n, m = len(samples), len(real)
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # in units of 1 / (N M)
    weights = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    i, j = ((ends - 1) // m).to(theta.device), ((ends - 1) // n).to(theta.device)
    weights, distances = weights.to(theta.device), []
    for part in in_parts(theta.split(64), "sliced Wasserstein distance", "direction"):
        a, b = (part @ samples.T).sort(dim=1).values, (part @ real.T).sort(dim=1).values  # [64, N], [64, M]
        distances.append((a[:, i] - b[:, j]).square() @ weights)
    return mean_estimate(D * torch.cat(distances))


def authentic_share(samples: Tensor, train: Tensor, radii: Tensor | None = None) -> Estimate:
    """Compute which share of `samples` `[M, D]` is authentic (AuthPct, Alaa et al. 2022), beside `train` `[N, D]`.

    A sample is authentic if it is farther from its nearest training image than that is from the nearest other one;
    `radii` are these squared distances, `[N]`, where they are known.
    """
    samples, train = checked("authenticity", 2, samples, train)
    radii = nearest_others(train, 1)[:, 0] if radii is None else radii
    distances, nearest = nearest_neighbours(samples, train)
    return share(distances[:, 0] > radii[nearest[:, 0]])
