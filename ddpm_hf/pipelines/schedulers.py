"""Check and set what schedulers take, ours and stock's, before and while they sample from a DDPM."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelScheduler
from diffusers.utils import logging

from ..diffusion.scheduling_ddpm import DDPMScheduler, vanished
from ..diffusion.tables import number_of_steps
from ..utils.errors import UserError
from ..utils.randomness import Generators, SeededNoise

logger = logging.get_logger(__name__)

# Stock's schedulers whose every step is T // K timesteps long, wherever their timesteps lead.
_FIXED_STRIDE = (DDIMScheduler, DDIMParallelScheduler, CogVideoXDDIMScheduler)
# More than stock's DDIM loses by rounding in float32, near 1; its root, 7e-4, is a tenth of a pixel value.
_ROUNDING = 2.0**-21
_warned_of_a_late_start = False
DISTILLED_STEPS = "_distilled_steps"  # in a network's configuration, where stock keeps and ignores it


def make_scheduler(network: Mapping[str, Any], settings: Mapping[str, Any]) -> DDPMScheduler | DDIMScheduler:
    """Return a scheduler of these settings for a network's configuration: DDIM's for a distilled one."""
    return (DDIMScheduler if DISTILLED_STEPS in network else DDPMScheduler)(**settings)


def check_is_ddpm(scheduler: Any) -> None:
    """Raise a UserError unless the process is x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""
    config = scheduler.config
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or not isinstance(alpha_bar, torch.Tensor) or len(alpha_bar) != config.get("num_train_timesteps"):
        what = f"{type(scheduler).__name__} is for another process than a DDPM's"
        raise UserError(f"{what}; use DDPMScheduler, DDIMScheduler or another with alphas_cumprod over T timesteps")


def check_is_sampler(scheduler: Any) -> None:
    """Raise a UserError unless a scheduler samples from a DDPM by `step(model_output, timestep, sample)`."""
    if isinstance(scheduler, DDPMScheduler):
        return
    check_is_ddpm(scheduler)
    name, parameters = type(scheduler).__name__, inspect.signature(scheduler.step).parameters
    needed = [argument for argument, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    # UnCLIP's has to be told where each step leads, and goes to t - 1 otherwise
    if needed != ["model_output", "timestep", "sample"] or "prev_timestep" in parameters or "Inverse" in name:
        what = "does not sample from the network's output alone"
        raise UserError(f"{name} {what}; use DDIMScheduler.from_config({name}'s config)")


def checked_steps(scheduler: Any, num_inference_steps: int | None) -> int:
    """Return the number of sampler steps, T for `None`; a UserError if it is not 1 to T, or this is no sampler."""
    check_is_sampler(scheduler)
    T = scheduler.config.num_train_timesteps
    if num_inference_steps is None:
        return T
    return number_of_steps(num_inference_steps, T)


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Set the chain's timesteps; a UserError refuses numbers of steps that stock rounds to chains without an image."""
    scheduler.set_timesteps(steps)
    config, timesteps, alpha_bar = scheduler.config, scheduler.timesteps, scheduler.alphas_cumprod
    T, first, name = config.num_train_timesteps, int(timesteps[0]), type(scheduler).__name__
    late = alpha_bar[first].item() ** 0.5 > max(0.1, 2 * alpha_bar[-1].item() ** 0.5)
    if isinstance(scheduler, DDPMScheduler):
        global _warned_of_a_late_start
        if late and not _warned_of_a_late_start:  # as stock does it, so it is not refused
            _warned_of_a_late_start = True
            where = f"at t={first}, where the network expects a part of the image"
            logger.warning(f"{steps} steps start from pure noise {where}; better: timestep_spacing='trailing'")
        return
    vanishes = alpha_bar[first] == 0 or (config.get("rescale_betas_zero_snr") and first == T - 1)
    if vanishes and config.get("prediction_type") == "epsilon":  # stock divides by 0, and clips what comes of it
        raise UserError(vanished(first, "epsilon"))
    # PNDM and second-order solvers evaluate some timesteps twice on purpose.
    once = getattr(scheduler, "order", 1) == 1 and "PNDM" not in name
    repeated = once and len(timesteps.unique()) < len(timesteps)
    uneven = isinstance(scheduler, _FIXED_STRIDE) and (timesteps.diff() != -(T // steps)).any()
    if late or repeated or uneven:
        what = f"takes each of {steps} steps to be {T // steps} of the {T} timesteps long, where they are not"
        what = "comes to the same timestep twice" if repeated else what
        what = f"starts from noise at t={first}" if late else what
        advice = f"use timestep_spacing='trailing', and a number of steps that divides {T}"
        raise UserError(f"{name} {what} with {steps} steps; {advice}")


def checked_eta(scheduler: Any, eta: float | None) -> float:
    """Return eta, by default the scheduler's own, or 0; a UserError outside 0 to 1, or where there is none."""
    known = inspect.signature(scheduler.step).parameters.get("eta")
    if eta is None:
        return 0.0 if known is None else known.default
    if not 0 <= eta <= 1:
        raise UserError(f"eta must be between 0 and 1, got {eta}")
    if eta and known is None:
        raise UserError(f"eta={eta} is for the ddim sampler; {type(scheduler).__name__} has none")
    return eta


def feasible_etas(scheduler: Any, eta: float) -> list[float]:
    """Return eta for each of DDIM's timesteps: where alpha_bar_t is 0 or nearly so, as high as float32 allows.

    There sigma^2 = 1 - alpha_bar_prev (Song et al. 2021, Eq. 16 at eta = 1), and stock takes the root of the
    difference of the two, which rounding makes negative.
    """
    t = scheduler.timesteps.cpu()
    previous = t - scheduler.config.num_train_timesteps // len(t)
    alpha_bar = scheduler.alphas_cumprod.double().cpu()
    now, then = alpha_bar[t], alpha_bar[previous.clamp(min=0)]
    then = torch.where(previous >= 0, then, float(scheduler.final_alpha_cumprod))
    variance = (1 - then) / (1 - now) * (1 - now / then)
    largest = ((1 - then - _ROUNDING).clamp(min=0) / variance).sqrt()
    return [eta if math.isnan(most) else min(eta, most) for most in largest.tolist()]  # NaN: no variance at all


def step_options(scheduler: Any, generator: Generators, eta: float | None) -> dict[str, Any]:
    """Return what the scheduler's `step` takes beyond the usual: deterministic ones take no generator, DDIM an eta."""
    # DDIM takes the noise of seeds, like our scheduler; other samplers of stock draw for themselves.
    eta = checked_eta(scheduler, eta)
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": eta} if "eta" in known else {}
    if not isinstance(generator, SeededNoise) or isinstance(scheduler, DDPMScheduler):
        options |= {"generator": generator} if "generator" in known else {}
    elif "variance_noise" in known and eta:
        options["variance_noise"] = None  # drawn for each step
    elif "generator" in known:
        options["generator"] = generator.generators()
    if "use_clipped_model_output" in known:
        # Where x_0 is clipped, eps has to follow, or x_t is no longer the mixture of both that the network knows.
        options["use_clipped_model_output"] = True
    return options
