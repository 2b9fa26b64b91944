"""What is done to a network's output before a step: guidance by a second network, and epsilon scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import UserError


@dataclass(frozen=True)
class Adjustment:
    """How the network's output is changed at (x_t, t)."""

    guidance_scale: float = 1.0  # w of D_guide + w (D - D_guide), or of classifier-free guidance; 1: none
    guidance_interval: tuple[float, float] | None = None  # guided at these timesteps only, both included
    epsilon_scale: tuple[float, float] = (1.0, 0.0)  # b and k: eps is divided by lambda(t) = k t + b
    guide: Any = None  # the network of D_guide; `None`: the same network without its class

    @classmethod
    def checked(
        cls,
        T: int,
        guidance_scale: float = 1.0,
        guidance_interval: Any = None,
        epsilon_scale: Any = None,
        guide: Any = None,
    ) -> Adjustment:
        """Return that of a pipeline's arguments (see `DDPMPipeline.__call__`); a UserError for one out of range."""
        if not math.isfinite(guidance_scale):
            raise UserError(f"--guidance_scale must be a finite number, got {guidance_scale}")
        if guidance_interval is not None:
            if guidance_scale == 1:
                raise UserError("--guidance_interval goes with a --guidance_scale other than 1")
            guidance_interval = _two_numbers("--guidance_interval", "two timesteps LOW and HIGH", guidance_interval)
            low, high = guidance_interval
            if not 0 <= low <= min(high, T - 1):
                what = f"must be 0 <= LOW <= HIGH, with LOW below T = {T}"
                raise UserError(f"--guidance_interval {what}, got {low:g} and {high:g}")
        if epsilon_scale is None:
            return cls(guidance_scale, guidance_interval, guide=guide)
        if isinstance(epsilon_scale, int | float):
            epsilon_scale = (epsilon_scale, 0.0)
        b, k = _two_numbers("--epsilon_scale", "a number b, or b and k of lambda(t) = k t + b", epsilon_scale)
        if not min(b, b + k * (T - 1)) > 0:
            ends = f"{b:g} at t=0 and {b + k * (T - 1):g} at t={T - 1}"
            raise UserError(f"--epsilon_scale divides by k t + b, which must stay above 0, got {ends}")
        return cls(guidance_scale, guidance_interval, (b, k), guide)

    def guides(self, t: float) -> bool:
        """Return whether the step at t is guided."""
        low, high = self.guidance_interval or (-math.inf, math.inf)
        return self.guidance_scale != 1 and low <= t <= high

    @property
    def scales(self) -> bool:
        """Whether eps is divided by anything but 1."""
        return self.epsilon_scale != (1.0, 0.0)

    def scaled(self, output: Tensor, x_t: Tensor, t: Tensor, without_noise: Tensor | None) -> Tensor:
        """Return the output `[B, C or 2C, H, W]` whose epsilon is divided by lambda(t); the variance stays.

        Ning et al. 2024 (arXiv 2308.15321). `without_noise` is that of `output_without_noise`, on the device of x_t.
        """
        if not self.scales:
            return output
        b, k = self.epsilon_scale
        t, channels = t.reshape(-1, 1, 1, 1), x_t.shape[1]
        predicted = output[:, :channels]
        if without_noise is None:
            predicted = predicted / (b + k * t)
        else:
            at_0 = without_noise[t.long()] * x_t
            predicted = at_0 + (predicted - at_0) / (b + k * t)
        return torch.cat([predicted, output[:, channels:]], dim=1)


def _two_numbers(name: str, what: str, values: Any) -> tuple[float, float]:
    try:
        a, b = map(float, values)
    except (TypeError, ValueError):
        a = b = math.nan
    if not math.isfinite(a) or not math.isfinite(b):
        raise UserError(f"{name} must be {what}, got {values!r}")
    return a, b


def output_without_noise(scheduler: Any) -> Tensor | None:
    """Return what the network's output is at every t where its epsilon is 0, in units of x_t, `[T]` float32.

    Whatever it predicts is linear in its epsilon: it is that plus a multiple of epsilon. `None`: it is the epsilon.
    A UserError where x_t says nothing of x_0, so that no output has an epsilon of 0.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return None
    alpha_bar = torch.as_tensor(getattr(scheduler, "alpha_bar", scheduler.alphas_cumprod)).double().cpu()
    if not (alpha_bar > 0).all():
        raise UserError("--epsilon_scale needs a schedule that leaves something of the image at every timestep")
    if kind == "posterior_mean":  # Eq. 11: mu = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t)
        return (torch.cat([torch.ones(1).double(), alpha_bar[:-1]]) / alpha_bar).sqrt().float()
    # Eq. 15: x_0 = x_t / sqrt(alpha_bar_t); v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    return (alpha_bar.rsqrt() if kind == "sample" else -(1 / alpha_bar - 1).sqrt()).float()


def check_guide(pipe: Any, guide: Any) -> None:
    """Raise a UserError unless the networks of two `DDPMPipeline`s predict the same of the same x_t."""
    if not hasattr(guide, "image_shape"):
        raise UserError(f"guide must be a DDPMPipeline, got {type(guide).__name__}")
    kind, its_kind = (one.scheduler.config.get("prediction_type", "epsilon") for one in (pipe, guide))
    table, its_table = (one.scheduler.alphas_cumprod.double().cpu() for one in (pipe, guide))
    if guide.distilled_steps:
        raise UserError(f"the guide is distilled into {guide.distilled_steps} steps, and knows no other timesteps")
    if guide.image_shape != pipe.image_shape:
        shapes = f"of {guide.image_shape} (channels, height, width), the model of {pipe.image_shape}"
        raise UserError(f"the guide makes images {shapes}; both have to make the same")
    if its_kind != kind:
        raise UserError(f"the guide predicts {its_kind!r}, the model {kind!r}; both have to predict the same")
    if its_table.shape != table.shape or not torch.allclose(its_table, table, rtol=1e-3):
        raise UserError("the guide was trained with another noise schedule than the model; both need the same betas")
    if guide.classes.count is not None and guide.classes != pipe.classes:
        theirs = f"it has {guide.classes.known()}, the model {pipe.classes.known()}"
        raise UserError(f"the guide must have the model's classes, or none: {theirs}")
