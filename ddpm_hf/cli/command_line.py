"""Flags and YAML files: what all commands of `ddpm-hf` share."""

import argparse
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NoReturn

import yaml

from ..training.configuration import Limit, TrainingConfig
from ..utils.errors import UserError, in_one_line
from ..utils.text import nearest

# The flags that say which images are taken, of which exactly one is given, and all about images.
IMAGE_SOURCES = ("dataset", "dataset_name", "train_data_dir")
_DECODING = ("image_column", "label_column", "background", "array_layout", "on_bad_image", "value_range")
IMAGE_FLAGS = (*IMAGE_SOURCES, "dataset_config_name", *_DECODING)

_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}

# For each kind of flag: its placeholder in `--help`, what it takes, and how its text is read.
_KINDS: dict[Any, tuple[str, str, Callable[[str], Any]]] = {
    str: ("TEXT", "text", str),
    int: ("N", "a whole number", int),
    float: ("X", "a number", lambda text: float(text.replace(".inf", "inf"))),  # YAML writes infinity as .inf
    bool: ("BOOL", "true or false", lambda text: _BOOLEANS[text.lower()]),
}


def _add_flag(
    group: Any, names: str, kind: Any, default: Any, help: str, limit: Limit | None = None, **more: Any
) -> None:
    """Add a flag with these `names` (between spaces), of a kind in `_KINDS`; `more` is what `add_argument` takes."""
    placeholder, takes, read = _KINDS[kind]

    def convert(text: str) -> Any:
        if takes_null and text == "null":
            return None
        try:
            value = read(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"takes {takes}, got {text!r}") from None
        if limit is not None and not limit[0](value):
            raise argparse.ArgumentTypeError(f"{limit[1]}, got {text!r}")
        return value

    takes_null = more.pop("null", False)
    more = {"metavar": placeholder} | more
    if kind is bool:  # may stand alone, as in diffusers' examples
        more |= {"nargs": "?", "const": True}
    group.add_argument(*names.split(), type=convert, default=default, help=help, **more)


