"""What a training run shows of itself: the pipeline of EMA weights, sample grids, held-out numbers, the card.

`Trainer` asks `due` after each update and calls `watch` where something is, and `publish` at the end; all processes
take part. Nothing here touches the network in training or its random numbers.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from ..data.class_labels import ClassIndex
from ..data.datasets import Images, StreamedImages
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..evaluation.run import EvaluationReport
from ..hub.background import BackgroundPush
from ..hub.files import CARD, REPORT, SAMPLES, write_card, write_pipeline
from ..hub.model_card import CardFacts, check_license
from ..hub.publish import Push, check_destination
from ..models.unet_2d import UNet2DModel
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..presets import Preset
from ..sampling.generation import generate, with_sampler
from ..utils.errors import NotFiniteError
from ..utils.processes import gather, say, together
from ..utils.text import is_local, recorded_name
from ..utils.visualize import image_grid, save_picture
from .batches import BatchPlan
from .configuration import TrainingConfig, TrainingError, due
from .evaluation import TrainingEvaluation


def precision_name(accelerator: Accelerator) -> str:
    """What the network computes in."""
    return {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


@contextmanager
def _memory_advice(step: int) -> Iterator[None]:
    """Say which flag helps where the device's memory is too small for what is shown of a run.

    Raises:
        TrainingError: It is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"too little memory on the device for the samples and numbers after update {step}; give a smaller "
            "--eval_batch_size, and go on with --resume_from_checkpoint latest"
        ) from error


def describe_images(data: Images, name: str | None = None) -> str:
    """How many images of what; `name` for readers who are not to see where on this machine they are."""
    return f"{'a stream' if isinstance(data, StreamedImages) else f'{len(data)} images'} of {name or data.name}"


def describe_classes(data: Images, class_conditional: bool) -> str | None:
    """Which classes a run is trained on, or does not use; `None` where there are none."""
    names = data.class_names
    if not names:
        return None
    named = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    if class_conditional:
        return f"{len(names)} classes: {named}"
    return f"the images' {len(names)} classes are not used (--class_conditional): {named}"


