"""What visitors of a Space can ask for: sampling that can be watched, interpolation between two seeds, bits/dim of an
uploaded image.

Every argument is checked, as it may come from anybody. Nothing needs the network if the models are folders.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image

from ..data.decoding import DecodeOptions, crop_box, read_image
from ..data.tensors import to_model_range, to_uint8
from ..diffusion.likelihood import stratified_bits_per_dim
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.unet_2d import check_weights, parameter_count
from ..pipelines.figures import interpolate
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..sampling.generation import SAMPLERS, parse_seeds, with_sampler
from ..utils.errors import UserError
from ..utils.text import nearest
from ..utils.visualize import image_grid

ANY_CLASS = "any"
_LARGEST_SEED = 2**63 - 1
_LONGEST_TEXT = 200
_FRAMES = 20  # pictures on the way; a slow network shows one per second besides
_NUM_EVALUATIONS = 50  # for bits/dim, as in the paper's tables here
_ORIENTATION = 0x0112  # Exif tag


@dataclass(frozen=True)
class Limits:
    """What one visitor can ask for.

    Attributes:
        images: At a time.
        steps: Of the sampler.
        waiting: How many visitors the queue holds; the next one is told to come later.
        pixels: Of an uploaded image.
        megabytes: Of an uploaded file.
    """

    images: int = 16
    steps: int = 1000
    waiting: int = 20
    pixels: int = 25_000_000
    megabytes: int = 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"the limit of {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Progress:
    """How far sampling has come.

    Attributes:
        x_t: The noisy images, one grid.
        pred_original_sample: The x_0 predicted from them, or `None` where the sampler does not return it.
        images: The finished ones, in the order of their seeds; none before the end, and none where it was stopped.
        text: Where in the chain, and how fast.
    """

    x_t: Image.Image
    pred_original_sample: Image.Image | None
    images: list[Image.Image]
    text: str


def checked_seeds(text: Any, most: int) -> list[int]:
    """`"0-3,8"` to `[0, 1, 2, 3, 8]`, without ever making a list longer than `most`.

    Raises:
        ValueError: Not such a text, a seed twice or beyond 2^63 - 1, or too many.
    """
    text = str(text or "").strip()
    parts = text.split(",")
    if len(text) > _LONGEST_TEXT or not all(re.fullmatch(r"\s*[0-9]{1,19}(-[0-9]{1,19})?\s*", part) for part in parts):
        raise UserError("seeds are whole numbers and ranges, such as 0-7 or 0,5,8-11")
    ends = [[int(end) for end in part.split("-")] for part in parts]
    if max(max(pair) for pair in ends) > _LARGEST_SEED:
        raise UserError(f"a seed is at most {_LARGEST_SEED}")
    count = sum(max(0, pair[-1] - pair[0] + 1) for pair in ends)
    if count > most:
        raise UserError(f"{count} seeds are too many here; at most {most} images at a time")
    try:
        return parse_seeds(text)
    except UserError as error:  # it speaks of a flag, which there is none of here
        raise UserError(str(error).replace("--seeds", "the seeds")) from None


def checked_number(value: Any, name: str, low: float, high: float, whole: bool = True) -> float:
    """A number within its limits.

    Raises:
        ValueError: It is none, or outside.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} must be {kind} from {low} to {high}, got {str(value)[:40]}")
    return number


