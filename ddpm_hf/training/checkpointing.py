"""Training state on disk: a checkpoint directory is either complete or does not exist.

```
output_dir/
  checkpoint-500/              written as .checkpoint-500.partial, fsynced, then renamed
    model.safetensors          the weights in training
    ema.safetensors            the EMA weights
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
    """A checkpoint is missing or damaged; the message names the file."""


def training_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Return whole weights, whole optimizer tensors and the optimizer's plain values, by the network's own names.

    Wrappers (DDP, `torch.compile`) leave no trace in the names, and shards of FSDP 2 are gathered: all processes have
    to call this, and the first one gets the result.

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
    """Restore what `training_state` returned; every process passes the same whole tensors and keeps its share.

    Files hold contiguous tensors. Adam's moments get their parameters' layout in memory, as the fused kernel needs: it
    reads the memory of weights, gradients and moments side by side, whatever their strides are.
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
    """Return a tensor gathered from its shards, if it has any; all processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor: sharded, placed and laid out in memory as `like`."""
    if isinstance(like, DTensor):
        tensor = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(tensor)


def _manifest_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise CheckpointError(f"the checkpoint {str(path.parent)!r} is damaged: {path.name} is not readable")


def save_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int | None = None
) -> Path:
    """Write `output_dir/checkpoint-<step>`, then remove all but the `keep` newest ones (`None`: keep all).

    Args:
        output_dir: The run's directory.
        step: Optimizer updates done.
        tensors: File name (without ending) to tensors by name.
        state: JSON values.

    Raises:
        OSError: It could not be written; older checkpoints are untouched.
    """

    def fill(folder: Path) -> None:
        for name, content in tensors.items():
            plain = {key: value.detach().contiguous().cpu() for key, value in content.items()}
            save_file(plain, folder / f"{name}.safetensors")
        (folder / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        manifest = {file.name: _manifest_entry(file) for file in folder.iterdir()}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    target = output_dir / f"checkpoint-{step}"
    try:
        write_directory(target, fill)
    except OSError as error:
        kept = list_checkpoints(output_dir)
        last = f"the last complete checkpoint is {kept[-1] if kept else 'none'}"
        raise OSError(f"cannot write {target}: {error.strerror or error}; {last}") from error
    if keep is not None:
        older = [path for path in list_checkpoints(output_dir) if path != target]
        for old in older[: max(0, len(older) - keep + 1)]:
            remove_directory(old)
    return target


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the update after which a checkpoint was written, by its name."""
    return int(path.name.split("-")[1])


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors and the state that `save_checkpoint` wrote, every file checked against its SHA-256.

    Raises:
        CheckpointError: No such checkpoint, or a damaged one.
    """
    if not (path / MANIFEST_FILE).is_file():
        raise CheckpointError(f"{str(path)!r} is not a complete checkpoint: it has no {MANIFEST_FILE}")
    manifest = _read_json(path / MANIFEST_FILE)
    for name, recorded in manifest.items():
        if not (path / name).is_file():
            raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: {name} is missing")
        if _manifest_entry(path / name) != recorded:
            raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: {name} does not match its checksum")
    state = _read_json(path / STATE_FILE)
    tensors = {Path(name).stem: load_file(path / name) for name in manifest if name.endswith(".safetensors")}
    return tensors, state


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which holds those of all its files."""
    return _manifest_entry(path / MANIFEST_FILE)["sha256"]


def find_checkpoint(output_dir: Path, which: str) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Return the checkpoint to resume from and what it holds; `None` where `latest` finds no checkpoint at all.

    Args:
        output_dir: The run's directory.
        which: `latest`, a path, or the name of a checkpoint in `output_dir`. With `latest`, damaged checkpoints are
            reported and the newest good one is taken.

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
