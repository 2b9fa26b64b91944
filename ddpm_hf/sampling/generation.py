"""Seeds to files: many images, each a function of its own seed, in any batch size and number of processes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from ..data.class_labels import as_list
from ..diffusion.noise_schedule import check_choice
from ..diffusion.scheduling_ddpm import TIMESTEP_SPACINGS, DDPMScheduler
from ..pipelines.inputs import one_per_image
from ..pipelines.pipeline_ddpm import DDPMPipeline, without_bar
from ..pipelines.schedulers import BEST, check_is_ddpm, checked_eta, set_timesteps
from ..presets import SAMPLERS
from ..utils.digests import digest, weights_digest
from ..utils.errors import NotFiniteError, UserError, in_one_line
from ..utils.files import write_text, write_whole
from ..utils.processes import processes, raise_on_all_ranks
from ..utils.progress import progress_bar
from ..utils.visualize import as_picture, image_grid, save_picture
from .shards import in_order, kept_rows, write_tensors

# Dynamic thresholding with a largest value of 1 is clipping to [-1, 1], the only kind that the solvers have.
_SOLVER_CLIPPING = {"thresholding": True, "sample_max_value": 1.0}
_SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {  # the scheduler's class, and settings of its own
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "variance_type": None}),
    "unipc": (UniPCMultistepScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "sa_solver": (SASolverScheduler, {"variance_type": None}),
}
_NOTE = "sampling.json"  # how the images of a folder were made

_RESAMPLE = {"resample_length": 10, "resample_times": 10}  # RePaint's j and r, where they are not given

# Files that cannot be written; without this check they would become folders.
_OTHER_FILES = re.compile(r"\.(jpe?g|gif|webp|bmp|tiff?|npy|zip|tar|safetensors)", re.IGNORECASE)


def parse_seeds(text: str, name: str = "--seeds", most: int = 10_000_000) -> list[int]:
    """Read `"0-3,8"` as `[0, 1, 2, 3, 8]`; a UserError about `name` for another text, a seed named twice, too many."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,30})(?:-([0-9]{1,30}))?", part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if high - low >= most - len(seeds):  # before a list of them fills the memory
            raise UserError(f"{name} are too many; at most {most} images at a time")
        if not low <= high < 2**63:
            takes = "whole numbers and rising ranges (below 2^63)"
            raise UserError(f"{name} takes {takes}, such as 0-63 or 0,5,8-11, got {part.strip()[:40]!r}")
        seeds.extend(range(low, high + 1))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{name} {text!r} names a seed twice")
    return seeds


def with_sampler(
    pipe: DDPMPipeline,
    sampler: str | None = None,
    variance_type: str | None = None,
    timestep_spacing: str | None = None,
) -> DDPMPipeline:
    """Return a pipeline of the same network with another sampler; a UserError for one, or a setting, that is unknown.

    Args:
        pipe: The network, with the scheduler that it was trained with, whose betas and settings are kept.
        sampler: `ddpm` (Algorithm 2), `ddim` (Song et al. 2021), `dpmsolver++` (Lu et al. 2022), `unipc` (Zhao et
            al. 2023), `heun` (Karras et al. 2022; K steps are 2K - 1 network evaluations), `deis` (Zhang & Chen 2023)
            or `sa_solver` (Xue et al. 2023; random); all clip the predicted x_0 if the pipeline's scheduler does.
            By default `ddpm`; a distilled model has its own, and no other.
        variance_type: For `ddpm`: another variance than the pipeline's, of those that need no other network.
        timestep_spacing: Which timesteps a short chain takes: `leading`, `linspace`, `trailing`, or `best` for those
            that `ddpm-hf best_timesteps` saved. By default the scheduler's own; samplers but `ddpm` take `trailing`
            where that one starts too late.
    """
    if pipe.distilled_steps:
        if sampler or variance_type or timestep_spacing:
            others = "--sampler, --variance_type and --timestep_spacing"
            raise UserError(f"a distilled model has one sampler, its own; leave out {others}")
        return pipe
    sampler = sampler or "ddpm"
    check_choice("sampler", sampler, SAMPLERS)
    if sampler == "ddpm" and isinstance(pipe.scheduler, DDPMScheduler) and not (variance_type or timestep_spacing):
        return pipe
    check_is_ddpm(pipe.scheduler)
    # with what is this class's default, which another class may have another default for
    config = {name: value for name, value in pipe.scheduler.config.items() if name != "_use_default_values"}
    kind, settings = _SAMPLERS[sampler][0], dict(_SAMPLERS[sampler][1])
    if sampler != "ddpm" and config.get("prediction_type") == "posterior_mean":
        raise UserError(f"this network predicts the posterior's mean, which {sampler} cannot use; use ddpm")
    if config.get("clip_sample", True) and sampler in ("dpmsolver++", "unipc", "deis", "sa_solver"):
        settings |= _SOLVER_CLIPPING
    if variance_type is not None:
        trained = config.get("variance_type") or "fixed_small"
        if sampler != "ddpm":
            raise UserError(f"--variance_type {variance_type} is for the ddpm sampler, {sampler} has none")
        if variance_type != trained and "learned" in f"{variance_type} {trained}":
            what = f"does not go with this network, whose variance is {trained!r}"
            raise UserError(f"--variance_type {variance_type} {what}")
        settings["variance_type"] = variance_type
    if timestep_spacing is not None:
        check_choice("--timestep_spacing", timestep_spacing, (*TIMESTEP_SPACINGS, BEST))
        if timestep_spacing != BEST:
            settings["timestep_spacing"] = timestep_spacing
    scheduler = kind.from_config(config, **settings)
    spacing = timestep_spacing or (None if sampler == "ddpm" else "any")
    scheduler.register_to_config(_timestep_spacing=spacing)
    made = DDPMPipeline(pipe.unet, scheduler)
    made.network, made.guide = pipe.network, pipe.guide
    return made


