"""Epsilon scaling (Ning et al. 2024, arXiv 2308.15321): by what to divide the predicted noise of a sampler.

While it samples, a network sees the x_t that its own predictions led to, and predicts too much noise for them:
exposure bias. Its epsilon divided by lambda(t) = k t + b, slightly above 1, makes up for it without training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.class_labels import ClassIndex
from ..data.tensors import ImageDataset, to_model_range
from ..pipelines.adjustment import output_without_noise
from ..pipelines.pipeline_ddpm import DDPMPipeline, evaluating
from ..pipelines.schedulers import checked_steps, set_timesteps
from ..sampling.generation import generate
from ..sampling.shards import Rows, all_rows
from ..utils.errors import UserError
from ..utils.randomness import SeededNoise
from .features import FeatureExtractor
from .metrics import frechet_distance, frechet_statistics

_RANGE = 0.95, 1.10  # where b is looked for; Ning et al. find 1.0004 to 1.03
EVALUATIONS = 11  # of an objective, for one number
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ExposureBias:
    """Mean norms of the epsilon that a network predicts along a sampler's chain of K steps; `[K]` each."""

    timesteps: list[int]  # from high to low
    training: Tensor  # at x_t ~ q(x_t|x_0)
    sampling: Tensor  # at the sampler's x_t

    @property
    def ratio(self) -> Tensor:
        """Sampling over training, `[K]`: above 1 where there is too much noise in x_t."""
        return self.sampling / self.training


@torch.no_grad()
def exposure_bias(
    pipe: DDPMPipeline,
    data: ImageDataset,
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
    **chain: Any,
) -> ExposureBias:
    """Measure the norm of the predicted epsilon while sampling against that on q(x_t|x_0), one sample per image.

    Both are the network's own, before any scaling, so they are equal where x_t is distributed as in training. Of
    networks that predict something else, the norms are those of epsilon up to a factor that depends on t only.

    Args:
        pipe: Network and sampler.
        data: Images; sample i has the class of image i.
        batch_size, progress: As for `generation.generate`; no number depends on them.
        seed: Sample i has the seed `seed + i`.
        chain: `num_inference_steps`, `epsilon_scale` and `eta` of `DDPMPipeline`.

    Raises a UserError for images of another shape, and for samplers with another x_t than a DDPM's.
    """
    pipe.check_images_fit(data)
    if float(pipe.scheduler.init_noise_sigma) != 1:
        name = type(pipe.scheduler).__name__
        raise UserError(f"{name} scales x_t in a way of its own; use ddpm, ddim, dpmsolver++ or unipc")
    labels, channels = pipe.classes.of_dataset(data), pipe.image_shape[0]
    without_noise = output_without_noise(pipe.scheduler)
    set_timesteps(pipe.scheduler, checked_steps(pipe.scheduler, chain.get("num_inference_steps")))
    timesteps: list[int] = pipe.scheduler.timesteps.tolist()

    def norm(x_t: Tensor, t: int, classes: Tensor | None) -> Tensor:  # [B]
        output = pipe.network(x_t.to(pipe.network.dtype), t, class_labels=classes).sample.float()[:, :channels]
        return (output if without_noise is None else output - float(without_noise[t]) * x_t).flatten(1).norm(dim=1)

    def rows_of(ids: list[int]) -> Rows:
        seeds, x_0 = [seed + i for i in ids], to_model_range(data.images[ids]).to(pipe.device)
        classes = None if labels is None else labels[ids].to(pipe.device)
        chosen = None if classes is None else [ClassIndex(label) for label in classes.tolist()]
        steps = pipe.progressive(seeds=seeds, class_labels=chosen, **chain)
        sampling = torch.stack([norm(step.sample, step.timestep, classes) for step in steps], dim=1)
        noise = SeededNoise(seeds, pipe.device)
        training = []
        for t in timesteps:
            at = torch.full((len(ids),), t, device=pipe.device)
            training.append(norm(pipe.scheduler.add_noise(x_0, noise.normal(x_0.shape), at), t, classes))
        return {"sampling": sampling, "training": torch.stack(training, dim=1)}

    with evaluating(pipe.unet):
        rows = all_rows(len(data), rows_of, batch_size, None, "exposure bias", progress)
    return ExposureBias(timesteps, rows["training"].double().mean(0), rows["sampling"].double().mean(0))


