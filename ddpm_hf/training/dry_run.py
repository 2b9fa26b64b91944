"""`--dry_run`: what can be known of a run before it starts. Nothing is written."""

from __future__ import annotations

import math
import shutil
import time
from typing import TYPE_CHECKING

from ..models.unet_2d import parameter_count
from ..utils.errors import UserError
from ..utils.files import writable_folder
from ..utils.machine import peak_memory
from ..utils.processes import from_first, gather, log, raise_on_all_ranks
from .configuration import TrainingError
from .estimate import time_left
from .memory import state_bytes

if TYPE_CHECKING:
    from .trainer import Trainer

_SECONDS, _MOST_UPDATES = 5.0, 50  # of measuring


def dry_run(trainer: Trainer) -> None:
    """Make the first updates of a run in memory; log what it takes, and where its results will go.

    Images, network and settings were checked when the trainer was made; its weights have moved afterwards. Raises
    UserError for a folder or disk that cannot take the run, a loss that is not finite, or a Hub that refuses it.
    """
    left, limit = max(0, trainer.last - trainer.step), trainer.config.max_train_minutes
    if left:
        trainer.begin()
        _seconds(trainer, 1)  # compiles, and takes all the memory that an update needs
        count = max(1, min(left, _MOST_UPDATES, from_first(int(_SECONDS / _seconds(trainer, 1)))))
        seconds = _seconds(trainer, count) / count
        time_of_updates = time_left(seconds, left)
        if limit is not None:
            left = min(left, max(0, int((60 * limit - trainer.seconds()) / seconds)))
            time_of_updates = f"{seconds:.3g} s per update: at most {left:,} in the {limit:g} minutes"
        log(f"time: {time_of_updates} (measured over {count} updates; samples and evaluations come on top)")
        log(f"memory: {peak_memory(trainer.device)}")
    else:
        log("time: no update is left")
    with raise_on_all_ranks():
        if trainer.accelerator.is_main_process:
            log(f"disk: {_disk(trainer, left)}")
            log(f"Hub: {trainer.publisher.describe_hub()}")
    log("dry run: all of this was checked, and nothing was written")


def _seconds(trainer: Trainer, count: int) -> float:
    """Return how long the first `count` updates take, or raise a TrainingError: their loss is not finite."""
    started = time.monotonic()
    for step in range(trainer.step, trainer.step + count):
        with trainer.reproducible():
            loss, _ = trainer.update(step)
    losses = gather(loss.item())  # waits for the device; each process has that of its share
    if not math.isfinite(value := sum(losses)):
        raise TrainingError(
            f"the loss of update {step + 1} is {value}; lower the learning rate, or look at the images"
        )
    return time.monotonic() - started


def _disk(trainer: Trainer, updates: int) -> str:
    """Return what checkpoints and snapshots take on the disk, or raise UserError: they do not fit."""
    folder, config = trainer.output_dir, trainer.config
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    writable_folder(there, "--output_dir")
    averaged, weights = trainer.update.powers is not None, parameter_count(trainer.unet) * 4
    size = state_bytes(trainer.unet, averaged)
    made = math.ceil(updates / config.checkpointing_steps)
    count = min(made, config.checkpoints_total_limit or made)
    snapshots = min(updates, config.posthoc_ema_snapshots) if averaged else 0  # of two averages in float16
    free = shutil.disk_usage(there).free
    text = f"checkpoints of {size / 1e9:.2g} GB, {count} kept, "
    text += f"and {snapshots} snapshots of {weights / 1e9:.2g} GB for post-hoc EMA, " if snapshots else ""
    text += f"in {folder}, where {free / 1e9:.0f} GB are free"
    # a new one is there before an old one is removed
    if size * (count + 1) + weights * (snapshots + bool(snapshots)) > free:
        how = " or --posthoc_ema_snapshots" if snapshots else ""
        raise UserError(f"too little space for {text}; give a smaller --checkpoints_total_limit{how}")
    return text