@dataclass(frozen=True)
class SamplingOptions:
    """How a model is sampled; see `with_sampler` for the first three, and `DDPMPipeline` for the others."""

    sampler: str | None = None
    variance_type: str | None = None
    timestep_spacing: str | None = None
    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] | None = None
    epsilon_scale: float | Sequence[float] | None = None

    def pipeline(self, pipe: DDPMPipeline) -> DDPMPipeline:
        """Return a pipeline of the same network with this sampler."""
        return with_sampler(pipe, self.sampler, self.variance_type, self.timestep_spacing)

    @property
    def chain(self) -> dict[str, Any]:
        """What a call of `DDPMPipeline` takes."""
        return {name: getattr(self, name) for name in _CHAIN}

    def recorded(self, pipe: DDPMPipeline) -> dict[str, Any]:
        """Return what decides, beside `pipe.settings`, which image a seed gives, with the defaults' values."""
        steps, eta = pipe.checked_steps(self.num_inference_steps), checked_eta(pipe.scheduler, self.eta)
        guide = None if pipe.guide is None else weights_digest(pipe.guide.unet)
        return {**self.chain, "num_inference_steps": steps, "eta": eta, "guide": guide}


_CHAIN = [field.name for field in fields(SamplingOptions)][3:]  # what is not the sampler's own


def check_sampler(pipe: DDPMPipeline, **options: Any) -> None:
    """Check a pipeline's settings and the options of a call of it, without drawing; raises a UserError."""
    options.setdefault("class_labels", None if pipe.classes.count is None else [])
    try:
        pipe(seeds=[], output_type="pt", **options)
    except UserError:
        raise
    except ValueError as error:  # stock's samplers refuse settings in words of their own
        raise UserError(f"{type(pipe.scheduler).__name__}: {in_one_line(error)}") from error
    if isinstance(pipe.scheduler, DDPMScheduler):
        pipe.scheduler.check_variance()


