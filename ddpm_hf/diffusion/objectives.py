"""Training losses per image: L_simple (Eq. 14), the variational bound L (Eqs. 5, 12), and the hybrid of the two.

All take `(unet, scheduler, x_0, t, noise)` and return `[B]`, float32 at least. `unet` is called as
`unet(x_t, t, **model_kwargs).sample`; `x_0` is `[B, C, H, W]` in [-1, 1]; `t` is `[B]` (or one number), 0..T-1.
"""

from typing import Any

import torch
from torch import Tensor

from ..utils.errors import UserError
from .distributions import mean_flat
from .likelihood import vb_terms_bpd
from .scheduling_ddpm import LEARNED_VARIANCES, DDPMScheduler

# Nichol & Dhariwal 2021, Section 3.1: "L_hybrid = L_simple + lambda L_vlb", lambda = 0.001
HYBRID_WEIGHT = 0.001


def _predict(
    unet: Any, scheduler: DDPMScheduler, x_0: Tensor, t: Tensor, noise: Tensor, model_kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Draw x_t (Eq. 4) and evaluate the network there, in float32 at least whatever it runs in."""
    x_t = scheduler.add_noise(x_0, noise, t)
    output = unet(x_t, t, **model_kwargs).sample
    return x_t, output if output.dtype == torch.float64 else output.float()


def _squared_error(
    scheduler: DDPMScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    # Eq. 14: || epsilon - epsilon_theta(x_t, t) ||^2, per dimension
    prediction, _ = scheduler.split_output(model_output, x_t)
    return mean_flat((scheduler.get_target(x_0, noise, t) - prediction).square())


def simple_loss(
    unet: Any, scheduler: DDPMScheduler, x_0: Tensor, t: Tensor, noise: Tensor, **model_kwargs: Any
) -> Tensor:
    """Return L_simple (Eq. 14): the mean squared error of what is predicted, `[B]`; without a learned variance."""
    x_t, output = _predict(unet, scheduler, x_0, t, noise, model_kwargs)
    return _squared_error(scheduler, output, x_0, x_t, t, noise)


def variational_bound_loss(
    unet: Any, scheduler: DDPMScheduler, x_0: Tensor, t: Tensor, noise: Tensor, **model_kwargs: Any
) -> Tensor:
    """Return the bound's term at t (L_{t-1} of Eq. 5, or L_0 of Eq. 13 at t = 0), in bits/dim, `[B]`.

    The predicted x_0 is not clipped. T times the mean over uniform t, plus L_T, is the bound.
    """
    x_t, output = _predict(unet, scheduler, x_0, t, noise, model_kwargs)
    return vb_terms_bpd(scheduler, output, x_0, x_t, t, clip_denoised=False)


def hybrid_loss(
    unet: Any, scheduler: DDPMScheduler, x_0: Tensor, t: Tensor, noise: Tensor, **model_kwargs: Any
) -> Tensor:
    """Return L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021), `[B]`: the bound trains the learned variance only.

    L_vlb is T times the term at t in bits/dim, so that its mean over uniform t is the bound; the prediction's
    gradient is stopped in it. A variance that is not learned raises a `ValueError`.
    """
    if scheduler.variance_type not in LEARNED_VARIANCES:
        advice = "use variance_type='learned_range' with twice the output channels, or loss 'simple'"
        given = f"variance_type is {scheduler.variance_type!r}"
        raise UserError(f"the hybrid loss trains a learned variance, but {given}; {advice}")
    x_t, output = _predict(unet, scheduler, x_0, t, noise, model_kwargs)
    prediction, raw_variance = scheduler.split_output(output, x_t)
    assert raw_variance is not None
    frozen = torch.cat([prediction.detach(), raw_variance], dim=1)
    bound = scheduler.config.num_train_timesteps * vb_terms_bpd(scheduler, frozen, x_0, x_t, t, clip_denoised=False)
    return _squared_error(scheduler, output, x_0, x_t, t, noise) + HYBRID_WEIGHT * bound


OBJECTIVES: dict[str, Any] = {"simple": simple_loss, "vlb": variational_bound_loss, "hybrid": hybrid_loss}
