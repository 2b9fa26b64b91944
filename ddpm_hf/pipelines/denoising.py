"""Algorithm 2: from x_T down to x_0, step by step; on NVIDIA GPUs a step is one CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelScheduler
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelScheduler
from torch import Tensor

from ..diffusion.scheduling_ddpm import DDPMScheduler, infinite_to_nan
from ..models.inference import InferenceNetwork, fill
from ..utils.cuda_graphs import record, warm_up
from ..utils.errors import UserError
from ..utils.randomness import Generators, SeededNoise, normal_noise, standard_normal
from .adjustment import Adjustment, output_without_noise
from .schedulers import feasible_etas, step_options, true_stride

_UNCHANGED = Adjustment()


@dataclass
class DenoisingStep:
    """One step down the chain."""

    index: int  # its place in `scheduler.timesteps`
    timestep: int  # t, from T-1 to 0
    sample: Tensor  # x_t, [B, C, H, W], in the [-1, 1] scale
    pred_original_sample: Tensor | None  # x_0 predicted from it (Eq. 15); `None` where the scheduler gives none
    prev_sample: Tensor  # x_{t-1}; the next step starts from what stands here


class Denoiser:
    """Take steps down a chain whose timesteps are set; `labels` are `[B]` classes on the device."""

    def __init__(
        self,
        network: Any,
        scheduler: Any,
        generator: Generators,
        labels: Tensor | None = None,
        adjustment: Adjustment = _UNCHANGED,
        eta: float | None = None,
    ):
        self.network, self.scheduler, self.generator = network, scheduler, generator
        self.labels, self.adjustment = labels, adjustment
        without_noise = output_without_noise(scheduler) if adjustment.scales else None
        self._without_noise = None if without_noise is None else without_noise.to(network.device)
        self.dtype = network.dtype  # looked up once: it is searched for in all of the parameters
        # A learned variance is for the ancestral samplers only.
        learned = "learned" in (scheduler.config.get("variance_type") or "")
        ancestral = isinstance(scheduler, DDPMParallelScheduler) and learned
        self._ancestral = ancestral or isinstance(scheduler, DDPMScheduler)
        self._options = step_options(scheduler, generator, eta)
        self._etas = feasible_etas(scheduler, eta) if eta and isinstance(scheduler, DDIMScheduler) else None

    def steps(self, x_t: Tensor, start: int = 0, stop: int | None = None) -> Iterator[DenoisingStep]:
        """Take the chain's steps `start` to `stop` (all by default), from x_t `[B, C, H, W]` float32."""
        scheduler, timesteps = self.scheduler, self.scheduler.timesteps
        on_device = timesteps.to(x_t.device)  # once, so that no step waits for the device
        if start and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        stop = len(timesteps) if stop is None else min(stop, len(timesteps))
        guided = [self.adjustment.guides(t) for t in timesteps.tolist()]
        graphs = {now: self._captured(x_t, on_device, now) for now in sorted(set(guided[start:stop]))}
        x_0: Tensor | None
        for index in range(start, stop):
            if (graph := graphs[guided[index]]) is not None:
                x_prev, x_0 = graph(index, x_t, self.labels, self.generator)
            else:
                # Algorithm 2, line 4: eps_theta(x_t, t), then x_{t-1} from it and z
                seen = scheduler.scale_model_input(x_t, timesteps[index])
                output = self.predict(seen, on_device[index], guided[index])
                with true_stride(scheduler, index):
                    made = scheduler.step(output, timesteps[index], x_t, **self._options_at(index, x_t))
                x_prev, x_0 = made.prev_sample, getattr(made, "pred_original_sample", None)
            step = DenoisingStep(index, int(timesteps[index]), x_t, x_0, x_prev)
            yield step
            x_t = step.prev_sample

    def predict(self, x_t: Tensor, t: Tensor, guided: bool) -> Tensor:
        """Return the network's output at x_t and one t, guided and scaled as requested; float32, infinities as NaN."""
        output = infinite_to_nan(self._guided(x_t.to(self.dtype), t, guided).float())
        output = output if self._ancestral else output[:, : x_t.shape[1]]
        return self.adjustment.scaled(output, x_t, t, self._without_noise)

    def _guided(self, x_t: Tensor, t: Tensor, guided: bool) -> Tensor:
        guide, labels, channels = self.adjustment.guide, self.labels, x_t.shape[1]
        if guided and guide is not None:
            # Karras et al. 2024 (arXiv 2406.02507): D_guide + w (D - D_guide)
            better = self.network(x_t, t, class_labels=labels).sample.float()
            known = labels if guide.config.num_class_embeds is not None else None
            worse = guide(x_t.to(guide.dtype), t, class_labels=known).sample.float()
        elif guided and labels is not None:
            no_class = torch.full_like(labels, self.network.config["_null_class"])
            both = self.network(torch.cat([x_t, x_t]), t, class_labels=torch.cat([labels, no_class])).sample
            better, worse = both.chunk(2)
        else:
            return self.network(x_t, t, class_labels=labels).sample
        # Ho & Salimans 2022, Eq. 6, with guidance_scale = 1 + w; a learned variance is not guided
        scale, predicted = self.adjustment.guidance_scale, worse[:, :channels]
        predicted = predicted + scale * (better[:, :channels] - predicted)
        return torch.cat([predicted, better[:, channels:]], dim=1)

    def _options_at(self, index: int, x_t: Tensor) -> dict[str, Any]:
        """Return the scheduler's options for one step."""
        options = dict(self._options) | ({} if self._etas is None else {"eta": self._etas[index]})
        if "variance_noise" in options:
            options["variance_noise"] = standard_normal(x_t.shape, self.generator, x_t.device, x_t.dtype)
        return options

    def _captured(self, x_t: Tensor, timesteps: Tensor, guided: bool) -> CapturedSteps | None:
        """Return the chain's step as a graph, where the network's options ask for it and the scheduler is ours."""
        network, scheduler = self.network, self.scheduler
        if not (isinstance(network, InferenceNetwork) and network.options.captured and len(x_t)):
            return None
        if not isinstance(scheduler, DDPMScheduler):  # stock's keep Python state; the network alone is a graph
            return None
        seeded = isinstance(self.generator, SeededNoise)
        tables = tuple(scheduler.timesteps.tolist()), tuple(scheduler.alphas_cumprod.tolist())
        size = network.batch_size(len(x_t)), *x_t.shape[1:]
        key = size, self.labels is None, self.adjustment, guided, seeded, scheduler.to_json_string(), tables
        return network.captured(key, lambda: CapturedSteps(self, network, x_t, timesteps, guided))