class Demo:
    """What visitors can ask for.

    Args:
        names: The models to choose between: folders, or names on the Hub.
        limits: Of a request.
        folder: Where relative folders are looked for first; then in the working directory.

    Raises:
        ValueError: No model, or one twice.
    """

    def __init__(self, names: Sequence[str], limits: Limits | None = None, folder: Path | None = None):
        self.names = [name.strip() for name in names if name.strip()]
        self.limits = limits or Limits()
        self.folder = folder
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"name at least one model, and each one once, such as runs/digits,org/name; got {names}")
        self._lock = threading.Lock()
        self._loaded: dict[str, DDPMPipeline] = {}

    # ------------------------------------------------------------------ models

    def load(self, name: Any) -> DDPMPipeline:
        """One of the models; it stays in memory.

        Raises:
            ValueError, OSError: It is none of them, or cannot be loaded, or draws no pictures.
        """
        if name not in self.names:  # before anything is looked up: a visitor must not choose what is downloaded
            raise UserError(f"there is no model {str(name)[:80]!r} here, only {', '.join(self.names)}")
        with self._lock:
            if name not in self._loaded:
                beside = None if self.folder is None else self.folder / name
                logging.disable_progress_bar()
                pipe = DDPMPipeline.from_pretrained(beside if beside is not None and beside.is_dir() else name)
                if pipe.image_shape[0] not in (1, 3):
                    raise UserError(f"{name!r} makes images of {pipe.image_shape[0]} channels, which are no pictures")
                check_weights(pipe.unet)
                self._loaded[name] = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
            return self._loaded[name]

    def pipeline(self, model: Any, sampler: Any = "ddpm") -> DDPMPipeline:
        """A model with a sampler, which has a memory: every request gets one of its own."""
        if sampler not in SAMPLERS:
            known = f"it must be one of {', '.join(SAMPLERS)}"
            raise UserError(f"unknown sampler {str(sampler)[:40]!r}{nearest(str(sampler)[:40], SAMPLERS)}; {known}")
        pipe = with_sampler(self.load(model), sampler)
        return DDPMPipeline(pipe.unet, type(pipe.scheduler).from_config(pipe.scheduler.config))

    def classes(self, model: Any) -> list[str]:
        """What a visitor can choose between; nothing for an unconditional network."""
        pipe = self.load(model)
        classes = pipe.classes
        known = [name for i, name in enumerate(classes.all_names()) if i != classes.null]
        return [ANY_CLASS, *known] if classes.null is not None and ANY_CLASS not in known else known

    def describe(self, model: Any) -> str:
        """One line about a model."""
        pipe = self.load(model)
        channels, height, width = pipe.image_shape
        count = parameter_count(pipe.unet)
        colours = "grey" if channels == 1 else "colour"
        T = pipe.scheduler.config.num_train_timesteps
        return f"{colours} images of {height} x {width} pixels, {count:,} parameters, T = {T}"

    def _label(self, model: Any, label: Any) -> int | None:
        """The class, by its name or number as `classes` lists it.

        Raises:
            ValueError: There is no such class.
        """
        known, classes = self.classes(model), self.load(model).classes
        unsaid = label in (None, "")
        if (unsaid or (label == ANY_CLASS and ANY_CLASS not in classes.names)) and (
            not known or classes.null is not None
        ):
            return None
        if unsaid:
            label = known[0]
        return classes.index(str(label)[:_LONGEST_TEXT])

    def _options(self, model: Any, steps: Any, label: Any, guidance: Any) -> dict[str, Any]:
        pipe = self.load(model)
        most = min(self.limits.steps, pipe.scheduler.config.num_train_timesteps)
        guidance = checked_number(guidance, "guidance", 0, 20, whole=False)
        return {
            "num_inference_steps": int(checked_number(steps, "the number of steps", 1, most)),
            "class_labels": self._label(model, label),
            "guidance_scale": 1.0 if pipe.classes.null is None else guidance,
        }

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        seeds: Any,
        steps: Any = 50,
        sampler: Any = "ddim",
        label: Any = None,
        guidance: Any = 1,
        stop: threading.Event | None = None,
    ) -> Iterator[Progress]:
        """Draw one image per seed: those of `pipe(seeds=seeds)`.

        Args:
            model: One of `names`.
            seeds: Such as `0-7` or `0,5,8-11`.
            steps, sampler: Of the chain.
            label: A class by name or number, for class-conditional networks.
            guidance: Guidance scale, 0 to 20; for networks trained with class dropout.
            stop: Ends it after the step at hand, once it is set.

        Yields:
            How far it has come, now and then; the last one has the images.

        Raises:
            ValueError: An argument cannot be taken.
        """
        chosen = checked_seeds(seeds, self.limits.images)
        options = self._options(model, steps, label, guidance)
        pipe = self.pipeline(model, sampler)
        count, T = options["num_inference_steps"], pipe.scheduler.config.num_train_timesteps
        shown = {round(i * (count - 1) / _FRAMES) for i in range(_FRAMES)}
        worked, last = 0.0, time.monotonic()  # the time in which a visitor is shown pictures is not the network's
        resumed = last
        for step in pipe.progressive(seeds=chosen, **options):
            x_t, x_0 = step.prev_sample, step.pred_original_sample
            done, now = step.index + 1, time.monotonic()
            stopped = stop is not None and stop.is_set()
            if done < count and (step.index in shown or now - last > 1 or stopped):
                worked += now - resumed
                text = f"step {done} of {count}, t = {step.timestep} of {T}: {done / worked:.1f} steps/s"
                text = f"stopped at {text}" if stopped else text
                pipe.check_finite(x_t)
                yield Progress(_picture(x_t), None if x_0 is None else _picture(x_0), [], text)
                if stopped:
                    return
                last = resumed = time.monotonic()
        images = pipe.as_output(x_t, "pil")
        worked += time.monotonic() - resumed
        text = (
            f"{len(chosen)} image{'s'[: len(chosen) > 1]} in {worked:.2f} s: {count} steps of {sampler}, "
            f"{count / worked:.1f} steps/s"
        )
        yield Progress(_picture(x_t), None if x_0 is None else _picture(x_t), images, text)

    @torch.no_grad()
    def interpolate(
        self,
        model: Any,
        seed_a: Any,
        seed_b: Any,
        share: Any = 0.5,
        steps: Any = 50,
        sampler: Any = "ddim",
        label: Any = None,
        guidance: Any = 1,
    ) -> Iterator[tuple[Image.Image | None, str]]:
        """Images between those of two seeds (Fig. 8): both are drawn, diffused to t, mixed, and decoded.

        Args:
            seed_a, seed_b: Two whole numbers.
            share: t / T, 0 to 1: how much of the two is forgotten before they are mixed.
            model, steps, sampler, label, guidance: See `sample`.

        Yields:
            The figure, `None` until it is there, and what is being done.

        Raises:
            ValueError: An argument cannot be taken.
        """
        a, b = (int(checked_number(seed, "a seed", 0, 2**53)) for seed in (seed_a, seed_b))
        t_share = checked_number(share, "t / T", 0, 1, whole=False)
        options = self._options(model, steps, label, guidance)
        pipe = self.pipeline(model, sampler)
        pipe.set_progress_bar_config(disable=True)
        yield None, f"drawing the images of seeds {a} and {b}"
        start = time.monotonic()
        (ends,) = pipe(seeds=[a, b], output_type="pt", return_dict=False, **options)
        ends = ends.cpu()
        worked = time.monotonic() - start
        yield None, "interpolating between them"
        start = time.monotonic()
        t = round(t_share * pipe.scheduler.config.num_train_timesteps)
        figure = interpolate(pipe, ends[:1], ends[1:], t, seeds=[a], batch_size=self.limits.images, **options)
        worked += time.monotonic() - start
        yield figure.draw(), f"{len(figure.lambdas)} images between two, mixed at t = {figure.t}, in {worked:.2f} s"

    # ------------------------------------------------------------------ bits/dim

    @torch.no_grad()
    def bits_per_dim(self, model: Any, file: str | None, label: Any = None) -> tuple[Image.Image, str]:
        """The bound on an image's -log p in bits/dim, from few network evaluations.

        Args:
            file: The path of an image file.
            label: See `sample`.

        Returns:
            The image as the network saw it, enlarged; the estimate, its error, and how the image was converted.

        Raises:
            ValueError: The file cannot be read or is too large, or the model has no likelihood.
        """
        if not file:
            raise UserError("choose an image file first")
        pipe = self.load(model)
        if not isinstance(pipe.scheduler, DDPMScheduler):
            raise UserError(f"{model!r} was saved with a {type(pipe.scheduler).__name__}, which has no likelihood")
        chosen = self._label(model, label)
        channels, height, width = pipe.image_shape
        converted = describe_conversion(Path(file), pipe.image_shape, self.limits.pixels)
        pixels = torch.from_numpy(read_image(Path(file), DecodeOptions(channels, (height, width))).copy())[None]
        labels: dict[str, Any] = {}
        if pipe.unet.config.num_class_embeds is not None:
            label_index = pipe.classes.null if chosen is None else chosen
            labels["class_labels"] = torch.tensor([label_index], device=pipe.device)
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        evaluations = min(_NUM_EVALUATIONS, 2 * scheduler.config.num_train_timesteps)
        start = time.monotonic()
        estimate = stratified_bits_per_dim(
            pipe.unet,
            scheduler,
            to_model_range(pixels).to(pipe.device),
            num_evaluations=evaluations,
            batch_size=self.limits.images,
            **labels,
        )
        took = time.monotonic() - start
        text = (
            f"**{estimate.mean:.2f} ± {estimate.sampling_standard_error:.2f} bits/dim**: the variational bound, "
            f"estimated from {evaluations} network evaluations in {took:.2f} s, with its standard error.\n\n"
            f"What the network saw: {converted}."
        )
        return image_grid(pixels, tile=256), text


