"""Training state on disk: a checkpoint directory is either complete or does not exist, and belongs to one run.

```
output_dir/
  checkpoint-500/              written as .checkpoint-500.partial, fsynced, then renamed
    model.safetensors          the weights in training
    ema.safetensors            the EMA weights
    optimizer.safetensors      Adam's moments and step counts
    posthoc_ema.safetensors    the averages for post-hoc EMA
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

from ..data.datasets import StreamedImages
from ..hub.files import CARD, INDEX, REPORT, SAMPLES
from ..utils.errors import UserError
from ..utils.files import remove_directory, write_directory
from ..utils.processes import log
from ..utils.text import plain
from .configuration import TrainingConfig
from .evaluation import BEST, HISTORY
from .posthoc_ema import FOLDER
from .run import Run

STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"
CONFIG = "training_config.yaml"  # what a run writes first: the mark of its folder


class CheckpointError(UserError):
    """A checkpoint is missing or damaged; the message names the file."""


def training_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Return whole weights, the optimizer's tensors as `<parameter>.<entry>`, and its JSON values.

    Wrappers (DDP, `torch.compile`) leave no trace in the names, and shards of FSDP 2 are gathered: all processes have
    to call this, and the first one gets the result.
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


# ---------------------------------------------------------------------- files


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
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
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

    `which` is `latest` (the newest one that is not damaged), a path, or the name of a checkpoint in `output_dir`.

    Raises:
        CheckpointError: A named checkpoint is missing or damaged, or all are damaged.
    """
    checkpoints = list_checkpoints(output_dir)
    if which != "latest":
        path = Path(which) if Path(which).is_dir() else output_dir / which
        if not path.is_dir():
            have = ", ".join(p.name for p in checkpoints) or "none"
            raise CheckpointError(f"no checkpoint {which!r}; {str(output_dir)!r} has {have}")
        return path, *load_checkpoint(path)
    for path in reversed(checkpoints):
        try:
            return path, *load_checkpoint(path)
        except CheckpointError as error:
            log(f"warning: {error}; trying the one before it")
    if checkpoints:
        raise CheckpointError(f"all {len(checkpoints)} checkpoints in {str(output_dir)!r} are damaged")
    return None


# ---------------------------------------------------------------------- which run a folder or a checkpoint belongs to


def check_output_is_ours(config: TrainingConfig) -> None:
    """Check that a run may write into its folder.

    Raises:
        UserError: It holds another run, a model that the run could only replace, or other people's files.
    """
    folder, where = Path(config.output_dir), f"--output_dir {config.output_dir!r}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where} is a file; name a folder")
    checkpoints = list_checkpoints(folder)
    if not config.resume_from_checkpoint and checkpoints:
        raise UserError(
            f"{where} already holds a run; resume it with --resume_from_checkpoint latest, or name another folder"
        )
    if not (folder / CONFIG).exists():
        for name in (INDEX, "unet", "scheduler", CARD, SAMPLES, REPORT, BEST, HISTORY, FOLDER):
            if (folder / name).exists():
                raise UserError(f"{where} holds {name}, which a run would overwrite; name another folder")
    # Models are written after checkpoints, so these were removed: to save space, not to train all over again.
    elif (folder / INDEX).exists() and not checkpoints and config.resume_from_checkpoint in (None, "latest"):
        raise UserError(f"{where} holds a finished model and no checkpoint to resume from; name another folder")


def fixed_settings(run: Run) -> dict[str, Any]:
    """Return what makes two runs different runs: a checkpoint of one is refused by the other."""
    return {
        "network": {k: v for k, v in run.unet_config.items() if k != "dropout"},
        "scheduler": dict(run.recipe.scheduler),
        "loss": run.recipe.loss,
        "images": run.data.name,
        "num_images": None if isinstance(run.data, StreamedImages) else len(run.data),
        "total_batch_size": run.plan.total,
        "seed": run.config.seed,
    }


def changeable_settings(run: Run) -> dict[str, Any]:
    """Return what a resumed run may do differently; it does not end in the same bits then."""
    of_recipe = "learning_rate lr_scheduler lr_warmup_steps max_train_steps max_grad_norm"
    of_recipe += " ema_decay ema_warmup random_flip timestep_sampling"
    return {
        **{name: getattr(run.recipe, name) for name in of_recipe.split()},
        **{name: getattr(run.config, name) for name in ("class_dropout", "center_crop", "tf32")},
        "dropout": run.recipe.unet["dropout"],
        "precision": run.precision,
        **run.computation._asdict(),
        "train_batch_size": run.plan.micro,
        "number of processes": run.plan.num_processes,
    }


def check_checkpoint(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Check that a run may resume from a checkpoint and its `state`; log what is different from now on.

    Raises:
        UserError: It is another run's, or would lead away from this one's later checkpoints.
    """
    for name, here in plain(fixed_settings(run)).items():  # plain as in the checkpoint: tuples are lists there
        if state.get(name) != here:
            raise UserError(
                f"{str(path)!r} was trained with {name} {state.get(name)}, and this run has {here}; resume with "
                "the same setting, or start a new run in another folder"
            )
    for name, here in changeable_settings(run).items():
        if (was := state["recipe"].get(name, here)) != here:  # 0.1.0 did not write all of them
            log(f"changed since {path.name}: {name} was {was} and is {here} from now on")
    later = [other.name for other in list_checkpoints(run.output_dir) if _step_of(other) > state["step"]]
    # "latest" has passed over damaged ones, which the run will write again.
    if later and run.config.resume_from_checkpoint != "latest":
        raise UserError(
            f"{run.config.output_dir!r} also holds {', '.join(later)}, which {path.name} would lead away from; remove "
            "them, or resume in another --output_dir"
        )
    if state["step"] > run.recipe.max_train_steps:
        raise UserError(f"{path.name} is already past --max_train_steps {run.recipe.max_train_steps}")
