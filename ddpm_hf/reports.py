"""The report of an evaluation: as JSON with all that is needed to repeat it, as a page, and beside another."""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from .errors import NotFiniteError, UserError

# Settings that may differ between two runs whose numbers are the same.
_INCIDENTAL = ("seconds", "batch_size")
# A file while it is written (`write_whole`); after a day its writer was killed.
_PARTIAL, _ONE_DAY = re.compile(r"\..+\.[0-9a-f]{32}\.partial"), 86_400.0


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("ddpm-hf", "torch", "diffusers", "accelerate", "transformers", "torch-fidelity"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass
class EvaluationReport:
    """Numbers of one model on one dataset.

    Attributes:
        dataset, split, num_images: What was evaluated on (likelihood), or compared with (samples).
        values: Name to `{"value", "standard_error", ...}`; likelihoods are in bits/dim. NaN is `null` in JSON.
        settings: How each number was made, by the same names with an `estimator` in words; and, once for all, the
            `sampling` and the `features`.
        versions: Of Python and the libraries.
        model: Its name, revision, a hash of its weights.
        tables: Name to rows of columns and numbers, such as the paper's Table 4.
        warnings: What to know before a number is put beside others.
        pictures: Files beside the report.
        created: When, UTC.
    """

    dataset: str
    split: str
    num_images: int
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)
    model: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, completely or not at all."""
        write_text(Path(path), json.dumps(finite(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Read a report that `save` wrote; a folder's `report.json` for a folder. Errors that it lacks are NaN.

        Raises:
            ValueError: There is none, or the file is something else.
        """
        file = report_file(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no report {str(file)!r}") from None
        except ValueError:
            raise UserError(f"{str(file)!r} is not a report: it is not JSON") from None
        known = {entry.name for entry in dataclasses.fields(cls)}
        required = {"dataset", "split", "num_images", "values"}
        if not isinstance(content, dict) or not required <= content.keys():
            raise UserError(f"{str(file)!r} is not a report of ddpm-hf evaluate")
        if wrong := _wrong_part(content):
            raise UserError(f"{str(file)!r} is not a report of ddpm-hf evaluate: {wrong}")
        report = cls(**{key: value for key, value in content.items() if key in known})
        for value in report.values.values():
            value.setdefault("standard_error", math.nan)
            value.update({key: math.nan for key, number in value.items() if number is None})
        return report

    def add(self, name: str, value: float, standard_error: float, settings: dict[str, Any], **more: float) -> None:
        """One number, with its error and how it was made (`estimator` in words, and what else there is to say).

        Raises:
            NotFiniteError: It is NaN or infinite. Its error, and `more`, may be NaN: not known, as from one image.
        """
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{name} is {value}, which is no result; the model, or what it was compared with, is at fault"
            )
        self.values[name] = {"value": value, "standard_error": standard_error, **more}
        self.settings[name] = settings


def report_file(path: str | Path) -> Path:
    """The file of a report that is given by its file or by its folder."""
    return Path(path) / "report.json" if Path(path).is_dir() else Path(path)


def _wrong_part(content: dict[str, Any]) -> str:
    """What of a report's content pages and comparisons could not use; nothing if all is well."""
    values, settings = content["values"], content.get("settings", {})
    if not isinstance(values, dict) or not isinstance(settings, dict):
        return "its values and settings must have names"
    for name, entry in values.items():
        numbers = [entry.get("value", "none"), entry.get("standard_error")] if isinstance(entry, dict) else [entry]
        if not isinstance(entry, dict) or any(not isinstance(x, (int, float, NoneType)) for x in numbers):
            return f"{name!r} must have a number or null as its 'value'"
        if not isinstance(settings.get(name, {}), dict):
            return f"the settings of {name!r} must have names"
    return ""


