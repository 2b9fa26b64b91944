"""What a run shows in trackers (`--report_to`): numbers and sample grids, each at its update."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image
from torch import Tensor

from ..utils.errors import UserError
from ..utils.processes import raise_on_all_ranks
from .configuration import TrainingConfig

PROJECT = "ddpm_hf"


def known_trackers(text: str | None) -> list[str]:
    """Return the trackers of `"tensorboard,trackio"` (`all`: the installed; `none`, `None`: none); or UserError."""
    names = [part.strip().lower() for part in (text or "none").split(",") if part.strip()]
    installed = [str(tracker) for tracker in get_available_trackers()]
    if len(names) > 1 and (alone := {"all", "none"}.intersection(names)):
        raise UserError(f"--report_to {min(alone)!r} stands alone, got {text!r}; leave out the others, or it")
    if names == ["all"] and not installed:
        raise UserError("--report_to 'all': no tracker is installed; pip install 'ddpm-hf[train]' first, or give none")
    if names in (["all"], ["none"]):
        return installed if names == ["all"] else []
    if missing := [name for name in names if name not in installed]:
        what = "'ddpm-hf[train]'" if missing[0] in ("tensorboard", "trackio") else "it"
        how = f"pip install {what} first, or give none (installed: {', '.join(installed) or 'none'})"
        raise UserError(f"--report_to {missing[0]!r} is not an installed tracker; {how}")
    return list(dict.fromkeys(names))


class Tracking:
    """The run's trackers, which accelerate starts and closes on the main process; there may be none."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig):
        self.accelerator, self.config = accelerator, config
        # Updates, with loss and gradient norm that are still on the device, and other numbers.
        self._unread: list[tuple[int, Tensor, dict[str, float]]] = []

    def start(self, resumed: bool) -> None:
        """Start the trackers, or raise UserError: one refuses, where nobody is logged in for example."""
        if not self.accelerator.log_with:
            return
        given = self.config.public_values().items()
        settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in given if v is not None}
        name = Path(self.config.output_dir).resolve().name
        # A Space of trackio's (TRACKIO_SPACE_ID) would be public by default.
        trackio = {"name": name, "private": True, "embed": False, "resume": "allow" if resumed else "never"}
        with raise_on_all_ranks():
            try:
                options = {"trackio": trackio, "wandb": {"name": name}}
                self.accelerator.init_trackers(PROJECT, config=settings, init_kwargs=options)
            except Exception as error:  # each has errors of its own
                raise UserError(f"--report_to {self.config.report_to} cannot start: {error}") from error

    def note(self, update: int, loss: Tensor, norm: Tensor, numbers: dict[str, float]) -> None:
        """Keep the numbers of an update until the device is read anyway."""
        if self.accelerator.trackers:
            self._unread.append((update, torch.stack([loss, norm]), numbers))

    def read(self) -> None:
        """Read what was kept from the device, all at once, and log it."""
        kept, self._unread = self._unread, []
        read = torch.stack([pair for _, pair, _ in kept]).tolist() if kept else []
        for (update, _, numbers), (loss, norm) in zip(kept, read, strict=True):
            loss *= self.accelerator.num_processes  # it is of this process's share
            self.accelerator.log({"loss": loss, "grad_norm": norm, **numbers}, step=update)

    def numbers(self, update: int, values: dict[str, float]) -> None:
        """Log numbers that were measured after an update."""
        self.read()  # some trackers take updates in their order only
        self.accelerator.log(values, step=update)

    def picture(self, update: int, name: str, picture: Image.Image) -> None:
        """Log a picture, on the main process, to the trackers that show pictures."""
        self.read()
        for tracker in self.accelerator.trackers:
            shown: Any = tracker  # each takes pictures in a way of its own
            if tracker.name == "tensorboard":
                pixels = np.asarray(picture.convert("RGB"))[None]
                shown.log_images({name: pixels}, step=update, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                shown.log({name: trackio.Image(picture)}, step=update)
            elif tracker.name in ("wandb", "swanlab"):
                shown.log_images({name: [picture]}, step=update)
