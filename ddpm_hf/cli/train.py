"""`ddpm-hf train | reproduce`: a recipe in flags and YAML, trained, and measured beside the paper's numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ActionConfigFile

from ..training.configuration import ReproductionConfig, TrainingConfig
from .command_line import Parser, add_flags, parse_configs


def training_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf train` and `examples/train.py`."""
    parser = Parser(prog, "Train a DDPM (Ho et al. 2020).")
    _add_training_flags(parser)
    return parser


def reproduction_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf reproduce`."""
    parser = Parser(prog, "An experiment of the paper from start to end: train, sample, measure, compare.")
    _add_training_flags(parser)
    add_flags(parser, ReproductionConfig)
    return parser


def _add_training_flags(parser: Parser) -> None:
    parser.add_argument_group("configuration").add_argument(
        "--config",
        action=ActionConfigFile,
        help="a YAML file of these flags, without the dashes; the command line wins",
    )
    add_flags(parser, TrainingConfig)


def parse_training_config(arguments: Sequence[str], prog: str | None = None) -> TrainingConfig:
    """Flags, and the YAML files they name, as a checked `TrainingConfig`.

    Raises:
        ValueError: Anything that cannot be taken, in one sentence.
    """
    return parse_configs(training_parser(prog), arguments, TrainingConfig)[0]


def train(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf train`, and all that `examples/train.py` does."""
    config = parse_training_config(arguments, prog)
    from ..training.trainer import Trainer

    Trainer(config).train()
    return 0


def reproduce(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf reproduce`."""
    config, options = parse_configs(reproduction_parser(prog), arguments, TrainingConfig, ReproductionConfig)
    from ..training.reproduction import reproduce as reproduce_experiment
    from ..utils.processes import say

    try:
        found = reproduce_experiment(config, options)
    except KeyboardInterrupt:
        print("what is finished is kept: the same command goes on from there", file=sys.stderr)
        raise
    if found is None:
        say("not finished: the same command goes on from there")
        return 130
    say(f"{found.preset.name}: {found.preset.source}\n\n{found.table()}\n\nwrote {config.output_dir}/reproduction.md")
    return 0
