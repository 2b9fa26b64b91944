"""The variational bound on -log p(x_0) in bits/dim: L_T, L_{t-1}, L_0 (Eq. 5), in full or from few evaluations."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import NotFiniteError, UserError
from ..utils.progress import progress_bar
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

        Beside `rmse[t]`, the curve of Figure 5 and Table 4, whose row of k reverse steps is column T - k.
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
    return _term_and_x_0(scheduler, model_output, x_0, x_t, t, clip_denoised, cdf)[0]


def _term_and_x_0(
    scheduler: DDPMScheduler, output: Tensor, x_0: Tensor, x_t: Tensor, t: int | Tensor, clip: bool, cdf: str
) -> tuple[Tensor, Tensor]:
    """Return the bound's term `[B]` and the predicted x_0."""
    q_mean, _, q_log_variance = scheduler.q_posterior(x_0, x_t, t)
    p_mean, _, p_log_variance, pred_x_0 = scheduler.p_mean_variance(output, t, x_t, clip_denoised=clip)
    t = torch.as_tensor(t, device=x_0.device)
    return bound_term(x_0, t, q_mean, q_log_variance, p_mean, p_log_variance, cdf), pred_x_0


def subsequence(scheduler: DDPMScheduler, timesteps: Sequence[int]) -> DDPMScheduler:
    """Return the chain over K falling `timesteps` as a process of K steps (Nichol & Dhariwal 2021, Section 4).

    Its step k is `sorted(timesteps)[k]` for the network; over all T it is `scheduler` itself. Timesteps that do not
    fall raise a `ValueError`, as does a network that predicts the mean of another step.
    """
    t = scheduler._falling(timesteps)[::-1]
    if len(t) == scheduler.config.num_train_timesteps:
        return scheduler
    if scheduler.config.prediction_type == "posterior_mean":
        raise UserError("a network that predicts the posterior's mean has a bound over all T steps only")
    # beta_k = 1 - alpha_bar_k / alpha_bar_{k-1}, by logarithms as in `Chain`
    betas = -np.expm1(np.diff(np.cumsum(np.log1p(-scheduler._betas))[t], prepend=0.0))
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    if (error := config.get("_prediction_error")) is not None:
        config["_prediction_error"] = [error[i] for i in t]
    changed = {"num_train_timesteps": len(t), "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    return DDPMScheduler.from_config({**config, **changed})


class _Bound:
    """The bound's terms of images `x_0`, each of which has a stream of random numbers of its own."""

    def __init__(self, unet: Any, scheduler: DDPMScheduler, x_0: Tensor, seed: int, options: dict[str, Any]):
        if not hasattr(scheduler, "p_mean_variance"):
            what = f"the bound needs ddpm_hf's DDPMScheduler, got {type(scheduler).__name__}"
            raise UserError(f"{what}; a distilled model has no likelihood")
        if x_0.ndim < 2 or not len(x_0):
            raise UserError(f"x_0 must hold at least one image, [N, C, H, W], got shape {tuple(x_0.shape)}")
        if not x_0.is_floating_point() or not x_0.abs().amax() <= 1 + 1e-4:
            got = f"{x_0.dtype} from {x_0.amin().item()} to {x_0.amax().item()}; for uint8 use x / 127.5 - 1"
            raise UserError(f"x_0 must be floating-point pixel values scaled to [-1, 1], got {got}")
        ids: Sequence[int] | None = options.pop("image_ids", None)
        self._ids = range(len(x_0)) if ids is None else ids
        if len(self._ids) != len(x_0):
            raise UserError(f"got {len(self._ids)} image_ids for {len(x_0)} images")
        chosen: Sequence[int] | None = options.pop("timesteps", None)
        self.scheduler = scheduler if chosen is None else subsequence(scheduler, chosen)
        self._timesteps = None if chosen is None else torch.tensor(sorted(chosen), device=x_0.device)
        self._unet, self._x_0, self._seed = unet, x_0, seed
        self._clip, self._cdf = options.pop("clip_denoised", True), options.pop("cdf", "tanh")
        self._model_kwargs = options

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
        """Yield the numbers of the images in each batch, and what their random numbers are drawn from."""
        if batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, got {batch_size}")
        for rows in torch.arange(len(self._x_0)).split(batch_size):
            yield rows, [derived_generator(self._seed, "bits_per_dim", self._ids[i]) for i in rows]

    def evaluate(self, rows: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms `[B]` and squared errors `[B]` of the predicted x_0, for these images and a draw of x_t."""
        n, x_0 = len(self._x_0), self._x_0[rows.to(self._x_0.device)]
        of_rows = {  # class labels, one value per image
            name: value[rows.to(value.device)]
            if isinstance(value, Tensor) and value.ndim and len(value) == n
            else value
            for name, value in self._model_kwargs.items()
        }
        t = t.to(x_0.device)
        x_t = self.scheduler.add_noise(x_0, noise.to(x_0), t)
        seen = t if self._timesteps is None else self._timesteps[t]
        dtype = getattr(self._unet, "dtype", x_t.dtype)  # a network in bf16; the bound's own arithmetic is x_0's
        output = infinite_to_nan(self._unet(x_t.to(dtype), seen, **of_rows).sample.to(x_0.dtype))
        term, pred_x_0 = _term_and_x_0(self.scheduler, output, x_0, x_t, t, self._clip, self._cdf)
        if not (finite := term.isfinite()).all():
            where = f"the bound's term at t={int(t.expand_as(term)[~finite][0])} is not finite"
            hint = ", float16 ends at 65504: use bfloat16 or float32" if dtype == torch.float16 else ""
            why = f"the network's output there, or one of its weights, is NaN or infinite{hint}"
            raise NotFiniteError(f"{where}: {why}")
        return term, mean_flat((pred_x_0 - x_0).square())


@torch.no_grad()
def bits_per_dim(
    unet: Any,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> LikelihoodResult:
    """Compute the whole bound: every one of the T terms for every image, T network evaluations per image.

    Args:
        unet: Called as `unet(x_t, t).sample` with a 0-d t; put it in evaluation mode.
        scheduler: Gives q, p and T.
        x_0: `[N, C, H, W]`, pixel values scaled to [-1, 1], on the network's device.
        batch_size: Images per network evaluation; any value gives the same draws.
        seed: Seed of the noise; image i has a stream of its own.
        progress: Show a progress bar.
        options: `image_ids`: the numbers that seed the images' streams, 0..N-1 by default; for a share of a larger
            set. `clip_denoised` (True), `cdf` ("tanh"): see `vb_terms_bpd`. `timesteps`: K of them, falling, for the
            bound of the chain over these (`subsequence`); it has K terms, which stand in T's place in the result. All
            others are handed on to `unet`, tensors of N values batch by batch.

    Raises:
        ValueError: No images, images outside [-1, 1], a batch size below 1.
        NotFiniteError: A term is NaN or infinite; says where.
    """
    bound, n = _Bound(unet, scheduler, x_0, seed, options), len(x_0)
    scheduler, T = bound.scheduler, bound.scheduler.config.num_train_timesteps
    terms, mse = torch.empty(n, T), torch.empty(n, T)
    with progress_bar(n, "bits/dim", show=progress) as bar:
        for rows, streams in bound.batches(batch_size):
            for t in range(T):
                noise = torch.stack([torch.randn(x_0.shape[1:], generator=g, dtype=x_0.dtype) for g in streams])
                term, error = bound.evaluate(rows, torch.tensor(t), noise)
                terms[rows, t], mse[rows, t] = term.float().cpu(), error.float().cpu()
                bar.update(len(rows) / T)
    prior = prior_bpd(scheduler, x_0).float().cpu()
    return LikelihoodResult(prior + terms.sum(1), prior, terms, mse)


def timestep_strata(num_train_timesteps: int, count: int) -> np.ndarray:
    """Return the edges `[count + 1]` of intervals that cover 0..T-1: single timesteps first, then growing ones."""
    # The terms at small t are the largest and differ most from one to the next.
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
    progress: bool = False,
    **options: Any,
) -> LikelihoodEstimate:
    """Estimate `bits_per_dim` without bias from `num_evaluations` network evaluations per image instead of T.

    The timesteps are cut into `num_evaluations / 2` intervals (`timestep_strata`). Two independent draws are made from
    each, and their difference gives the error of the estimate.

    Args:
        num_evaluations: K, even, 2..2T.
        unet, scheduler, x_0, batch_size, seed, progress, options: See `bits_per_dim`, which raises the same errors.
    """
    bound, n, K = _Bound(unet, scheduler, x_0, seed, options), len(x_0), num_evaluations
    scheduler, T = bound.scheduler, bound.scheduler.config.num_train_timesteps
    if not isinstance(K, int) or K not in range(2, 2 * T + 1, 2):
        raise UserError(f"--num_evaluations must be even and between 2 and {2 * T}, got {K}")
    edges = torch.from_numpy(timestep_strata(T, K // 2))
    low, width = edges[:-1], edges.diff()
    draws = torch.empty(n, 2, dtype=torch.float64)
    with progress_bar(n, "bits/dim, stratified", show=progress) as bar:
        for images, streams in bound.batches(min(batch_size, max(1, batch_size // K))):
            # [images, draws, strata], flattened: which t, which noise, and which image each evaluation is for.
            # In an interval of w timesteps t is uniform, so w times its term is an unbiased draw of their sum.
            uniform = torch.stack([torch.rand(2, len(low), generator=g, dtype=torch.float64) for g in streams])
            t = (low + (uniform * width).long()).flatten()
            noise = torch.cat([torch.randn(K, *x_0.shape[1:], generator=g, dtype=x_0.dtype) for g in streams])
            rows = images.repeat_interleave(K)
            terms = []
            for part in zip(rows.split(batch_size), t.split(batch_size), noise.split(batch_size), strict=True):
                terms.append(bound.evaluate(*part)[0].double().cpu())
                bar.update(len(part[0]) / K)
            draws[images] = (torch.cat(terms).view(len(images), 2, -1) * width).sum(2)
    prior = prior_bpd(scheduler, x_0).double().cpu()
    return LikelihoodEstimate(prior + draws.mean(1), prior, (draws[:, 0] - draws[:, 1]).square() / 4)
