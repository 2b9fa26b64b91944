"""Training state on disk: a checkpoint directory is either complete or does not exist.

```
output_dir/
  checkpoint-500/              written as .checkpoint-500.partial, fsynced, then renamed
    model.safetensors          the weights in training
    ema.safetensors            their moving average
    optimizer.safetensors      Adam's moments and step counts
    state.json                 the update, and small state
    manifest.json              SHA-256 and size of every file above
  checkpoint-1000/
```

safetensors and JSON only; no pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..utils.errors import UserError
from ..utils.files import remove_directory, write_directory
from ..utils.processes import say

_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another run; the message says which file and what to do."""


def training_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Whole weights, whole optimizer tensors and the optimizer's plain values, by the network's own names.

    Wrappers (DDP, `torch.compile`) leave no trace in the names, and tensors that FSDP2 shards are gathered: all
    processes have to call this, and the first one gets the result.

    Returns:
        The weights; tensors called `<parameter>.<entry>`; JSON values.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = dict(get_model_state_dict(model, options=options))
    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options))
    tensors = {f"{name}.{key}": x for name, entries in state.get("state", {}).items() for key, x in entries.items()}
    return weights, tensors, state.get("param_groups", [])


def restore_training_state(
    model: nn.Module, optimizer: Optimizer, weights: dict[str, Tensor], tensors: dict[str, Tensor], values: Any
) -> None:
    """The inverse of `training_state`; every process passes the same whole tensors and keeps its share.

    Files hold contiguous tensors. Adam's moments take their parameters' layout in memory, as the fused kernel needs:
    it walks the memory of weights, gradients and moments side by side, whatever their strides are.
    """
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(weights), options=options)
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit(".", 1)
        state.setdefault(name, {})[entry] = value
    whole_state: dict[str, Any] = {"state": state, "param_groups": values}
    set_optimizer_state_dict(model, optimizer, whole_state, options=options)
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            if value.ndim:  # not the step counts
                entries[entry] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def gather_shards(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards, if it has any; all processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor: sharded, placed and laid out in memory as `like`."""
    if isinstance(like, DTensor):
        tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(tensor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int | None = None
) -> Path:
    """Write `output_dir/checkpoint-<step>`, then remove all but the `keep` newest ones.

    Args:
        output_dir: The run's directory.
        step: Optimizer updates done.
        tensors: File name (without ending) to tensors by name.
        state: JSON values.
        keep: How many checkpoints to keep, `None` for all.

    Raises:
        OSError: It could not be written; older checkpoints are untouched.
    """
    target = output_dir / f"checkpoint-{step}"

    def fill(folder: Path) -> None:
        for name, content in tensors.items():
            plain = {key: value.detach().contiguous().cpu() for key, value in content.items()}
            save_file(plain, folder / f"{name}.safetensors")
        (folder / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        manifest = {file.name: {"sha256": _sha256(file), "size": file.stat().st_size} for file in folder.iterdir()}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    try:
        write_directory(target, fill)
    except OSError as error:
        kept = list_checkpoints(output_dir)
        reason = error.strerror or str(error)
        raise OSError(
            f"cannot write {target}: {reason}; the last complete checkpoint is {kept[-1] if kept else 'none'}"
        ) from error
    if keep is not None:
        older = [path for path in list_checkpoints(output_dir) if path != target]
        for old in older[: max(0, len(older) - keep + 1)]:
            remove_directory(old)
    return target


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The update that a checkpoint of a run is called after."""
    return int(path.name.split("-")[1])


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save_checkpoint` wrote, every file checked against its SHA-256.

    Raises:
        CheckpointError: No such checkpoint, or a damaged one.
    """
    if not (path / MANIFEST_FILE).is_file():
        raise CheckpointError(f"{str(path)!r} is not a complete checkpoint: it has no {MANIFEST_FILE}")
    damaged = f"the checkpoint {str(path)!r} is damaged"
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, recorded in manifest.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{damaged}: {name} is missing")
            if file.stat().st_size != recorded["size"] or _sha256(file) != recorded["sha256"]:
                raise CheckpointError(f"{damaged}: {name} does not match its checksum")
    except CheckpointError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{damaged}: {MANIFEST_FILE} is not readable") from None
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):  # it is not in the manifest, or was not JSON when that was written
        raise CheckpointError(f"{damaged}: {STATE_FILE} is not readable") from None
    tensors = {Path(name).stem: load_file(path / name) for name in manifest if name.endswith(".safetensors")}
    return tensors, state


def fingerprint(path: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which holds those of all its files."""
    return _sha256(path / MANIFEST_FILE)


def find_checkpoint(output_dir: Path, which: str) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The checkpoint to resume from, and what it holds.

    Args:
        output_dir: The run's directory.
        which: `latest`, a path, or the name of a checkpoint in `output_dir`. With `latest`, damaged checkpoints are
            reported and the newest good one is taken.

    Returns:
        `None` where `latest` finds no checkpoint at all.

    Raises:
        CheckpointError: A named checkpoint is missing or damaged, or all are damaged.
    """
    if which != "latest":
        path = Path(which) if Path(which).is_dir() else output_dir / which
        if not path.is_dir():
            have = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
            raise CheckpointError(f"no checkpoint {which!r}; {str(output_dir)!r} has {have}")
        return path, *load_checkpoint(path)
    checkpoints = list_checkpoints(output_dir)
    for path in reversed(checkpoints):
        try:
            return path, *load_checkpoint(path)
        except CheckpointError as error:
            say(f"warning: {error}; trying the one before it")
    if checkpoints:
        raise CheckpointError(f"all {len(checkpoints)} checkpoints in {str(output_dir)!r} are damaged")
    return None
