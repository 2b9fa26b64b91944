"""Gaussians in closed form: KL divergence, and the discretised decoder of Eq. 13. In nats, but for `bound_term`.

Sources: Ho et al. 2020, Eqs. 5 and 13; `utils.py` of the official code for the approximate normal CDF.
"""

import math

import torch
from torch import Tensor

from ..utils.errors import UserError

# Eq. 13's bins: 256 pixel values scaled to [-1, 1] lie 2/255 apart, so a bin reaches 1/255 to either side.
HALF_BIN = 1.0 / 255.0


def nats_to_bits(nats: Tensor) -> Tensor:
    """Convert nats to bits: division by ln 2."""
    return nats / math.log(2.0)


def mean_flat(x: Tensor) -> Tensor:
    """Return the mean over all but the first dimension: `[B, ...] -> [B]`."""
    return x.flatten(1).mean(1)


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """Return KL(N(mean_1, var_1) || N(mean_2, var_2)) of diagonal Gaussians, elementwise, in nats."""
    # KL = (log var_2 / var_1 - 1 + var_1 / var_2 + (mean_1 - mean_2)^2 / var_2) / 2
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (-ratio - 1.0 + torch.exp(ratio) + (mean_1 - mean_2).square() * torch.exp(-log_variance_2))


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Return the official code's tanh approximation of the standard normal CDF; within 2e-4 of the exact one."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor, cdf: str = "tanh") -> Tensor:
    """Return log p of 8-bit images under a Gaussian integrated over each pixel value's bin (Eq. 13), in nats.

    Args:
        x: Images whose values are 0..255 scaled to [-1, 1], any shape.
        means, log_scales: Means and log standard deviations in the same scale; all three broadcast.
        cdf: `"tanh"`: the official code's approximation with its floor of 1e-12 under each probability (the paper's
            numbers were made with it). `"exact"`: the exact CDF in log space, without a floor.
    """
    # Eq. 13: p(x) = Phi((x + 1/255 - mean) / scale) - Phi((x - 1/255 - mean) / scale); the first bin reaches to minus
    # infinity and the last to plus infinity, so the 256 probabilities sum to 1
    centered = x - means
    inv_scale = torch.exp(-log_scales)
    upper = inv_scale * (centered + HALF_BIN)
    lower = inv_scale * (centered - HALF_BIN)
    lowest, highest = x < -0.999, x > 0.999
    if cdf == "tanh":
        cdf_upper, cdf_lower = approximate_normal_cdf(upper), approximate_normal_cdf(lower)
        probability = torch.where(lowest, cdf_upper, torch.where(highest, 1.0 - cdf_lower, cdf_upper - cdf_lower))
        return torch.log(probability.clamp_min(1e-12))
    if cdf == "exact":
        # By symmetry Phi(b) - Phi(a) = Phi(-a) - Phi(-b): mirror bins right of the mean into the left tail, where
        # log Phi keeps its precision, then log(e^u - e^l) = u + log1p(-e^(l - u)).
        right = centered > 0
        near = torch.special.log_ndtr(torch.where(right, -lower, upper))
        far = torch.special.log_ndtr(torch.where(right, -upper, lower))
        inside = near + torch.log(-torch.expm1((far - near).clamp_max(-torch.finfo(near.dtype).tiny)))
        above = torch.where(highest, torch.special.log_ndtr(-lower), inside)
        return torch.where(lowest, torch.special.log_ndtr(upper), above)
    raise UserError(f"cdf must be 'tanh' (the official code's) or 'exact', got {cdf!r}")


def bound_term(
    x_0: Tensor, t: Tensor, q_mean: Tensor, q_log_var: Tensor, p_mean: Tensor, p_log_var: Tensor, cdf: str = "tanh"
) -> Tensor:
    """Return one term of the bound per image, `[B]` in bits/dim: L_{t-1} (Eq. 5), or L_0 where `t == 0` (Eq. 13).

    Args:
        x_0: `[B, C, H, W]` in [-1, 1].
        t: 0-d or `[B]`, counted from 0 as in the code (the paper's t is one more).
        q_mean, q_log_var: The posterior q(x_{t-1} | x_t, x_0); broadcast with `x_0`.
        p_mean, p_log_var: The model's p(x_{t-1} | x_t); broadcast with `x_0`.
        cdf: See `discretized_gaussian_log_likelihood`.
    """

    def kl() -> Tensor:
        return mean_flat(normal_kl(q_mean, q_log_var, p_mean, p_log_var).expand_as(x_0))

    def decoder_nll() -> Tensor:
        log_p = discretized_gaussian_log_likelihood(x_0, p_mean, 0.5 * p_log_var, cdf)
        return -mean_flat(log_p.expand_as(x_0))

    if t.ndim == 0 and t.device.type == "cpu":  # known here, so that only one of them is wanted
        return nats_to_bits(decoder_nll() if t == 0 else kl())
    return nats_to_bits(torch.where(t == 0, decoder_nll(), kl()))
