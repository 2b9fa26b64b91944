"""The error classes of users' mistakes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# A flag with its value, if that is one by its form or a choice of flags; commands to be typed, and what stands between
# quotes, stay as they are.
_NUMBERS = r"-?\d+(?:\.\d+)?(?:e-?\d+)?\b"
_CHOICES = "true|false|skip|trailing|best|optimal|fixed_small|fixed_large|learned|learned_range|hybrid|vlb|simple"
_CHOICES += "|latest|CHW|HWC|pixels|inception|fid|nll|samples|bf16|fp16|\\w+_diffusion"
_VALUE = rf"(?:(?P<numbers>{_NUMBERS}(?: {_NUMBERS})*)|(?P<choice>{_CHOICES})\b)(?![,/-]\w)|(?P<quoted>'[^']*')"
_KEPT = r"ddpm-hf [^;,)]*|(?<!\w)'[^']*'|\"[^\"]*\""
_FLAG = re.compile(rf"(?P<kept>{_KEPT})|(?<![^\s(])--(?P<name>[a-z]\w*)(?: (?:{_VALUE}))?")
_OTHER_NAMES = {"from": "from_format", "no_ema": "ema=False"}
_flags = False  # whether people see flags


@contextmanager
def showing_flags() -> Iterator[None]:
    """Let sentences name flags, within: for command lines; elsewhere they name arguments."""
    global _flags
    before, _flags = _flags, True
    try:
        yield
    finally:
        _flags = before


def _as_argument(found: re.Match[str]) -> str:
    if found["kept"]:
        return found["kept"]
    name = _OTHER_NAMES.get(found["name"], found["name"])
    if found["numbers"]:
        value = f"({', '.join(several)})" if len(several := found["numbers"].split()) > 1 else several[0]
    elif found["choice"]:
        value = found["choice"].title() if found["choice"] in ("true", "false") else repr(found["choice"])
    else:
        value = found["quoted"]
    return f"{name}={value}" if value else name


def named_as_typed(sentence: str) -> str:
    """Return a sentence that is written with flags: as it is on a command line, with names of arguments elsewhere."""
    return sentence if _flags else _FLAG.sub(_as_argument, sentence)


class UserError(ValueError):
    """A mistake of a user, in one sentence: what is wrong, which value, what to write instead.

    A sentence is written with flags: `--resolution 64`. Who called from Python reads `resolution=64`.

    Commands print the sentence and end with exit code 2. Any other exception is a fault of this package or of a
    library, and keeps its traceback. It is a `ValueError`, so that code which catches those of stock diffusers works.
    """

    def __str__(self) -> str:
        return named_as_typed(super().__str__())


class NotFiniteError(UserError):
    """An image, a number or a weight is NaN or infinite, where it would have become part of a result."""


def in_one_line(error: BaseException) -> str:
    """Return an error's message in one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, where further ones are for developers; its class if it has none."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
