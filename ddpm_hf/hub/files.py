"""What of a model's folder is published: the pipeline's files and its card, and a snapshot of them for a push."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.report import EvaluationReport, report_file
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.hub_errors import check_pipeline
from ..utils.text import public_name
from .model_card import WEIGHTS, CardFacts, ModelFacts, make_card, merge_cards

if TYPE_CHECKING:  # torch and diffusers take seconds, which mistakes on the command line need not wait for
    from ..pipelines.pipeline_ddpm import DDPMPipeline

CARD, REPORT, SAMPLES, INDEX = "README.md", "evaluation.json", "samples.png", "model_index.json"
# What a push takes of a folder. Not ".partial": a run that starts removes what others have left under that name, and a
# push of the same folder may be going on, in the background or in another terminal.
_SNAPSHOT = (".push-", ".snapshot")
_EXTRAS = (CARD, REPORT, "LICENSE", "samples*.png", "samples*.gif")
_COMPONENT_FILES = ("config.json", "scheduler_config.json", "*.safetensors", "*.safetensors.index*.json")
_VARIANT = re.compile(r"diffusion_pytorch_model\.([^.]+?)(-\d+-of-\d+)?\.safetensors")
_OPENING = threading.Lock()  # diffusers changes torch.nn.init for everybody while it loads
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT = 10_000_000
_ONE_DAY = 86_400.0


def write_pipeline(pipe: DDPMPipeline, folder: Path) -> None:
    """Save a pipeline into a run's folder, beside its checkpoints.

    All of it is written and flushed elsewhere first; then each file and subfolder takes its predecessor's place: a
    file in one step, a subfolder in two renames. After a kill between these two that part is missing until the run
    goes on, whose `checkpointing.remove_leftovers` puts the old one back; after one between two parts an old one is
    beside a new one, until the run has written them again.
    """
    from ..utils.files import write_directory

    staging = folder / ".pipeline.partial"
    write_directory(staging, pipe.save_pretrained)
    for entry in sorted(staging.iterdir()):
        target, old = folder / entry.name, folder / f".{entry.name}.old"
        if target.is_dir():
            shutil.rmtree(old, ignore_errors=True)  # by a kill before
            target.rename(old)
        entry.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    staging.rmdir()


def read_card(path: Path) -> str:
    """The text of a card, as a person may have saved it.

    Raises:
        ValueError: It is in another encoding than UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path.name} is not a text in UTF-8; save it again in that encoding, or remove it") from None


def write_card(folder: str | Path, facts: CardFacts) -> list[str]:
    """Write the card of a saved pipeline, or renew the generated sections of the one that is there.

    Returns:
        The sections that were left as they are because a person edited them.

    Raises:
        OSError, KeyError: The folder is not a saved DDPM.
        ValueError: The card that is there cannot be read.
    """
    path = Path(folder) / CARD
    text = make_card(ModelFacts.read(Path(folder)), facts)
    kept: list[str] = []
    if path.exists():
        text, kept = merge_cards(read_card(path), text)
    write_text(path, text)
    return kept


def published_files(folder: Path) -> list[str]:
    """What of a folder is published: the pipeline's own files, the card, sample grids and the report.

    Not published is everything else: checkpoints, logs, the training configuration, hidden files.

    Raises:
        OSError, ValueError: There is no DDPM in it, or it holds a variant of the weights only.
    """
    check_pipeline(folder)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir()]
    patterns = [INDEX, *_EXTRAS, *(f"{part}/{pattern}" for part in parts for pattern in _COMPONENT_FILES)]
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    weights = [path for path in found if path.suffix == ".safetensors"]
    if not weights:
        raise OSError(f"{str(folder)!r} has no safetensors weights to publish")
    if not any(WEIGHTS.fullmatch(path.name) for path in weights) and (variants := _variants(folder)):
        raise UserError(
            f"{str(folder)!r} holds the variant {variants[0]!r} of the weights only, which from_pretrained without "
            f"variant= does not open; save it as a whole model first: DDPMPipeline.from_pretrained({str(folder)!r}, "
            f"variant={variants[0]!r}).save_pretrained(FOLDER)"
        )
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _variants(folder: Path) -> list[str]:
    """What variants of the weights there are, such as `fp16`."""
    found = (_VARIANT.fullmatch(path.name) for path in folder.glob("unet/*.safetensors"))
    return sorted({match[1] for match in found if match is not None})


def check_opens(snapshot: Path, folder: Path) -> None:
    """Open what is published as a reader will, by its card: `DDPMPipeline.from_pretrained` without further arguments.

    Args:
        snapshot: What `make_snapshot` made.
        folder: What it was made of, for messages.

    Raises:
        UserError: It does not open, or the network is not the one that the files hold, or holds NaN.
    """
    from ..models.unet_2d import check_weights
    from ..pipelines.pipeline_ddpm import DDPMPipeline

    for variant in (None, *_variants(snapshot)):
        how = "from_pretrained" if variant is None else f"from_pretrained(..., variant={variant!r})"
        try:
            with _OPENING, _without_bars():
                pipe = DDPMPipeline.from_pretrained(snapshot, variant=variant, local_files_only=True)
            check_weights(pipe.unet)
        except MemoryError:
            raise
        except Exception as error:  # damaged files end in the errors of several libraries
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].replace(str(snapshot), str(folder))
            raise UserError(f"{how} does not open {str(folder)!r}, so it is not published: {why}") from error
        here, held = (
            sum(value.numel() for value in pipe.unet.state_dict().values()),
            ModelFacts.read(snapshot).parameters,
        )
        if variant is None and here != held:
            raise UserError(
                f"the weight files of {str(folder)!r} hold {held:,} numbers and its network {here:,}, so it is not "
                "published; remove the files that belong to another model"
            )


@contextmanager
def _without_bars() -> Iterator[None]:
    """diffusers shows no bar while it loads."""
    from diffusers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def make_snapshot(folder: Path, token: str | None = None) -> Path:
    """The published files as they are now, in a folder of their own, without paths of this machine in them.

    Who calls this removes it.

    Raises:
        OSError, ValueError: There is no DDPM in the folder, or a file holds an access token.
    """
    prefix, suffix = _SNAPSHOT
    for left in folder.glob(f"{prefix}*{suffix}"):  # by a push that was killed
        if time.time() - left.stat().st_mtime > _ONE_DAY:
            shutil.rmtree(left, ignore_errors=True)
    try:  # beside the weights, which then need not be copied
        staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=folder))
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
        ValueError: It is not a report, or it holds an access token.
    """
    EvaluationReport.load(report)
    shutil.copyfile(report_file(report), staging / REPORT)  # with what this version of the package does not know
    _without_secrets(staging / REPORT, token)


def _without_secrets(path: Path, token: str | None) -> None:
    """Take paths of this machine out of a JSON file, and refuse a text with an access token in it."""
    data = path.read_bytes()
    if len(data) < _LARGEST_TEXT and ((token and token.encode() in data) or _TOKEN.search(data)):
        raise UserError(f"{path.name} holds an access token; remove it before anything is published")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        value = json.loads(data)
        cleaned = _without_paths(value)
        if cleaned != value:
            path.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: entry if key == "_class_names" else _without_paths(entry)  # a class may be called "/m/0cmf2"
            for key, entry in value.items()
            if key != "_name_or_path"
        }
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value
