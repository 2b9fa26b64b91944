"""The paper's figures of a model: progressive generation (Figs. 6, 10, 14), shared latents (7), interpolations (8, 9).

Each function returns its images, in the [-1, 1] scale and on the CPU, with a `draw()` that makes the labelled picture.
`t` counts diffusion steps from 0, the data, to T; where the chain has fewer steps, the nearest one counts. All noise
comes from seeds. Arguments outside their range, or counts that disagree, raise a `UserError` at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor

from ..data.class_labels import ClassLabels, as_list
from ..data.tensors import to_uint8
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..utils.errors import UserError
from ..utils.progress import progress_bar
from ..utils.randomness import SeededNoise, derive_seed
from ..utils.visualize import labelled_grid
from .inputs import images_in_model_range
from .pipeline_ddpm import DDPMPipeline
from .schedulers import set_timesteps

LAMBDAS = tuple(i / 10 for i in range(11))


class _Chain:
    """The reverse chain that a figure is drawn with; `options` are guidance_scale and eta."""

    def __init__(
        self,
        pipe: DDPMPipeline,
        num_inference_steps: int | None = None,  # T by default
        batch_size: int = 64,  # images at a time; does not change them
        class_labels: ClassLabels = None,  # one for all, or one per seed, for class-conditional networks
        progress: bool = False,  # show one progress bar over the whole figure
        **options: Any,
    ):
        if batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, got {batch_size}")
        self.pipe, self.batch_size, self.class_labels = pipe, batch_size, class_labels
        self._options = {"num_inference_steps": num_inference_steps, **options}
        scheduler = pipe.scheduler
        set_timesteps(scheduler, pipe.checked_steps(num_inference_steps))
        self.T: int = scheduler.config.num_train_timesteps
        self.ts = [*(scheduler.timesteps.long() + 1).tolist(), 0]  # before each step, and the data
        # The delay keeps a bar away from the sentence about a class that the network does not have.
        self.bar = progress_bar(0, "drawing", "step", show=progress, delay=0.1)

    def indices_of(self, ts: Sequence[int]) -> list[int]:
        """Return the place in the chain of the step nearest to each t, without repeats; the data's is the last."""
        if not ts:
            raise UserError(f"ts is empty; give at least one number of diffusion steps, 0 to {self.T}")
        for t in ts:
            if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t <= self.T:
                raise UserError(f"t counts diffusion steps, 0 to {self.T}, got {t!r}")
        places = range(len(self.ts))
        return list(dict.fromkeys(min(places, key=lambda place: abs(self.ts[place] - t)) for t in ts))

    def labels(self, count: int) -> list[Any]:  # one class label per seed
        labels = as_list(self.class_labels)
        if len(labels) not in (1, count):
            raise UserError(f"got {len(labels)} --class_labels for {count} seeds; give one, or one per seed")
        return labels * (count // len(labels))

    def options(self, labels: Sequence[Any]) -> dict[str, Any]:
        """Return the options of `DDPMPipeline.denoise` for images of these classes."""
        return self._options | {"class_labels": None if all(label is None for label in labels) else list(labels)}

    def batches(self, count: int) -> list[slice]:
        return [slice(first, first + self.batch_size) for first in range(0, count, self.batch_size)]

    def expect(self, count: int, indices: Sequence[int], more: int = 0) -> None:
        """Let the bar end after the steps that decode `count` images from each of these places, and `more`."""
        self.bar.total = more + len(self.batches(count)) * sum(len(self.ts) - 1 - index for index in indices)

    def decode(self, x_t: Tensor, index: int, seeds: list[int], drawn: int, labels: list[Any]) -> Tensor:
        """Draw x_0 ~ p(x_0|x_t) at one place in the chain; the seeds' noise was drawn `drawn` times before."""
        x_0 = []
        for rows in self.batches(len(x_t)):
            x = x_t[rows].to(self.pipe._execution_device)
            noise = SeededNoise(seeds[rows], x.device, drawn)
            for step in self.pipe.denoise(x, noise, start=index, **self.options(labels[rows])):
                x = step.prev_sample
                self.bar.update()
            self.pipe.check_finite(x)
            x_0.append(x.cpu())
        return torch.cat(x_0)


def _evenly(last: int, count: int) -> list[int]:
    """Return 0, ..., last in at most `count` even strides, both ends included."""
    count = min(count, last)
    return [round(i * last / count) for i in range(count + 1)] if count else [last]


@dataclass(frozen=True)
class ProgressiveGeneration:
    """How images come into being: N of them at S points of the chain."""

    x_t: Tensor  # [N, S, C, H, W], from pure noise to the image
    pred_original_sample: Tensor  # the x_0 predicted from each (Eq. 15); at t = 0 the image itself
    ts: list[int]  # the t of each of the S points; the last one is 0
    T: int  # how many diffusion steps the process has
    seeds: list[int]  # of the N images

    def draw(self, columns: int = 11) -> Image.Image:
        """Draw time from left to right; two rows per image: x_t and the predicted x_0."""
        points = _evenly(len(self.ts) - 1, columns - 1)
        both = torch.stack([self.x_t[:, points], self.pred_original_sample[:, points]], dim=1).flatten(0, 1)
        rows = [text for seed in self.seeds for text in (f"seed {seed}: x_t", "predicted x_0")]
        title = f"Progressive generation: x_t and the x_0 predicted from it, from t = {self.ts[0]} to the image"
        return labelled_grid(to_uint8(both), rows, [f"t = {self.ts[point]}" for point in points], title)

    def frames(self) -> list[Image.Image]:
        """Draw one picture per point of time, for `visualize.save_animation`."""
        both = to_uint8(torch.stack([self.x_t, self.pred_original_sample]))
        columns = [f"seed {seed}" for seed in self.seeds]
        frames = zip(both.unbind(2), self.ts, strict=True)
        return [labelled_grid(x, ["x_t", "predicted x_0"], columns, f"t = {t} of {self.T}") for x, t in frames]


@torch.no_grad()
def progressive_generation(
    pipe: DDPMPipeline, seeds: Iterable[int], *, points: int = 100, **options: Any
) -> ProgressiveGeneration:
    """Draw images and keep x_t and the predicted x_0 on the way (Section 4.3, Figs. 6, 10 and 14).

    Args:
        pipe: Network and sampler; the sampler has to return its predicted x_0, as `ddpm` and `ddim` do.
        seeds: One per image; the images are those of `pipe(seeds=seeds)`.
        points: How many points of the chain to keep beside the image, evenly spaced; all if it has fewer steps.
        options: `num_inference_steps` (T), `batch_size` (64), `class_labels` (one, or one per seed), `guidance_scale`
            (1.0), `eta` (the scheduler's own), `progress` (False).
    """
    if not (seeds := list(seeds)):
        raise UserError("progressive generation needs at least 1 seed, got 0")
    if points < 1:
        raise UserError(f"points must be at least 1, got {points}")
    chain = _Chain(pipe, **options)
    labels, kept, parts = chain.labels(len(seeds)), _evenly(len(chain.ts) - 1, points), []
    with chain.bar:
        chain.expect(len(seeds), [0])
        for rows in chain.batches(len(seeds)):
            pairs = []
            for step in pipe.progressive(seeds=seeds[rows], **chain.options(labels[rows])):
                if step.pred_original_sample is None:
                    name = type(pipe.scheduler).__name__
                    raise UserError(f"{name} does not return the x_0 that it predicts; use the sampler ddpm or ddim")
                if step.index in kept:
                    pairs.append(torch.stack([step.sample, step.pred_original_sample]).cpu())
                chain.bar.update()
            pipe.check_finite(step.prev_sample)
            pairs.append(step.prev_sample.expand(2, *step.prev_sample.shape).cpu())
            parts.append(torch.stack(pairs, dim=2))  # [2, B, S, C, H, W]
    x_t, x_0 = torch.cat(parts, dim=1)
    return ProgressiveGeneration(x_t, x_0, [chain.ts[index] for index in kept], chain.T, seeds)


@dataclass(frozen=True)
class SharedLatents:
    """Images that were one until some t."""

    x_t: Tensor  # [R, C, H, W]: what each row shares
    samples: Tensor  # [R, S, C, H, W]: x_0 ~ p(x_0|x_t)
    ts: list[int]  # the t of each row
    T: int  # how many diffusion steps the process has
    seeds: list[int]  # the first drew all x_t, the others the columns of samples

    def draw(self) -> Image.Image:
        """Draw one row per t: x_t itself, then what was drawn from it."""
        tiles = to_uint8(torch.cat([self.x_t[:, None], self.samples], dim=1))
        columns = ["shared x_t", *(f"seed {seed}" for seed in self.seeds[1:])]
        title = f"Samples that share x_t at one t of {self.T}, and continue from it with noise of their own"
        return labelled_grid(tiles, [f"t = {t}" for t in self.ts], columns, title)


@torch.no_grad()
def shared_latents(
    pipe: DDPMPipeline, seeds: Iterable[int], *, ts: Sequence[int] | None = None, **options: Any
) -> SharedLatents:
    """Draw several x_0 ~ p(x_0|x_t) for each of some x_t of one chain (Section 4.3, Fig. 7).

    Args:
        pipe: Network and sampler, which has to be random: `ddpm`, or `ddim` with an eta above 0.
        seeds: The first one draws the chain that all x_t are from, each of the others one column of samples.
        ts: Where on the chain; T, 3/4 T, 1/2 T and 1/4 T by default, in the paper 1000, 750, 500 and 250.
        options: See `progressive_generation`.
    """
    if len(seeds := list(seeds)) < 2:
        raise UserError(f"a figure of shared latents needs at least 2 seeds, got {len(seeds)}")
    random = isinstance(pipe.scheduler, DDIMScheduler) and options.get("eta")
    if not (random or isinstance(pipe.scheduler, DDPMScheduler)):
        what, how = type(pipe.scheduler).__name__, "use the sampler ddpm, or ddim with an --eta above 0"
        if pipe.distilled_steps:
            what, how = "a distilled model", "draw the figure of the model that it was made from"
        raise UserError(f"{what} is deterministic from x_t on; {how}")
    chain = _Chain(pipe, **options)
    labels = chain.labels(len(seeds))
    indices = chain.indices_of([round(chain.T * share / 4) for share in (4, 3, 2, 1)] if ts is None else ts)
    count, stop = len(seeds) - 1, max(1, *indices)  # `progressive` returns x_T only with its first step
    x_at: dict[int, Tensor] = {}
    with chain.bar:
        chain.expect(count, indices, more=stop)
        for step in pipe.progressive(seeds=seeds[:1], stop=stop, **chain.options(labels[:1])):
            x_at[step.index], x_at[step.index + 1] = step.sample.cpu(), step.prev_sample.cpu()
            chain.bar.update()
        shared = torch.cat([x_at[index] for index in indices])
        samples = [
            chain.decode(x_t.repeat(count, 1, 1, 1), index, seeds[1:], 0, labels[1:])
            for x_t, index in zip(shared, indices, strict=True)
        ]
    return SharedLatents(shared, torch.stack(samples), [chain.ts[index] for index in indices], chain.T, seeds)


@dataclass(frozen=True)
class Interpolation:
    """Images between images."""

    images: Tensor  # [N, L, C, H, W]: N pairs, L values of lambda
    image_a: Tensor  # [N, C, H, W]: the given images, at lambda = 0
    image_b: Tensor  # and at lambda = 1
    lambdas: list[float]  # the L values
    t: int  # after how many diffusion steps the two were mixed
    T: int  # how many the process has
    seeds: list[int]  # of the noise of each pair

    def tiles(self) -> Tensor:  # [N, L + 2, C, H, W]: with the given images at both ends
        return torch.cat([self.image_a[:, None], self.images, self.image_b[:, None]], dim=1)

    def columns(self) -> list[str]:  # their titles; lambda = 0 and 1 are reconstructions
        ends = {0.0: "rec. A", 1.0: "rec. B"}
        return ["source A", *(ends.get(x, f"{x:.3g}") for x in self.lambdas), "source B"]

    def draw(self) -> Image.Image:
        """Draw one row per pair, lambda from left to right."""
        title = f"Interpolation at t = {self.t} of {self.T}: (1 - lambda) x_t + lambda x'_t, decoded; lambda on top"
        return labelled_grid(to_uint8(self.tiles()), [f"seed {seed}" for seed in self.seeds], self.columns(), title)


@dataclass(frozen=True)
class CoarseToFine:
    """Interpolations of one pair: one row for each number of diffusion steps, in the order given."""

    rows: list[Interpolation]

    def draw(self) -> Image.Image:
        """Draw one row per number of steps, lambda from left to right."""
        tiles = to_uint8(torch.cat([row.tiles() for row in self.rows]))
        title = "Coarse-to-fine interpolation: mixed after so many diffusion steps; lambda on top"
        return labelled_grid(tiles, [f"{row.t} steps" for row in self.rows], self.rows[0].columns(), title)


@torch.no_grad()
def interpolate(
    pipe: DDPMPipeline,
    image_a: Any,
    image_b: Any,
    t: int | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    seeds: Iterable[int] | None = None,
    *,
    same_noise: bool = False,
    **options: Any,
) -> Interpolation:
    """Draw images between two images (Section 4.3, Fig. 8): both are diffused to t, mixed, and decoded.

    x_t, x'_t ~ q(x_t|x_0) and the noise of the reverse chain are the same for every lambda of a pair.

    Args:
        pipe: Network and sampler.
        image_a, image_b: As `image` of `DDPMPipeline.__call__`, or equally many of them.
        t: After how many diffusion steps to mix; T / 2 by default, in the paper 500. 0 mixes the images themselves.
        lambdas: Shares of `image_b`, 0 to 1.
        seeds: One per pair; 0, 1, ... by default.
        same_noise: Diffuse both images with the same noise, instead of one of its own for each as in the paper.
        options: See `progressive_generation`; one label per pair.
    """
    chain = _Chain(pipe, **options)
    ts = [chain.T // 2 if t is None else t]
    return _interpolations(chain, (image_a, image_b), ts, lambdas, seeds, same_noise)[0]


@torch.no_grad()
def coarse_to_fine(
    pipe: DDPMPipeline,
    image_a: Any,
    image_b: Any,
    ts: Sequence[int] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    seed: int = 0,
    *,
    same_noise: bool = False,
    **options: Any,
) -> CoarseToFine:
    """Interpolate between one pair of images after different numbers of diffusion steps (Appendix D, Fig. 9).

    Args:
        pipe, image_a, image_b, lambdas, same_noise, options: See `interpolate`.
        ts: Numbers of diffusion steps, one row each; eighths of T by default, in the paper 1000, 875, ..., 125, 0.
        seed: Of the noise, which is the same in all rows.
    """
    chain = _Chain(pipe, **options)
    ts = [round(chain.T * share / 8) for share in range(8, -1, -1)] if ts is None else ts
    return CoarseToFine(_interpolations(chain, (image_a, image_b), ts, lambdas, [seed], same_noise))


def _interpolations(
    chain: _Chain, pair: tuple[Any, Any], ts: Sequence[int], lambdas: Any, seeds: Any, same_noise: bool
) -> list[Interpolation]:
    """Return an interpolation for each t; see `indices_of`."""
    scheduler = chain.pipe.scheduler
    a, b = (images_in_model_range(image, chain.pipe.image_shape) for image in pair)
    seeds = list(range(len(a)) if seeds is None else seeds)
    if not len(a) == len(b) == len(seeds):
        got = f"{len(a)} first and {len(b)} second images and {len(seeds)} seed{'s'[: len(seeds) != 1]}"
        raise UserError(f"interpolation needs at least one pair of images and one seed per pair, got {got}")
    lambdas = [float(x) for x in lambdas]
    if not lambdas or not all(0 <= x <= 1 for x in lambdas):
        raise UserError(f"lambdas must be numbers from 0 to 1, at least one, got {lambdas}")
    indices = chain.indices_of(ts)
    noise_a = SeededNoise(seeds).normal(a.shape)
    seeds_b = [derive_seed(seed, "noise of the second image") for seed in seeds]
    noise_b = noise_a if same_noise else SeededNoise(seeds_b).normal(b.shape)
    share = torch.tensor(lambdas).view(-1, 1, 1, 1)
    mixed = []  # before any step is taken: stock's solvers diffuse to the step that they are at
    for index in indices:
        x_a, x_b = a, b
        if chain.ts[index] > 0:  # x_t, x'_t ~ q(x_t|x_0), Eq. 4
            t = scheduler.timesteps[index : index + 1].cpu()
            x_a, x_b = scheduler.add_noise(a, noise_a, t), scheduler.add_noise(b, noise_b, t)
        mixed.append(((1 - share) * x_a[:, None] + share * x_b[:, None]).flatten(0, 1))  # [N L, C, H, W]
    labels = [label for label in chain.labels(len(a)) for _ in lambdas]
    of_each = [seed for seed in seeds for _ in lambdas]  # the reverse chain's noise is the same for every lambda
    with chain.bar:
        chain.expect(len(of_each), indices)
        made = [chain.decode(x, index, of_each, 1, labels) for x, index in zip(mixed, indices, strict=True)]
    images = [x_0.unflatten(0, (len(a), -1)) for x_0 in made]
    ts = [chain.ts[index] for index in indices]
    return [Interpolation(x, a, b, lambdas, t, chain.T, seeds) for x, t in zip(images, ts, strict=True)]