def writable_folder(folder: Path, flag: str) -> None:
    """Make the folder and see that files can be written into it: before hours of work, not after them.

    Raises:
        ValueError: They cannot; names the flag that says where else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {flag} {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {flag} {folder}: permission denied")


def write_whole(path: Path, write: Callable[[Path], Any], durable: bool = True) -> None:
    """Write a file completely or not at all, and flush it to the disk.

    Any number of threads, processes and machines may write the same file: each has a partial file of its own, and the
    last one to finish counts.

    Args:
        path: The file; its folder is made.
        write: Writes a file of the name that it is given, which ends in `.partial`.
        durable: `False` leaves the flushing to the system: for many small files that can be made again, as it takes
            milliseconds.

    Raises:
        OSError: It cannot be written; what was at `path` before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial_files(path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        if durable:
            flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `write_whole` does."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def flush(path: Path) -> None:
    """Put a file's content, or the names in a folder, onto the disk, so that a crash of the machine cannot take it.

    Windows, and some network file systems, flush no folders.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    mode = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes what may be written
    try:
        descriptor = os.open(path, mode)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise


@functools.cache
def _remove_partial_files(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; it is looked at once per process."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError):  # another process removes them too
            if _PARTIAL.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ONE_DAY:
                path.unlink()


def finite(content: Any) -> Any:
    """The same with `None` for NaN and infinities, which JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def plain(content: Any) -> Any:
    """As it comes back from JSON: tuples are lists, keys are strings, what JSON does not know is its text."""
    return json.loads(json.dumps(content, default=str))


def number(value: float, standard_error: float = math.nan) -> str:
    """A value with as many digits as its error allows: `3.1416 ± 0.0012`."""
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(standard_error) or standard_error <= 0:
        return f"{value:.5g}"
    if abs(value) < 1e-3 and standard_error < 1e-4:
        return f"{value:.3e} ± {standard_error:.1e}"
    digits = min(8, max(0, 1 - math.floor(math.log10(standard_error))))
    return f"{value:.{digits}f} ± {standard_error:.{digits}f}"


def table(rows: list[list[str]], texts: tuple[int, ...] = (0,)) -> str:
    """Markdown, aligned to be read as plain text too; the first row is the head.

    Args:
        rows: Cells.
        texts: Which columns are text; the others are numbers.
    """
    columns = range(len(rows[0]))
    # A long last column of text is not filled up with spaces.
    widths = [1 if i and i == len(rows[0]) - 1 and i in texts else max(len(row[i]) for row in rows) for i in columns]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * width if i in texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [[c.ljust(widths[i]) if i in texts else c.rjust(widths[i]) for i, c in enumerate(row)] for row in rows]
    return "\n".join([line(aligned[0]), line(rule), *map(line, aligned[1:])])


def as_markdown(report: EvaluationReport) -> str:
    """The report as a page: numbers, warnings, tables, pictures, settings."""
    name = report.model.get("name", "a model")
    parts = [f"# {name} on {report.dataset}", f"Made by `ddpm-hf evaluate` on {report.created}."]
    rows = [["number", "value", "how it was made"]]
    for key, value in report.values.items():
        how = report.settings.get(key, {}).get("estimator", "")
        rows.append([f"`{key}`", number(value["value"], value["standard_error"]), how])
    parts += ["## Numbers", table(rows, texts=(0, 2)), "± is one standard error."]
    if report.warnings:
        parts += ["## Before you compare", "\n".join(f"- {warning}" for warning in report.warnings)]
    for title, content in report.tables.items():
        head = list(content[0])
        cells = [[f"{row[column]:.5g}" for column in head] for row in content]
        parts += [f"## {title}", table([head, *cells])]
    if report.pictures:
        parts += ["## Pictures", "\n\n".join(f"![{picture}]({picture})" for picture in report.pictures)]
    everything = {
        "model": report.model,
        "settings": {key: value for key, value in report.settings.items() if key not in report.values},
        "versions": report.versions,
    }
    parts += ["## Settings", f"```json\n{json.dumps(finite(everything), indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"


def compare(reports: dict[str, EvaluationReport]) -> str:
    """Reports side by side, the difference of the last to the first, and what makes numbers incomparable.

    Args:
        reports: By what to call them; at least two.
    """
    names, all_of = list(reports), list(reports.values())
    first, last = all_of[0], all_of[-1]
    rows = [["number", *names, "difference", "in errors"]]
    notes = []
    for key in dict.fromkeys(key for report in all_of for key in report.values):
        cells = [report.values.get(key) for report in all_of]
        texts = [number(cell["value"], cell["standard_error"]) if cell else "-" for cell in cells]
        difference = errors = "-"
        if (a := first.values.get(key)) and (b := last.values.get(key)):
            change = b["value"] - a["value"]
            difference = f"{change:+.4g}"
            error = math.hypot(a["standard_error"], b["standard_error"])
            errors = f"{change / error:+.1f}" if error > 0 else "-"
        different = _different_settings([report.settings.get(key, {}) for report in all_of if key in report.values])
        rows.append([key + ("*" if different else ""), *texts, difference, errors])
        notes += [f"* {key}: {note}" for note in different]
    for what in ("sampling", "features"):
        both = [report.settings[what] for report in all_of if what in report.settings]
        notes += [f"* {what}: {note}" for note in _different_settings(both)]
    if len({report.dataset for report in all_of}) > 1:
        notes.append(f"* other datasets: {', '.join(report.dataset for report in all_of)}")
    return "\n".join([table(rows), *notes])


def _different_settings(settings: list[dict[str, Any]]) -> list[str]:
    notes = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = [one.get(key) for one in settings]
        if key in _INCIDENTAL or all(value == values[0] for value in values):
            continue
        if all(isinstance(value, dict) for value in values):
            notes += [f"{key}.{note}" for note in _different_settings([value for value in values if value])]
        else:
            notes.append(f"{key} differs: {' | '.join(_short(value) for value in values)}")
    exact = [note for note in notes if not note.startswith("estimator ")]  # the same again in words
    return exact or notes


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