def _picture(images: torch.Tensor) -> Image.Image:
    """One grid of `[N, C, H, W]` in [-1, 1]."""
    return image_grid(to_uint8(images), columns=min(4, len(images)), tile=48)


def describe_conversion(path: Path, image_shape: tuple[int, int, int], most_pixels: int) -> str:
    """What `read_image` makes of an image file, in words, told before it is decoded.

    Args:
        path: The file.
        image_shape: Channels, height and width that are wanted.
        most_pixels: How many it may have.

    Raises:
        ValueError: It is no image, or has more pixels.
    """
    channels, height, width = image_shape
    try:
        with Image.open(path) as image:
            kind, mode, size = image.format, image.mode, image.size
            turned = image.getexif().get(_ORIENTATION, 1)
            animated, transparent = getattr(image, "is_animated", False), image.has_transparency_data
    except Exception:  # whatever Pillow's decoders raise; reading it says what it is
        read_image(path, DecodeOptions(channels, (height, width)))
        raise UserError("the file could not be read") from None
    if size[0] * size[1] > most_pixels:
        raise UserError(
            f"the image has {size[0]} x {size[1]} pixels; at most {most_pixels / 1e6:g} million are taken here"
        )
    words = [f"{kind} of {size[0]} x {size[1]} pixels (mode {mode})"]
    if animated:
        words.append("its first frame")
    if turned in range(2, 9):
        words.append("turned upright")
    if turned in range(5, 9):
        size = size[::-1]
    if transparent:
        words.append("white under transparent pixels")
    if channels == 1 and mode not in ("L", "1"):
        words.append("made grey")
    elif channels == 3 and mode != "RGB":
        words.append("made RGB")
    left, top, right, bottom = crop_box(size[1], size[0], (height, width))
    if (right - left, bottom - top) != size:
        words.append(f"the middle {right - left} x {bottom - top} of it")
    if (right - left, bottom - top) != (width, height):
        words.append(f"resized to {width} x {height}")
    return ", ".join(words)
