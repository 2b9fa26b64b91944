"""Training state as a checkpoint holds it, and which run a folder or a checkpoint belongs to.

`pipelines/checkpoints.py` draws a checkpoint's folder, writes and reads it.
"""

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..data.datasets import StreamedImages
from ..hub.files import CARD, CURVE, INDEX, REPORT, SAMPLES
from ..pipelines.checkpoints import CONFIG, list_checkpoints, step_of
from ..utils.errors import UserError
from ..utils.processes import log
from ..utils.text import plain
from .configuration import TrainingConfig
from .evaluation import BEST, HISTORY
from .posthoc_ema import FOLDER
from .run import Run


def training_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Return whole weights, the optimizer's tensors as `<parameter>.<entry>`, and its JSON values.

    The names are without wrappers (DDP, `torch.compile`). All processes call this, and the first one gets the result.
    """
    options = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = dict(distributed.get_model_state_dict(model, options=options))
    state: dict[str, Any] = dict(distributed.get_optimizer_state_dict(model, optimizer, options=options))
    tensors = {f"{name}.{key}": x for name, entries in state.get("state", {}).items() for key, x in entries.items()}
    return weights, tensors, state.get("param_groups", [])


def restore_training_state(
    model: nn.Module, optimizer: Optimizer, weights: dict[str, Tensor], tensors: dict[str, Tensor], values: Any
) -> None:
    """Restore what `training_state` returned; every process passes the same whole tensors and keeps its share.

    Files hold contiguous tensors. Adam's moments get their parameters' layout in memory, as the fused kernel needs: it
    reads the memory of weights, gradients and moments side by side, whatever their strides are.
    """
    options = distributed.StateDictOptions(full_state_dict=True)
    distributed.set_model_state_dict(model, dict(weights), options=options)
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit(".", 1)
        state.setdefault(name, {})[entry] = value
    whole: dict[str, Any] = {"state": state, "param_groups": values}
    distributed.set_optimizer_state_dict(model, optimizer, whole, options=options)
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


def check_output_is_ours(config: TrainingConfig) -> None:
    """Raise UserError if a run's folder holds another run, a model that it could only replace, or other files."""
    folder, where = Path(config.output_dir), f"--output_dir {config.output_dir!r}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where} is a file; name a folder")
    checkpoints = list_checkpoints(folder)
    if not config.resume_from_checkpoint and checkpoints:
        how = "resume it with --resume_from_checkpoint latest, or name another folder"
        raise UserError(f"{where} already holds a run; {how}")
    if not (folder / CONFIG).exists():
        for name in (INDEX, "unet", "scheduler", CARD, SAMPLES, REPORT, BEST, HISTORY, CURVE, FOLDER):
            if (folder / name).exists() and not (name == FOLDER and checkpoints):  # a stopped run has both
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
        "init_from": run.initial.record if run.initial else None,
        **({"distillation": run.distillation.record} if run.distillation else {}),
    }


def changeable_settings(run: Run) -> dict[str, Any]:
    """Return what a resumed run may do differently; it does not end in the same bits then."""
    of_recipe = "learning_rate lr_scheduler lr_warmup_steps max_train_steps max_grad_norm"
    of_recipe += " ema_decay ema_warmup random_flip timestep_sampling"
    device = f"{run.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name(run.device)
    return {
        **{name: getattr(run.recipe, name) for name in of_recipe.split()},
        **{name: getattr(run.config, name) for name in ("class_dropout", "center_crop", "tf32", "max_train_minutes")},
        "dropout": run.recipe.unet["dropout"],
        "precision": run.precision,
        **run.computation._asdict(),
        "train_batch_size": run.plan.micro,
        "number of processes": run.plan.num_processes,
        "device": device,
    }


def settings_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint records of its run: with the weights, all that a model and its card are made of."""
    return {**fixed_settings(run), "recipe": changeable_settings(run)}


def _shortened(value: Any) -> str:
    """Return a setting as text that fits into a sentence: a schedule may be a thousand numbers."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_settings(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Raise UserError: the checkpoint's state is that of another run than this one."""
    for name, here in plain(fixed_settings(run)).items():  # plain as in the checkpoint: tuples are lists there
        if (was := state.get(name)) != here:
            if isinstance(was, dict) and isinstance(here, dict):
                differ = [key for key in {**was, **here} if was.get(key) != here.get(key)]
                was, here = ({key: one.get(key) for key in differ} for one in (was, here))
            name = "--num_trajectories" if run.distillation and name == "num_images" else name
            what = f"{str(path)!r} was trained with {name} {_shortened(was)}, and this run has {_shortened(here)}"
            raise UserError(f"{what}; resume with the same setting, or start a new run in another folder")


def check_checkpoint(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Log what changes where a run resumes from this checkpoint; raise UserError: it is not one to resume from."""
    check_settings(run, path, state)
    for name, here in changeable_settings(run).items():
        if (was := state["recipe"].get(name, here)) != here:  # 0.1.0 did not write all of them
            log(f"changed since {path.name}: {name} was {was} and is {here} from now on")
    later = [other.name for other in list_checkpoints(Path(run.config.output_dir)) if step_of(other) > state["step"]]
    # "latest" has passed over damaged ones, which the run will write again.
    if later and run.config.resume_from_checkpoint != "latest":
        what = f"{run.config.output_dir!r} also holds {', '.join(later)}, which {path.name} would lead away from"
        raise UserError(f"{what}; remove them, or resume in another --output_dir")
    if state["step"] > run.recipe.max_train_steps:
        raise UserError(f"{path.name} is already past --max_train_steps {run.recipe.max_train_steps}")
