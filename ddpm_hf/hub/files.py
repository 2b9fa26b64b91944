"""What of a model's folder is published: the pipeline's files and its card, and a snapshot of them for a push."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..evaluation.report import EvaluationReport, report_file
from ..utils.errors import UserError, first_line
from ..utils.files import write_directory, write_text
from ..utils.hub_errors import INDEX, check_pipeline
from ..utils.text import public_name
from .model_card import CardFacts, ModelFacts, generated_facts, make_card, training_facts

if TYPE_CHECKING:  # torch and diffusers take seconds, which mistakes on the command line need not wait for
    from ..pipelines.pipeline_ddpm import DDPMPipeline

CARD, REPORT, SAMPLES, CURVE = "README.md", "evaluation.json", "samples.png", "curve.png"
# The folder that a push takes its files from. Not ".partial": a run that starts removes what others have left under
# that name, and a push of the same folder may be under way, in the background or in another terminal.
_SNAPSHOT = (".push-", ".snapshot")
_EXTRAS = (CARD, REPORT, CURVE, "LICENSE", "samples*.png", "samples*.gif")
_COMPONENT_FILES = ("config.json", "scheduler_config.json", "*.safetensors", "*.safetensors.index*.json")
_VARIANT = re.compile(r"diffusion_pytorch_model\.([^.]+?)(-\d+-of-\d+)?\.safetensors")
_OPENING = threading.Lock()  # diffusers changes torch.nn.init for everybody while it loads
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_ONE_DAY = 86_400.0  # seconds


def write_pipeline(pipe: DDPMPipeline, folder: Path) -> None:
    """Save a pipeline into a run's folder, beside its checkpoints.

    All of it is written and flushed elsewhere first; then each file and subfolder takes its predecessor's place: a
    file in one step, a subfolder in two renames. What a kill in between takes away, `utils.files.remove_leftovers`
    puts back when the run is resumed.
    """
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
    """Return the text of a card, or raise a UserError: a person saved it in another encoding than UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path.name} is not a text in UTF-8; save it again in that encoding, or remove it") from None


def write_card(folder: str | Path, facts: CardFacts) -> bool:
    """Write the card of a saved pipeline, unless a person has edited the one that is there; return whether.

    Raises:
        OSError, KeyError: The folder is not a saved DDPM.
        UserError: The card that is there cannot be read.
    """
    path = Path(folder) / CARD
    if path.exists() and generated_facts(read_card(path)) is None:
        return False
    write_text(path, make_card(ModelFacts.read(path.parent), facts))
    return True


def published_files(folder: Path) -> list[str]:
    """Return what of a folder is published: the pipeline's own files, the card, sample grids and the report.

    Checkpoints, logs, the training configuration and hidden files are not. Raises OSError or UserError where there is
    no DDPM.
    """
    check_pipeline(folder)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir()]
    patterns = [INDEX, *_EXTRAS, *(f"{part}/{pattern}" for part in parts for pattern in _COMPONENT_FILES)]
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def check_opens(snapshot: Path, folder: Path) -> None:
    """Open what is published as a reader will, by its card: `DDPMPipeline.from_pretrained` without further arguments.

    `folder` is what `make_snapshot` made the snapshot of, for messages. Variants of the weights (`fp16`) are opened
    too. Raises UserError: it does not open, the network is not the one that the files hold, or it holds NaN.
    """
    from diffusers.utils import logging

    from ..models.unet_2d import check_weights
    from ..pipelines.pipeline_ddpm import DDPMPipeline

    variants = {found[1] for path in snapshot.glob("unet/*") if (found := _VARIANT.fullmatch(path.name))}
    with _OPENING:
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            for variant in (None, *sorted(variants)):
                pipe = DDPMPipeline.from_pretrained(snapshot, variant=variant, local_files_only=True)
                check_weights(pipe.unet)
                in_network = sum(value.numel() for value in pipe.unet.state_dict().values())
                if variant is None and in_network != (in_files := ModelFacts.read(snapshot).parameters):
                    numbers = f"its weight files hold {in_files:,} numbers and its network {in_network:,}"
                    raise UserError(f"{numbers}; remove the files that belong to another model")
        except MemoryError:
            raise
        except Exception as error:  # damaged files end in the errors of several libraries
            why = first_line(error).replace(str(snapshot), str(folder))
            how = "from_pretrained" if variant is None else f"from_pretrained(..., variant={variant!r})"
            raise UserError(f"{how} does not open {str(folder)!r}, so it is not published: {why}") from error
        finally:
            if bars:
                logging.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """Raise OSError where there is no such folder: before a token is asked for."""
    if not folder.is_dir():
        raise OSError(f"there is no folder {str(folder)!r}; name that of a run or model")


