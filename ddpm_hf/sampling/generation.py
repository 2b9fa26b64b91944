"""Seeds to files: many images, each a function of its own seed, in any batch size and number of processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.class_labels import as_list
from ..diffusion.scheduling_ddpm import TIMESTEP_SPACINGS, DDPMScheduler, check_choice
from ..pipelines.inputs import one_per_image
from ..pipelines.pipeline_ddpm import DDPMPipeline, without_bar
from ..pipelines.schedulers import check_is_ddpm
from ..utils.digests import digest, weights_digest
from ..utils.errors import NotFiniteError, UserError
from ..utils.files import write_text, write_whole
from ..utils.processes import processes, together
from ..utils.text import nearest
from ..utils.visualize import image_grid, save_picture
from .shards import read_tensors, write_tensors

# Dynamic thresholding with a largest value of 1 is clipping to [-1, 1], the only kind that the solvers have.
_SOLVER_CLIPPING = {"thresholding": True, "sample_max_value": 1.0}
_SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "variance_type": None}),
    "unipc": (UniPCMultistepScheduler, {}),
}
SAMPLERS = tuple(_SAMPLERS)

# How the images of a folder were made.
_NOTE = "sampling.json"

# Suffixes of files that cannot be written; without this check they would become folders.
_OTHER_FILES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy", ".zip", ".tar", ".safetensors")


def parse_seeds(text: str) -> list[int]:
    """`"0-3,8"` to `[0, 1, 2, 3, 8]`.

    Raises:
        ValueError: Not a list of whole numbers and ranges, or a seed given twice.
    """
    seeds: list[int] = []
    most, largest = 10_000_000, 2**63 - 1  # a list of more would fill the memory before anything is said
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--seeds takes whole numbers and ranges such as 0-63 or 0,5,8-11, got {text!r}")
        low, high = int(first), int(last or first)
        if high > largest or high - low >= most:
            raise UserError(f"--seeds takes numbers up to {largest}, and at most {most} of them, got {part.strip()!r}")
        if high < low:
            raise UserError(f"the range {part.strip()!r} of --seeds is empty; write {high}-{low}")
        seeds.extend(range(low, high + 1))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r} names a seed twice")
    return seeds


def with_sampler(
    pipe: DDPMPipeline, sampler: str, variance_type: str | None = None, timestep_spacing: str | None = None
) -> DDPMPipeline:
    """The same network with another sampler.

    Args:
        pipe: The network, with the scheduler that it was trained with; another one's betas and settings are kept.
        sampler: `ddpm` (Algorithm 2), `ddim` (Song et al. 2021), `dpmsolver++` (Lu et al. 2022) or `unipc` (Zhao et
            al. 2023); all clip the predicted x_0 if the pipeline's scheduler does.
        variance_type: For `ddpm`: another variance than the pipeline's, of those that need no other network.
        timestep_spacing: Which timesteps a short chain takes: `leading`, `linspace` or `trailing`.

    Raises:
        ValueError: An unknown sampler, or a setting that it does not have.
    """
    if sampler not in _SAMPLERS:
        raise UserError(
            f"unknown sampler {sampler!r}{nearest(sampler, SAMPLERS)}; it must be one of {', '.join(SAMPLERS)}"
        )
    if sampler == "ddpm" and isinstance(pipe.scheduler, DDPMScheduler) and not (variance_type or timestep_spacing):
        return pipe
    check_is_ddpm(pipe.scheduler)
    kind, options = _SAMPLERS[sampler]
    config = pipe.scheduler.config
    if sampler != "ddpm" and config.get("prediction_type") == "posterior_mean":
        raise UserError(f"this network predicts the posterior's mean, which {sampler} cannot use; use ddpm")
    if config.get("clip_sample", True) and sampler in ("dpmsolver++", "unipc"):
        options = {**options, **_SOLVER_CLIPPING}
    if variance_type is not None:
        if sampler != "ddpm":
            raise UserError(f"variance_type={variance_type!r} is for the ddpm sampler, {sampler} has none")
        trained = config.get("variance_type") or "fixed_small"
        if variance_type != trained and "learned" in f"{variance_type} {trained}":
            raise UserError(
                f"variance_type={variance_type!r} does not go with this network, whose variance is {trained!r}"
            )
        options = {**options, "variance_type": variance_type}
    if timestep_spacing is not None:
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        options = {**options, "timestep_spacing": timestep_spacing}
    made = DDPMPipeline(pipe.unet, kind.from_config(config, **options))
    made.network = pipe.network
    return made


def check_sampler(pipe: DDPMPipeline, **options: Any) -> None:
    """Hear all that a pipeline has to say against its settings, without drawing anything.

    Args:
        pipe: Network and sampler.
        options: See `DDPMPipeline`; `class_labels` of none where they will be given with the images.

    Raises:
        ValueError: One of them does not go with the others, the network or the sampler.
    """
    unconditional = pipe.classes.count is None and pipe.classes.embedding is None
    options.setdefault("class_labels", None if unconditional else [])
    try:
        pipe(seeds=[], output_type="pt", **options)
    except UserError:
        raise
    except ValueError as error:  # stock's samplers refuse settings in words of their own
        raise UserError(f"{type(pipe.scheduler).__name__}: {' '.join(str(error).split())}") from error
    if isinstance(pipe.scheduler, DDPMScheduler):
        pipe.scheduler.check_variance()


def generate(
    pipe: DDPMPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    num_inference_steps: int | None = None,
    progress: bool = False,
    desc: str = "sampling",
    class_labels: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    eta: float | None = None,
    image: Tensor | None = None,
    mask_image: Tensor | None = None,
    strength: float | None = None,
    resample_length: int = 10,
    resample_times: int = 10,
) -> Iterator[tuple[list[int], Tensor]]:
    """Draw one image per seed, batch by batch.

    Args:
        pipe: Network and sampler.
        seeds: One per image; an image depends on its own seed only.
        batch_size: Images at a time.
        num_inference_steps: Steps of the sampler; the chain's T by default.
        progress: One progress bar over all steps of all batches.
        desc: Its label.
        class_labels: One per seed, for class-conditional networks.
        guidance_scale, eta, strength, resample_length, resample_times: See `DDPMPipeline`.
        image, mask_image: Start from these, `[n, C, H, W]` uint8 and `[n, 1, H, W]` bool; one, or one per seed.

    Yields:
        The seeds of a batch, and its images, `[B, C, H, W]` uint8.

    Raises:
        ValueError: No batch, counts that disagree, or what `DDPMPipeline` refuses.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    _check_labels(class_labels, seeds)
    steps = pipe.checked_steps(num_inference_steps)  # before a progress bar is shown
    if strength is not None and 0 <= strength <= 1:  # the pipeline refuses others
        steps = round(steps * strength)
    if mask_image is not None:
        steps *= resample_times
    batches = [list(seeds[start : start + batch_size]) for start in range(0, len(seeds), batch_size)]
    with tqdm(total=len(batches) * steps, desc=desc, unit="step", disable=not progress) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        for i, part in enumerate(batches):
            rows = slice(i * batch_size, (i + 1) * batch_size)
            with without_bar(pipe):
                (images,) = pipe(
                    seeds=part,
                    num_inference_steps=num_inference_steps,
                    output_type="pt",
                    return_dict=False,
                    class_labels=None if class_labels is None else list(class_labels[rows]),
                    guidance_scale=guidance_scale,
                    eta=eta,
                    image=_share(image, rows),
                    mask_image=_share(mask_image, rows),
                    strength=strength,
                    resample_length=resample_length,
                    resample_times=resample_times,
                    callback_on_step_end=advance,
                )
            yield part, (images * 255).round().to(torch.uint8).cpu()


