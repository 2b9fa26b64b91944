"""`ddpm-hf train | reproduce | distill`: a recipe in flags and YAML, trained; measured beside the paper's numbers."""

import sys
from collections.abc import Sequence

from ..training.configuration import DistillationConfig, ReproductionConfig, TrainingConfig
from .command_line import Parser, add_config_flags, parse_configs

# What to write instead of flags of diffusers' train_unconditional.py that do not exist here; docs/coming_from.md.
_PRESET = "as in --preset; or make a pipeline in Python and give --init_from"
_OF_DIFFUSERS_EXAMPLE = {
    "--num_epochs": "give --max_train_steps; an epoch is (number of images) / (images per update) steps",
    "--save_images_epochs": "give --save_images_steps",
    "--save_model_epochs": "leave it out; the model is written at the end, and by ddpm-hf publish",
    "--use_ema": "leave it out; EMA weights are always kept, and are the model",
    "--ema_inv_gamma": "leave it out; the decay is --ema_max_decay from the start, or as in --preset",
    "--ema_power": "leave it out, as --ema_inv_gamma",
    "--adam_beta1": "leave it out; 0.9",
    "--adam_beta2": "leave it out; 0.999",
    "--adam_weight_decay": "leave it out; 0",
    "--adam_epsilon": "leave it out; 1e-8",
    "--logger": "give --report_to",
    "--overwrite_output_dir": "name a new --output_dir; a finished model is not overwritten",
    "--model_config_name_or_path": _PRESET,
    "--ddpm_num_steps": _PRESET,
    "--ddpm_beta_schedule": _PRESET,
    "--enable_xformers_memory_efficient_attention": "leave it out; PyTorch's own attention is used",
    "--preserve_input_precision": "leave it out; 16-bit images are scaled to 8 bits, not clipped",
    "--local_rank": "leave it out; launchers set LOCAL_RANK",
}


def training_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf train` and `examples/train.py`."""
    parser = _parser(prog, "Train a DDPM (Ho et al. 2020).", TrainingConfig)
    parser.elsewhere = _OF_DIFFUSERS_EXAMPLE
    return parser


def reproduction_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf reproduce`."""
    what = "An experiment of the paper from start to end: train, sample, measure, compare."
    return _parser(prog, what, TrainingConfig, ReproductionConfig)


def distillation_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf distill`."""
    return _parser(prog, "Distil a trained model into one that samples in a few steps.", DistillationConfig)


def _parser(prog: str | None, description: str, *config_classes: type) -> Parser:
    parser = Parser(prog, description)
    text = "a YAML file of these flags, without the dashes; the command line wins; null is a flag left out"
    parser.group("configuration")("--config", str, None, text, action="append")
    for config_class in config_classes:
        add_config_flags(parser, config_class)
    return parser


def parse_training_config(arguments: Sequence[str], prog: str | None = None) -> TrainingConfig:
    """Return flags, and the YAML files that they name, as a `TrainingConfig`, or raise UserError: one is wrong."""
    return parse_configs(training_parser(prog), arguments, TrainingConfig)[0]


def parse_distillation_config(arguments: Sequence[str], prog: str | None = None) -> DistillationConfig:
    """Return the same of `ddpm-hf distill`."""
    return parse_configs(distillation_parser(prog), arguments, DistillationConfig)[0]


def train(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf train`, and all that `examples/train.py` does."""
    config = parse_training_config(arguments, prog)
    from ..training.trainer import Trainer

    Trainer(config).train()


def distill(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf distill`."""
    config = parse_distillation_config(arguments, prog)
    from ..training.trainer import Trainer

    Trainer(config).train()


def reproduce(arguments: Sequence[str], prog: str | None = None) -> int:
    """Run `ddpm-hf reproduce`."""
    config, options = parse_configs(reproduction_parser(prog), arguments, TrainingConfig, ReproductionConfig)
    from ..training.reproduction import reproduce as reproduce_experiment
    from ..utils.processes import log

    try:
        found = reproduce_experiment(config, options)
    except KeyboardInterrupt:
        print("what is finished is kept: the same command resumes from there", file=sys.stderr)
        raise
    if config.dry_run:
        return 0
    if found is None:
        log("not finished: the same command resumes from there")
        return 130
    log(f"{found.preset.name}: {found.preset.source}\n\n{found.table()}\n\nwrote {config.output_dir}/reproduction.md")
    return 0
