"""What the tests compare with: the official implementation's outputs, and the paper's formulas written out again.

Nothing here uses the code under test. The formulas are in plain float64 numpy (or mpmath, where float64 is what is in
question), one number at a time, in the order of the paper rather than in a fast one.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import mpmath
import numpy as np
import torch
from safetensors.torch import load_file
from scipy import special

FIXTURES = Path(__file__).parent / "fixtures"

# ---------------------------------------------------------------------- the official implementation's outputs

# Our names for what the official code calls (eps, xstart, xprev) and (fixedlarge, fixedsmall).
PREDICTION_TYPE = {"eps": "epsilon", "xstart": "sample", "xprev": "posterior_mean"}
VARIANCE_TYPE = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
TIMESTEPS = {"0": [0, 1], "37": [37, 500], "998": [998, 999]}
CASES = [(mean, var, t) for mean in PREDICTION_TYPE for var in VARIANCE_TYPE for t in TIMESTEPS]

# The network that the official outputs were made with.
OFFICIAL_NETWORK = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


@cache
def _reference() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "official_reference.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def official(name: str) -> torch.Tensor:
    """A recorded array; images go from the official channels-last layout to ours."""
    array = torch.from_numpy(_reference()[name].copy())
    return array.permute(0, 3, 1, 2).contiguous() if array.ndim == 4 else array


def official_noise() -> torch.Tensor:
    """The noise that the official `p_sample` was given: the recorded one with its rows in reverse."""
    return torch.from_numpy(_reference()["noise"][:, ::-1].copy()).permute(0, 3, 1, 2).contiguous()


def our_key(name: str, levels: int) -> str:
    """The state-dict key of an official variable (`model/...`, without the average's suffix)."""
    parts = name.split("/")[1:]
    tail = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}[parts.pop()]
    where = parts[0]
    renamed = {
        "temb": "time_embedding",
        "dense0": "linear_1",
        "dense1": "linear_2",
        "norm_out": "conv_norm_out",
        "temb_proj": "time_emb_proj",
        "nin_shortcut": "conv_shortcut",
        "downsample": "downsamplers.0",
        "upsample": "upsamplers.0",
        "mid": "mid_block",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj_out": "to_out.0",
        "norm": "group_norm",
    }
    out = []
    for part in parts:
        if match := re.fullmatch(r"(down|up)_(\d+)", part):
            level = int(match[2])  # the official up blocks are named by level, ours count from the lowest level
            out.append(f"{match[1]}_blocks.{level if match[1] == 'down' else levels - 1 - level}")
        elif match := re.fullmatch(r"(block|attn)_(\d+)", part):
            kind = {"block": "resnets", "attn": "attentions"}[match[1]]
            out.append(f"{kind}.{int(match[2]) - (where == 'mid')}")  # in the middle they count from 1
        else:
            out.append(renamed.get(part, part))
    return ".".join([*out, tail])


def official_state_dict(ema: bool = True, levels: int = 2) -> dict[str, torch.Tensor]:
    """The official weights under our keys and in our layout; `ema=False` gives the raw, wrong ones."""
    suffix = "/ExponentialMovingAverage"
    state = {}
    for name, value in load_file(FIXTURES / "official_weights.safetensors").items():
        if name == "global_step" or name.endswith(suffix) != ema:
            continue
        key = our_key(name.removesuffix(suffix), levels)
        if value.ndim == 4:
            value = value.permute(3, 2, 0, 1)  # height, width, in, out -> out, in, height, width
        elif value.ndim == 2:
            value = value.T  # in, out -> out, in
            if key.endswith("conv_shortcut.weight"):
                value = value[:, :, None, None]
        state[key] = value.contiguous()
    return state


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error anywhere, relative to the largest expected value of the same image."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    return ((actual - expected).abs().amax(1) / expected.abs().amax(1)).max().item()


def official_kl_rounding(prefix: str, timesteps: torch.Tensor) -> torch.Tensor:
    """How far the recorded KL terms may be off by the official code's own float32 arithmetic, bits/dim, `[B]`.

    It computes `-1 + logvar2 - logvar1 + exp(...) + ...` from left to right. The first sum is a number around -5 or
    -11, rounded to the nearest float32, and all pixels of an image get the same rounding, as their log-variances are
    equal. At large t, where the whole term is a millionth of a bit, that is up to a third of it.
    (`test_likelihood.py` reproduces the recorded digits this way.) The decoder's term at t = 0 has no such sum.
    Beside it the roundings of the two means, 1e-7 of gaps of 1e-4 over a variance of 0.02, averaged over 192 pixels.
    """
    log_variance = official(prefix + "logvar")[:, 0, 0, 0].numpy()
    half_ulp = np.spacing(np.abs(log_variance - 1).astype(np.float32)) / 2
    return torch.where(timesteps == 0, 0.0, torch.from_numpy(half_ulp) / 2 / math.log(2) + 2e-10)