class CapturedSteps:
    """One step of a chain as a CUDA graph: guidance and network, x_0, posterior, and the noise of seeds.

    What changes lies in tensors that keep their place. Noise of generators, with their own order, is drawn outside.
    """

    def __init__(
        self, denoiser: Denoiser, network: InferenceNetwork, x_t: Tensor, timesteps: Tensor, guided: bool = False
    ):
        self._scheduler = scheduler = copy.deepcopy(denoiser.scheduler)  # the graph reads its tables
        self._size = network.batch_size(len(x_t))
        device = x_t.device
        self._x_t = fill(x_t, self._size).clone()
        self._noise = torch.zeros_like(self._x_t)
        self._labels = None if denoiser.labels is None else fill(denoiser.labels, self._size).clone()
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._seeds, self._draws = torch.zeros(2, self._size, dtype=torch.int64, device=device).unbind()
        seeded = isinstance(denoiser.generator, SeededNoise)
        guide = denoiser.adjustment.guide
        guide = guide.uncaptured() if isinstance(guide, InferenceNetwork) else guide
        adjustment = replace(denoiser.adjustment, guide=guide)
        inside = Denoiser(network.uncaptured(), scheduler, None, self._labels, adjustment)
        # One kernel, where there is a compiler, instead of about a hundred.
        compiled = network.options.compiled and device.type == "cuda"
        normal = torch.compile(normal_noise, dynamic=False) if compiled else normal_noise
        timesteps = timesteps.clone()

        def run() -> None:
            t = timesteps[self._index]
            if seeded:
                self._noise.copy_(normal(self._seeds, self._draws[None], x_t[0].numel()).view_as(self._noise))
            self._made = scheduler.step(inside.predict(self._x_t, t, guided), t, self._x_t, _Given(self._noise))

        warm_up(run, device)
        self._graph = record(run, device)

    def __call__(self, index: int, x_t: Tensor, labels: Tensor | None, generator: Generators) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and the predicted x_0 of the chain's step `index`."""
        n = len(x_t)
        self._index.fill_(index)
        self._x_t[:n] = x_t
        if self._labels is not None:
            self._labels[:n] = labels
        if index == len(self._scheduler.timesteps) - 1:
            pass  # the step to the data draws nothing; what is there is multiplied by 0
        elif isinstance(generator, SeededNoise):
            self._seeds[:n], self._draws[:n] = generator.seeds, generator.count_draw()
        else:
            self._noise[:n] = standard_normal(x_t.shape, generator, x_t.device, x_t.dtype)
        self._graph.replay()
        return self._made.prev_sample[:n].clone(), self._made.pred_original_sample[:n].clone()


