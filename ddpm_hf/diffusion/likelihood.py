"""The variational bound on -log p(x_0) in bits/dim: L_T, L_{t-1}, L_0 (Eq. 5), in full or from few evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..utils.errors import NotFiniteError, UserError
from ..utils.randomness import derived_generator
from .distributions import bound_term, mean_flat, nats_to_bits, normal_kl
from .scheduling_ddpm import DDPMScheduler, infinite_to_nan


@dataclass
class LikelihoodResult:
    """The bound of every image, term by term (`calc_bpd_loop` of the official code), on the CPU."""

    total_bpd: Tensor  # [B], the bound in bits/dim: prior_bpd + terms_bpd.sum(1)
    prior_bpd: Tensor  # [B], L_T
    terms_bpd: Tensor  # [B, T], column t is the term at t: L_0 first, then L_1, ... L_{T-1}
    mse: Tensor  # [B, T], mean squared error of the predicted x_0 at t, in the [-1, 1] scale

    @property
    def rate_bpd(self) -> Tensor:
        """`[B]`: L_1 + ... + L_T, what the paper calls rate (Section 4.3)."""
        return self.prior_bpd + self.terms_bpd[:, 1:].sum(1)

    @property
    def distortion_bpd(self) -> Tensor:
        """`[B]`: L_0, what the paper calls distortion."""
        return self.terms_bpd[:, 0]

    @property
    def progressive_rate_bpd(self) -> Tensor:
        """`[T]`: the mean rate of a code that has sent x_t only, L_T + L_{T-1} + ... down to what x_t costs.

        Column t goes with `rmse[t]`, the error of decoding from that x_t: the curve of Figure 5 and Table 4, whose
        row of k reverse steps is column T - k.
        """
        later = self.terms_bpd.mean(0)[1:].flip(0).cumsum(0).flip(0)
        return self.prior_bpd.mean() + torch.cat([later, later.new_zeros(1)])

    @property
    def rmse(self) -> Tensor:
        """`[T]`: root mean squared error of the predicted x_0 at t, in pixel values of 0..255 (Table 4)."""
        return 127.5 * self.mse.mean(0).sqrt()


@dataclass
class LikelihoodEstimate:
    """An unbiased estimate of the bound from few network evaluations per image, on the CPU."""

    total_bpd: Tensor  # [B], each image's estimate, bits/dim
    prior_bpd: Tensor  # [B], L_T, exact
    sampling_variance: Tensor  # [B], an unbiased estimate of the variance of total_bpd over draws of t and noise

    @property
    def mean(self) -> float:
        """The mean over the images, bits/dim."""
        return self.total_bpd.mean().item()

    @property
    def sampling_standard_error(self) -> float:
        """How far `mean` is expected to lie from the full sum over the same images."""
        return math.sqrt(self.sampling_variance.sum().item()) / len(self.total_bpd)

    @property
    def standard_error(self) -> float:
        """How far `mean` is expected to lie from the mean over all images of their kind; NaN for one image."""
        n = len(self.total_bpd)
        return (self.total_bpd.std() / math.sqrt(n)).item() if n > 1 else math.nan


def prior_bpd(scheduler: DDPMScheduler, x_0: Tensor) -> Tensor:
    """Return L_T = KL(q(x_T|x_0) || N(0, I)) in bits/dim, `[B]`, for images `[B, C, H, W]` in [-1, 1]."""
    mean, _, log_variance = scheduler.q_mean_variance(x_0, scheduler.config.num_train_timesteps - 1)
    zero = torch.zeros((), dtype=mean.dtype, device=mean.device)
    return nats_to_bits(mean_flat(normal_kl(mean, log_variance, zero, zero)))


def vb_terms_bpd(
    scheduler: DDPMScheduler,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    clip_denoised: bool = True,
    cdf: str = "tanh",
) -> Tensor:
    """Return the bound's term at t: L_{t-1} (Eq. 5), or L_0 = -log p(x_0|x_1) (Eq. 13) at t = 0; `[B]`, bits/dim.

    Args:
        scheduler: Gives q and p.
        model_output: The network's output at `(x_t, t)`.
        x_0, x_t: `[B, C, H, W]`; `x_0` holds pixel values scaled to [-1, 1].
        t: int, 0-d or `[B]`.
        clip_denoised: Clip the predicted x_0 (evaluation does, training does not).
        cdf: `tanh` (the official code's) or `exact`, for L_0.
    """
    q_mean, _, q_log_variance = scheduler.q_posterior(x_0, x_t, t)
    p_mean, _, p_log_variance, _ = scheduler.p_mean_variance(model_output, t, x_t, clip_denoised=clip_denoised)
    t = torch.as_tensor(t, device=x_0.device)
    return bound_term(x_0, t, q_mean, q_log_variance, p_mean, p_log_variance, cdf)


def _evaluate(
    unet: Any,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    clip: bool,
    cdf: str,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return the bound's terms `[B]` and the squared errors `[B]` of the predicted x_0, for one draw of x_t."""
    x_t = scheduler.add_noise(x_0, noise.to(x_0), t)
    dtype = getattr(unet, "dtype", x_t.dtype)  # a network in bf16; the bound's own arithmetic is x_0's
    output = infinite_to_nan(unet(x_t.to(dtype), t, **model_kwargs).sample.to(x_0.dtype))
    q_mean, _, q_log_variance = scheduler.q_posterior(x_0, x_t, t)
    p_mean, _, p_log_variance, pred_x_0 = scheduler.p_mean_variance(output, t, x_t, clip_denoised=clip)
    term = bound_term(x_0, t, q_mean, q_log_variance, p_mean, p_log_variance, cdf)
    if not (finite := term.isfinite()).all():
        hint = ", float16 ends at 65504: use bfloat16 or float32" if dtype == torch.float16 else ""
        raise NotFiniteError(
            f"the bound's term at t={int(t.expand_as(term)[~finite][0])} is not finite: the network's output there, "
            f"or one of its weights, is NaN or infinite{hint}"
        )
    return term, mean_flat((pred_x_0 - x_0).square())


def _rows_of(model_kwargs: dict[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
    """Select the rows of keyword arguments with one value per image (class labels)."""
    return {
        name: value[rows.to(value.device)] if isinstance(value, Tensor) and value.ndim and len(value) == n else value
        for name, value in model_kwargs.items()
    }


def _check_images(x_0: Tensor, image_ids: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    """Return the numbers that seed the images' noise, after all checks of `bits_per_dim`."""
    if x_0.ndim < 2 or not len(x_0):
        raise UserError(f"x_0 must hold at least one image, [N, C, H, W], got shape {tuple(x_0.shape)}")
    if not x_0.is_floating_point() or not x_0.abs().amax() <= 1 + 1e-4:
        raise UserError(
            f"x_0 must be floating-point pixel values scaled to [-1, 1], got {x_0.dtype} from {x_0.amin().item()} to "
            f"{x_0.amax().item()}; for uint8 use x / 127.5 - 1"
        )
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    ids = range(len(x_0)) if image_ids is None else image_ids
    if len(ids) != len(x_0):
        raise UserError(f"got {len(ids)} image_ids for {len(x_0)} images")
    return ids


@torch.no_grad()
def bits_per_dim(
    unet: Any,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    *,
    batch_size: int = 64,
    seed: int = 0,
    image_ids: Sequence[int] | None = None,
    clip_denoised: bool = True,
    cdf: str = "tanh",
    progress: bool = False,
    **model_kwargs: Any,
) -> LikelihoodResult:
    """Compute the whole bound: every one of the T terms for every image, T network evaluations per image.

    Args:
        unet: Called as `unet(x_t, t).sample` with a 0-d t; put it in evaluation mode.
        scheduler: Gives q, p and T.
        x_0: `[N, C, H, W]`, pixel values scaled to [-1, 1], on the network's device.
        batch_size: Images per network evaluation; any value gives the same draws.
        seed: Seed of the noise; image i has a stream of its own.
        image_ids: The numbers that seed the images' streams, 0..N-1 by default; for a share of a larger set.
        clip_denoised, cdf: See `vb_terms_bpd`.
        progress: Show a progress bar.
        model_kwargs: Handed on to `unet`, tensors of N values batch by batch.

    Raises:
        ValueError: No images, images outside [-1, 1], a batch size below 1.
        NotFiniteError: A term is NaN or infinite; says where.
    """
    ids = _check_images(x_0, image_ids, batch_size)
    T, n = scheduler.config.num_train_timesteps, len(x_0)
    terms, mse = torch.empty(n, T), torch.empty(n, T)
    with tqdm(total=n * T, desc="bits/dim", unit="eval", disable=not progress) as bar:
        for rows in torch.arange(n).split(batch_size):
            batch, labels = x_0[rows[0] : rows[-1] + 1], _rows_of(model_kwargs, rows, n)
            streams = [derived_generator(seed, "bits_per_dim", ids[i]) for i in rows]
            for step in range(T):
                t = torch.tensor(step, device=batch.device)
                noise = torch.stack([torch.randn(batch.shape[1:], generator=g, dtype=x_0.dtype) for g in streams])
                term, error = _evaluate(unet, scheduler, batch, t, noise, clip_denoised, cdf, labels)
                terms[rows, step], mse[rows, step] = term.float().cpu(), error.float().cpu()
                bar.update(len(batch))
    prior = prior_bpd(scheduler, x_0).float().cpu()
    return LikelihoodResult(prior + terms.sum(1), prior, terms, mse)


def timestep_strata(num_train_timesteps: int, count: int) -> np.ndarray:
    """Return the edges `[count + 1]` of intervals that cover 0..T-1: single timesteps first, then growing ones.

    The terms at small t are the largest and differ most from one to the next, so they get intervals of their own.
    """
    T = num_train_timesteps
    if not 1 <= count <= T:
        raise UserError(f"the number of strata must be between 1 and T={T}, got {count}")
    edges = [0]
    for left in range(count, 1, -1):  # intervals still to place
        # The geometric growth that would just reach T with the intervals left, and at least one timestep each.
        grown = round(edges[-1] * (T / edges[-1]) ** (1 / left)) if edges[-1] else 1
        edges.append(min(max(grown, edges[-1] + 1), T - left + 1))
    return np.array([*edges, T])


@torch.no_grad()
def stratified_bits_per_dim(
    unet: Any,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    *,
    num_evaluations: int = 50,
    batch_size: int = 256,
    seed: int = 0,
    image_ids: Sequence[int] | None = None,
    clip_denoised: bool = True,
    cdf: str = "tanh",
    progress: bool = False,
    **model_kwargs: Any,
) -> LikelihoodEstimate:
    """Estimate `bits_per_dim` without bias from `num_evaluations` network evaluations per image instead of T.

    The timesteps are cut into `num_evaluations / 2` intervals (`timestep_strata`). Two independent draws are made from
    each, and their difference gives the error of the estimate. Image i draws from a stream of its own, so the result
    does not depend on `batch_size`.

    Args:
        num_evaluations: K, even, 2..2T.
        seed: Seed of all draws.
        unet, scheduler, x_0, batch_size, image_ids, clip_denoised, cdf, progress, model_kwargs: See `bits_per_dim`,
            which raises the same errors.
    """
    ids = _check_images(x_0, image_ids, batch_size)
    T, n, K = scheduler.config.num_train_timesteps, len(x_0), num_evaluations
    if not isinstance(K, int) or K not in range(2, 2 * T + 1, 2):
        raise UserError(f"num_evaluations must be even and between 2 and {2 * T}, got {K}")
    edges = torch.from_numpy(timestep_strata(T, K // 2))
    low, width = edges[:-1], edges.diff()
    draws = torch.empty(n, 2, dtype=torch.float64)
    with tqdm(total=n * K, desc="bits/dim, stratified", unit="eval", disable=not progress) as bar:
        for images in torch.arange(n).split(max(1, batch_size // K)):
            streams = [derived_generator(seed, "bits_per_dim", ids[i]) for i in images]
            # [images, draws, strata], flattened: which t, which noise, and which image each evaluation is for.
            # In an interval of w timesteps t is uniform, so w times its term is an unbiased draw of their sum.
            uniform = torch.stack([torch.rand(2, len(low), generator=g, dtype=torch.float64) for g in streams])
            t = (low + (uniform * width).long()).flatten()
            noise = torch.cat([torch.randn(K, *x_0.shape[1:], generator=g, dtype=x_0.dtype) for g in streams])
            rows = images.repeat_interleave(K)
            terms = []
            for part in torch.arange(len(t)).split(batch_size):
                batch, labels = x_0[rows[part].to(x_0.device)], _rows_of(model_kwargs, rows[part], n)
                t_part = t[part].to(x_0.device)
                term, _ = _evaluate(unet, scheduler, batch, t_part, noise[part], clip_denoised, cdf, labels)
                terms.append(term.double().cpu())
                bar.update(len(part))
            draws[images] = (torch.cat(terms).view(len(images), 2, -1) * width).sum(2)
    prior = prior_bpd(scheduler, x_0).double().cpu()
    return LikelihoodEstimate(prior + draws.mean(1), prior, (draws[:, 0] - draws[:, 1]).square() / 4)
