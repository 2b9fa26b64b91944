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
from ..utils.progress import in_parts
from .distances import centre, check_same_size, checked, nearest_others, within


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


def frechet_statistics(features: Tensor) -> FrechetStatistics:
    """Compute mean and covariance of `features`, `[N, D]` with N >= 2."""
    (x,) = checked("the Frechet distance", 2, features)
    mean, D = centre(x), x.shape[1]
    factor = mean.new_empty((0, D))
    # Some rows at a time: in float64 50,000 images of 3072 features, and the same for the decomposition, are 2.4 GB.
    for part in in_parts(x.split(max(1024, 2 * D)), "covariance"):
        factor = torch.cat([factor, (part.double() - mean) / math.sqrt(len(x) - 1)])
        if len(factor) > D:
            factor = torch.linalg.qr(factor, mode="r").R
    return FrechetStatistics(mean, factor, len(x))


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """Compute the squared Frechet distance of two Gaussians; on Inception features the FID (Heusel et al. 2017)."""
    check_same_size(a.mean, b.mean)
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
    log_p = x.double().log_softmax(1)
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
    for _ in in_parts([range(1)] * subsets, "kernel distance", "subset"):
        x, y = (s[torch.from_numpy(draw.choice(len(s), m, replace=False)).to(s.device)] for s in (samples, real))
        distances.append(_unbiased_mmd2(x.double(), y.double()))
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


def precision_recall(
    samples: Tensor, real: Tensor, k: int = 3, radii: tuple[Tensor, Tensor] | None = None
) -> tuple[Estimate, Estimate]:
    """Compute improved precision and recall (Kynkaanniemi et al. 2019) of `samples` `[N, D]` and `real` `[M, D]`.

    Precision: the share of samples within the k-th neighbour's distance of any real image; recall: the reverse. `<=`
    as in Eq. 1 and the authors' code: a copy of an image that is there several times is inside. `radii` are these
    squared distances of samples and of real images, `[N]` and `[M]`, where they are known.
    """
    samples, real = checked("precision and recall", k + 1, samples, real)
    of_samples, of_real = radii or (nearest_others(x, k)[:, -1] for x in (samples, real))
    return share(within(samples, real, of_real)), share(within(real, samples, of_samples))


def share(found: Tensor) -> Estimate:
    """Return the share of true ones in `[N]` bool, with its binomial error."""
    value = found.double().mean().item()
    return Estimate(value, math.sqrt(value * (1 - value) / len(found)))


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
