"""Docstrings here describe parameters that belong together in one line: `beta_start, beta_end: first and last beta`.

The reference shows one entry for each name, so the line is repeated for each before griffe reads it.
"""

import re
from typing import Any

import griffe

_GROUP = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_SECTION = re.compile(r"^Args:\n(?:(?:    .*)?\n?)*", re.MULTILINE)


def _split(match: re.Match[str]) -> str:
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class GroupedNames(griffe.Extension):
    """Splits them in every function and class."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(lambda args: _GROUP.sub(_split, args[0]), obj.docstring.value)