@dataclass
class Publisher:
    """Shows a run in its output folder.

    Attributes:
        config, recipe: What the run was told, and the preset with that in it.
        unet_config: The network's arguments.
        accelerator: The run's.
        data: The training images.
        evaluation: What is measured.
        plan: How an update's images are cut.
        pushes: To the Hub, in the main process of a run that was asked for them.

    Raises:
        ValueError: The license or the name of a repository cannot be taken.
    """

    config: TrainingConfig
    recipe: Preset
    unet_config: dict[str, Any]
    accelerator: Accelerator
    data: Images
    evaluation: TrainingEvaluation
    plan: BatchPlan
    pushes: BackgroundPush | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        config = self.config
        check_license(config.license)
        self._push = None
        if config.push_to_hub:
            self._push = Push(
                config.output_dir,
                config.hub_model_id or self.output_dir.resolve().name,
                private=config.hub_private_repo,
                token=config.hub_token,
                license=config.license,
            )

    def open_hub(self) -> None:
        """Look at where the run's pushes will go, if it was asked for any; only the main process makes them.

        Raises:
            ValueError: They will not be possible.
        """
        with together():
            if self._push is not None and self.accelerator.is_main_process:
                self.pushes = BackgroundPush(check_destination(self._push, say), say)

    def push(self, averaged: dict[str, Tensor], step: int) -> None:
        """Put the model as it is after update `step` into the output folder, and on its way to the Hub."""
        with together():
            if self.pushes is None:
                return
            try:
                self._write_pipeline(self.pipeline(averaged))
                self._write_card(step, None)
            except (OSError, ValueError) as error:  # a full disk, or a card that cannot be read: the run goes on
                say(f"not published after update {step}: {error}")
            else:
                self.pushes.offer(f"After update {step}")

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    def due(self, step: int) -> bool:
        """Whether there is anything to show after update `step`."""
        return due(step, self.config.save_images_steps) or self.evaluation.due(step)

    def watch(self, averaged: dict[str, Tensor], step: int) -> tuple[DDPMPipeline, EvaluationReport | None]:
        """Make what is due after update `step` from the EMA weights: the model, and what was measured of it.

        A model whose images or numbers are not finite has none to show, which is said; the run goes on.
        """
        with _memory_advice(step):
            pipe = self._shared_pipeline(averaged)
            try:
                if due(step, self.config.save_images_steps):
                    self.sample_grid(pipe, f"samples-{step}.png")
                return pipe, self.evaluation.measure(pipe) if self.evaluation.due(step) else None
            except NotFiniteError as error:
                say(f"nothing to show after update {step}: {error}")
                return pipe, None

    def publish(self, averaged: dict[str, Tensor], step: int) -> DDPMPipeline:
        """Write the pipeline (safetensors), sample grid, report and card into the output folder.

        Raises:
            NotFiniteError: The model makes no images or numbers that are finite; nothing is pushed.
        """
        pipe, folder, main = self._shared_pipeline(averaged), self.output_dir, self.accelerator.is_main_process
        with together():
            if main:
                self._write_pipeline(pipe)
        say(f"wrote the pipeline to {folder}")
        with _memory_advice(step):
            self.sample_grid(pipe, SAMPLES)
            report = self.evaluation.measure(pipe)
        if report is not None:
            self.evaluation.keep(pipe, report, step)
        with together():
            if main:
                if report is not None:
                    report.save(folder / REPORT)
                self._write_card(step, report)
        say(f"wrote {folder / CARD}")
        if self.pushes is not None:
            self.pushes.offer(f"After update {step}, the last")
        return pipe

    def _write_pipeline(self, pipe: DDPMPipeline) -> None:
        """The model into the output folder; numbers and pictures of the one before go."""
        for name in (REPORT, SAMPLES):
            (self.output_dir / name).unlink(missing_ok=True)
        write_pipeline(pipe, self.output_dir)

    def _write_card(self, step: int, report: EvaluationReport | None) -> None:
        folder, config = self.output_dir, self.config
        on_hub = config.images_given().get("dataset_name")
        pictures = sorted(folder.glob("samples*.png"), key=lambda path: path.stat().st_mtime_ns)
        written = write_card(
            folder,
            CardFacts(
                name=folder.resolve().name,
                dataset=recorded_name(self.data.name),
                dataset_id=on_hub if on_hub is not None and not is_local(on_hub) else None,
                recipe=self.recipe_for_card(step),
                report=dataclasses.asdict(report) if report is not None else None,
                sample=pictures[-1].name if pictures else None,
                license=config.license,
            ),
        )
        if not written:
            say(f"{folder / CARD} was edited, so it stays as it is")

    def pipeline(self, averaged: dict[str, Tensor]) -> DDPMPipeline:
        """The EMA weights in a float32 pipeline of their own, apart from the network in training."""
        unet = UNet2DModel(**self.unet_config)
        unet.load_state_dict(averaged)
        pipe = DDPMPipeline(unet.to(self.accelerator.device), DDPMScheduler(**self.recipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _shared_pipeline(self, averaged: dict[str, Tensor]) -> DDPMPipeline:
        """`pipeline`, with the first process's weights in all, for rounding may differ between them."""
        with together():
            pipe = self.pipeline(averaged)
        if self.accelerator.num_processes > 1:
            broadcast(pipe.unet.state_dict())
        return pipe

    def sample_grid(self, pipe: DDPMPipeline, name: str) -> None:
        """Images 0, 1, ... in a grid; every process draws a share of them."""
        config, a = self.config, self.accelerator
        seeds = range(a.process_index, config.num_sample_images, a.num_processes)
        classes = self.data.class_names if config.class_conditional else None
        batches = generate(
            with_sampler(pipe, config.sampler),
            seeds,
            batch_size=config.evaluation_batch(a.num_processes, most=64),
            num_inference_steps=config.inference_steps(pipe.scheduler.config.num_train_timesteps),
            class_labels=[ClassIndex(seed % len(classes)) for seed in seeds] if classes else None,
        )
        with together():
            drawn = [(seed, image) for part, images in batches for seed, image in zip(part, images, strict=True)]
        shares = gather(drawn)
        with together():
            if a.is_main_process:
                whole = sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
                save_picture(image_grid(torch.stack([image for _, image in whole])), self.output_dir / name)
        say(f"wrote {self.output_dir / name}")

    def recipe_for_card(self, step: int) -> dict[str, Any]:
        """What the card lists under "Training"."""
        recipe, images = self.recipe, describe_images(self.data, recorded_name(self.data.name))
        return {
            "images": images + (", random flips" if recipe.random_flip else ""),
            "updates": f"{step} of {self.plan.total} images, seed {self.config.seed}",
            "optimizer": f"Adam(0.9, 0.999), learning rate {recipe.learning_rate:g} after {recipe.lr_warmup_steps} "
            f"warm-up updates, then {recipe.lr_scheduler}, gradient norm at most {recipe.max_grad_norm:g}",
            "EMA weights": f"decay {recipe.ema_decay}" + (" after a warm-up" if recipe.ema_warmup else ""),
            "objective": f"{recipe.loss}, {recipe.timestep_sampling} timesteps, dropout {recipe.unet['dropout']:g}",
            **(
                {"classes": f"{len(self.data.class_names or [])}, dropped for {self.config.class_dropout:.0%}"}
                if self.config.class_conditional
                else {}
            ),
            "precision": precision_name(self.accelerator),
            "hardware": f"{self.accelerator.num_processes} x {_device_name(self.accelerator.device)}",
        }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