# ---------------------------------------------------------------------- the paper's process, one t at a time


def exact_alpha_bar(betas: np.ndarray) -> list[mpmath.mpf]:
    """alpha_bar_t = prod (1 - beta_s) with 50 digits, from the float64 betas taken as exact."""
    with mpmath.workdps(50):
        product, out = mpmath.mpf(1), []
        for beta in betas:
            product *= 1 - mpmath.mpf(float(beta))
            out.append(product)
        return out


def exact_coefficients(betas: np.ndarray, t: int, s: int) -> dict[str, float]:
    """Eqs. 4, 6, 7 and 15 for the step from t to s < t (s = -1: the data), with 50 digits, rounded to float64."""
    with mpmath.workdps(50):
        alpha_bar = exact_alpha_bar(betas[: t + 1])
        a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else mpmath.mpf(1)
        alpha = a_t / a_s
        beta = 1 - alpha
        return {
            "sqrt_alpha_bar": float(mpmath.sqrt(a_t)),
            "sqrt_one_minus_alpha_bar": float(mpmath.sqrt(1 - a_t)),
            "log_one_minus_alpha_bar": float(mpmath.log(1 - a_t)),
            "beta": float(beta),
            "beta_tilde": float((1 - a_s) / (1 - a_t) * beta),
            "mean_from_x_0": float(mpmath.sqrt(a_s) * beta / (1 - a_t)),
            "mean_from_x_t": float(mpmath.sqrt(alpha) * (1 - a_s) / (1 - a_t)),
            "x_0_from_x_t": float(1 / mpmath.sqrt(a_t)),
            "x_0_from_eps": float(-mpmath.sqrt(1 / a_t - 1)),
        }


def posterior_on_a_grid(
    betas: np.ndarray, t: int, x_0: float, x_t: float, s: int | None = None
) -> tuple[float, float]:
    """Mean and variance of q(x_s|x_t,x_0) by Bayes' rule on a fine 1-D grid: q(x_t|x_s) q(x_s|x_0), normalised.

    The two factors are the forward process as the paper defines it (Eqs. 2 and 4), multiplied up step by step.
    """
    s = t - 1 if s is None else s
    a_s = np.prod(1 - betas[: s + 1])
    alpha = np.prod(1 - betas[s + 1 : t + 1])
    # The posterior lies between the centres of q(x_s|x_0) and of the likelihood, and is no wider than the narrower.
    width = min(np.sqrt(1 - a_s), np.sqrt((1 - alpha) / alpha))
    centres = np.sqrt(a_s) * x_0, x_t / np.sqrt(alpha)
    grid = np.arange(min(centres) - 12 * width, max(centres) + 12 * width, width / 1000)
    log_density = -0.5 * (grid - np.sqrt(a_s) * x_0) ** 2 / (1 - a_s)
    log_density -= 0.5 * (x_t - np.sqrt(alpha) * grid) ** 2 / (1 - alpha)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    mean = float((weight * grid).sum())
    return mean, float((weight * (grid - mean) ** 2).sum())


# ---------------------------------------------------------------------- Gaussian data: everything is known