def norm_mismatch(pipe: DDPMPipeline, data: ImageDataset, **options: Any) -> Callable[[Any], float]:
    """Return the objective of matching norms: a function of `epsilon_scale`, 0 where they are equal at most t.

    That is, where x_t is distributed as in training. The median, as the last steps of some samplers differ on purpose.
    """
    return lambda scale: exposure_bias(pipe, data, epsilon_scale=scale, **options).ratio.log().median().item() ** 2


def sample_distance(
    pipe: DDPMPipeline, real: ImageDataset, extractor: FeatureExtractor, seeds: Sequence[int], **options: Any
) -> Callable[[Any], float]:
    """Return the objective of near samples: a function of `epsilon_scale`, the Frechet distance of features.

    The same `seeds` for every scale make it smooth. `options` are those of `generation.generate`.
    """
    goal = frechet_statistics(extractor(real.images)["features"])
    labels = pipe.classes.of_dataset(real)
    if labels is not None:
        options["class_labels"] = [ClassIndex(labels[i % len(labels)]) for i in range(len(seeds))]

    def distance(scale: Any) -> float:
        drawn = generate(pipe, seeds, epsilon_scale=scale, **options)
        return frechet_distance(frechet_statistics(torch.cat([extractor(x)["features"] for _, x in drawn])), goal)

    return distance


def find_epsilon_scale(objective: Callable[[Any], float], T: int, ramp: bool = False) -> tuple[float, float]:
    """Return b and k of lambda(t) = k t + b where an objective is smallest; k is 0 without `ramp`.

    A golden-section search, to 0.001, in `EVALUATIONS` evaluations; for a ramp another one for its slope around the
    middle of the chain. Raises a UserError where b would be outside 0.95 to 1.10.
    """
    low, high = _RANGE
    b = _smallest(lambda b: objective((b, 0.0)), low, high)
    if not low + 0.003 < b < high - 0.003:
        raise UserError(f"no scale from {low} to {high} is the best: {b:.3f} is at the end; try more steps or images")
    if not ramp:
        return b, 0.0
    rise = _smallest(lambda rise: objective((b - rise / 2, rise / T)), -0.08, 0.08)
    return b - rise / 2, rise / T


def _smallest(f: Callable[[float], float], low: float, high: float, narrowed: int = EVALUATIONS - 2) -> float:
    """Return where f, with one minimum between low and high, is smallest (golden-section search)."""
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    f_a, f_b = f(a), f(b)
    for _ in range(narrowed):
        if f_a < f_b:
            high, b, f_b = b, a, f_a
            a = high - _GOLDEN * (high - low)
            f_a = f(a)
        else:
            low, a, f_a = a, b, f_b
            b = low + _GOLDEN * (high - low)
            f_b = f(b)
    return (low + high) / 2


def check_can_be_scaled(pipe: DDPMPipeline) -> None:
    """Raise a UserError for a network whose epsilon cannot be divided by its last layer, or is already."""
    if (kind := pipe.scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
        what = f"this network predicts {kind!r}, and dividing its epsilon adds a multiple of x_t to that"
        raise UserError(f"{what}, which no weights do; sample with --epsilon_scale instead")
    if (done := pipe.unet.config.get("_epsilon_scale")) is not None:
        how = f"{done['b']:g}, for {done['sampler']} over {done['num_inference_steps']} steps"
        raise UserError(f"this network's epsilon is divided by {how} already; take the model that it was made from")


@torch.no_grad()
def scaled_model(pipe: DDPMPipeline, b: float, sampler: str, num_inference_steps: int) -> DDPMPipeline:
    """Return a pipeline whose last layer divides the predicted epsilon by b; a learned variance stays.

    For which sampler and steps b was found is noted in the network's configuration. Errors as `check_can_be_scaled`.
    """
    check_can_be_scaled(pipe)
    unet = copy.deepcopy(pipe.unet)
    channels = pipe.image_shape[0]
    unet.conv_out.weight[:channels] /= b
    if unet.conv_out.bias is not None:
        unet.conv_out.bias[:channels] /= b
    unet.register_to_config(_epsilon_scale={"b": b, "sampler": sampler, "num_inference_steps": num_inference_steps})
    return DDPMPipeline(unet, pipe.scheduler)
