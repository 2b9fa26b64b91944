"""The report of an evaluation: as JSON with all that is needed to repeat it, as a page, and beside another."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import statistics
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from ..utils.errors import NotFiniteError, UserError
from ..utils.files import write_text
from ..utils.text import finite, number, table

_INCIDENTAL = ("seconds", "batch_size", "sets")  # settings that may differ between two runs whose numbers are the same


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("ddpm-hf", "torch", "diffusers", "accelerate", "transformers", "torch-fidelity"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """Return the scheduler's configuration and the network's dtype, for the settings of a number."""
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {"scheduler": config, "dtype": pipe.settings["dtype"]}


@dataclass
class EvaluationReport:
    """Numbers of one model on one dataset."""

    # what was evaluated on (likelihood), or compared with (samples)
    dataset: str
    split: str
    num_images: int
    # name to {"value", "standard_error", ...}; likelihoods are in bits/dim; NaN is null in JSON
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    # how each number was made, by the same names with an "estimator" in words; and once for all "sampling", "features"
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)  # of Python and the libraries
    model: dict[str, Any] = field(default_factory=dict)  # its name, revision, a hash of its weights
    tables: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # rows of columns and numbers
    warnings: list[str] = field(default_factory=list)  # what to know before a number is put beside others
    pictures: list[str] = field(default_factory=list)  # files beside the report
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, name: str, value: float, standard_error: float, settings: dict[str, Any], **more: float) -> None:
        """Add a number with its error, how it was made (`estimator` in words, ...), and what else is known of it.

        Raises a NotFiniteError for NaN and infinities; the error and `more` may be NaN: not known, as of one image.
        """
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value}, which is no result; check the model and the images")
        self.values[name] = {"value": value, "standard_error": standard_error, **more}
        self.settings[name] = settings

    def add_sets(self, sets: list[EvaluationReport]) -> None:
        """Add the numbers of one set of samples, or their means over several sets and how far these lie apart.

        The standard error is then that of the mean, `spread` the standard deviation of the sets.
        """
        first = sets[0]
        self.warnings += first.warnings
        if len(sets) == 1:
            self.values |= first.values
            self.settings |= first.settings
            return
        for name, how in first.settings.items():
            entries = [part.values[name] for part in sets]
            more = {key: statistics.mean(entry[key] for entry in entries) for key in entries[0]}
            values = [entry["value"] for entry in entries]
            spread = statistics.stdev(values)
            more |= {"standard_error": spread / math.sqrt(len(sets)), "spread": spread}
            more |= {"lowest": min(values), "highest": max(values)}
            words = f"mean of {len(sets)} sets: {how['estimator']}"  # the same for other models: see `compare`
            self.add(name, settings=how | {"estimator": words, "sets": values}, **more)

    def lines(self) -> list[str]:
        """Return each number with its error, for terminals."""
        names = {"bits_per_dim": f"bits/dim on {self.num_images} images of {self.split}"}
        return [f"{names.get(k, k)}: {number(v['value'], v['standard_error'])}" for k, v in self.values.items()]

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, completely or not at all."""
        write_text(Path(path), json.dumps(finite(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Read a report that `save` wrote, by its file or folder; errors that it lacks are NaN.

        Raises a UserError if there is none, or the file is something else.
        """
        file = report_file(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there is no report {str(file)!r}") from None
        except ValueError:
            raise UserError(f"{str(file)!r} is not a report: it is not JSON") from None
        if not _is_report(content):
            what = "an object with dataset, split, num_images and values: a number or null as each 'value'"
            raise UserError(f"{str(file)!r} is not a report of ddpm-hf evaluate, which is {what}")
        report = cls(**{key: content[key] for key in cls.__dataclass_fields__ if key in content})
        for entry in report.values.values():
            entry.setdefault("standard_error", math.nan)
            entry.update({key: math.nan for key, value in entry.items() if value is None})
        return report


def report_file(path: str | Path) -> Path:
    """Return the file of a report that is given by its file or by its folder."""
    return Path(path) / "report.json" if Path(path).is_dir() else Path(path)


def _is_report(content: Any) -> bool:
    """Return whether pages and comparisons can use it."""
    required = {"dataset": str, "split": str, "num_images": int, "values": dict}
    if not isinstance(content, dict) or not all(isinstance(content.get(k), kind) for k, kind in required.items()):
        return False
    entries, settings = content["values"].values(), content.get("settings", {})
    if not all(isinstance(entry, dict) and "value" in entry for entry in entries) or not isinstance(settings, dict):
        return False
    numbers = [entry.get(key) for entry in entries for key in ("value", "standard_error")]
    of_numbers = [settings.get(name, {}) for name in ("sampling", "features", *content["values"])]
    return all(isinstance(x, (int, float, NoneType)) for x in numbers) and all(isinstance(x, dict) for x in of_numbers)


def warnings_section(report: EvaluationReport) -> list[str]:
    """Return the part of a page that says what to know before comparing; nothing where there is nothing."""
    lines = "\n".join(f"- {warning}" for warning in report.warnings)
    return ["## Before you compare", lines] if lines else []


def as_markdown(report: EvaluationReport) -> str:
    """Return the report as a page: numbers, warnings, tables, pictures, settings."""
    rows = [["number", "value", "how it was made"]]
    for name, entry in report.values.items():
        how = report.settings.get(name, {}).get("estimator", "")
        if "lowest" in entry:
            how += f"; {entry['lowest']:.5g} to {entry['highest']:.5g}"
        rows.append([f"`{name}`", number(entry["value"], entry["standard_error"]), how])
    parts = [f"# {report.model.get('name', 'a model')} on {report.dataset}"]
    parts += [f"Made by `ddpm-hf evaluate` on {report.created}."]
    parts += ["## Numbers", table(rows, texts=(0, 2)), "± is one standard error.", *warnings_section(report)]
    for title, content in report.tables.items():
        cells = [[f"{row[column]:.5g}" for column in content[0]] for row in content]
        parts += [f"## {title}", table([list(content[0]), *cells])]
    if report.pictures:
        parts += ["## Pictures", *(f"![{picture}]({picture})" for picture in report.pictures)]
    settings = {key: value for key, value in report.settings.items() if key not in report.values}
    everything = {"model": report.model, "settings": settings, "versions": report.versions}
    parts += ["## Settings", f"```json\n{json.dumps(finite(everything), indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"


def compare(reports: dict[str, EvaluationReport]) -> str:
    """Put two or more reports side by side: their numbers, the last one's difference to the first, other settings."""
    all_of, notes = list(reports.values()), []
    rows = [["number", *reports, "difference", "in errors"]]
    for key in dict.fromkeys(key for report in all_of for key in report.values):
        cells = [report.values.get(key) for report in all_of]
        texts = [number(cell["value"], cell["standard_error"]) if cell else "-" for cell in cells]
        difference = in_errors = "-"
        if (first := cells[0]) and (last := cells[-1]):
            change = last["value"] - first["value"]
            difference, error = f"{change:+.4g}", math.hypot(first["standard_error"], last["standard_error"])
            in_errors = f"{change / error:+.1f}" if error > 0 else "-"
        different = _different_settings([report.settings.get(key, {}) for report in all_of if key in report.values])
        rows.append([key + ("*" if different else ""), *texts, difference, in_errors])
        notes += [f"* {key}: {note}" for note in different]
    for what in ("sampling", "features"):
        both = [report.settings[what] for report in all_of if what in report.settings]
        notes += [f"* {what}: {note}" for note in _different_settings(both)]
    if len({report.dataset for report in all_of}) > 1:
        notes.append(f"* other datasets: {', '.join(report.dataset for report in all_of)}")
    return "\n".join([table(rows), *notes])


def _different_settings(settings: list[dict[str, Any]]) -> list[str]:
    """Return a note for each setting that is not the same in all; of nested ones, for each of theirs."""
    notes = []
    for key in dict.fromkeys(key for one in settings for key in one if key not in _INCIDENTAL):
        values = [one.get(key) for one in settings]
        if all(isinstance(value, dict) for value in values):
            notes += [f"{key}.{note}" for note in _different_settings([value for value in values if value])]
        elif any(value != values[0] for value in values):
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
            notes.append(f"{key} differs: {' | '.join(t if len(t) <= 60 else f'{t[:57]}...' for t in texts)}")
    return [note for note in notes if not note.startswith("estimator ")] or notes  # the same again in words
