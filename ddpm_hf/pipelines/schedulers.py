"""Check and set what schedulers take, ours and stock's, before and while they sample from a DDPM."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.utils import logging

from ..diffusion.scheduling_ddpm import DDPMScheduler, vanished
from ..diffusion.tables import number_of_steps, spaced_timesteps
from ..utils.errors import UserError, named_as_typed
from ..utils.randomness import Generators, SeededNoise

logger = logging.get_logger(__name__)

# Stock's schedulers whose every step is T // K timesteps long, wherever their timesteps lead.
_FIXED_STRIDE = (DDIMScheduler, DDIMParallelScheduler, CogVideoXDDIMScheduler)
# Those that read their noise levels from `sigmas`, one for each timestep and one for the end.
_BY_SIGMAS = (UniPCMultistepScheduler, DEISMultistepScheduler, SASolverScheduler)
_END = 1e-4  # a noise level that is no longer seen in pixels, where 0 would be divided by
BEST = "best"  # the spacing of timesteps that were chosen for the model, and saved with it
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
    """Set the chain's timesteps, for all of stock's samplers too.

    Where stock rounds `steps` to a chain without an image, the same spacing is computed without its rounding. Where
    the spacing itself starts too late, `trailing` takes its place if nobody chose the spacing (`with_sampler`);
    otherwise a UserError says so.
    """
    config, T = scheduler.config, scheduler.config.num_train_timesteps
    chosen, wrong = config.get("_timestep_spacing"), None
    if chosen == BEST:
        use_timesteps(scheduler, best_timesteps(scheduler, steps))
    else:
        scheduler.set_timesteps(steps)
    if isinstance(scheduler, DDPMScheduler):
        _warn_of_a_late_start(scheduler)
        return
    if chosen != BEST and (wrong := _what_is_wrong(scheduler)) and takes_timesteps(scheduler):
        for spacing in (config.timestep_spacing, *(["trailing"] if chosen == "any" else [])):
            use_timesteps(scheduler, spaced_timesteps(T, steps, spacing, config.get("steps_offset", 0)).tolist())
            if not (wrong := _what_is_wrong(scheduler)):
                break
    first = int(scheduler.timesteps[0])
    vanishes = scheduler.alphas_cumprod[first] == 0 or (config.get("rescale_betas_zero_snr") and first == T - 1)
    if vanishes and config.get("prediction_type") == "epsilon":  # stock divides by 0, and clips what comes of it
        raise UserError(vanished(first, "epsilon"))
    if wrong:
        what = f"{type(scheduler).__name__} {wrong} with --num_inference_steps {steps}"
        raise UserError(f"{what}; use --timestep_spacing trailing")


def _what_is_wrong(scheduler: Any) -> str | None:
    """Return why the timesteps that are set make no image, in words."""
    timesteps, order = scheduler.timesteps, getattr(scheduler, "order", 1)
    if _starts_late(scheduler):
        return f"starts from noise at t={int(timesteps[0])}"
    # PNDM and second-order solvers evaluate some timesteps twice on purpose.
    once = order == 1 and "PNDM" not in type(scheduler).__name__
    ends_twice = isinstance(scheduler, _BY_SIGMAS) and scheduler.sigmas[-1] == scheduler.sigmas[-2]
    if once and (len(timesteps.unique()) < len(timesteps) or ends_twice):
        return "comes to the same timestep twice"
    # np.arange(T, 0, -T / K), stock's `trailing`, has one value too many for some K
    return "steps beyond the data" if timesteps.min() < 0 else None


def _starts_late(scheduler: Any) -> bool:
    """Return whether the chain starts from pure noise where the network expects a part of the image."""
    alpha_bar = scheduler.alphas_cumprod
    return alpha_bar[int(scheduler.timesteps[0])].item() ** 0.5 > max(0.1, 2 * alpha_bar[-1].item() ** 0.5)


def _warn_of_a_late_start(scheduler: Any) -> None:
    """Warn once: stock does it, so it is not refused."""
    global _warned_of_a_late_start
    if not _warned_of_a_late_start and _starts_late(scheduler):
        _warned_of_a_late_start = True
        what = f"--num_inference_steps {len(scheduler.timesteps)} starts from pure noise"
        where = f"at t={int(scheduler.timesteps[0])}, where the network expects a part of the image"
        logger.warning(named_as_typed(f"{what} {where}; better: --timestep_spacing trailing"))


def takes_timesteps(scheduler: Any) -> bool:
    """Return whether `use_timesteps` can give the scheduler its timesteps."""
    named = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
    return named or isinstance(scheduler, (*_FIXED_STRIDE, *_BY_SIGMAS))


def use_timesteps(scheduler: Any, timesteps: Sequence[int]) -> None:
    """Make falling `timesteps` the chain of a scheduler; also of stock's that have no argument for them."""
    if not takes_timesteps(scheduler):
        raise UserError(f"{type(scheduler).__name__} takes no timesteps; use the ddpm, ddim or dpmsolver++ sampler")
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps))
        return
    scheduler.set_timesteps(len(timesteps))
    scheduler.timesteps, scheduler.num_inference_steps = torch.tensor(timesteps), len(timesteps)
    if isinstance(scheduler, _BY_SIGMAS):
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps].double()
        sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().float()
        end = scheduler.sigmas[-1:]  # the level of t = 0, or 0
        scheduler.sigmas = torch.cat([sigmas, end if end < sigmas[-1] else end.new_tensor([_END])])