def generate(
    pipe: DDPMPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    progress: bool = False,
    class_labels: Sequence[int] | None = None,
    image: Tensor | None = None,
    mask_image: Tensor | None = None,
    **options: Any,
) -> Iterator[tuple[list[int], Tensor]]:
    """Draw one image per seed; yield each batch's seeds and images, `[B, C, H, W]` uint8.

    Args:
        pipe: Network and sampler.
        seeds: One per image; an image depends on its own seed only.
        batch_size: Images at a time.
        progress: Show one progress bar over all steps of all batches.
        class_labels: One per seed, for class-conditional networks.
        image, mask_image: Start from these, `[n, C, H, W]` uint8 and `[n, 1, H, W]` bool; one, or one per seed.
        options: `num_inference_steps`, `guidance_scale`, `guidance_interval`, `epsilon_scale`, `eta`, `strength`,
            `resample_length` and `resample_times` of `DDPMPipeline`. Counts that disagree raise a UserError.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, got {batch_size}")
    if class_labels is not None:
        _check_labels(class_labels, seeds)
    set_timesteps(pipe.scheduler, pipe.checked_steps(options.get("num_inference_steps")))
    steps = len(pipe.scheduler.timesteps)  # what is wrong is said before a progress bar is shown
    strength = options.get("strength")
    if strength is not None and 0 <= strength <= 1:  # the pipeline refuses others
        steps = round(steps * strength)
    if mask_image is not None:
        steps *= options.get("resample_times", _RESAMPLE["resample_times"])
    with progress_bar(len(seeds), "sampling", show=progress) as bar:

        def advance(*_: Any) -> None:
            bar.update(len(seeds[rows]) / steps)

        for start in range(0, len(seeds), batch_size):
            rows = slice(start, start + batch_size)
            own: dict[str, Any] = {"image": _share(image, rows), "mask_image": _share(mask_image, rows)}
            own["class_labels"] = None if class_labels is None else list(class_labels[rows])
            with without_bar(pipe):
                drawn: Any = pipe(seeds=seeds[rows], output_type="pt", callback_on_step_end=advance, **own, **options)
            yield list(seeds[rows]), (drawn.images * 255).round().to(torch.uint8).cpu()


def _check_labels(class_labels: Sequence[Any], seeds: Sequence[int]) -> None:
    if len(class_labels) != len(seeds):
        raise UserError(f"got {len(class_labels)} --class_labels for {len(seeds)} seeds; give one per seed")


def _share(values: Tensor | None, rows: slice | list[int]) -> Tensor | None:
    """Select the values of some seeds, of one for all seeds or one per seed."""
    return values if values is None or len(values) == 1 else values[rows]


def class_sequence(pipe: DDPMPipeline, text: str | None, count: int) -> list[int] | None:
    """Read `"cats,dogs"` or `"0,1"` (see `Classes.index`) as class indices for `count` images, over and over."""
    if text is None:
        return None
    parts = [text] if text in pipe.classes.names else text.split(",")  # a name may hold a comma
    chosen = [pipe.classes.index(part.strip()) for part in parts]
    return [chosen[i % len(chosen)] for i in range(count)]


def write_samples(
    pipe: DDPMPipeline,
    seeds: Sequence[int],
    output: str | Path,
    *,
    batch_size: int = 64,
    prepare: Callable[[DDPMPipeline], Any] | None = None,
    **options: Any,
) -> int:
    """Draw one image per seed into files, which appear complete or not at all; return how many were drawn now.

    An interrupted run resumes where it stopped. Under `accelerate launch` or torchrun every process draws a share.

    Args:
        pipe, seeds, batch_size, options: See `generate`.
        output: `FILE.png` for one grid, `FILE.npz` for one uint8 array `arr_0` of shape `[N, H, W, C]` in the order of
            the seeds (what FID tools read), else a folder of `<thousand>/<seed>.png`.
        prepare: Called with the pipeline on every process when all is checked, for what takes time, such as
            `inference.optimize_for_inference`.

    Raises:
        UserError: An output that cannot be written, or that holds other images.
        NotFiniteError: The network made NaN or infinities; the batches before are kept.
    """
    output, here = Path(output), processes()
    kind = _checked_kind(output, pipe)
    # Where finished images are kept: the folder itself, or one beside the file that is made of it in the end.
    folder = output if kind == "folder" else output.with_name(f".{output.name}.parts")
    with raise_on_all_ranks():  # so all have looked at what is finished before anybody adds to it
        drawn = _finished(folder, kind)
        _check_options(pipe, seeds, options)
        if here.is_main_process:
            _claim(folder, bool(drawn), pipe, seeds, options)
    if prepare is not None:
        prepare(pipe)
    missing = [i for i, seed in enumerate(seeds) if seed not in drawn]
    mine = missing[here.process_index :: here.num_processes]
    if (labels := options.get("class_labels")) is not None:
        options["class_labels"] = [labels[i] for i in mine]
    for name in ("image", "mask_image"):
        options[name] = _share(options.get(name), mine)
    options["progress"] = options.get("progress", False) and here.is_main_process
    try:
        with raise_on_all_ranks():
            for part, images in generate(pipe, [seeds[i] for i in mine], batch_size=batch_size, **options):
                if kind == "folder":
                    for seed, pixels in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
                        file = folder / f"{seed // 1000:05d}" / f"{seed:08d}.png"
                        save_picture(as_picture(pixels), file, durable=False)  # what a crash empties is drawn again
                else:
                    write_tensors(folder / f"{part[0]}.safetensors", {"ids": torch.tensor(part), "images": images})
    except NotFiniteError:
        if here.num_processes == 1 and not _finished(folder, kind):  # leave nothing behind
            (folder / _NOTE).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
        raise
    with raise_on_all_ranks():
        if kind != "folder" and here.is_main_process:
            images = in_order(kept_rows(folder), seeds, folder)["images"]
            if kind == ".png":
                save_picture(image_grid(images), output)
            else:
                write_whole(output, lambda partial: _save_npz(partial, images))
            shutil.rmtree(folder)
    return len(missing)


def _checked_kind(output: Path, pipe: DDPMPipeline) -> str:
    """Return what to write: `.png`, `.npz` or `folder`."""
    suffix = output.suffix.lower()
    kind = suffix if suffix in (".png", ".npz") else "folder"
    if _OTHER_FILES.fullmatch(suffix):
        raise UserError(f"--output must be a folder, FILE.png or FILE.npz, got {str(output)!r}")
    if output.is_file() if kind == "folder" else output.is_dir():
        raise UserError(f"--output {str(output)!r} is a {'folder' if output.is_dir() else 'file'}; name another")
    if kind != ".npz" and pipe.image_shape[0] not in (1, 3):
        raise UserError(f"images of {pipe.image_shape[0]} channels are no PNGs; write --output FILE.npz")
    return kind


def _check_options(pipe: DDPMPipeline, seeds: Sequence[int], options: dict[str, Any]) -> None:
    """Check everything that images are drawn with before anything is written; class labels become indices."""
    given = {name: value for name, value in options.items() if name not in ("progress", "class_labels")}
    for name in ("image", "mask_image"):
        if given.get(name) is not None:
            given[name] = one_per_image(given[name], len(seeds), name)[:1]
    if (labels := options.get("class_labels")) is not None:
        if pipe.classes.count is not None:
            labels = options["class_labels"] = [pipe.classes.index(label) for label in as_list(labels)]
        _check_labels(labels, seeds)
        given["class_labels"] = []
    check_sampler(pipe, **{"class_labels": None, **given})


def _finished(folder: Path, kind: str) -> set[int]:
    """Return the seeds whose images are there."""
    if kind != "folder":
        return {seed for part in kept_rows(folder) for seed in part["ids"].tolist()}
    files = folder.glob("[0-9]*/[0-9]*.png")
    # A crash of the machine may leave a file without content.
    return {int(file.stem) for file in files if file.stem.isdecimal() and file.stat().st_size}


def _save_npz(path: Path, images: Tensor) -> None:
    with path.open("wb") as file:  # to a name numpy would add .npz
        np.savez(file, images.permute(0, 2, 3, 1).numpy())


def _claim(folder: Path, has_images: bool, pipe: DDPMPipeline, seeds: Sequence[int], options: dict[str, Any]) -> None:
    """Note in the folder how its images are made; a UserError where it holds images that were made otherwise."""
    inpainting = options.get("mask_image") is not None
    made = {
        "weights": weights_digest(pipe.unet),
        **pipe.settings,
        **SamplingOptions(**{name: options[name] for name in _CHAIN if name in options}).recorded(pipe),
        "strength": options.get("strength"),
        **{name: options.get(name, default) if inpainting else None for name, default in _RESAMPLE.items()},
    }
    # What each image has of its own, by its seed.
    own: dict[str, dict[str, Any]] = {}
    for name in ("class_labels", "image", "mask_image"):
        values = [] if options.get(name) is None else list(options[name])
        if name != "class_labels":
            one_for_all = len(values) == 1
            values = [digest(pixels)[:16] for pixels in values] * (len(seeds) if one_for_all else 1)
        own[name] = dict(zip(map(str, seeds), values, strict=True)) if values else {}
    note = folder / _NOTE
    if has_images:
        try:
            there = json.loads(note.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            what = f"holds images, and no {_NOTE} that can be read and says how they were made"
            raise UserError(f"{str(folder)!r} {what}; name another --output") from None
        in_file = json.loads(json.dumps(made))  # a tuple is a list there
        different = [key for key, value in in_file.items() if there.get(key) != value]
        for name, now in own.items():
            before = there.get(name, {})
            if bool(before) != bool(now) or before | now != now | before:
                different.append(name)
            own[name] = {**before, **now}
        if different:
            what = f"holds images that were made with other {' and '.join(different)}"
            raise UserError(f"{str(folder)!r} {what}; name another --output, or remove it first")
    write_text(note, json.dumps(made | own, indent=2) + "\n")
