"""The variances beta_t, and every number that follows from them: coefficients of q, the posterior and p.

Float64 tables, cast where they are used. Equation numbers are those of Ho et al. 2020; timesteps count from 0.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.text import nearest

# Schedules that stock implements, and those that only the official code has (stored as `trained_betas`).
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
OFFICIAL_SCHEDULES = ("quad", "const", "jsd", "warmup10", "warmup50")


def check_choice(name: str, value: Any, known: Sequence[str], otherwise: str = "") -> None:
    """Raise a `ValueError` where a setting is not one of those known; it names the nearest, and what else there is."""
    if value not in known:
        wanted = f"it must be one of {', '.join(known)}{otherwise}"
        raise UserError(f"unknown {name} {value!r}{nearest(str(value), known)}; {wanted}")


def is_number(value: Any) -> bool:
    """Return whether a setting is one real number, of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def make_betas(beta_schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """Return the variances beta_t of the forward process, float64 `[T]`.

    Args:
        beta_schedule: `linear` (the paper), `quad`, `const`, `jsd`, `warmup10`, `warmup50` (also in the official
            code), `scaled_linear`, `squaredcos_cap_v2`, `laplace`, `sigmoid` (stock diffusers').
        num_train_timesteps: T.
        beta_start, beta_end: The first and last beta where the schedule has a choice.
    """
    T = num_train_timesteps
    check_choice("beta_schedule", beta_schedule, STOCK_SCHEDULES + OFFICIAL_SCHEDULES, ", or give trained_betas")
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        # Below 0, sqrt would give a complex number, whose real part numpy takes for beta.
        if not is_number(value) or not 0 <= value < math.inf:
            raise UserError(f"{name} must be a number between 0 and 1, got {value!r}; the paper's are 1e-4 and 0.02")
    beta_start, beta_end = float(beta_start), float(beta_end)  # NumPy's float32 would make tables of its precision
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, T)
    if beta_schedule in ("quad", "scaled_linear"):
        return np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    if beta_schedule == "const":
        return np.full(T, beta_end, dtype=np.float64)
    if beta_schedule == "jsd":  # 1/T, 1/(T-1), ..., 1
        return 1.0 / np.linspace(T, 1, T)
    if beta_schedule in ("warmup10", "warmup50"):
        warmup = int(T * int(beta_schedule[-2:]) / 100)
        return np.append(np.linspace(beta_start, beta_end, warmup), np.full(T - warmup, beta_end, dtype=np.float64))
    if beta_schedule == "sigmoid":
        return 1.0 / (1.0 + np.exp(-np.linspace(-6, 6, T))) * (beta_end - beta_start) + beta_start
    u = np.arange(T + 1, dtype=np.float64) / T
    if beta_schedule == "squaredcos_cap_v2":
        alpha_bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    else:
        log_snr = -0.5 * np.copysign(1.0, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
        alpha_bar = np.sqrt(np.exp(log_snr) / (1 + np.exp(log_snr)))
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift betas `[T]` so that alpha_bar_T is 0 (Lin et al. 2023, arXiv 2305.08891, Algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    if not root[-1] < root[0]:
        what = f"in which alpha_bar falls, but {len(betas)} timesteps keep it at {root[-1] ** 2:.9g}"
        advice = "use more or larger betas, or rescale_betas_zero_snr=False"
        raise UserError(f"rescale_betas_zero_snr needs a schedule {what}; {advice}")
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return betas_of("alphas_cumprod", root**2)


def tables_of(betas: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tables of a diffusers scheduler that follow from beta_t, by their names there; float64 `[T]` each."""
    return {"betas": betas, "alphas": 1.0 - betas, "alphas_cumprod": np.cumprod(1.0 - betas)}


def betas_of(name: str, table: np.ndarray) -> np.ndarray:
    """Return the beta_t to which one of those tables belongs: the inverse of `tables_of`."""
    if name == "betas":
        return table
    if name == "alphas":
        return 1.0 - table
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 - np.append(table[:1], table[1:] / table[:-1])  # alpha_t = alpha_bar_t / alpha_bar_{t-1}


def check_betas(betas: np.ndarray, may_end_at_1: bool = False) -> None:
    """Raise a `ValueError` where a beta does not lie strictly between 0 and 1.

    With `may_end_at_1` the last one may be 1: alpha_bar_T = 0, nothing is left of the image.
    """
    outside = ~((betas > 0) & (betas < 1))
    outside[-1] &= not (may_end_at_1 and betas[-1] == 1)
    if outside.any():
        t = int(outside.argmax())
        paper = "the paper's schedule is beta_schedule='linear' with beta_start=1e-4 and beta_end=0.02"
        raise UserError(f"betas must lie strictly between 0 and 1, got {float(betas[t])!r} at t={t}; {paper}")


class Chain:
    """Coefficients of one reverse chain over the timesteps `t_1 > t_2 > ...`, the last of which steps to the data.

    Row t of `table` (float64 `[T, len(columns)]`) holds the numbers for the step from t to the chain's next timestep;
    other rows are NaN. Over all timesteps this is the paper's process, over fewer the DDPM whose alpha_bar are those
    of the subsequence (Nichol & Dhariwal 2021, Section 4). `prediction_error`, `[T]`, is E (x_0 - predicted x_0)^2 per
    pixel, for the optimal variance.
    """

    def __init__(self, betas: np.ndarray, timesteps: np.ndarray, prediction_error: np.ndarray | None = None):
        T, t = len(betas), np.asarray(timesteps, dtype=np.int64)
        self.alpha_bar = alpha_bar = np.cumprod(1.0 - betas)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # 1 - alpha_bar and 1 - alpha by way of logarithms: a difference of numbers close to 1 has lost digits (at
            # beta = 1e-4 the last 4 of 16), a ratio of alpha_bar that underflowed has none left.
            log_alpha_bar = np.cumsum(np.log1p(-betas))
            log_a_bar, log_a_bar_prev = log_alpha_bar[t], np.append(log_alpha_bar[t[1:]], 0.0)
            a_bar, a_bar_prev = alpha_bar[t], np.append(alpha_bar[t[1:]], 1.0)
            rest, rest_prev = -np.expm1(log_a_bar), -np.expm1(log_a_bar_prev)  # 1 - alpha_bar
            beta = betas[t] if len(t) == T else -np.expm1(log_a_bar - log_a_bar_prev)

            beta_tilde = beta * rest_prev / rest
            c_0 = beta * np.sqrt(a_bar_prev) / rest
            c_t = rest_prev * np.sqrt(1.0 - beta) / rest
            # A network that predicts mu_tilde was trained on the step from t to t - 1, whatever the chain's next step.
            one_before = np.where(t > 0, log_alpha_bar[t - 1], 0.0)
            trained_c_0 = betas[t] * np.exp(0.5 * one_before) / rest
            trained_c_t = -np.expm1(one_before) * np.sqrt(1.0 - betas[t]) / rest
            # The step to the data has beta_tilde = 0. For the likelihood's sake the official code gives it its
            # neighbour's log-variance instead of log 0, whichever the fixed variance.
            last_variance = beta_tilde[-2] if len(t) > 1 else beta[-1]
            columns = {
                "sqrt_alpha_bar": np.sqrt(a_bar),  # q(x_t|x_0) mean, Eq. 4
                "sqrt_one_minus_alpha_bar": np.sqrt(rest),  # q(x_t|x_0) standard deviation, Eq. 4
                "log_one_minus_alpha_bar": np.where(a_bar < 0.5, np.log1p(-a_bar), np.log(rest)),
                # x_0 = from_x_t x_t + from_output output, where the output is epsilon (Eq. 15) or mu_tilde (Eq. 7)
                "epsilon_from_x_t": np.sqrt(1.0 / a_bar),
                "epsilon_from_output": -np.sqrt(rest / a_bar),
                "posterior_mean_from_x_t": -trained_c_t / trained_c_0,
                "posterior_mean_from_output": 1.0 / trained_c_0,
                "mean_from_x_0": c_0,  # mu_tilde = mean_from_x_0 x_0 + mean_from_x_t x_t, Eq. 7
                "mean_from_x_t": c_t,
                "beta_tilde": beta_tilde,  # Eq. 7
                "log_beta_tilde_clipped": np.log(np.append(beta_tilde[:-1], last_variance)),
                "log_beta": np.log(beta),
                "log_beta_clipped": np.log(np.append(beta[:-1], last_variance)),
                "has_previous": np.append(np.ones(len(t) - 1), 0.0),  # 0 for the step to the data: no noise
            }
            if prediction_error is not None:
                # What remains unknown of x_0 moves the posterior's mean, and adds to its variance (Bao et al. 2022,
                # Theorem 1, with the measured error of x_0 for the one that a perfect network would have).
                optimal = beta_tilde + c_0**2 * np.maximum(prediction_error[t], 1e-20)
                # When sampling, the last noise is at most one pixel value on average, as in their Appendix: it would
                # stay in the image.
                noise = optimal.copy()
                noise[-2:-1] = np.minimum(noise[-2:-1], (2 / 255) ** 2 * math.pi / 2)
                columns |= {"log_optimal": np.log(optimal), "log_optimal_noise": np.log(noise)}
        self.table = np.full((T, len(columns)), np.nan)
        self.table[t] = np.stack(list(columns.values()), axis=1)
        self.columns, self.timesteps, self.is_whole = tuple(columns), t, len(t) == T
        self.previous = dict(zip(t.tolist(), [*t[1:].tolist(), -1], strict=True))
        # Where alpha_bar vanishes nothing is left of x_0, and epsilon cannot give it back: float32 would overflow.
        self.undefined: dict[str, set[int]] = {}
        for kind in ("epsilon", "posterior_mean"):
            largest = np.maximum(*(np.abs(columns[f"{kind}_from_{x}"]) for x in ("x_t", "output")))
            self.undefined[kind] = set(t[~(largest < 1e30)].tolist())
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def check(self, t: int) -> None:
        """Raise a `ValueError` where t is not one of the chain's timesteps."""
        if not 0 <= t < len(self.table):
            raise UserError(f"t={t} is outside the schedule; timesteps count from 0 to {len(self.table) - 1}")
        if t not in self.previous:
            what = f"t={t} is not among the {len(self.previous)} timesteps of the sampling chain"
            advice = "pass a value of scheduler.timesteps, or put it there with set_timesteps(timesteps=[...])"
            raise UserError(f"{what}; {advice}")

    def row(self, t: int) -> dict[str, float]:
        """Return all columns at one t, as Python numbers."""
        return dict(zip(self.columns, self.table[t].tolist(), strict=True))

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the table on a device, copied there once."""
        if (table := self._on_device.get(key := (device, dtype))) is None:
            table = torch.from_numpy(self.table).to(dtype).to(device)  # cast first: not every device has float64
            if not torch.compiler.is_compiling():  # what a compiled graph makes lives in the graph's memory
                self._on_device[key] = table
        return table

    def gather(self, t: Tensor, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all columns at `t` (`[B]` or `[1]`), each `[B, 1, ..., 1]` to broadcast with `like`."""
        rows = self.on(like.device, dtype)[t.to(device=like.device, dtype=torch.int64)]
        rows = rows.view(-1, *[1] * (like.ndim - 1), len(self.columns))
        return dict(zip(self.columns, rows.unbind(-1), strict=True))
