"""`ddpm-hf train | reproduce | distill`: a recipe in flags and YAML, trained; measured beside the paper's numbers."""

import sys
from collections.abc import Sequence

from ..training.configuration import DistillationConfig, ReproductionConfig, TrainingConfig
from .command_line import Parser, add_config_flags, parse_configs


def training_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf train` and `examples/train.py`."""
    return _parser(prog, "Train a DDPM (Ho et al. 2020).", TrainingConfig)


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
