"""`ddpm-hf train | sample | evaluate | convert`: flags and YAML in, exit codes out.

A user's mistake gets one sentence on stderr and exit code 2. Heavy libraries are imported by the command that needs
them.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from jsonargparse.typing import PositiveInt

from .configuration import TrainingConfig


class UsageError(ValueError):
    """A flag or key that cannot be taken; the message says which and what to write instead."""


class _Parser(ArgumentParser):
    """A parser whose errors are one sentence, without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(_one_sentence(message, self._flags()))

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _one_sentence(message: str, flags: list[str]) -> str:
    """jsonargparse's and argparse's messages, shortened, with the nearest flag for an unknown one."""
    text = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (.*)", text, re.IGNORECASE):
        first = found[1].split()[0].split("=")[0]
        if not first.startswith("--"):
            return f"unexpected argument {first!r}; flags start with --, see --help"
        close = difflib.get_close_matches(first, flags, n=1)
        return f"unknown flag {first}" + (f" (did you mean {close[0]}?)" if close else "; see --help")
    if found := re.search(r'key "(\w+)".*(?:Given|Got) value: (.*)', text):
        wanted = [_KINDS.get(kind, kind) for kind in re.findall(r"Expected a <class '(\w+)'>", text)]
        kinds = " or ".join(dict.fromkeys(k for k in wanted if k != "NoneType")) or "another kind of value"
        return f"--{found[1]} takes {kinds}, got {found[2]!r}"
    return text


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def _add_flags(parser: ArgumentParser, config_class: type) -> None:
    """One flag per dataclass field; booleans may stand without a value, as in diffusers' examples."""
    hints = typing.get_type_hints(config_class)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        group = field.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group))
        boolean = hints[field.name] in (bool, bool | None)
        groups[group].add_argument(
            f"--{field.name}",
            type=hints[field.name],
            default=field.default,
            help=field.metadata["help"],
            **({"nargs": "?", "const": True} if boolean else {}),
        )


def check_config_file(path: str, known: Sequence[str]) -> None:
    """The YAML file exists, is a mapping and has known keys only.

    Raises:
        UsageError: It does not; an unknown key is named with the nearest known one.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold keys and values, such as 'preset: digits'")
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the keys are {', '.join(known)}"
            raise UsageError(f"unknown key {key!r} in --config {path}{hint}")


def training_parser(prog: str | None = None) -> ArgumentParser:
    """The parser of `ddpm-hf train` and `examples/train.py`."""
    parser = _Parser(allow_abbrev=False, prog=prog, description="Train a DDPM (Ho et al. 2020).")
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these flags; the command line wins")
    _add_flags(parser, TrainingConfig)
    return parser


def _bracket_lists(arguments: Sequence[str]) -> list[str]:
    """`--resolution 64 96` as `--resolution [64, 96]`, which is how jsonargparse writes a list."""
    out: list[str] = []
    rest = list(arguments)
    while rest:
        out.append(rest.pop(0))
        if out[-1] in ("--resolution", "--value_range"):
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if len(values) == 1:
                out.extend(values)
            elif values:
                out.append(f"[{', '.join(values)}]")
    return out


def parse_training_config(arguments: Sequence[str], prog: str | None = None) -> TrainingConfig:
    """Flags, and the YAML files they name, as a checked `TrainingConfig`.

    Raises:
        ValueError: Anything that cannot be taken, in one sentence.
    """
    arguments = _bracket_lists(arguments)
    parser = training_parser(prog)
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            check_config_file(arguments[i + 1], names)
        elif argument.startswith("--config="):
            check_config_file(argument.partition("=")[2], names)
    values = parser.parse_args(list(arguments))
    return TrainingConfig(**{name: values[name] for name in names})


def train(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf train`, and all that `examples/train.py` does."""
    config = parse_training_config(arguments, prog)
    from .training import Trainer

    Trainer(config).train()
    return 0