class _HelpFormatter(argparse.HelpFormatter):
    """Show default values as they are typed; where the default is `None`, the flag's text says what it stands for."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action: argparse.Action) -> str:
        value = str(action.default).lower() if isinstance(action.default, bool) else action.default
        note = "required" if action.required else "" if value in (None, argparse.SUPPRESS) else f"default: {value}"
        return (action.help or "") + (f" ({note})" if note and action.option_strings else "")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage.

    `elsewhere` says what to write instead of flags that another program has, and this one has not.
    """

    elsewhere: Mapping[str, str] = MappingProxyType({})

    def __init__(self, prog: str | None, description: str, arguments: str = "[flags]"):
        usage = f"%(prog)s {arguments}"
        super().__init__(prog, usage, description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse would take -1e-3 for a flag

    def group(self, title: str) -> Callable[..., None]:
        """Add a group of flags; return the function that adds a flag to it: `_add_flag` but for the group."""
        return functools.partial(_add_flag, self.add_argument_group(title))

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the values of the flags, or raise UserError: one is unknown, missing, or of another kind."""
        names = dict.fromkeys(argument.partition("=")[0] for argument in args if argument.startswith("--"))
        unknown = [name for name in names if name not in ("--", *self._option_string_actions)]
        for name in [name for name in unknown if name not in self.elsewhere]:
            raise UserError(f"unknown flag {name}{nearest(name, self._option_string_actions) or '; see --help'}")
        if unknown:
            raise UserError("not a flag here: " + "; ".join(f"{name} ({self.elsewhere[name]})" for name in unknown))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def add_config_flags(parser: Parser, config_class: type) -> None:
    """Add a flag for each field of a configuration."""
    hints, left_out = typing.get_type_hints(config_class), getattr(config_class, "not_flags", ())
    defaults, own = getattr(config_class, "defaults", None), config_class.__annotations__
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own):
        if field.metadata["group"] is not None:
            title = field.metadata["group"]  # which may speak of --preset
            flag = parser.group(title.partition("; ")[0] if "preset" in left_out else title)
        if field.name in left_out:
            continue
        names = "--output_dir --output" if left_out and field.name == "output_dir" else f"--{field.name}"
        hint = hints[field.name]  # such as int | list[int] | None, of which the flag takes the last that is not None
        kind = [kind for kind in typing.get_args(hint) or (hint,) if kind is not NoneType][-1]
        several = {"nargs": "+"} if typing.get_origin(kind) is list else {}
        kind = typing.get_args(kind)[0] if several else kind
        null = field.default is None  # which takes the place of what a file says
        text = field.metadata["help"]
        if defaults is not None and field.metadata["paper"]:  # instead of the paper's values
            text = f"{text.partition('; the paper: ')[0]}; default: {getattr(defaults, field.metadata['paper'])}"
        flag(names, kind, field.default, text, null=null, **several)


def parse_configs(parser: Parser, arguments: Sequence[str], *config_classes: type) -> list[Any]:
    """Return flags, and the YAML files that `--config` names, as checked configurations; the command line wins."""
    files = parser.parse_args(arguments).config or []
    from_files = [argument for file in files for argument in _arguments_of_file(parser, file)]
    values = vars(parser.parse_args([*from_files, *arguments]))
    names = [[field.name for field in dataclasses.fields(cls) if field.name in values] for cls in config_classes]
    return [cls(**{n: values[n] for n in own}) for cls, own in zip(config_classes, names, strict=True)]


def _arguments_of_file(parser: Parser, path: str) -> list[str]:
    """Return a YAML file's keys and values as they would be typed."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: another encoding, or a date that is none
        raise UserError(f"--config {path} is not valid YAML: {in_one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold keys and values, such as 'preset: digits'")
    flags = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    arguments: list[str] = []
    for key, value in content.items():
        if key not in flags:
            raise UserError(f"unknown key {key!r} in --config {path}{nearest(key, flags) or '; see --help'}")
        several = isinstance(value, list)
        if (value is None and flags[key].default is not None) or (several and flags[key].nargs != "+"):
            raise UserError(f"--config {path}: {key} takes one value, got {value!r}")
        takes_text = flags[key].metavar == _KINDS[str][0]
        if value is False and takes_text:
            value = "no"  # as in `mixed_precision: no`
        elif takes_text and isinstance(value, (bool, int, float)):  # YAML reads 007 as 7, and 1.50 as 1.5
            raise UserError(f"--config {path}: {key} takes text, got {value!r}; put it between quotes")
        if several:  # with a space before it, -1e-05 is a value, and no flag
            arguments += [f"--{key}", *(f" {part}" for part in value)]
        else:
            arguments.append(f"--{key}={'null' if value is None else value}")
    return arguments


def given(values: Any, *names: str) -> dict[str, Any]:
    """Return some flags' values by their names, without those that are left out."""
    return {name: value for name in names if (value := getattr(values, name)) is not None}


def add_image_flags(flag: Callable[..., None]) -> None:
    """Add the training's flags for images, all of which may be left out."""
    for field in dataclasses.fields(TrainingConfig):
        if field.name in IMAGE_FLAGS:
            default = "" if field.default is None else f"; default: {field.default}"
            more = {"nargs": 2} if field.name == "value_range" else {}
            flag(f"--{field.name}", float if more else str, None, field.metadata["help"] + default, **more)


def image_arguments(values: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the flags for images, and the shape that a network takes, as arguments of `data.load_images`."""
    channels, height, width = image_shape
    arguments = {"channels": channels, "resolution": (height, width), **given(values, *IMAGE_FLAGS)}
    if "value_range" in arguments:
        arguments["value_range"] = tuple(arguments["value_range"])
    if "dataset_config_name" in arguments:
        arguments["config_name"] = arguments.pop("dataset_config_name")
    return arguments
