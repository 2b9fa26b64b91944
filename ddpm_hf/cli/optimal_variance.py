"""`ddpm-hf optimal_variance`: the best variance of the ddpm sampler, measured once and kept in the scheduler."""

from collections.abc import Sequence
from pathlib import Path

from ..training.configuration import POSITIVE
from ..utils.errors import UserError
from . import model
from .command_line import Parser, add_image_flags, image_arguments


def optimal_variance_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf optimal_variance`."""
    what = "Measure the best variance of the ddpm sampler (Analytic-DPM), and write it into the model's scheduler."
    parser = Parser(prog, what)
    flag = parser.group("model")
    model.add_model_flags(flag, batch_size=256)
    text = "leave the model's own variance in use; take the new one with --variance_type optimal"
    flag("--output", str, None, "a new folder for the model with it; left out: the scheduler of --model is rewritten")
    flag("--keep_variance_type", bool, False, text)
    flag = parser.group("images")
    add_image_flags(flag)
    flag("--num_images", int, 128, "how many; each costs T evaluations", POSITIVE)
    flag("--seed", int, 0, "of the noise")
    return parser


def optimal_variance(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf optimal_variance`."""
    values = optimal_variance_parser(prog).parse_args(arguments)
    from ..data.datasets import load_images
    from ..evaluation.optimal_variance import prediction_error, save_optimal_variance
    from ..evaluation.run import first_images
    from ..hub.files import facts_of_model, write_model
    from ..utils.files import check_new_folder
    from ..utils.processes import log, processes, raise_on_all_ranks, start_process

    if values.output is None:
        target = model.published_folder(values, "give --output")
    else:
        check_new_folder(target := Path(values.output))
    start_process()
    with raise_on_all_ranks():
        pipe = model.load_pipeline(values.model, weights=values.weights)
        model.check_not_distilled(pipe, "optimal_variance")
        if not values.keep_variance_type and "learned" in (pipe.scheduler.config.get("variance_type") or ""):
            raise UserError("this network predicts its own variance; add --keep_variance_type")
        data = load_images(split="train", **image_arguments(values, pipe.image_shape))
        images = first_images(data, values.num_images)
    error = prediction_error(pipe, images, batch_size=values.batch_size, seed=values.seed, progress=True)
    with raise_on_all_ranks():
        if processes().is_main_process:
            if values.output is not None:
                write_model(target, pipe, facts_of_model(values.model, target.name, values.weights))
            save_optimal_variance(target, pipe, error, use=not values.keep_variance_type)
    log(f"wrote the error on {len(images)} images into {target}/scheduler")