def sample(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf sample`."""
    parser = _Parser(allow_abbrev=False, prog=prog, description="Draw images from a trained model.")
    parser.add_argument("--model", type=str, required=True, help="a pipeline's folder, or its name on the Hub")
    parser.add_argument("--output", type=str, required=True, help="a folder of PNGs, FILE.npz, or FILE.png (a grid)")
    parser.add_argument("--seeds", type=str, default="0-15", help="one image per seed, for example 0-63 or 0,5,8-11")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; does not change them")
    parser.add_argument("--num_inference_steps", type=int | None, default=None, help="sampler steps; default: T")
    parser.add_argument("--sampler", type=str, default="ddpm", help="ddpm (Algorithm 2) or ddim")
    parser.add_argument(
        "--class_labels", type=str | None, default=None, help="classes by name or number, in turn: cats,dogs or 0,1"
    )
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1: as learned; more exaggerates the class")
    values = parser.parse_args(list(arguments))
    from .generation import class_sequence, parse_seeds, with_sampler, write_samples

    seeds = parse_seeds(values.seeds)
    pipe = with_sampler(_load_pipeline(values.model), values.sampler)
    drawn = write_samples(
        pipe,
        seeds,
        values.output,
        batch_size=values.batch_size,
        num_inference_steps=values.num_inference_steps,
        progress=True,
        class_labels=class_sequence(pipe, values.class_labels, len(seeds)),
        guidance_scale=values.guidance_scale,
    )
    print(
        f"wrote {drawn} images to {values.output}"
        + (f", {len(seeds) - drawn} were there" if drawn < len(seeds) else "")
    )
    return 0


def evaluate(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf evaluate`."""
    parser = _Parser(allow_abbrev=False, prog=prog, description="Bits/dim of a trained model on images.")
    parser.add_argument("--model", type=str, required=True, help="a pipeline's folder, or its name on the Hub")
    parser.add_argument("--metrics", type=str, default="nll", help="nll (bits/dim)")
    parser.add_argument("--dataset", type=str | None, default=None, help="a built-in dataset: digits")
    parser.add_argument("--dataset_name", type=str | None, default=None, help="a dataset by Hub id or local path")
    parser.add_argument("--train_data_dir", type=str | None, default=None, help="a folder of images")
    parser.add_argument("--split", type=str, default="validation", help="train or validation, for --dataset")
    parser.add_argument("--num_images", type=PositiveInt | None, default=None, help="the first this many images")
    parser.add_argument("--validation_split", type=float, default=0.0, help="as in training, for --split validation")
    parser.add_argument(
        "--num_evaluations", type=int | None, default=None, help="stratified estimate; the full sum if left out"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--output", type=str | None, default=None, help="write the report as JSON here")
    values = parser.parse_args(list(arguments))
    if values.metrics != "nll":
        raise UsageError(f"--metrics knows nll, got {values.metrics!r}")
    from .data import load_images
    from .evaluation import evaluate_likelihood, first_images

    pipe = _load_pipeline(values.model)
    channels, height, width = pipe.image_shape
    given = {name: values[name] for name in ("dataset", "dataset_name", "train_data_dir") if values[name] is not None}
    split = values.split if "dataset" in given or values.validation_split else "train"
    data = load_images(
        **given,
        split=split,
        channels=channels,
        resolution=(height, width),
        validation_split=values.validation_split,
    )
    report = evaluate_likelihood(
        pipe,
        first_images(data, values.num_images),
        split,
        num_evaluations=values.num_evaluations,
        batch_size=values.batch_size,
        seed=values.seed,
        progress=True,
    )
    value = report.values["bits_per_dim"]
    print(f"bits/dim on {report.num_images} images: {value['value']:.4f} +- {value['standard_error']:.4f}")
    if values.output:
        report.save(values.output)
        print(f"wrote {values.output}")
    return 0


def convert(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf convert`."""
    parser = _Parser(
        prog=prog, description="Other people's weights to a stock-readable folder, or ours to TensorFlow."
    )
    parser.add_argument(
        "--from",
        type=str | None,
        default=None,
        help="official_tf, pesser (also ermongroup), pytorch_ddpm, improved_diffusion or diffusers",
    )
    parser.add_argument(
        "--to", type=str | None, default=None, help="official_tf: write our weights for the official code"
    )
    parser.add_argument("--checkpoint", type=str, required=True, help="the file; for TensorFlow without its ending")
    parser.add_argument("--output", type=str, required=True, help="the folder to make")
    parser.add_argument("--sample_size", type=int | None, default=None, help="height and width of the images")
    parser.add_argument("--preset", type=str | None, default=None, help="gives sample size and diffusion process")
    parser.add_argument("--no_ema", action="store_true", help="take the raw weights instead of the averaged ones")
    parser.add_argument("--num_heads", type=int, default=1, help="attention heads (improved_diffusion)")
    parser.add_argument("--variance_type", type=str | None, default=None, help="of the scheduler; see the docs")
    values = parser.parse_args(list(arguments))
    if (values["from"] is None) == (values["to"] is None):
        raise UsageError("give either --from FORMAT (to ours) or --to official_tf (from ours)")
    from . import convert as conversion

    if values["to"] is not None:
        if values["to"] != "official_tf":
            raise UsageError(f"--to knows official_tf, got {values['to']!r}")
        print(f"wrote {conversion.convert_to_official(values['checkpoint'], values['output'])}")
        return 0
    pipe = conversion.convert(
        values["from"],
        values["checkpoint"],
        values["output"],
        sample_size=values["sample_size"],
        preset=values["preset"],
        ema=not values["no_ema"],
        num_heads=values["num_heads"],
        variance_type=values["variance_type"],
    )
    count = sum(p.numel() for p in pipe.unet.parameters())
    print(f"wrote {values['output']}: {count:,} parameters, variance {pipe.scheduler.config.variance_type}")
    return 0


def _load_pipeline(model: str) -> Any:
    from diffusers.utils import logging

    from .pipeline_ddpm import DDPMPipeline

    logging.disable_progress_bar()  # loading takes no time worth a bar
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise UsageError(f"--model {model} holds no pipeline: there is no model_index.json in it")
    try:
        return DDPMPipeline.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load --model {model}: {str(error).strip().splitlines()[0]}") from error


COMMANDS: dict[str, Callable[..., int]] = {"train": train, "sample": sample, "evaluate": evaluate, "convert": convert}

_HELP = """usage: ddpm-hf COMMAND [flags]

  train      train a model; the same as examples/train.py
  sample     draw images from a model
  evaluate   bits/dim of a model on images
  convert    other people's weights to ours, ours to the official format

ddpm-hf COMMAND --help lists the flags of a command."""


def run(command: Callable[..., int], arguments: Sequence[str], prog: str) -> int:
    """Run one command; a user's mistake becomes one sentence on stderr and exit code 2, Ctrl-C exit code 130.

    The environment variable DDPM_HF_TRACEBACK=1 shows where the sentence came from.
    """
    try:
        return command(arguments, prog)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, ArgumentError, OSError) as error:
        if os.environ.get("DDPM_HF_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The `ddpm-hf` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(f"error: unknown command {name!r}{hint}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(COMMANDS[name], rest, f"ddpm-hf {name}")


if __name__ == "__main__":
    sys.exit(main())
