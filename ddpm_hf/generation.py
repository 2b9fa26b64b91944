"""Seeds to files: many images, each a function of its own seed, in any batch size."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .pipeline_ddpm import DDPMPipeline
from .visualize import image_grid, save_picture

SAMPLERS = ("ddpm", "ddim")


def parse_seeds(text: str) -> list[int]:
    """`"0-3,8"` to `[0, 1, 2, 3, 8]`.

    Raises:
        ValueError: Not a list of whole numbers and ranges, or a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--seeds takes whole numbers and ranges such as 0-63 or 0,5,8-11, got {text!r}")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"the range {part.strip()!r} of --seeds is empty; write {high}-{low}")
        seeds.extend(range(low, high + 1))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text!r} names a seed twice")
    return seeds


def with_sampler(pipe: DDPMPipeline, sampler: str) -> DDPMPipeline:
    """The same network with another sampler: `ddpm` (Algorithm 2) or `ddim` (Song et al. 2020, deterministic).

    Raises:
        ValueError: Unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    if sampler == "ddpm":
        return pipe
    return DDPMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))


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
        guidance_scale: See `DDPMPipeline`.

    Yields:
        The seeds of a batch, and its images, `[B, C, H, W]` uint8.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pipe.checked_steps(num_inference_steps)  # before a progress bar is shown
    for start in tqdm(range(0, len(seeds), batch_size), desc=desc, unit="batch", disable=not progress):
        part = list(seeds[start : start + batch_size])
        pipe.set_progress_bar_config(disable=True)
        (images,) = pipe(
            seeds=part,
            num_inference_steps=num_inference_steps,
            output_type="pt",
            return_dict=False,
            class_labels=None if class_labels is None else list(class_labels[start : start + batch_size]),
            guidance_scale=guidance_scale,
        )
        yield part, (images * 255).round().to(torch.uint8).cpu()


def class_sequence(pipe: DDPMPipeline, text: str | None, count: int) -> list[int] | None:
    """`"cats,dogs"` or `"0,1"` to class indices for `count` images, in turn.

    Raises:
        ValueError: A class that the network does not have.
    """
    if text is None:
        return None
    names = list(pipe.unet.config.get("_class_names") or [])
    classes = pipe.unet.config.num_class_embeds or 0
    chosen = []
    for part in (part.strip() for part in text.split(",")):
        index = names.index(part) if part in names else int(part) if part.isdecimal() else -1
        if not 0 <= index < classes:
            have = ", ".join(names) or (f"0..{classes - 1}" if classes else "none: it is not class-conditional")
            raise ValueError(f"--class_labels {part!r} is no class of this network; it has {have}")
        chosen.append(index)
    return [chosen[i % len(chosen)] for i in range(count)]


def _claim_folder(folder: Path, pipe: DDPMPipeline, options: dict[str, Any]) -> None:
    """Note in the folder how its images are made, and refuse to mix them with images that were made otherwise."""
    digest = hashlib.sha256()
    for name, value in sorted(pipe.unet.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    made = {
        "weights": digest.hexdigest(),
        "scheduler": json.loads(pipe.scheduler.to_json_string()),
        "num_inference_steps": pipe.checked_steps(options.get("num_inference_steps")),
        "guidance_scale": options.get("guidance_scale", 1.0),
    }
    note = folder / "sampling.json"
    if note.is_file():
        there = json.loads(note.read_text())
        if different := [key for key, value in made.items() if there.get(key) != value]:
            raise ValueError(
                f"--output {str(folder)!r} holds images that were made with other {' and '.join(different)}; name "
                "another folder, or remove it first"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made, indent=2) + "\n")


def write_samples(pipe: DDPMPipeline, seeds: Sequence[int], output: str | Path, **options: Any) -> int:
    """Draw one image per seed into files. Files appear complete or not at all; existing images are not drawn again.

    Args:
        pipe: Network and sampler.
        seeds: One per image.
        output: `FILE.png` for one labelled grid, `FILE.npz` for one uint8 array `arr_0` of shape `[N, H, W, C]`, else
            a folder of `<thousand>/<seed>.png`.
        options: See `generate`.

    Returns:
        How many images were drawn now.
    """
    output = Path(output)
    if output.suffix == ".png":
        save_picture(image_grid(torch.cat([images for _, images in generate(pipe, seeds, **options)])), output)
        return len(seeds)
    if output.suffix == ".npz":
        images = torch.cat([images for _, images in generate(pipe, seeds, **options)])
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, images.permute(0, 2, 3, 1).numpy())
        os.replace(partial, output)
        return len(seeds)
    if output.suffix:
        raise ValueError(f"--output must be a folder, FILE.png or FILE.npz, got {str(output)!r}")
    if options.get("batch_size", 1) < 1:
        raise ValueError(f"batch_size must be at least 1, got {options['batch_size']}")
    _claim_folder(output, pipe, options)
    missing = [seed for seed in seeds if not _file_of(output, seed).exists()]
    if (labels := options.get("class_labels")) is not None:
        of_seed = dict(zip(seeds, labels, strict=True))
        options["class_labels"] = [of_seed[seed] for seed in missing]
    for part, images in generate(pipe, missing, **options):
        for seed, image in zip(part, images, strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            save_picture(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), _file_of(output, seed))
    return len(missing)


def _file_of(folder: Path, seed: int) -> Path:
    return folder / f"{seed // 1000:05d}" / f"{seed:08d}.png"
