"""What of a model's folder is published: the pipeline's files and its card, and a snapshot of them for a push."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hub_errors import check_pipeline
from .model_card import CardFacts, ModelFacts, make_card, merge_cards, public_name
from .reports import write_text

if TYPE_CHECKING:  # torch and diffusers take seconds, which a push does not need
    from .pipeline_ddpm import DDPMPipeline

CARD, REPORT, SAMPLES, INDEX = "README.md", "evaluation.json", "samples.png", "model_index.json"
_EXTRAS = (CARD, REPORT, "LICENSE", "samples*.png", "samples*.gif")
_COMPONENT_FILES = ("config.json", "scheduler_config.json", "*.safetensors", "*.safetensors.index.json")
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT = 10_000_000
_ONE_DAY = 86_400.0


def write_pipeline(pipe: DDPMPipeline, folder: Path) -> None:
    """Save a pipeline into a run's folder, beside its checkpoints.

    All of it is written and flushed elsewhere first; then each file and subfolder takes its predecessor's place.
    """
    from .checkpointing import write_directory

    staging = folder / ".pipeline"
    write_directory(staging, pipe.save_pretrained)
    for entry in sorted(staging.iterdir()):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    staging.rmdir()


def write_card(folder: str | Path, facts: CardFacts) -> list[str]:
    """Write the card of a saved pipeline, or renew the generated sections of the one that is there.

    Returns:
        The sections that were left as they are because a person edited them.
    """
    path = Path(folder) / CARD
    text = make_card(ModelFacts.read(Path(folder)), facts)
    kept: list[str] = []
    if path.exists():
        text, kept = merge_cards(path.read_text(), text)
    write_text(path, text)
    return kept


def published_files(folder: Path) -> list[str]:
    """What of a folder is published: the pipeline's own files, the card, sample grids and the report.

    Not published is everything else: checkpoints, logs, the training configuration, hidden files.

    Raises:
        OSError, ValueError: There is no DDPM in it.
    """
    check_pipeline(folder)
    index = json.loads((folder / INDEX).read_text())
    parts = [name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir()]
    patterns = [INDEX, *_EXTRAS, *(f"{part}/{pattern}" for part in parts for pattern in _COMPONENT_FILES)]
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not any(path.suffix == ".safetensors" for path in found):
        raise OSError(f"{str(folder)!r} has no safetensors weights to publish")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def make_snapshot(folder: Path, token: str | None = None) -> Path:
    """The published files as they are now, in a folder of their own, without paths of this machine in them.

    Who calls this removes it.

    Raises:
        OSError, ValueError: There is no DDPM in the folder, or a file holds an access token.
    """
    for left in folder.glob(".push-*.partial"):  # by a push that was killed
        if time.time() - left.stat().st_mtime > _ONE_DAY:
            shutil.rmtree(left, ignore_errors=True)
    try:  # beside the weights, which then need not be copied
        staging = Path(tempfile.mkdtemp(prefix=".push-", suffix=".partial", dir=folder))
    except OSError:
        staging = Path(tempfile.mkdtemp(prefix="ddpm-hf-push-"))
    try:
        for _ in range(10):
            before = _state(folder)
            for name in before:
                _take(folder / name, staging / name)
            if _state(folder) == before:
                break
            shutil.rmtree(staging)
            staging.mkdir()
        else:
            raise OSError(f"{str(folder)!r} is being written; try again when that is done")
        for path in staging.rglob("*"):
            if path.suffix in (".json", ".md"):
                _without_secrets(path, token)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return staging


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Which files there are; equal before and after means that nothing was written in between."""
    stats = {name: (folder / name).stat() for name in published_files(folder)}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    if source.suffix == ".safetensors":  # large, and replaced rather than rewritten, so a second name is enough
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def take_report(report: Path, staging: Path, token: str | None) -> None:
    """Put another evaluation (a file, or a folder with `report.json`) into a snapshot.

    Raises:
        ValueError: There is none, or it holds an access token.
    """
    path = report / "report.json" if report.is_dir() else report
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"there is no evaluation report in {str(report)!r}; ddpm-hf evaluate --output makes one"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("values"), dict):
        raise ValueError(f"{str(path)!r} is no evaluation report")
    (staging / REPORT).write_text(json.dumps(content, indent=2) + "\n")
    _without_secrets(staging / REPORT, token)


def _without_secrets(path: Path, token: str | None) -> None:
    """Take paths of this machine out of a JSON file, and refuse a text with an access token in it."""
    data = path.read_bytes()
    if len(data) < _LARGEST_TEXT and ((token and token.encode() in data) or _TOKEN.search(data)):
        raise ValueError(f"{path.name} holds an access token; remove it before anything is published")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        value = json.loads(data)
        cleaned = _without_paths(value)
        if cleaned != value:
            path.write_text(json.dumps(cleaned, indent=2) + "\n")


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items() if key != "_name_or_path"}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value
