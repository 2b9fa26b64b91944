"""What a training run shows: the pipeline of EMA weights, sample grids, held-out numbers, the card.

All processes take part. Nothing here touches the network in training or its random numbers.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from ..data.class_labels import ClassIndex
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..evaluation.report import EvaluationReport
from ..hub.background import BackgroundPush
from ..hub.files import CARD, REPORT, SAMPLES, write_card, write_pipeline
from ..hub.model_card import CardFacts, check_license
from ..hub.publish import Push, check_destination
from ..models.unet_2d import UNet2DModel
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..sampling.generation import generate, with_sampler
from ..utils.errors import NotFiniteError
from ..utils.processes import gather, log, raise_on_all_ranks
from ..utils.text import is_local, recorded_name
from ..utils.visualize import image_grid, save_picture
from .configuration import TrainingError, due
from .evaluation import TrainingEvaluation
from .run import Run


@contextmanager
def _memory_advice(step: int) -> Iterator[None]:
    """Name the flag that helps where the device runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"too little memory on the device for the samples and numbers after update {step}; give a smaller "
            "--eval_batch_size, and resume with --resume_from_checkpoint latest"
        ) from error


class Publisher:
    """Writes what a run shows into its output folder, or raises UserError: a license or name cannot be taken."""

    def __init__(self, run: Run, evaluation: TrainingEvaluation):
        self.run, self.evaluation, self.accelerator, config = run, evaluation, run.accelerator, run.config
        self.pushes: BackgroundPush | None = None  # to the Hub, in the main process of a run with `--push_to_hub`
        check_license(config.license)
        self._push = None
        if config.push_to_hub:
            self._push = Push(
                config.output_dir,
                config.hub_model_id or run.output_dir.resolve().name,
                private=config.hub_private_repo,
                token=config.hub_token,
                license=config.license,
            )

    def open_hub(self) -> None:
        """Check where the run's pushes will go, if it has any, or raise UserError; only the main process pushes."""
        with raise_on_all_ranks():
            if self._push is not None and self.accelerator.is_main_process:
                self.pushes = BackgroundPush(check_destination(self._push, log), log)

    def push(self, ema_weights: dict[str, Tensor], step: int) -> None:
        """Put the model as it is after update `step` into the output folder, and on its way to the Hub."""
        with raise_on_all_ranks():
            if self.pushes is None:
                return
            try:
                self._write_pipeline(self.pipeline(ema_weights))
                self._write_card(step, None)
            except (OSError, ValueError) as error:  # a full disk, or a card that cannot be read: training continues
                log(f"not published after update {step}: {error}")
            else:
                self.pushes.offer(f"After update {step}")

    def show(self, ema_weights: dict[str, Tensor], step: int) -> tuple[DDPMPipeline, EvaluationReport | None]:
        """Make the sample grid and the evaluation that are due after update `step`; return the model and its numbers.

        If images or numbers of the model are not finite, a line says so and training continues.
        """
        config = self.run.config
        with _memory_advice(step):
            pipe = self._shared_pipeline(ema_weights)
            try:
                if due(step, config.save_images_steps):
                    self.sample_grid(pipe, f"samples-{step}.png")
                return pipe, self.evaluation.measure(pipe) if due(step, config.validation_steps) else None
            except NotFiniteError as error:
                log(f"nothing to show after update {step}: {error}")
                return pipe, None

    def publish(self, ema_weights: dict[str, Tensor], step: int) -> DDPMPipeline:
        """Write the pipeline (safetensors), sample grid, report and card into the output folder.

        Raises:
            NotFiniteError: Images or numbers of the model are not finite; nothing is pushed.
        """
        folder, main = self.run.output_dir, self.accelerator.is_main_process
        pipe = self._shared_pipeline(ema_weights)
        with raise_on_all_ranks():
            if main:
                self._write_pipeline(pipe)
        log(f"wrote the pipeline to {folder}")
        with _memory_advice(step):
            self.sample_grid(pipe, SAMPLES)
            report = self.evaluation.measure(pipe)
        if report is not None:
            self.evaluation.record(pipe, report, step)
        with raise_on_all_ranks():
            if main:
                if report is not None:
                    report.save(folder / REPORT)
                self._write_card(step, report)
        log(f"wrote {folder / CARD}")
        if self.pushes is not None:
            self.pushes.offer(f"After update {step}, the last")
        return pipe

    def _write_pipeline(self, pipe: DDPMPipeline) -> None:
        """Write the model into the output folder, and remove the former one's numbers and samples."""
        for name in (REPORT, SAMPLES):
            (self.run.output_dir / name).unlink(missing_ok=True)
        write_pipeline(pipe, self.run.output_dir)

    def _write_card(self, step: int, report: EvaluationReport | None) -> None:
        folder, config = self.run.output_dir, self.run.config
        on_hub, initial = config.images_given().get("dataset_name"), self.run.initial
        pictures = sorted(folder.glob("samples*.png"), key=lambda path: path.stat().st_mtime_ns)
        written = write_card(
            folder,
            CardFacts(
                name=folder.resolve().name,
                dataset=recorded_name(self.run.data.name),
                dataset_id=on_hub if on_hub is not None and not is_local(on_hub) else None,
                recipe=self._recipe_for_card(step),
                report=dataclasses.asdict(report) if report is not None else None,
                sample=pictures[-1].name if pictures else None,
                license=config.license,
                base_model=initial.base_model if initial else None,
            ),
        )
        if not written:
            log(f"{folder / CARD} was edited, so it stays as it is")

    def pipeline(self, ema_weights: dict[str, Tensor]) -> DDPMPipeline:
        """Return the EMA weights in a float32 pipeline of their own, apart from the network in training."""
        unet = UNet2DModel(**self.run.unet_config)
        unet.load_state_dict(ema_weights)
        pipe = DDPMPipeline(unet.to(self.run.device), DDPMScheduler(**self.run.recipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _shared_pipeline(self, ema_weights: dict[str, Tensor]) -> DDPMPipeline:
        """Return `pipeline` with the first process's weights in all, as rounding may differ between them."""
        with raise_on_all_ranks():
            pipe = self.pipeline(ema_weights)
        if self.accelerator.num_processes > 1:
            broadcast(pipe.unet.state_dict())
        return pipe

    def sample_grid(self, pipe: DDPMPipeline, name: str) -> None:
        """Write images 0, 1, ... as a grid; every process draws a share of them."""
        config, a = self.run.config, self.accelerator
        seeds = range(a.process_index, config.num_sample_images, a.num_processes)
        classes = self.run.data.class_names if config.class_conditional else None
        batches = generate(
            with_sampler(pipe, config.sampler),
            seeds,
            batch_size=config.evaluation_batch(self.run.unet_config, a.num_processes, most=64),
            num_inference_steps=min(config.ddpm_num_inference_steps, pipe.scheduler.config.num_train_timesteps),
            class_labels=[ClassIndex(seed % len(classes)) for seed in seeds] if classes else None,
        )
        with raise_on_all_ranks():
            drawn = [(seed, image) for part, images in batches for seed, image in zip(part, images, strict=True)]
        whole = dict(pair for share in gather(drawn) for pair in share)
        path = self.run.output_dir / name
        with raise_on_all_ranks():
            if a.is_main_process:
                save_picture(image_grid(torch.stack([whole[seed] for seed in range(config.num_sample_images)])), path)
        log(f"wrote {path}")

    def _recipe_for_card(self, step: int) -> dict[str, Any]:
        """Return what the card lists under "Training"."""
        run, recipe, config = self.run, self.run.recipe, self.run.config
        flips, warmup = ", random flips" * recipe.random_flip, " after a warm-up" * recipe.ema_warmup
        facts = {
            "images": run.describe_images(recorded_name(run.data.name)) + flips,
            "updates": f"{step} of {run.plan.total} images, seed {config.seed}",
            "optimizer": f"Adam(0.9, 0.999), learning rate {recipe.learning_rate:g} after {recipe.lr_warmup_steps} "
            f"warm-up updates, then {recipe.lr_scheduler}, gradient norm at most {recipe.max_grad_norm:g}",
            "EMA weights": f"decay {recipe.ema_decay}{warmup}",
            "objective": f"{recipe.loss}, {recipe.timestep_sampling} timesteps, dropout {recipe.unet['dropout']:g}",
        }
        if run.initial is not None:
            model = run.initial.base_model or recorded_name(run.initial.name)
            facts["started from"] = f"the weights of {model} (SHA-256 {run.initial.digest[:12]}...)"
        if config.class_conditional:
            facts["classes"] = f"{len(run.data.class_names or [])}, dropped for {config.class_dropout:.0%}"
        device = f"{run.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
        if run.device.type == "cuda":
            device = torch.cuda.get_device_name(run.device)
        return {**facts, "precision": run.precision, "hardware": f"{self.accelerator.num_processes} x {device}"}
