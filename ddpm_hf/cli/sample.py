"""`ddpm-hf sample`: images of a model, from noise or from given images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse.typing import PositiveInt

from .command_line import Parser, UsageError
from .figure import add_figure_flags, draw_figure, wants_figure
from .model import (
    add_sampler_flags,
    check_optimize,
    inference_optimization,
    load_sampling_pipeline,
    read_images,
    sampling_evaluations,
)

# What only goes with given images, and what it goes with.
_GOES_WITH = {
    "strength": "image",
    "mask_image": "image",
    "resample_length": "mask_image",
    "resample_times": "mask_image",
}


def sample_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf sample`."""
    parser = Parser(prog, "Draw images from a trained model.")
    group = parser.add_argument_group("model and output")
    group.add_argument("--model", type=str, required=True, help="a pipeline's folder, or its name on the Hub")
    group.add_argument("--output", type=str, required=True, help="a folder of PNGs, FILE.npz, or FILE.png (a grid)")
    group.add_argument(
        "--seeds",
        type=str | None,
        default=None,
        help="one image per seed, for example 0-63 or 0,5,8-11; default: 0-15, or one for each of several --image",
    )
    group.add_argument(
        "--class_labels", type=str, default=None, help="classes by name or number, in turn: cats,dogs or 0,1"
    )
    group.add_argument("--batch_size", type=PositiveInt, default=64, help="images at a time; does not change them")
    add_sampler_flags(parser)
    group = parser.add_argument_group("from given images: image to image, inpainting")
    group.add_argument(
        "--image",
        type=str,
        nargs="+",
        default=None,
        help="start from these files instead of from noise, in turn; needs --strength or --mask_image",
    )
    group.add_argument(
        "--strength",
        type=float | None,
        default=None,
        help="the share of the chain to go back: 0 keeps the image, 1 next to nothing of it",
    )
    group.add_argument(
        "--mask_image",
        type=str,
        nargs="+",
        default=None,
        help="draw anew where this file is white, keep the image where it is black; one, or one for each --image",
    )
    group.add_argument(
        "--resample_length",
        type=PositiveInt | None,
        default=None,
        help="RePaint's jump length: go back this many steps after as many; default: 10",
    )
    group.add_argument(
        "--resample_times",
        type=PositiveInt | None,
        default=None,
        help="how often each stretch is sampled; 1: no going back; default: 10",
    )
    add_figure_flags(parser)
    return parser


def sample(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf sample`."""
    values = sample_parser(prog).parse_args(list(arguments))
    for name, other in _GOES_WITH.items():
        if values[name] is not None and values[other] is None:
            raise UsageError(f"--{name} goes with --{other}")
    if wants_figure(values):
        if values.image is not None:
            raise UsageError("--image does not go with --figure, whose images are --images A.png B.png")
        return draw_figure(values)
    if values.image is not None and values.strength is None and values.mask_image is None:
        raise UsageError("--image needs --strength (the share of the chain to go back, 0 to 1) or --mask_image FILE")
    from ..sampling.generation import class_sequence, parse_seeds, write_samples
    from ..utils.processes import say, start_process, together

    check_optimize(values.optimize)
    start_process()
    default = "0-15" if values.image is None or len(values.image) == 1 else f"0-{len(values.image) - 1}"
    seeds = parse_seeds(default if values.seeds is None else values.seeds)
    with together():
        pipe = load_sampling_pipeline(values)
        labels = class_sequence(pipe, values.class_labels, len(seeds))
        given = _given_images(values, len(seeds), pipe.image_shape)
    prepare = inference_optimization(values, sampling_evaluations(pipe, values, len(seeds)))
    drawn = write_samples(
        pipe,
        seeds,
        values.output,
        batch_size=values.batch_size,
        num_inference_steps=values.num_inference_steps,
        progress=True,
        class_labels=labels,
        guidance_scale=values.guidance_scale,
        eta=values.eta,
        prepare=prepare,
        **given,
    )
    say(
        f"wrote {drawn} images to {values.output}"
        + (f", {len(seeds) - drawn} were there" if drawn < len(seeds) else "")
    )
    return 0


def _given_images(values: Any, count: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What `--image` and its companions name, as `write_samples` takes it: one for all seeds, or one for each.

    Raises:
        UsageError: A file cannot be read, or there are too many.
    """
    if values.image is None:
        return {}
    if len(values.image) > count:
        raise UsageError(f"--image names {len(values.image)} images, and there are {count} --seeds: one for each")
    if values.mask_image is not None and len(values.mask_image) not in (1, len(values.image)):
        raise UsageError(
            f"--mask_image names {len(values.mask_image)} files for {len(values.image)} of --image; give one, or one "
            "for each"
        )
    found = {"image": read_images("image", values.image, image_shape)}
    if values.mask_image is not None:
        # As the images are: a mask of an image's own size has to cover what it covers there.
        found["mask_image"] = read_images("mask_image", values.mask_image, (1, *image_shape[1:])) > 127
    in_turn = {
        n: files if len(files) == 1 else files[[i % len(files) for i in range(count)]] for n, files in found.items()
    }
    names = ("strength", "resample_length", "resample_times")
    return in_turn | {name: values[name] for name in names if values[name] is not None}
