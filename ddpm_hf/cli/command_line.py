"""Flags and YAML in, checked values or one sentence out: what all commands of `ddpm-hf` share."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import typing
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ..utils.errors import UserError

# Where images come from, in flags as in `data.load_images`.
IMAGE_SOURCES = {
    "dataset": "a built-in dataset: digits",
    "dataset_name": "a dataset by Hub id or local path",
    "train_data_dir": "a folder of images",
}
# How their images are read.
_READING = {
    "dataset_config_name": "the configuration of --dataset_name",
    "image_column": "its column of images; found by itself if left out",
    "label_column": "its column of classes; found by itself if left out",
    "background": "colour under transparent pixels; default: white",
    "array_layout": "HWC or CHW, for .npy arrays whose shape fits both",
    "on_bad_image": "error (default), or skip: name unreadable images and go on without them",
}
# All flags of `add_image_flags`.
IMAGE_FLAGS = (*IMAGE_SOURCES, *_READING, "value_range")


class UsageError(UserError):
    """A flag or key that cannot be taken; the message says which and what to write instead."""


def _typed(action: Any) -> list[str]:
    """An argument's flags, without --name+ by which jsonargparse would add to a list."""
    return [flag for flag in action.option_strings if not flag.endswith("+")]


class _HelpFormatter(DefaultHelpFormatter):
    """Default values as they are typed, and no types: the placeholder tells numbers from text."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, max_help_position=34, **kwargs)

    def _get_help_string(self, action: Any) -> str:
        if action.help is None or not action.option_strings or action.nargs == 0:
            return action.help or ""
        notes = ["required"] if action.required else []
        if action.default not in (None, SUPPRESS):  # what stands for None is in the text
            default = action.default
            notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
        return action.help + (f" ({', '.join(notes)})" if notes else "")

    def _format_action_invocation(self, action: Any) -> str:
        shown = copy.copy(action)
        shown.option_strings = _typed(action)
        return super()._format_action_invocation(shown)

    def _get_default_metavar_for_optional(self, action: Any) -> str:
        kind = str(getattr(action, "_typehint", action.type)).lower()
        return "N" if "int" in kind else "X" if "float" in kind else "TEXT"


class Parser(ArgumentParser):
    """A parser whose errors are one sentence, without the usage text, and whose flags are written out."""

    def __init__(self, prog: str | None, description: str, arguments: str = "[flags]"):
        super().__init__(
            prog=prog,
            usage=f"%(prog)s {arguments}",
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(_one_sentence(message, self.flags()))

    def flags(self) -> list[str]:
        """All flags, as they are typed."""
        return [flag for action in self._actions for flag in _typed(action)]


def _one_sentence(message: str, flags: list[str]) -> str:
    """jsonargparse's and argparse's messages, shortened, with the nearest flag for an unknown one."""
    text = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (.*)", text, re.IGNORECASE):
        first = found[1].split()[0].split("=")[0]
        if not first.startswith("--"):
            return f"unexpected argument {first!r}; flags start with --, see --help"
        close = difflib.get_close_matches(first, flags, n=1)
        return f"unknown flag {first}" + (f" (did you mean {close[0]}?)" if close else "; see --help")
    if found := re.search(r"arguments are required: (.*)", text):
        missing = [f"--{name}" if f"--{name}" in flags else name.upper() for name in found[1].split(", ")]
        return f"give {' and '.join(missing)}; see --help"
    if (found := re.search(r'key "(\w+)"', text)) and "PositiveInt" in text:
        patterns = (r"Given value: (.*)", r"base 10: '(.*)'", r"PositiveInt: (.*) does not")
        value = next((match[1] for pattern in patterns if (match := re.search(pattern, text))), "something else")
        return f"--{found[1]} takes a positive whole number, got {value!r}"
    if found := re.search(r'key "(\w+)".*(?:Given|Got) value: (.*)', text):
        wanted = [_KINDS.get(kind, kind) for kind in re.findall(r"Expected a <class '(\w+)'>", text)]
        kinds = " or ".join(dict.fromkeys(k for k in wanted if k != "NoneType")) or "another kind of value"
        return f"--{found[1]} takes {kinds}, got {found[2]!r}"
    return text


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def add_flags(parser: ArgumentParser, config_class: type) -> None:
    """One flag per dataclass field; booleans may stand without a value, as in diffusers' examples."""
    hints = typing.get_type_hints(config_class)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: another encoding, or a date that is none
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold keys and values, such as 'preset: digits'")
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the keys are {', '.join(known)}"
            raise UsageError(f"unknown key {key!r} in --config {path}{hint}")


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


def parse_configs(parser: ArgumentParser, arguments: Sequence[str], *config_classes: type) -> list[Any]:
    """Flags, and the YAML files they name, as checked configurations."""
    arguments = _bracket_lists(arguments)
    names = [field.name for config_class in config_classes for field in dataclasses.fields(config_class)]
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            check_config_file(arguments[i + 1], names)
        elif argument.startswith("--config="):
            check_config_file(argument.partition("=")[2], names)
    values = parser.parse_args(list(arguments))
    return [
        config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
        for config_class in config_classes
    ]


def add_image_flags(group: Any) -> None:
    """The flags that say where images come from and how they are read, as in training."""
    for name, text in (IMAGE_SOURCES | _READING).items():
        group.add_argument(f"--{name}", type=str | None, default=None, help=text)
    group.add_argument(
        "--value_range", type=float, nargs=2, default=None, help="what .npy arrays call black and white, such as 0 1"
    )


def image_arguments(values: Any) -> dict[str, Any]:
    """Those of them that were given, as arguments of `data.load_images`."""
    given = {name: values[name] for name in (*IMAGE_SOURCES, *_READING) if values[name] is not None}
    if "dataset_config_name" in given:
        given["config_name"] = given.pop("dataset_config_name")
    if values.value_range is not None:
        given["value_range"] = tuple(values.value_range)
    return given
