"""Format numbers, tables and names for people."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any


def finite(content: Any) -> Any:
    """Return JSON values with `None` for NaN and infinities, which JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def plain(content: Any) -> Any:
    """Return values as they come back from JSON: tuples as lists, keys as strings, other objects as their text."""
    return json.loads(json.dumps(content, default=str))


def number(value: float, standard_error: float = math.nan) -> str:
    """Return a value with as many digits as its error allows: `3.1416 ± 0.0012`."""
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(standard_error) or standard_error <= 0:
        return f"{value:.5g}"
    if abs(value) < 1e-3 and standard_error < 1e-4:
        return f"{value:.3e} ± {standard_error:.1e}"
    digits = min(8, max(0, 1 - math.floor(math.log10(standard_error))))
    return f"{value:.{digits}f} ± {standard_error:.{digits}f}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: `45 s`, `12 min`, `3 h 20 min`, `5 days`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


def table(rows: list[list[str]], texts: tuple[int, ...] = (0,)) -> str:
    """Return Markdown, aligned to be read as plain text too; the first row is the head, `texts` columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(widths) > 1 and len(widths) - 1 in texts:
        widths[-1] = 1  # a long last column of text is not filled up with spaces
    rule = ["-" * width if i in texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [[c.ljust(widths[i]) if i in texts else c.rjust(widths[i]) for i, c in enumerate(row)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (aligned[0], rule, *aligned[1:]))


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return names separated by commas, of more than `most` the first ones and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, known: Any) -> str:
    """Return ` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_local(name: str) -> bool:
    """Return whether the name of a dataset or model is a path on this machine rather than a name on the Hub."""
    return public_name(name) != name or Path(name).exists()


def recorded_name(name: str) -> str:
    """Return a name as it may be published: of a path, the last part."""
    return Path(name).resolve().name if Path(name).exists() else public_name(name)


def public_name(name: str) -> str:
    """Return a name without the folders of a path, by its form alone, whether or not the path exists."""
    if "\\" in name or re.match(r"[A-Za-z]:/", name):
        return PureWindowsPath(name).name
    return Path(name).name if name.startswith(("/", ".", "~")) else name
