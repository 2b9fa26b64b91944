"""`ddpm-hf sample`: images of a model, from noise or from given images."""

from collections.abc import Sequence
from typing import Any

from ..training.configuration import POSITIVE
from ..utils.errors import UserError
from . import model
from .command_line import Parser, given
from .figure import add_figure_flags, draw_figure, refuse_figure_flags

# Flags that only go with given images, and the flag that gives those.
_GOES_WITH = {"strength": "image", "mask_image": "image"}
_GOES_WITH |= {"resample_length": "mask_image", "resample_times": "mask_image"}


def sample_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf sample`."""
    parser = Parser(prog, "Draw images from a trained model.")
    flag = parser.group("model and output")
    model.add_model_flags(flag, batch_size=64)
    flag("--output", str, None, "a folder of PNGs, FILE.npz, or FILE.png (a grid)", required=True)
    flag("--seeds", str, None, "one image per seed: 0-63 or 0,5,8-11; default: 0-15, or one for each --image")
    flag("--class_labels", str, None, "classes by name or number, repeated for all seeds: cats,dogs or 0,1")
    model.add_sampler_flags(parser)
    flag = parser.group("from given images: image to image, inpainting")
    text = "start from these files instead of from noise, repeated for all seeds; needs --strength or --mask_image"
    flag("--image", str, None, text, nargs="+")
    flag("--strength", float, None, "share of the chain to go back: 0 keeps the image, 1 next to nothing of it")
    text = "draw new pixels where this file is white, keep the image where it is black; one, or one for each --image"
    flag("--mask_image", str, None, text, nargs="+")
    text = "RePaint's jump length: go back this many steps after as many; default: 10"
    flag("--resample_length", int, None, text, POSITIVE)
    text = "how often each stretch is sampled; 1: no going back; default: 10"
    flag("--resample_times", int, None, text, POSITIVE)
    add_figure_flags(parser)
    return parser


def sample(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf sample`."""
    values = sample_parser(prog).parse_args(arguments)
    for name, other in _GOES_WITH.items():
        if getattr(values, name) is not None and getattr(values, other) is None:
            raise UserError(f"--{name} goes with --{other}")
    if values.figure is not None:
        if values.image is not None:
            raise UserError("--image does not go with --figure, whose images are --images A.png B.png")
        draw_figure(values)
        return
    refuse_figure_flags(values)
    if values.image is not None and values.strength is None and values.mask_image is None:
        raise UserError("--image needs --strength (the share of the chain to go back, 0 to 1) or --mask_image FILE")
    from ..sampling.generation import class_sequence, parse_seeds, write_samples
    from ..utils.processes import log, raise_on_all_ranks, start_process

    start_process()
    default = "0-15" if len(values.image or [0]) == 1 else f"0-{len(values.image) - 1}"
    seeds = parse_seeds(default if values.seeds is None else values.seeds)
    with raise_on_all_ranks():
        pipe = model.load_sampling_pipeline(values)
        labels = class_sequence(pipe, values.class_labels, len(seeds))
        images = _given_images(values, len(seeds), pipe.image_shape)
    prepare = model.inference_optimization(values, model.sampling_evaluations(pipe, values, len(seeds)))
    options = {"progress": True, "class_labels": labels, **model.sampling_options(values).chain, **images}
    drawn = write_samples(pipe, seeds, values.output, batch_size=values.batch_size, prepare=prepare, **options)
    already = f", {len(seeds) - drawn} were there already" if drawn < len(seeds) else ""
    log(f"wrote {drawn} images to {values.output}{already}")


def _given_images(values: Any, count: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the images and masks of the flags as `write_samples` takes them: one for all seeds, or one for each."""
    if values.image is None:
        return {}
    if len(values.image) > count:
        raise UserError(f"--image names {len(values.image)} images, and there are {count} --seeds: one for each")
    files = {"image": model.read_images("image", values.image, image_shape)}
    if values.mask_image is not None:
        if len(values.mask_image) not in (1, len(values.image)):
            what = f"{len(values.mask_image)} files for {len(values.image)} of --image"
            raise UserError(f"--mask_image names {what}; give one, or one for each")
        # Scaled and cropped as its image is: white pixels (> 127) are replaced.
        files["mask_image"] = model.read_images("mask_image", values.mask_image, (1, *image_shape[1:])) > 127
    chosen = {n: f if len(f) == 1 else f[[i % len(f) for i in range(count)]] for n, f in files.items()}
    return chosen | given(values, "strength", "resample_length", "resample_times")
