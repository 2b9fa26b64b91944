"""Checkpoints of a training run on disk: how they are written, found and checked, and how a model is read from one.

```
output_dir/
  training_config.yaml         the run's configuration
  checkpoint-500/              written as .checkpoint-500.partial, fsynced, then renamed
    model.safetensors          the weights in training
    ema.safetensors            the EMA weights
    optimizer.safetensors      Adam's moments and step counts
    posthoc_ema.safetensors    the averages for post-hoc EMA
    state.json                 the update, the network's and scheduler's configuration, and small state
    manifest.json              SHA-256 and size of every file above
  checkpoint-1000/
```

A checkpoint either is complete or does not exist. safetensors and JSON only; no pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.unet_2d import UNet2DModel
from ..utils.errors import UserError, first_line
from ..utils.files import remove_directory, write_directory
from ..utils.hub_errors import INDEX
from ..utils.processes import log
from .schedulers import make_scheduler

STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"
CONFIG = "training_config.yaml"  # what a run writes first: the mark of its folder
EMA, RAW = "ema", "model"  # the files of weights, without their ending


class CheckpointError(UserError):
    """A checkpoint is missing or damaged; the message names the file."""


def _manifest_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"the checkpoint {str(path.parent)!r} is damaged: {path.name} is not readable") from None


def save_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int | None = None
) -> Path:
    """Write `output_dir/checkpoint-<step>`, then remove all but the `keep` newest ones (`None`: keep all).

    `tensors` are by file, without ending, and name; `state` is JSON values. Raises OSError where it could not be
    written; older checkpoints are untouched.
    """

    def fill(folder: Path) -> None:
        for name, content in tensors.items():
            whole = {key: value.detach().contiguous().cpu() for key, value in content.items()}
            save_file(whole, folder / f"{name}.safetensors")
        (folder / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        manifest = {file.name: _manifest_entry(file) for file in folder.iterdir()}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    target = output_dir / f"checkpoint-{step}"
    try:
        write_directory(target, fill)
    except OSError as error:
        last = f"the last complete checkpoint is {[None, *list_checkpoints(output_dir)][-1] or 'none'}"
        raise OSError(f"cannot write {target}: {error.strerror or error}; {last}") from error
    if keep is not None:
        older = [path for path in list_checkpoints(output_dir) if path != target]
        for old in older[: max(0, len(older) - keep + 1)]:
            remove_directory(old)
    return target


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the update of a checkpoint, by its folder's name."""
    return int(path.name.split("-")[1])


