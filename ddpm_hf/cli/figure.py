"""`ddpm-hf sample --figure`: the paper's figures, drawn for a model."""

from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from . import model
from .command_line import IMAGE_FLAGS, IMAGE_SOURCES, Parser, add_image_flags, given, image_arguments

# The figures, and the seeds that they have by default.
_SEEDS = {"progressive": "0-7", "shared_latents": "0-8", "interpolation": "0-3", "coarse_to_fine": "0"}

# Flags that only some figures take, and which.
_TAKEN_BY = {
    "animation": ("progressive",),
    **dict.fromkeys(("images", *IMAGE_FLAGS), ("interpolation", "coarse_to_fine")),
    "t": ("interpolation",),
}


def add_figure_flags(parser: Parser) -> None:
    """Add `--figure`, and the flags that only figures take."""
    flag = parser.group("the paper's figures")
    flag("--figure", str, None, f"draw one into --output FILE.png: {', '.join(_SEEDS)}")
    flag("--animation", str, None, "progressive too: FILE.gif, .webp or .png")
    text = "to interpolate between: A.png B.png, or several pairs; or the first images of a dataset:"
    flag("--images", str, None, text, nargs="+")
    add_image_flags(flag)
    flag("--t", int, None, "diffusion steps before interpolation; default: T/2; the paper: 500 (Figure 8)")


def refuse_figure_flags(values: Any, figure: str | None = None) -> None:
    """Refuse flags that a figure does not take, without one all flags of figures, with a UserError."""
    for name, figures in _TAKEN_BY.items():
        if getattr(values, name) is not None and figure not in figures:
            other = "" if figure is None else f", not with {figure}"
            raise UserError(f"--{name} goes with --figure {' or '.join(figures)}{other}")


def draw_figure(values: Any) -> None:
    """Draw `--figure`; everything is checked before anything is sampled."""
    from ..pipelines import figures
    from ..sampling.generation import class_sequence
    from ..utils.files import writable_folder
    from ..utils.processes import processes
    from ..utils.visualize import save_animation, save_picture

    seeds = _checked_seeds(values)
    if not processes().is_main_process:
        return  # one picture, one process
    pipe = model.load_sampling_pipeline(values)
    if pipe.image_shape[0] not in (1, 3):
        raise UserError(f"a figure needs images of 1 or 3 channels, and the model's have {pipe.image_shape[0]}")
    labels = class_sequence(pipe, values.class_labels, len(seeds))
    options = {"batch_size": values.batch_size, "class_labels": labels, "progress": True}
    options |= model.sampling_options(values).chain
    ends = _given_images(values, 2 * len(seeds), pipe.image_shape)
    for flag in given(values, "output", "animation"):
        there = next(folder for folder in Path(getattr(values, flag)).absolute().parents if folder.exists())
        writable_folder(there, f"--{flag}")
    prepare = model.inference_optimization(values, model.sampling_evaluations(pipe, values, len(seeds)))
    if prepare is not None:
        prepare(pipe)

    made: Any
    if values.figure == "interpolation":
        made = figures.interpolate(pipe, ends[0::2], ends[1::2], values.t, seeds=seeds, **options)
    elif values.figure == "coarse_to_fine":
        made = figures.coarse_to_fine(pipe, ends[:1], ends[1:], seed=seeds[0], **options)
    else:
        draw = figures.progressive_generation if values.figure == "progressive" else figures.shared_latents
        made = draw(pipe, seeds, **options)
    save_picture(made.draw(), values.output)
    print(f"wrote {values.output}")
    if values.animation is not None:
        save_animation(made.frames(), values.animation)
        print(f"wrote {values.animation}")


def _checked_seeds(values: Any) -> list[int]:
    """Return the seeds of a figure, one per image or pair of given images; a UserError refuses flags that disagree."""
    from ..sampling.generation import parse_seeds
    from ..utils.text import nearest
    from ..utils.visualize import animation_format

    figure, images = values.figure, values.images
    if figure not in _SEEDS:
        raise UserError(f"unknown --figure {figure!r}{nearest(figure, _SEEDS)}; there are {', '.join(_SEEDS)}")
    refuse_figure_flags(values, figure)
    if Path(values.output).suffix.lower() != ".png":
        raise UserError(f"--output of a figure must be FILE.png, got {values.output!r}")
    if values.animation is not None:
        animation_format(values.animation)
        if Path(values.animation).absolute() == Path(values.output).absolute():
            raise UserError("--animation and --output name the same file")
    default = _SEEDS[figure] if images is None else f"0-{max(len(images) // 2 - 1, 0)}"
    seeds = parse_seeds(default if values.seeds is None else values.seeds)
    if figure in _TAKEN_BY["images"]:
        sources = list(given(values, "images", *IMAGE_SOURCES))
        if len(sources) != 1:
            which = "--images A.png B.png, or exactly one of --dataset, --dataset_name and --train_data_dir"
            raise UserError(f"--figure {figure} needs images: give {which}; got {' and '.join(sources) or 'none'}")
        if figure == "coarse_to_fine" and (len(seeds) != 1 or len(images or [0, 0]) != 2):
            raise UserError("--figure coarse_to_fine is of one pair of images: give two, and one seed or none")
        if images is not None and len(images) != 2 * len(seeds):
            what = f"pairs of images, A.png B.png, one for each of the {len(seeds)} seeds"
            raise UserError(f"--images takes {what}, got {len(images)}")
    return seeds


def _given_images(values: Any, count: int, image_shape: tuple[int, int, int]) -> Any:
    """Return the images to interpolate between, `[count, C, H, W]` uint8, or a UserError; `None` without any."""
    from ..data.datasets import load_images
    from ..evaluation.run import first_images

    if values.images is not None:
        return model.read_images("images", values.images, image_shape)
    if values.figure not in _TAKEN_BY["images"]:
        return None
    images = first_images(load_images(**image_arguments(values, image_shape)), count).images
    if len(images) < count:
        raise UserError(f"{len(images)} images are too few for {count // 2} pairs; give fewer --seeds")
    return images
