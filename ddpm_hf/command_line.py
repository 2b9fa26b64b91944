"""Flags and YAML in, checked values or one sentence out: what all commands of `ddpm-hf` share."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

# Where images come from, in flags as in `data.load_images`.
_IMAGE_SOURCES = {
    "dataset": "a built-in dataset: digits",
    "dataset_name": "a dataset by Hub id or local path",
    "train_data_dir": "a folder of images",
}


class UsageError(ValueError):
    """A flag or key that cannot be taken; the message says which and what to write instead."""


class Parser(ArgumentParser):
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


def add_flags(parser: ArgumentParser, config_class: type) -> None:
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


def add_image_flags(parser: ArgumentParser) -> None:
    """The flags that say where images come from."""
    for name, text in _IMAGE_SOURCES.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)


def image_source(values: Any) -> dict[str, Any]:
    """Those of them that were given."""
    return {name: values[name] for name in _IMAGE_SOURCES if values[name] is not None}
