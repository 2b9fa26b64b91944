"""`ddpm-hf sample --figure`: the paper's figures, drawn for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .command_line import IMAGE_FLAGS, IMAGE_SOURCES, Parser, UsageError, add_image_flags, image_arguments
from .model import (
    check_optimize,
    inference_optimization,
    load_sampling_pipeline,
    read_images,
    sampling_evaluations,
)

# What only some figures take, and which do.
_FIGURE_FLAGS = {
    "animation": ("progressive",),
    **dict.fromkeys(("images", *IMAGE_FLAGS), ("interpolation", "coarse_to_fine")),
    "t": ("interpolation",),
}


def add_figure_flags(parser: Parser) -> None:
    """`--figure`, and what only figures take."""
    group = parser.add_argument_group("the paper's figures")
    group.add_argument(
        "--figure",
        type=str | None,
        default=None,
        help="draw one into --output FILE.png: progressive, shared_latents, interpolation or coarse_to_fine",
    )
    group.add_argument("--animation", type=str | None, default=None, help="progressive too: FILE.gif, .webp or .png")
    group.add_argument(
        "--images",
        type=str,
        nargs="+",
        default=None,
        help="to interpolate between: A.png B.png, or several pairs; or the first images of a dataset:",
    )
    add_image_flags(group)
    group.add_argument(
        "--t",
        type=int | None,
        default=None,
        help="diffusion steps before interpolation; default: T/2; the paper: 500 (Figure 8)",
    )


def wants_figure(values: Any) -> bool:
    """Whether a figure is asked for; its flags may not stand without one."""
    if values.figure is None:
        for name, figures in _FIGURE_FLAGS.items():
            if values[name] is not None:
                raise UsageError(f"--{name} goes with --figure {' or '.join(figures)}")
    return values.figure is not None


def draw_figure(values: Any) -> int:
    """`ddpm-hf sample --figure`: everything is checked before anything is sampled."""
    from ..pipelines import figures
    from ..sampling.generation import class_sequence, parse_seeds
    from ..utils.processes import processes
    from ..utils.text import nearest
    from ..utils.visualize import animation_format, check_writable, save_animation, save_picture

    check_optimize(values.optimize)
    figure = values.figure
    if figure not in figures.FIGURES:
        raise UsageError(
            f"unknown --figure {figure!r}{nearest(figure, figures.FIGURES)}; there are {', '.join(figures.FIGURES)}"
        )
    for name, takers in _FIGURE_FLAGS.items():
        if values[name] is not None and figure not in takers:
            raise UsageError(f"--{name} goes with --figure {' or '.join(takers)}, not with {figure}")
    if Path(values.output).suffix.lower() != ".png":
        raise UsageError(f"--output of a figure must be FILE.png, got {values.output!r}")
    if values.animation is not None:
        animation_format(values.animation)
        if Path(values.animation).absolute() == Path(values.output).absolute():
            raise UsageError("--animation and --output name the same file")
    default = {"progressive": "0-7", "shared_latents": "0-8", "interpolation": "0-3", "coarse_to_fine": "0"}[figure]
    if values.seeds is None and values.images is not None:
        default = f"0-{max(len(values.images) // 2 - 1, 0)}"
    seeds = parse_seeds(default if values.seeds is None else values.seeds)
    interpolating = figure in _FIGURE_FLAGS["images"]
    if interpolating:
        _check_pairs(values, len(seeds))
    if not processes().is_main_process:
        return 0  # one picture, one process
    pipe = load_sampling_pipeline(values)
    if pipe.image_shape[0] not in (1, 3):
        raise UsageError(f"a figure needs images of 1 or 3 channels, and the model's have {pipe.image_shape[0]}")
    options = {
        "num_inference_steps": values.num_inference_steps,
        "batch_size": values.batch_size,
        "class_labels": class_sequence(pipe, values.class_labels, len(seeds)),
        "guidance_scale": values.guidance_scale,
        "eta": values.eta,
        "progress": True,
    }
    given = _given_images(values, 2 * len(seeds), pipe.image_shape) if interpolating else None
    check_writable(values.output)
    if values.animation is not None:
        check_writable(values.animation)

    evaluations = sampling_evaluations(pipe, values, len(seeds))
    if (prepare := inference_optimization(values, evaluations)) is not None:
        prepare(pipe)  # this process alone is here
    made: Any
    if given is None:
        draw = figures.progressive_generation if figure == "progressive" else figures.shared_latents
        made = draw(pipe, seeds, **options)
    elif figure == "interpolation":
        made = figures.interpolate(pipe, given[0::2], given[1::2], values.t, seeds=seeds, **options)
    else:
        made = figures.coarse_to_fine(pipe, given[:1], given[1:], seed=seeds[0], **options)
    save_picture(made.draw(), values.output)
    print(f"wrote {values.output}")
    if values.animation is not None:
        save_animation(made.frames(), values.animation)
        print(f"wrote {values.animation}")
    return 0


def _check_pairs(values: Any, seeds: int) -> None:
    """As many pairs of images as seeds, from one place.

    Raises:
        UsageError: They are not.
    """
    sources = [name for name in ("images", *IMAGE_SOURCES) if values[name] is not None]
    if len(sources) != 1:
        raise UsageError(
            f"--figure {values.figure} needs images to interpolate between: give --images A.png B.png, or exactly one "
            f"of --dataset, --dataset_name and --train_data_dir; got {' and '.join(sources) or 'none'}"
        )
    if values.figure == "coarse_to_fine" and (seeds != 1 or len(values.images or [0, 0]) != 2):
        raise UsageError("--figure coarse_to_fine is of one pair of images: give two images, and one seed or none")
    if values.images is not None and len(values.images) != 2 * seeds:
        hint = "" if values.seeds is None else f", one pair for each of the {seeds} seeds"
        raise UsageError(f"--images takes pairs of images, A.png B.png and so on{hint}, got {len(values.images)}")


def _given_images(values: Any, count: int, image_shape: tuple[int, int, int]) -> Any:
    """The images to interpolate between, `[count, C, H, W]` uint8."""
    from ..data.datasets import load_images
    from ..evaluation.run import first_images

    if values.images is not None:
        return read_images("images", values.images, image_shape)
    channels, height, width = image_shape
    source = load_images(**image_arguments(values), channels=channels, resolution=(height, width))
    images = first_images(source, count).images
    if len(images) < count:
        raise UsageError(f"{len(images)} images are too few for {count // 2} pairs; give fewer --seeds")
    return images