def load_checkpoint(
    path: Path, only: tuple[str, ...] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors and the state that `save_checkpoint` wrote, every file checked against its SHA-256.

    `only` names the files of tensors to read, without ending; of the others only the size is checked.

    Raises:
        CheckpointError: No such checkpoint, or a damaged one.
    """
    if not (path / MANIFEST_FILE).is_file():
        raise CheckpointError(f"{str(path)!r} is not a complete checkpoint: it has no {MANIFEST_FILE}")
    manifest = _read_json(path / MANIFEST_FILE)
    for name, recorded in manifest.items():
        if not (path / name).is_file():
            raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: {name} is missing")
        if not name.endswith(".safetensors") or only is None or Path(name).stem in only:
            whole = _manifest_entry(path / name) == recorded
        else:
            whole = isinstance(recorded, dict) and recorded.get("size") == (path / name).stat().st_size
        if not whole:
            raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: {name} does not match its checksum")
    state = _read_json(path / STATE_FILE)
    stems = [Path(name).stem for name in manifest if name.endswith(".safetensors")]
    return {stem: load_file(path / f"{stem}.safetensors") for stem in stems if only is None or stem in only}, state


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which holds those of all its files."""
    return _manifest_entry(path / MANIFEST_FILE)["sha256"]


def find_checkpoint(
    output_dir: Path, which: str, only: tuple[str, ...] | None = None
) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Return the checkpoint to resume from and what it holds; `None` where `latest` finds no checkpoint at all.

    `which` is `latest` (the newest one that is not damaged), a path, or the name of a checkpoint in `output_dir`;
    `only` is as for `load_checkpoint`.

    Raises:
        CheckpointError: A named checkpoint is missing or damaged, or all are damaged.
    """
    checkpoints = list_checkpoints(output_dir)
    if which != "latest":
        path = Path(which) if Path(which).is_dir() else output_dir / which
        if not path.is_dir():
            have = ", ".join(p.name for p in checkpoints) or "none"
            raise CheckpointError(f"no checkpoint {which!r}; {str(output_dir)!r} has {have}")
        return path, *load_checkpoint(path, only)
    for path in reversed(checkpoints):
        try:
            return path, *load_checkpoint(path, only)
        except CheckpointError as error:
            log(f"warning: {error}; trying the one before it")
    if checkpoints:
        raise CheckpointError(f"all {len(checkpoints)} checkpoints in {str(output_dir)!r} are damaged")
    return None


def recorded_state(output_dir: Path, which: str | None) -> dict[str, Any] | None:
    """Return the state, without tensors, of the checkpoint that `find_checkpoint` would find; `None` without one.

    Raises CheckpointError: a named checkpoint is missing, or damaged as far as sizes tell.
    """
    if which not in (None, "latest"):
        found = find_checkpoint(output_dir, which, only=())
        return None if found is None else found[2]
    for path in reversed(list_checkpoints(output_dir) if which else []):
        with suppress(CheckpointError):
            return _read_json(path / STATE_FILE)
    return None


# ---------------------------------------------------------------------- models


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as a model.

    Attributes:
        path: Its folder.
        file: Which weights, `EMA` or `RAW`.
        weights: By name, as the network has them.
        state: What `state.json` holds.
    """

    path: Path
    file: str
    weights: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def run(self) -> Path:
        """The folder that it lies in: its run's, unless it was copied elsewhere."""
        return self.path.resolve().parent

    def __str__(self) -> str:
        kind = "EMA" if self.file == EMA else "raw"
        return f"{kind} weights of {self.path}, after {self.state['step']} updates"

    def model(self) -> tuple[UNet2DModel, Any]:
        """Return the network, in evaluation mode, and its scheduler, or raise CheckpointError: they do not fit."""
        try:
            return make_model(self.state, self.weights)
        except (KeyError, TypeError, ValueError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            what = f"the checkpoint {str(self.path)!r} does not fit its own {STATE_FILE}: {why}"
            raise CheckpointError(f"{what}; take another checkpoint") from error


def make_model(settings: dict[str, Any], weights: dict[str, Tensor]) -> tuple[UNet2DModel, Any]:
    """Return the network around these weights, not around copies of them, and the scheduler of a training run.

    `settings` are a run's, as `state.json` holds them. Raises KeyError, TypeError or ValueError where they describe no
    network, or another one than that of the weights.
    """
    with torch.device("meta"):  # draws nothing
        unet = UNet2DModel(**{**settings["network"], "dropout": settings["recipe"].get("dropout", 0.0)})
    expected = unet.state_dict()
    for name in sorted({*expected, *weights}):
        has, needs = (list(tensors[name].shape) if name in tensors else "none" for tensors in (weights, expected))
        if has != needs:
            raise UserError(f"the weights {name} have the shape {has}, and the network needs {needs}")
    unet.load_state_dict(weights, assign=True)
    return unet.eval(), make_scheduler(settings["network"], settings["scheduler"])


def read_checkpoint(folder: Path, weights: str = "ema") -> Checkpoint:
    """Read the model in a checkpoint's folder, whatever its name, or in the newest complete checkpoint of a run.

    `weights` are `ema` or `raw`. Damaged checkpoints of a run are passed over with a line.

    Raises:
        CheckpointError: There is none, or none that is complete.
        OSError: The folder holds no run.
    """
    file, state = {"ema": EMA, "raw": RAW}[weights], None
    if any((folder / name).exists() for name in (MANIFEST_FILE, STATE_FILE, f"{EMA}.safetensors")):
        path, (tensors, state) = folder, load_checkpoint(folder, (file,))
    elif (found := find_checkpoint(folder, "latest", (file,))) is not None:
        path, tensors, state = found
    elif (folder / INDEX).exists():
        why = "raw weights are in checkpoints only" if file == RAW else "the model is published already"
        raise CheckpointError(f"{str(folder)!r} holds a published model and no checkpoint: {why}")
    elif (folder / CONFIG).exists():
        what = f"the run in {str(folder)!r} has no checkpoint yet, so no model"
        raise CheckpointError(f"{what}; it writes one when it is stopped")
    else:
        what = f"holds no pipeline (there is no {INDEX} in it) and no checkpoint of a training run"
        raise OSError(f"{str(folder)!r} {what}")
    if file not in tensors:
        raise CheckpointError(f"the checkpoint {str(path)!r} has no {weights} weights: no {file}.safetensors")
    return Checkpoint(path, file, tensors[file], state)


def is_run_or_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a run's checkpoints, or is one, and no published model."""
    return not (folder / INDEX).exists() and ((folder / MANIFEST_FILE).exists() or bool(list_checkpoints(folder)))


def newer_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint beside a published model if it was written after that model."""
    newest = [None, *list_checkpoints(folder)][-1]
    if newest is None or not (newest / MANIFEST_FILE).exists():
        return None
    later = (newest / MANIFEST_FILE).stat().st_mtime > (folder / INDEX).stat().st_mtime
    return newest if later else None