def best_timesteps(scheduler: Any, steps: int) -> list[int]:
    """Return the timesteps that `ddpm-hf best_timesteps` saved for this number; a UserError where it saved none."""
    saved = scheduler.config.get("_timesteps") or {}
    if (timesteps := saved.get(str(steps))) is None:
        there = f"it has those for {', '.join(saved)} steps" if saved else "it has none"
        advice = f"run ddpm-hf best_timesteps --num_inference_steps {steps}"
        what = f"--timestep_spacing best takes timesteps saved with the model for {steps} steps"
        raise UserError(f"{what}; {there}: {advice}")
    return list(timesteps)


@contextmanager
def true_stride(scheduler: Any, index: int) -> Iterator[None]:
    """Let stock's DDIM go from its timestep number `index` to the next one (Song et al. 2021, Eq. 12).

    It goes T // num_inference_steps down, wherever its timesteps lead; with T / stride as a fraction, the stride.
    """
    if not isinstance(scheduler, _FIXED_STRIDE):
        yield
        return
    steps, stride = scheduler.num_inference_steps, -int(_next_timesteps(scheduler)[index] - scheduler.timesteps[index])
    scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, stride)
    try:
        yield
    finally:
        scheduler.num_inference_steps = steps


def _next_timesteps(scheduler: Any) -> torch.Tensor:
    """Return where each step leads, `[K]`; -1 is the data."""
    return torch.cat([scheduler.timesteps[1:], scheduler.timesteps.new_tensor([-1])])


def checked_eta(scheduler: Any, eta: float | None) -> float:
    """Return eta, by default the scheduler's own, or 0; a UserError outside 0 to 1, or where there is none."""
    known = inspect.signature(scheduler.step).parameters.get("eta")
    if eta is None:
        return 0.0 if known is None else known.default
    if not 0 <= eta <= 1:
        raise UserError(f"--eta must be between 0 and 1, got {eta}")
    if eta and known is None:
        raise UserError(f"--eta {eta:g} is for the ddim sampler; {type(scheduler).__name__} has none")
    return eta


def feasible_etas(scheduler: Any, eta: float) -> list[float]:
    """Return eta for each of DDIM's timesteps: where alpha_bar_t is 0 or nearly so, as high as float32 allows.

    There sigma^2 = 1 - alpha_bar_prev (Song et al. 2021, Eq. 16 at eta = 1), and stock takes the root of the
    difference of the two, which rounding makes negative.
    """
    t, previous = scheduler.timesteps.cpu(), _next_timesteps(scheduler).cpu()
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