class _Given(SeededNoise):
    """Noise that was drawn before."""

    def __init__(self, noise: Tensor):
        self._given = noise

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._given


def check_repaint(scheduler: Any, length: int, times: int) -> None:
    """Raise a UserError for a scheduler that has no q(x_{t-1}|x_0) of its own, or numbers below 1."""
    if not isinstance(scheduler, (DDPMScheduler, DDIMScheduler, DDIMParallelScheduler)):
        raise UserError(f"--mask_image works with the ddpm and ddim samplers, not {type(scheduler).__name__}")
    if length < 1 or times < 1:
        raise UserError(f"--resample_length and --resample_times must be at least 1, got {length} and {times}")


def repaint(
    denoiser: Denoiser, x_t: Tensor, x_0: Tensor, mask: Tensor, start: int, length: int, times: int
) -> Iterator[DenoisingStep]:
    """Take all steps from `start`: from p where the mask (`[B, 1, H, W]`) is true, from q(x_{t-1}|x_0) elsewhere.

    RePaint (Lugmayr et al. 2022, Algorithm 1): each stretch of `length` steps is taken `times` times.
    """
    scheduler, timesteps = denoiser.scheduler, denoiser.scheduler.timesteps
    # alpha_bar at every point of the chain; the data, at its end, has 1
    table = scheduler.alpha_bar if isinstance(scheduler, DDPMScheduler) else scheduler.alphas_cumprod.cpu()
    alpha_bar = [*table[timesteps.cpu()].tolist(), 1.0]

    def noisy(x: Tensor, signal: float) -> Tensor:
        """sqrt(signal) x + sqrt(1 - signal) noise."""
        noise = standard_normal(x.shape, denoiser.generator, x.device, x.dtype)
        return signal**0.5 * x + (1 - signal) ** 0.5 * noise

    for first in range(start, len(timesteps), length):
        last = min(first + length, len(timesteps))
        for again in reversed(range(times)):
            for step in denoiser.steps(x_t, first, last):
                signal = alpha_bar[step.index + 1]
                known = noisy(x_0, signal) if signal < 1 else x_0
                step.prev_sample = torch.where(mask, step.prev_sample, known)
                yield step
                x_t = step.prev_sample
            if again:
                x_t = noisy(x_t, alpha_bar[first] / alpha_bar[last])
