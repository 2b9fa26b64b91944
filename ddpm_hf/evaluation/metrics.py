"""From features of images to the numbers of the paper's tables: float64 mathematics, whatever made the features.

torch-fidelity computes distances in float32, and loses digits where covariances are singular; its protocols (subsets,
seeds, parts, neighbourhoods) are kept. Features that are not finite, of two sizes or too few raise a UserError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError

ROWS = 1024  # whose distances are in memory at a time: 1024 x 50,000 in float64 take 0.4 GB
_ROUNDING = 1e-12  # how far a squared distance from a matrix product may be off, as a share of the squared norms


class Estimate(NamedTuple):
    """A number and its standard error (NaN where that is not known)."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class FrechetStatistics:
    """The Gaussian that is fitted to the features of `count` images."""

    mean: Tensor  # [D] float64
    # [R, D] float64, R <= D: F with F^T F the unbiased covariance, which itself would lose half of the digits of its
    # small eigenvalues
    factor: Tensor
    count: int


def mean_estimate(values: Tensor) -> Estimate:
    """Return the mean of `values`, `[N]`, and its standard error, which is NaN for one value."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


def checked(what: str, at_least: int, *sets: Tensor) -> list[Tensor]:
    """Return sets of features, `[at least so many, D]`, in float64."""
    for features in sets:
        if features.ndim != 2:
            raise UserError(f"{what} takes features [N, D], got shape {tuple(features.shape)}")
        if len(features) < at_least:
            raise UserError(f"{what} needs at least {at_least} images, got {len(features)}")
        if not features.isfinite().all():
            raise UserError(f"{what} got features that are not finite numbers")
    _check_same_size(sets[0], sets[-1])
    return [features.double() for features in sets]


def _check_same_size(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        sizes = f"{a.shape[-1]} and {b.shape[-1]}"
        raise UserError(f"the features of the two sets differ in size, {sizes}: they are of different extractors")


def frechet_statistics(features: Tensor) -> FrechetStatistics:
    """Compute mean and covariance of `features`, `[N, D]` with N >= 2."""
    (x,) = checked("the Frechet distance", 2, features)
    mean = x.mean(0)
    factor = (x - mean) / math.sqrt(len(x) - 1)
    if len(x) > x.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return FrechetStatistics(mean, factor, len(x))


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """Compute the squared Frechet distance of two Gaussians; on Inception features the FID (Heusel et al. 2017)."""
    _check_same_size(a.mean, b.mean)
    # |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). With S = F^T F, the eigenvalues of S_a S_b are the squared
    # singular values of F_a F_b^T, which are exact for singular covariances too.
    root = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    traces = a.factor.square().sum() + b.factor.square().sum()
    return ((a.mean - b.mean).square().sum() + traces - 2 * root).item()


def leaving_out(features: Tensor, groups: int = 10) -> Iterator[Tensor]:
    """Yield all features `[N, D]`, then all but each tenth of them, for `jackknife`; only the first if N < 20."""
    yield features
    group = torch.arange(len(features), device=features.device) % groups
    for g in range(groups if len(features) >= 2 * groups else 0):
        yield features[group != g]


def jackknife(values: Sequence[float]) -> tuple[Estimate, float]:
    """Estimate a number's error, and its bias of order 1/N; both are NaN without parts.

    `values` is the number from all images, then without each of the equal parts (see `leaving_out`).
    """
    value, parts, g = values[0], torch.tensor(values[1:], dtype=torch.float64), len(values) - 1
    if not g:
        return Estimate(value, math.nan), math.nan
    spread = (parts - parts.mean()).square().sum().item()
    return Estimate(value, math.sqrt((g - 1) / g * spread)), (g - 1) * (parts.mean().item() - value)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[Estimate, float]:
    """Compute exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016), averaged over `splits` parts of the samples.

    As in the official code: `logits` `[N, classes]` without biases, and (unlike torch-fidelity) without shuffling.
    Returns the score, and the standard deviation over the parts, which is what papers print after +-.
    """
    (x,) = checked("the Inception score", splits, logits)
    log_p = x.log_softmax(1)
    scores: list[float] = []
    for i in range(splits):
        part = log_p[i * len(x) // splits : (i + 1) * len(x) // splits]
        log_marginal = part.exp().mean(0).log()
        # A class that no image of the part has any probability of adds nothing: 0 log 0 = 0.
        terms = torch.where(part.exp() > 0, part.exp() * (part - log_marginal), 0.0)
        scores.append(terms.sum(1).mean().exp().item())
    deviation = float(np.std(scores))
    return Estimate(float(np.mean(scores)), deviation / math.sqrt(splits)), deviation


def kernel_distance(
    samples: Tensor, real: Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 2020
) -> tuple[Estimate, int]:
    """Compute the unbiased squared MMD of the kernel (x.y / D + 1)^3; on Inception features the KID.

    Binkowski et al. 2018; the mean over random subsets of `samples` `[N, D]` and `real` `[M, D]`, drawn as
    torch-fidelity draws them: of 1000 images, or half of the smaller set if that is less. Returns the distance, and
    the subsets' size.
    """
    samples, real = checked("KID", 4, samples, real)
    n = min(len(samples), len(real))
    m = min(1000, n // 2) if subset_size is None else subset_size
    if not 2 <= m <= n:
        raise UserError(f"KID subsets of {m} images need between 2 and {n}, the size of the smaller set")
    draw = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x, y = (s[torch.from_numpy(draw.choice(len(s), m, replace=False)).to(s.device)] for s in (samples, real))
        distances.append(_unbiased_mmd2(x, y))
    # The variance over subsets drawn without replacement is (1 - m/n) of that over new images, and the mean over many
    # subsets has m/n of that.
    error = float(np.std(distances)) * math.sqrt(m / (n - m)) if m < n else math.nan
    return Estimate(float(np.mean(distances)), error), m


def _unbiased_mmd2(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m = len(x)
    k_xx, k_yy = kernel(x, x), kernel(y, y)
    within = k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()
    return (within / (m * (m - 1)) - 2 * kernel(x, y).mean()).item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return `[N, M]`, off by at most `_ROUNDING` of the squared norms, so a copy is not always at distance 0."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_min(0)


def precision_recall(samples: Tensor, real: Tensor, k: int = 3) -> tuple[Estimate, Estimate]:
    """Compute improved precision and recall (Kynkaanniemi et al. 2019) of `samples` `[N, D]` and `real` `[M, D]`.

    Precision: the share of samples within the k-th neighbour's distance of any real image; recall: the reverse.
    """
    samples, real = checked("precision and recall", k + 1, samples, real)
    return _within_radius(samples, real, radii(real, k)), _within_radius(real, samples, radii(samples, k))


def radii(features: Tensor, k: int) -> Tensor:
    """Return `[N]`: squared distance to the k-th nearest other one."""
    shifted, parts = features - features.mean(0), []
    for rows in torch.arange(len(features), device=features.device).split(ROWS):
        distances = squared_distances(shifted[rows], shifted)
        distances[torch.arange(len(rows)), rows] = math.inf  # not itself
        nearest = features[distances.kthvalue(k, dim=1).indices]
        parts.append((features[rows] - nearest).square().sum(1))  # by differences: a copy's is 0
    return torch.cat(parts)


def _within_radius(points: Tensor, centres: Tensor, radii: Tensor) -> Estimate:
    """Return the share of points that lie in the ball around any of the centres, with its binomial error.

    `<=` as in Eq. 1 and the code of Kynkaanniemi et al.: a copy of an image that is there several times is inside.
    """
    origin = centres.mean(0)  # distances are the same, and lose fewer digits
    others = centres - origin
    norms, found = others.square().sum(1), []
    for part in points.split(ROWS):
        shifted = part - origin
        beyond = squared_distances(shifted, others) - radii
        error = _ROUNDING * (shifted.square().sum(1)[:, None] + norms)
        inside = (beyond < -error).any(1)
        close = (beyond <= error) & ~inside[:, None]  # what rounding decides is computed by differences
        for row in close.any(1).nonzero().flatten().tolist():
            near = close[row].nonzero().flatten().split(ROWS)
            inside[row] = any(((part[row] - centres[i]).square().sum(1) <= radii[i]).any() for i in near)
        found.append(inside)
    share = torch.cat(found).double().mean().item()
    return Estimate(share, math.sqrt(share * (1 - share) / len(points)))


def nearest_neighbours(queries: Tensor, candidates: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Return distances (float64, ascending) and indices `[N, k]` of each query's nearest `candidates`."""
    queries, candidates = checked("neighbours", 1, queries, candidates)
    checked("neighbours", k, candidates)
    found = [squared_distances(part, candidates).topk(k, largest=False) for part in queries.split(ROWS)]
    indices = torch.cat([part.indices for part in found])
    # Those few again by differences, which do not cancel: a copy is at distance 0.
    distances = torch.stack([(queries - candidates[indices[:, j]]).norm(dim=1) for j in range(k)], dim=1)
    return distances, indices


def memorisation(samples: Tensor, held_out: Tensor) -> Estimate:
    """Estimate how likely a sample is closer to its nearest training image than a held-out image is, ties half.

    From these distances, `[N]` and `[M]`. It is 1/2 if samples are as new as held-out images, and near 1 if training
    images are repeated.
    """
    if not len(samples) or not len(held_out):
        raise UserError(f"memorisation compares samples with held-out images, got {len(samples)} and {len(held_out)}")
    # The Mann-Whitney statistic: [N, M], 1 where the sample is closer, 1/2 where both are as close.
    wins = (samples[:, None] < held_out).double() + (samples[:, None] == held_out) / 2
    by_sample, by_held_out, error = wins.mean(1), wins.mean(0), math.nan
    if min(wins.shape) > 1:  # DeLong et al. 1988
        error = math.sqrt(by_sample.var().item() / len(samples) + by_held_out.var().item() / len(held_out))
    return Estimate(by_sample.mean().item(), error)