def _check_labels(class_labels: Sequence[int] | None, seeds: Sequence[int]) -> None:
    if class_labels is not None and len(class_labels) != len(seeds):
        raise UserError(f"got {len(class_labels)} class_labels for {len(seeds)} seeds; give one per seed")


def _share(values: Tensor | None, rows: slice | list[int]) -> Tensor | None:
    """Those of some seeds, of one for all seeds or one per seed."""
    return values if values is None or len(values) == 1 else values[rows]


def class_sequence(pipe: DDPMPipeline, text: str | None, count: int) -> list[int] | None:
    """Read `"cats,dogs"` or `"0,1"` (see `Classes.index`): class indices for `count` images, in turn.

    Raises:
        ValueError: A class that the network does not have.
    """
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
    """Draw one image per seed into files, which appear complete or not at all.

    A run that was broken off goes on where it stopped. Under `accelerate launch` or torchrun every process draws a
    share of the images.

    Args:
        pipe: Network and sampler.
        seeds: One per image.
        output: `FILE.png` for one grid, `FILE.npz` for one uint8 array `arr_0` of shape `[N, H, W, C]` in the order of
            the seeds (what FID tools read), else a folder of `<thousand>/<seed>.png`.
        batch_size, options: See `generate`.
        prepare: Called with the pipeline on every process when all is checked, for what takes time, such as
            `inference.optimize_for_inference`.

    Returns:
        How many images were drawn now, by all processes together.

    Raises:
        ValueError: An output that cannot be written, or that holds other images.
        NotFiniteError: The network made NaN or infinities; the batches before are kept.
    """
    output = Path(output)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    kind = output.suffix.lower() if output.suffix.lower() in (".png", ".npz") else "folder"
    if output.suffix.lower() in _OTHER_FILES:
        raise UserError(f"--output must be a folder, FILE.png or FILE.npz, got {str(output)!r}")
    if output.is_dir() if kind != "folder" else output.is_file():
        raise UserError(f"--output {str(output)!r} is a {'folder' if output.is_dir() else 'file'}; name another")
    if kind != ".npz" and pipe.image_shape[0] not in (1, 3):
        raise UserError(f"images of {pipe.image_shape[0]} channels are no PNGs; write --output FILE.npz")
    here = processes()
    # What is drawn so far: the folder itself, or one beside the file that is made of it in the end.
    parts = _Parts(output.with_name(f".{output.name}.parts"))
    store = _Folder(output) if kind == "folder" else parts
    with together():  # so all have looked at what is finished before anybody adds to it
        drawn = store.finished()
        # All arguments are checked before anything is written.
        given = {name: value for name, value in options.items() if name not in ("progress", "desc", "class_labels")}
        for name in ("image", "mask_image"):
            if given.get(name) is not None:
                given[name] = one_per_image(given[name], len(seeds), name)[:1]
        if options.get("class_labels") is not None and pipe.classes.count is not None:
            options["class_labels"] = [pipe.classes.index(label) for label in as_list(options["class_labels"])]
        _check_labels(options.get("class_labels"), seeds)
        check_sampler(pipe, class_labels=None if options.get("class_labels") is None else [], **given)
        if here.is_main_process:
            _claim(store.path, bool(drawn), pipe, seeds, options)
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
        with together():
            for part, images in generate(pipe, [seeds[i] for i in mine], batch_size=batch_size, **options):
                store.add(part, images)
    except NotFiniteError:
        if here.num_processes == 1 and not store.finished():
            _unclaim(store.path)
        raise
    with together():
        if kind != "folder" and here.is_main_process:
            images = parts.read(seeds)
            if kind == ".png":
                save_picture(image_grid(images), output)
            else:
                _write_npz(output, images)
            shutil.rmtree(parts.path)
    return len(missing)