def make_snapshot(folder: Path, token: str | None = None, weights: str = "ema") -> Path:
    """Copy the published files as they are now into a folder of their own, without paths of this machine in them.

    Of a stopped run's folder or of a checkpoint, the model and a card are written there. Who calls this removes it.
    `weights` is as for `DDPMPipeline.from_pretrained`. Raises OSError or UserError: there is no DDPM in the folder, or
    a file holds an access token.
    """
    check_folder(folder)
    if weights == "raw" or not (folder / INDEX).is_file():
        return _snapshot_of_checkpoint(folder, token, weights)
    prefix, suffix = _SNAPSHOT
    for left in folder.glob(f"{prefix}*{suffix}"):  # by a push that was killed
        if time.time() - left.stat().st_mtime > _ONE_DAY:
            shutil.rmtree(left, ignore_errors=True)
    beside = folder if os.access(folder, os.W_OK) else None  # the weights, which then need not be copied
    staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=beside))
    try:
        for _ in range(10):
            before = _state(folder)
            for name in before:
                _copy(folder / name, staging / name)
            if _state(folder) == before:  # nothing was written in between
                break
            shutil.rmtree(staging)
            staging.mkdir()
        else:
            raise OSError(f"{str(folder)!r} is being written; try again when that is done")
        _remove_all_private(staging, token)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return staging


def write_model(folder: Path, pipe: DDPMPipeline, facts: CardFacts) -> None:
    """Write a model and its card into a new folder, which appears complete or not at all."""

    def fill(target: Path) -> None:
        pipe.save_pretrained(target)
        write_card(target, facts)

    write_directory(folder, fill)


def facts_of_run(run: Path, name: str, state: Mapping[str, Any], step: int, raw: bool = False) -> CardFacts:
    """Return `training_facts` of a run's weights, with what its configuration says, if that is there."""
    from ..pipelines.checkpoints import CONFIG

    config: dict[str, Any] = {}
    with suppress(OSError, ValueError, yaml.YAMLError):  # a checkpoint that was copied elsewhere has none beside it
        config = dict(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")))
    given = {name: config.get(name) for name in ("dataset_name", "license")}
    return training_facts(name, state, step, raw, **given)


def facts_of_model(model: str, name: str, weights: str = "ema") -> CardFacts:
    """Return what the card of a model that was made from `model` says of the training: what is known of that one's.

    `model` and `weights` are those of `DDPMPipeline.from_pretrained`; `name` is the new model's.
    """
    from ..pipelines.checkpoints import RAW, read_checkpoint
    from ..pipelines.pipeline_ddpm import name_on_hub

    folder = Path(model)
    if folder.is_dir() and (weights == "raw" or not (folder / INDEX).is_file()):
        checkpoint = read_checkpoint(folder, weights)
        state = checkpoint.state
        return facts_of_run(checkpoint.run, name, state, state["step"], checkpoint.file == RAW)
    known = generated_facts(read_card(folder / CARD)) if (folder / CARD).is_file() else None
    return replace(known or CardFacts(name, base_model=name_on_hub(model)), name=name)


def _snapshot_of_checkpoint(folder: Path, token: str | None, weights: str) -> Path:
    from ..pipelines.checkpoints import RAW, read_checkpoint
    from ..pipelines.pipeline_ddpm import DDPMPipeline
    from ..utils.processes import log

    checkpoint = read_checkpoint(folder, weights)
    pipe, step = DDPMPipeline(*checkpoint.model()), checkpoint.state["step"]
    log(str(checkpoint))
    facts = facts_of_run(checkpoint.run, folder.resolve().name, checkpoint.state, step, checkpoint.file == RAW)
    staging = Path(tempfile.mkdtemp(prefix="ddpm-hf-push-"))
    try:
        pipe.save_pretrained(staging)
        for name in (CARD, f"samples-{step}.png"):  # a person's own card, and the run's grid of this update
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
        write_card(staging, facts)
        _remove_all_private(staging, token)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return staging


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    stats = {name: (folder / name).stat() for name in published_files(folder)}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".safetensors":  # large, and replaced rather than rewritten, so a second name is enough
        with suppress(OSError):
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def take_report(report: Path, staging: Path, token: str | None) -> None:
    """Put another evaluation (a file, or a folder with `report.json`) into a snapshot, or raise a UserError."""
    EvaluationReport.load(report)
    shutil.copyfile(report_file(report), staging / REPORT)  # with what this version of the package does not know
    _remove_private(staging / REPORT, token)


def _remove_all_private(staging: Path, token: str | None) -> None:
    for path in staging.rglob("*"):
        if path.suffix in (".json", ".md"):
            _remove_private(path, token)


def _remove_private(path: Path, token: str | None) -> None:
    """Take paths of this machine out of a JSON file, and refuse a text with an access token in it."""
    data = path.read_bytes()
    if (token and token.encode() in data) or _TOKEN.search(data):
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