class GaussianData:
    """x_0 ~ N(mean, std^2), independent pixels: the marginals and the best predictions are Gaussian and linear."""

    def __init__(self, mean: float, std: float, betas: np.ndarray):
        self.mean, self.std = mean, std
        self.alpha_bar = np.array([float(a) for a in exact_alpha_bar(betas)])

    def marginal(self, t: int) -> tuple[float, float]:
        """Mean and variance of q(x_t)."""
        a = self.alpha_bar[t]
        return math.sqrt(a) * self.mean, a * self.std**2 + 1 - a

    def expected_noise(self, t: int) -> tuple[float, float]:
        """(slope, offset) of E[epsilon|x_t] = slope x_t + offset."""
        mean, variance = self.marginal(t)
        slope = math.sqrt(1 - self.alpha_bar[t]) / variance  # cov(epsilon, x_t) / var(x_t)
        return slope, -slope * mean

    def expected_x_0(self, t: int) -> tuple[float, float]:
        """(slope, offset) of E[x_0|x_t]."""
        mean, variance = self.marginal(t)
        slope = math.sqrt(self.alpha_bar[t]) * self.std**2 / variance
        return slope, self.mean - slope * mean

    def reverse_variance(self, t: int, s: int) -> float:
        """Variance of x_s given x_t, for s < t: the best that a Gaussian reverse step can have."""
        covariance = math.sqrt(self.alpha_bar[t] / self.alpha_bar[s]) * self.marginal(s)[1]
        return self.marginal(s)[1] - covariance**2 / self.marginal(t)[1]

    def unknown_of_x_0(self, t: int) -> float:
        """Variance of x_0 given x_t."""
        return self.std**2 * (1 - self.alpha_bar[t]) / self.marginal(t)[1]

    def ddim(self, timesteps: list[int]) -> tuple[float, float]:
        """Mean and variance of what deterministic DDIM makes of N(0, 1) with the best epsilon, at the data."""
        gain, offset = 1.0, 0.0
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            a_s = self.alpha_bar[s] if s >= 0 else 1.0
            (x_slope, x_offset), (e_slope, e_offset) = self.expected_x_0(t), self.expected_noise(t)
            slope = math.sqrt(a_s) * x_slope + math.sqrt(1 - a_s) * e_slope
            gain, offset = slope * gain, slope * offset + math.sqrt(a_s) * x_offset + math.sqrt(1 - a_s) * e_offset
        return offset, gain**2

    def dpm_solver_2m(self, timesteps: list[int]) -> tuple[float, float]:
        """The same for DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), whose last step is the predicted x_0."""
        x, before, h_before = np.array([0.0, 1.0]), None, 0.0  # what becomes of 0 and of 1
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            slope, offset = self.expected_x_0(t)
            x_0 = slope * x + offset
            if s < 0:
                return float(x_0[0]), float((x_0[1] - x_0[0]) ** 2)
            alpha_t, alpha_s = math.sqrt(self.alpha_bar[t]), math.sqrt(self.alpha_bar[s])
            sigma_t, sigma_s = math.sqrt(1 - self.alpha_bar[t]), math.sqrt(1 - self.alpha_bar[s])
            h = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)
            extrapolated = x_0 if before is None else x_0 + (x_0 - before) * h / (2 * h_before)
            x = sigma_s / sigma_t * x - alpha_s * math.expm1(-h) * extrapolated
            before, h_before = x_0, h
        raise AssertionError("no timesteps")

    def exact_flow(self, timesteps: list[int]) -> tuple[float, float]:
        """The same for the exact solution of the probability flow from the first timestep to the last.

        The flow maps quantiles to quantiles, and the last step is the predicted x_0.
        """
        (m_0, v_0), (m_1, v_1) = self.marginal(timesteps[0]), self.marginal(timesteps[-1])
        slope, offset = self.expected_x_0(timesteps[-1])
        gain = math.sqrt(v_1 / v_0)
        return slope * (m_1 - gain * m_0) + offset, (slope * gain) ** 2

    def reverse_moments(self, timesteps: list[int], large: bool, optimal: bool = False) -> list[tuple[float, float]]:
        """Mean and variance of x after every step of the ancestral chain that predicts the best epsilon.

        The chain starts from N(0, 1) and walks `timesteps` down to the data, with the posterior of the subsequence
        (alpha_bar of its own timesteps only) and variance beta_tilde, or beta where `large`, or x_s's own variance
        given x_t where `optimal` (the last one limited as in Bao et al. 2022). No clipping. The step to the data adds
        no noise.
        """
        mean, variance, out = 0.0, 1.0, []
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            a_t, a_s = self.alpha_bar[t], self.alpha_bar[s] if s >= 0 else 1.0
            beta = 1 - a_t / a_s
            slope, offset = self.expected_x_0(t)
            from_x_0 = math.sqrt(a_s) * beta / (1 - a_t)
            from_x_t = math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
            gain = from_x_0 * slope + from_x_t
            mean = gain * mean + from_x_0 * offset
            noise = 0.0 if s < 0 else beta if large else beta * (1 - a_s) / (1 - a_t)
            if optimal and s >= 0:
                noise = self.reverse_variance(t, s)
                if s == timesteps[-1]:  # the last noise: E|noise| is at most one of 255 pixel values of [-1, 1]
                    noise = min(noise, (2 / 255 / math.sqrt(2 / math.pi)) ** 2)
            variance = gain**2 * variance + noise
            out.append((mean, variance))
        return out

    def expected_kl(self, t: int, betas: np.ndarray, large: bool) -> float:
        """E KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)) in nats per dimension, for the best prediction and t > 0.

        The posterior's and the model's mean differ by mean_from_x_0 (x_0 - E[x_0|x_t]), whose mean square is the
        conditional variance of x_0.
        """
        a_t, a_s = self.alpha_bar[t], self.alpha_bar[t - 1]
        q_variance = betas[t] * (1 - a_s) / (1 - a_t)
        p_variance = betas[t] if large else q_variance
        conditional = self.std**2 * (1 - a_t) / self.marginal(t)[1]
        from_x_0 = math.sqrt(a_s) * betas[t] / (1 - a_t)
        gap = from_x_0**2 * conditional
        return 0.5 * (math.log(p_variance / q_variance) - 1 + q_variance / p_variance + gap / p_variance)

    def prior_kl(self) -> float:
        """E KL(q(x_T|x_0) || N(0, 1)) in nats per dimension."""
        a = self.alpha_bar[-1]
        return 0.5 * (-math.log(1 - a) - 1 + (1 - a) + a * (self.mean**2 + self.std**2))