def _write_npz(path: Path, images: Tensor) -> None:
    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # to a name numpy would add .npz
            np.savez(file, images.permute(0, 2, 3, 1).numpy())

    write_whole(path, write)


class _Folder:
    """Images as PNGs, a thousand to a subfolder."""

    def __init__(self, path: Path):
        self.path = path

    def _file(self, seed: int) -> Path:
        return self.path / f"{seed // 1000:05d}" / f"{seed:08d}.png"

    def finished(self) -> set[int]:
        # A crash of the machine may leave a file without content.
        files = self.path.glob("[0-9]*/[0-9]*.png")
        return {int(file.stem) for file in files if file.stem.isdecimal() and file.stat().st_size}

    def add(self, seeds: Sequence[int], images: Tensor) -> None:
        for seed, image in zip(seeds, images, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            save_picture(picture, self._file(seed), durable=False)  # what a crash empties is drawn again


class _Parts:
    """Images as safetensors, one file per batch, until one file can be made of all."""

    def __init__(self, path: Path):
        self.path = path

    def _parts(self) -> list[dict[str, Tensor]]:
        """What is there and whole."""
        found = (read_tensors(file) for file in sorted(self.path.glob("*.safetensors")))
        return [part for part in found if part is not None]

    def finished(self) -> set[int]:
        return {seed for part in self._parts() for seed in part["seeds"].tolist()}

    def add(self, seeds: Sequence[int], images: Tensor) -> None:
        write_tensors(
            self.path / f"{seeds[0]}.safetensors", {"seeds": torch.tensor(seeds), "images": images.contiguous()}
        )

    def read(self, seeds: Sequence[int]) -> Tensor:
        """The images of these seeds, in their order."""
        parts = self._parts()
        row_of = {seed: row for row, seed in enumerate(torch.cat([part["seeds"] for part in parts]).tolist())}
        if missing := [seed for seed in seeds if seed not in row_of]:
            raise UserError(
                f"the image of seed {missing[0]} is not in {str(self.path)!r}; all processes have to share this folder"
            )
        return torch.cat([part["images"] for part in parts])[[row_of[seed] for seed in seeds]]


def _claim(folder: Path, has_images: bool, pipe: DDPMPipeline, seeds: Sequence[int], options: dict[str, Any]) -> None:
    """Note in the folder how its images are made, and refuse to mix them with images that were made otherwise.

    Raises:
        ValueError: It holds images that were made otherwise.
    """
    inpainting = options.get("mask_image") is not None
    made = {
        "weights": weights_digest(pipe.unet),
        **json.loads(json.dumps(pipe.settings)),
        "num_inference_steps": pipe.checked_steps(options.get("num_inference_steps")),
        "guidance_scale": options.get("guidance_scale", 1.0),
        "eta": pipe.checked_eta(options.get("eta")),
        "strength": options.get("strength"),
        "resample_length": options.get("resample_length", 10) if inpainting else None,
        "resample_times": options.get("resample_times", 10) if inpainting else None,
    }
    # What each image has of its own, by its seed.
    own: dict[str, dict[str, Any]] = {"class_labels": _by_seed(seeds, options.get("class_labels"))}
    for name in ("image", "mask_image"):
        pixels = options.get(name)
        own[name] = _by_seed(seeds, None if pixels is None else [digest(one)[:16] for one in pixels])
    note = folder / _NOTE
    if has_images and not note.is_file():
        raise UserError(
            f"{str(folder)!r} holds images, and no sampling.json that says how they were made; name another --output"
        )
    if note.is_file() and has_images:
        try:
            there = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{str(note)!r} is damaged, and its images may be others; remove the folder") from None
        different = [key for key, value in made.items() if there.get(key) != value]
        for name, now in own.items():
            before = there.get(name, {})
            if bool(before) != bool(now) or any(before.get(seed, value) != value for seed, value in now.items()):
                different.append(name)
            own[name] = {**before, **now}
        if different:
            raise UserError(
                f"{str(folder)!r} holds images that were made with other {' and '.join(different)}; name another "
                "--output, or remove it first"
            )
    made |= own
    write_text(note, json.dumps(made, indent=2) + "\n")


def _unclaim(folder: Path) -> None:
    """Take the note of `_claim` back, and the folder if nothing else is in it."""
    (folder / _NOTE).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _by_seed(seeds: Sequence[int], values: Sequence[Any] | None) -> dict[str, Any]:
    if values is None:
        return {}
    values = list(values) * len(seeds) if len(values) == 1 else values  # one for all
    return {str(seed): value for seed, value in zip(seeds, values, strict=True)}
