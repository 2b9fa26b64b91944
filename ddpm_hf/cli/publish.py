"""`ddpm-hf publish`: the model, sample grid and card of a stopped run, without training."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..presets import SAMPLERS
from ..training.configuration import NOT_NEGATIVE, POSITIVE, TrainingConfig, one_of
from ..utils.errors import UserError
from . import model
from .command_line import Parser, given
from .train import parse_distillation_config, parse_training_config


def publish_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf publish`."""
    what = "Write the model, samples and card of a stopped run, without training, as its end would have."
    parser = Parser(prog, what, "RUN [flags]")
    flag = parser.group("model and output")
    model.add_run(flag)
    flag("--output", str, None, "where to; left out: into RUN, whose older published model is replaced")
    flag("--license", str, None, "for the card, such as apache-2.0; default: the run's")
    flag("--evaluate", bool, False, "also measure what the run would have measured at its end, on its images")
    flag = parser.group("sample grid, as the run would have drawn it if left out")
    flag("--num_sample_images", int, None, "images in the grid; 0: no grid", NOT_NEGATIVE)
    flag("--ddpm_num_inference_steps", int, None, "steps of the sampler", POSITIVE)
    flag("--sampler", str, None, "of samples and numbers", one_of(*SAMPLERS))
    flag("--eval_batch_size", int, None, "images at a time; changes no image and no number", POSITIVE)
    return parser


def publish(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf publish`."""
    values = publish_parser(prog).parse_args(arguments)
    folder = Path(model.run_folder(values))
    from ..pipelines.checkpoints import CONFIG, read_checkpoint
    from ..training.publishing import publish_checkpoint
    from ..utils.processes import log, raise_on_all_ranks, start_process

    start_process()
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; publish takes a run's folder, or a checkpoint's")
    with raise_on_all_ranks():
        checkpoint = read_checkpoint(folder, values.weights)
        output = folder if values.output is None else Path(values.output)
        if checkpoint.path == output:
            raise UserError(f"{str(folder)!r} is a checkpoint: say where its model goes with --output FOLDER")
        distilled = "distillation" in checkpoint.state
        if distilled and (values.evaluate or values.sampler or values.ddpm_num_inference_steps):
            what = "a distilled model has a sampler and steps of its own, and was trained on no images"
            raise UserError(f"{what}; leave out --evaluate, --sampler and --ddpm_num_inference_steps")
        yaml = checkpoint.run / CONFIG
        if yaml.is_file():
            parse = parse_distillation_config if distilled else parse_training_config
            config = parse(["--config", str(yaml)])
        elif values.evaluate:
            raise UserError(f"--evaluate needs the images of the run: there is no {CONFIG} beside {checkpoint.path}")
        else:  # a checkpoint that was copied elsewhere; its state says the rest
            config = TrainingConfig(preset="digits", resolution=checkpoint.state["network"]["sample_size"])
        flags = given(values, "license", "num_sample_images", "ddpm_num_inference_steps", "sampler", "eval_batch_size")
        if values.num_sample_images == 0:
            del flags["num_sample_images"]
        flags |= {"output_dir": str(output), "push_to_hub": False, "hub_model_id": None}
        config = dataclasses.replace(config, **flags)
    log(str(checkpoint))
    samples = values.num_sample_images != 0
    redraw = samples and bool(given(values, "num_sample_images", "ddpm_num_inference_steps", "sampler"))
    publish_checkpoint(checkpoint, config, samples, values.evaluate, redraw)
    log(f"published in {output}")
