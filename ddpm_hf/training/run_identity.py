"""Which run a folder or a checkpoint belongs to, so that a run is not mixed with another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.datasets import Images, StreamedImages
from ..hub.files import CARD, INDEX, REPORT, SAMPLES
from ..presets import Preset
from ..utils.errors import UserError
from ..utils.processes import say
from ..utils.text import plain
from .batches import BatchPlan
from .checkpointing import checkpoint_step, list_checkpoints
from .configuration import TrainingConfig
from .evaluation import BEST, HISTORY

# What a run writes first, and so what tells its folder from another.
CONFIG = "training_config.yaml"
_WRITTEN = (INDEX, "unet", "scheduler", CARD, SAMPLES, REPORT, BEST, HISTORY)

# May be changed on the way; the run says so, and does not end in the same bits then.
_CHANGEABLE = (
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "max_train_steps",
    "max_grad_norm",
    "ema_decay",
    "ema_warmup",
    "random_flip",
    "timestep_sampling",
)
_CHANGEABLE_SETTINGS = ("class_dropout", "center_crop", "tf32")


def check_output_is_ours(config: TrainingConfig) -> None:
    """Whether a run may write into its folder.

    Raises:
        ValueError: It holds another run, a model that the run could only replace, or other people's files.
    """
    folder, where = Path(config.output_dir), f"--output_dir {config.output_dir!r}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where} is a file; name a folder")
    checkpoints = list_checkpoints(folder)
    if not config.resume_from_checkpoint and checkpoints:
        raise UserError(
            f"{where} already holds a run; go on with --resume_from_checkpoint latest, or name another folder"
        )
    if not (folder / CONFIG).exists():
        for name in _WRITTEN:
            if (folder / name).exists():
                raise UserError(
                    f"{where} holds {name}, which a run would overwrite, and no run of this package; name another "
                    "folder"
                )
    # Models are written after checkpoints, so somebody has removed these: to save space, not to train all over again.
    elif (folder / INDEX).exists() and not checkpoints and config.resume_from_checkpoint in (None, "latest"):
        raise UserError(f"{where} holds a finished model and no checkpoint to go on from; name another folder")


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run this one.

    Attributes:
        config, recipe: What it was told, and the preset with that in it.
        unet_config: The network's arguments.
        data: The training images.
        plan: How an update's images are cut.
        computation: How the network is computed: `precision`, `channels_last`, `compile`.
    """

    config: TrainingConfig
    recipe: Preset
    unet_config: dict[str, Any]
    data: Images
    plan: BatchPlan
    computation: dict[str, Any]

    def fixed(self) -> dict[str, Any]:
        """What makes two runs different runs: a checkpoint of one is refused by the other."""
        return {
            "network": {k: v for k, v in self.unet_config.items() if k != "dropout"},
            "scheduler": dict(self.recipe.scheduler),
            "loss": self.recipe.loss,
            "images": self.data.name,
            "num_images": None if isinstance(self.data, StreamedImages) else len(self.data),
            "total_batch_size": self.plan.total,
            "seed": self.config.seed,
        }

    def changeable(self) -> dict[str, Any]:
        """What may be changed on the way."""
        return {
            **{name: getattr(self.recipe, name) for name in _CHANGEABLE},
            **{name: getattr(self.config, name) for name in _CHANGEABLE_SETTINGS},
            "dropout": self.recipe.unet["dropout"],
            **self.computation,
            "train_batch_size": self.plan.micro,
            "number of processes": self.plan.num_processes,
        }

    def check_checkpoint(self, path: Path, state: dict[str, Any]) -> None:
        """Whether this run may go on from a checkpoint; says what is different from now on.

        Args:
            path: The checkpoint.
            state: What it holds, with `fixed()` in it, and `changeable()` as its `recipe`.

        Raises:
            ValueError: It is another run's, or would lead away from this one's later checkpoints.
        """
        for name, here in plain(self.fixed()).items():  # plain as in the checkpoint: tuples are lists there
            if state.get(name) != here:
                raise UserError(
                    f"{str(path)!r} was trained with {name} {state.get(name)}, and this run has {here}; resume with "
                    "the same setting, or start anew in another folder"
                )
        for name, here in self.changeable().items():
            if (was := state["recipe"].get(name, here)) != here:  # 0.1.0 did not write all of them
                say(f"changed since {path.name}: {name} was {was} and is {here} from now on")
        folder = self.config.output_dir
        later = [other.name for other in list_checkpoints(Path(folder)) if checkpoint_step(other) > state["step"]]
        # "latest" has passed over damaged ones, which the run will write again.
        if later and self.config.resume_from_checkpoint != "latest":
            raise UserError(
                f"{folder!r} also holds {', '.join(later)}, which {path.name} would lead away from; remove them, or "
                "resume in another --output_dir"
            )
        if state["step"] > self.recipe.max_train_steps:
            raise UserError(f"{path.name} is already past --max_train_steps {self.recipe.max_train_steps}")
