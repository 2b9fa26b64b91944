"""Which run a folder or a checkpoint belongs to, so that two runs are not mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.datasets import StreamedImages
from ..hub.files import CARD, INDEX, REPORT, SAMPLES
from ..utils.errors import UserError
from ..utils.processes import say
from ..utils.text import plain
from .checkpointing import checkpoint_step, list_checkpoints
from .configuration import TrainingConfig
from .evaluation import BEST, HISTORY
from .run import Run

# What a run writes first: the mark of its folder.
CONFIG = "training_config.yaml"
_WRITTEN = (INDEX, "unet", "scheduler", CARD, SAMPLES, REPORT, BEST, HISTORY)

# Attributes of the recipe, and of the configuration, that a resumed run may change.
_CHANGEABLE = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "max_grad_norm"),
    *("ema_decay", "ema_warmup", "random_flip", "timestep_sampling"),
)
_CHANGEABLE_SETTINGS = ("class_dropout", "center_crop", "tf32")


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
        for name in _WRITTEN:
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
    return {
        **{name: getattr(run.recipe, name) for name in _CHANGEABLE},
        **{name: getattr(run.config, name) for name in _CHANGEABLE_SETTINGS},
        "dropout": run.recipe.unet["dropout"],
        "precision": run.precision,
        **run.computation._asdict(),
        "train_batch_size": run.plan.micro,
        "number of processes": run.plan.num_processes,
    }


def check_checkpoint(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Check that a run may resume from a checkpoint; log what is different from now on.

    Args:
        run: The run.
        path: The checkpoint.
        state: What it holds, with `fixed_settings` in it, and `changeable_settings` as its `recipe`.

    Raises:
        UserError: It is another run's, or would lead away from this one's later checkpoints.
    """
    for name, here in plain(fixed_settings(run)).items():  # plain as in the checkpoint: tuples are lists there
        if state.get(name) != here:
            raise UserError(
                f"{str(path)!r} was trained with {name} {state.get(name)}, and this run has {here}; resume with "
                "the same setting, or start anew in another folder"
            )
    for name, here in changeable_settings(run).items():
        if (was := state["recipe"].get(name, here)) != here:  # 0.1.0 did not write all of them
            say(f"changed since {path.name}: {name} was {was} and is {here} from now on")
    later = [other.name for other in list_checkpoints(run.output_dir) if checkpoint_step(other) > state["step"]]
    # "latest" has passed over damaged ones, which the run will write again.
    if later and run.config.resume_from_checkpoint != "latest":
        raise UserError(
            f"{run.config.output_dir!r} also holds {', '.join(later)}, which {path.name} would lead away from; remove "
            "them, or resume in another --output_dir"
        )
    if state["step"] > run.recipe.max_train_steps:
        raise UserError(f"{path.name} is already past --max_train_steps {run.recipe.max_train_steps}")