# ---------------------------------------------------------------------- Eq. 13 and the bound, in numpy

PIXEL_VALUES = np.arange(256) / 127.5 - 1


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return special.ndtr(x)


def tanh_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def decoder_log_likelihood(x_0: np.ndarray, mean: np.ndarray, log_std: np.ndarray, cdf) -> np.ndarray:
    """Eq. 13, pixel by pixel: the integral from delta_- to delta_+."""
    x_0, mean, log_std = np.broadcast_arrays(x_0, mean, log_std)
    out = np.empty(x_0.shape)
    for index in np.ndindex(x_0.shape):
        upper = np.inf if x_0[index] > 0.999 else x_0[index] + 1 / 255
        lower = -np.inf if x_0[index] < -0.999 else x_0[index] - 1 / 255
        std = np.exp(log_std[index])
        high = cdf((upper - mean[index]) / std) if np.isfinite(upper) else 1.0
        low = cdf((lower - mean[index]) / std) if np.isfinite(lower) else 0.0
        out[index] = np.log(max(high - low, 1e-12))
    return out


def slow_bits_per_dim(predict_x_0, betas: np.ndarray, x_0: np.ndarray, noise: np.ndarray, large: bool, clip: bool):
    """The whole bound of every image in float64, term by term: `(total [B], prior [B], terms [B, T], mse [B, T])`.

    Args:
        predict_x_0: `(x_t, t) -> x_0`, numpy in and out.
        noise: `[T, *x_0.shape]`, the epsilon of each x_t.
    """
    batch, T = len(x_0), len(betas)
    alpha_bar = np.cumprod(1 - betas)
    terms, mse = np.zeros((batch, T)), np.zeros((batch, T))
    for t in range(T):
        a, a_before = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
        x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * noise[t]
        guess = predict_x_0(x_t, t)
        guess = np.clip(guess, -1, 1) if clip else guess

        def posterior_mean(x, x_t=x_t, a=a, a_before=a_before, beta=betas[t]):
            return (np.sqrt(a_before) * beta * x + np.sqrt(1 - beta) * (1 - a_before) * x_t) / (1 - a)

        neighbour = max(t, 1)  # the official code's variance at t = 0
        a_n, a_n_before = alpha_bar[neighbour], alpha_bar[neighbour - 1]
        beta_tilde = betas[neighbour] * (1 - a_n_before) / (1 - a_n)
        p_variance = betas[t] if large and t else beta_tilde
        for image in range(batch):
            p_mean, q_mean = posterior_mean(guess)[image], posterior_mean(x_0)[image]
            if t == 0:
                log_std = np.full(p_mean.shape, 0.5 * np.log(p_variance))
                nats = -decoder_log_likelihood(x_0[image], p_mean, log_std, tanh_cdf).mean()
            else:
                gap = ((q_mean - p_mean) ** 2).mean()
                nats = 0.5 * (np.log(p_variance / beta_tilde) - 1 + (beta_tilde + gap) / p_variance)
            terms[image, t] = nats / np.log(2)
            mse[image, t] = ((guess[image] - x_0[image]) ** 2).mean()
    a = alpha_bar[-1]
    squares = (x_0**2).reshape(batch, -1).mean(1)
    prior = 0.5 * (-np.log(1 - a) - 1 + (1 - a) + a * squares) / np.log(2)
    return prior + terms.sum(1), prior, terms, mse
