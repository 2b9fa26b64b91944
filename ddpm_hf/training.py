"""Algorithm 1: the training loop, with its recipe, checkpoints and the model it publishes.

Everything random in update n (which images, flips, t, noise, dropout) is a function of (seed, n), drawn for the whole
batch of the update and then cut into micro-batches and processes. So a run does not depend on how it was cut, and a
resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from .checkpointing import (
    find_checkpoint,
    flatten_optimizer_state,
    list_checkpoints,
    save_checkpoint,
    unflatten_optimizer_state,
    write_directory,
)
from .configuration import TrainingConfig
from .data import ImageDataset, load_images, random_flip, to_model_range
from .evaluation import EvaluationReport, evaluate_likelihood
from .generation import generate, with_sampler
from .hub import write_model_card
from .objectives import OBJECTIVES
from .pipeline_ddpm import DDPMPipeline
from .randomness import derive_seed, derived_generator
from .scheduling_ddpm import DDPMScheduler
from .unet_2d import UNet2DModel, parameter_count
from .visualize import image_grid, save_picture

# How often the progress bar reads the loss from the device.
_SECONDS_BETWEEN_READINGS = 1.0


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what is left on disk."""


class Trainer:
    """Trains one DDPM.

    Args:
        config: What to do. All of it is checked here, before anything is written.

    Raises:
        ValueError: A setting that does not fit the others, the images or the machine.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.recipe = config.resolved_preset()
        if config.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError(
                "--mixed_precision fp16 needs a GPU, and there is none here; use bf16, or leave it out for float32"
            )
        self.output_dir = Path(config.output_dir)
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"--output_dir {config.output_dir!r} is a file; name a folder")
        if not config.resume_from_checkpoint and list_checkpoints(self.output_dir):
            raise ValueError(
                f"--output_dir {config.output_dir!r} already holds a run; go on with --resume_from_checkpoint latest, "
                "or name another folder"
            )

        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            _set_cpu_threads(config.num_cpu_threads, self.accelerator.num_processes)
        self.micro_batch, self.accumulation, self.total_batch = config.batch_plan(self.accelerator.num_processes)

        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.unet = UNet2DModel(**self.recipe.unet).to(self.device)
        self.scheduler = DDPMScheduler(**self.recipe.scheduler)
        self.data = self._load("train")
        if not len(self.data):
            raise ValueError(f"{self.data.name!r} has no images to train on")
        self.ema = EMAModel(
            self.unet.parameters(),
            decay=self.recipe.ema_decay,
            # diffusers ramps up to the decay unless the smallest one equals it, and skips the first update unless told
            # that averaging began before it; the paper's average has its full decay from the first update.
            min_decay=0.0 if self.recipe.ema_warmup else self.recipe.ema_decay,
            update_after_step=-1,
            foreach=True,
        )
        optimizer = torch.optim.Adam(
            self.unet.parameters(), lr=self.recipe.learning_rate, betas=(0.9, 0.999), fused=True
        )
        self.lr_schedule = get_scheduler(
            "constant_with_warmup" if self.recipe.lr_scheduler == "constant" else self.recipe.lr_scheduler,
            optimizer,
            num_warmup_steps=self.recipe.lr_warmup_steps,
            num_training_steps=self.recipe.max_train_steps,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.unet, optimizer)
        self.step = 0  # optimizer updates done
        self._order = (-1, torch.empty(0, dtype=torch.long))  # the current epoch's permutation
        if config.resume_from_checkpoint:
            self._resume(config.resume_from_checkpoint)

    # ------------------------------------------------------------------ data and draws

    def _load(self, split: str) -> ImageDataset:
        config, unet = self.config, self.unet.config
        size = unet.sample_size
        return load_images(
            **config.images_given(),
            split=split,
            channels=unet.in_channels,
            resolution=(size, size) if isinstance(size, int) else tuple(size),
            validation_split=config.validation_split,
            **(
                {"config_name": config.dataset_config_name, "cache_dir": config.cache_dir}
                if "dataset_name" in config.images_given()
                else {}
            ),
        )

    def _image_indices(self, step: int) -> Tensor:
        """`[total_batch]`: which images update `step` sees; every epoch is a new permutation, without gaps between."""
        n = len(self.data)
        position = torch.arange(step * self.total_batch, (step + 1) * self.total_batch)
        epochs, within = position // n, position % n
        return torch.cat(
            [self._epoch_order(int(epoch))[within[epochs == epoch]] for epoch in epochs.unique_consecutive()]
        )

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            stream = derived_generator(self.config.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self.data), generator=stream)
        return self._order[1]

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_0, t and noise of the whole update `step`, on the CPU, the CPU and the device."""
        seed, n = self.config.seed, self.total_batch
        x_0 = self.data.images[self._image_indices(step)]
        if self.recipe.random_flip:
            x_0 = random_flip(x_0, derived_generator(seed, "flip", step))
        T = self.scheduler.config.num_train_timesteps
        stream = derived_generator(seed, "t", step)
        if self.recipe.timestep_sampling == "stratified":
            u = (torch.randperm(n, generator=stream) + torch.rand(n, generator=stream, dtype=torch.float64)) / n
            t = (u * T).long().clamp_max(T - 1)
        else:
            t = torch.randint(T, (n,), generator=stream)
        noise = torch.randn(
            x_0.shape, generator=derived_generator(seed, "noise", step, device=self.device), device=self.device
        )
        return x_0, t, noise

    # ------------------------------------------------------------------ one update

    def _update(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer update; its loss and gradient norm, still on the device."""
        x_0, t, noise = self._batch(step)
        objective = OBJECTIVES[self.recipe.loss]
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        loss_sum = torch.zeros((), device=self.device)
        for micro in range(self.accumulation):
            start = (micro * processes + rank) * self.micro_batch
            rows = slice(start, start + self.micro_batch)
            torch.manual_seed(derive_seed(self.config.seed, "dropout", step, micro, rank))
            last = micro == self.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = objective(
                    self.model,
                    self.scheduler,
                    to_model_range(x_0[rows].to(self.device, non_blocking=True)),
                    t[rows].to(self.device, non_blocking=True),
                    noise[rows],
                )
                # Gradients are averaged over processes, so this adds up to the mean over the update's images.
                loss = losses.sum() * (processes / self.total_batch)
                self.accelerator.backward(loss)
            loss_sum += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_schedule.step()
        self.ema.step(self.unet.parameters())
        return loss_sum, norm

    # ------------------------------------------------------------------ the run

    def train(self) -> DDPMPipeline | None:
        """Train to the last update, then publish the model, its samples, numbers and card in `output_dir`.

        Returns:
            The published pipeline (averaged weights), or `None` where the run was asked to stop: its state is saved.

        Raises:
            TrainingError: Loss or gradients are no longer finite.
            OSError: The disk refuses; the last checkpoint is intact.
        """
        config, last = self.config, self.recipe.max_train_steps
        self._say(self._introduction())
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            config.save(self.output_dir / "training_config.yaml")
        started, first = time.monotonic(), self.step
        bar = tqdm(
            total=last, initial=first, desc="training", unit="step", disable=not self.accelerator.is_main_process
        )
        shown = started
        self.model.train()
        with bar, stop_signals() as stop:
            while self.step < last:
                loss, norm = self._update(self.step)
                self.step += 1
                bar.update()
                now = time.monotonic()
                due = self.step % config.checkpointing_steps == 0
                if now - shown > _SECONDS_BETWEEN_READINGS or due or self.step == last:
                    self._show(bar, loss.item(), norm.item(), (self.step - first) / (now - started))
                    shown = now
                stopping = self._all_agree_to_stop(stop)
                if due or stopping or self.step == last:
                    self._save()
                if stopping and self.step < last:
                    bar.close()
                    self._say(
                        f"stopped after update {self.step}; go on with --resume_from_checkpoint latest "
                        f"--output_dir {config.output_dir}"
                    )
                    return None
                if config.save_images_steps and self.step % config.save_images_steps == 0 and self.step < last:
                    self._sample_grid(self._pipeline(), f"samples-{self.step}.png")
                    self.model.train()
        seconds = time.monotonic() - started
        images_per_second = (self.step - first) * self.total_batch / seconds
        self._say(f"trained {self.step - first} updates in {seconds:.1f} s, {images_per_second:.0f} images/s")
        return self._publish()

    def _introduction(self) -> str:
        config, a = self.config, self.accelerator
        lines = [
            f"{config.preset}: {parameter_count(self.unet):,} parameters, {len(self.data)} images of "
            f"{self.data.name}, {self.recipe.max_train_steps - self.step} updates of {self.total_batch} images "
            f"on {self.device.type} ({a.num_processes} process(es), precision {a.mixed_precision})",
        ]
        if self.accumulation > 1:
            lines.append(
                f"each update gathers {self.accumulation} micro-batches of {self.micro_batch} images per process"
            )
        if self.step:
            lines.append(f"resumed after update {self.step}")
        return "\n".join(lines)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _show(self, bar: Any, loss: float, norm: float, updates_per_second: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = list_checkpoints(self.output_dir)
            raise TrainingError(
                f"loss {loss} and gradient norm {norm} after update {self.step} (learning rate "
                f"{self.lr_schedule.get_last_lr()[0]:.3g}, precision {self.accelerator.mixed_precision}); lower the "
                f"learning rate; the last checkpoint is {kept[-1] if kept else 'none yet'}"
            )
        bar.set_postfix_str(
            f"loss {loss:.4f}, lr {self.lr_schedule.get_last_lr()[0]:.2e}, grad {norm:.2f}, "
            f"{updates_per_second * self.total_batch:.0f} images/s"
        )

    def _all_agree_to_stop(self, stop: dict[str, bool]) -> bool:
        if self.accelerator.num_processes == 1:
            return stop["requested"]
        flag = torch.tensor(float(stop["requested"]), device=self.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0

    # ------------------------------------------------------------------ state

    def _save(self) -> None:
        """Write a checkpoint (main process), the others wait for it."""
        if self.accelerator.is_main_process:
            optimizer_tensors, optimizer_values = flatten_optimizer_state(self.optimizer.state_dict())
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.output_dir,
                self.step,
                {
                    "model": self.unet.state_dict(),
                    "ema": self._ema_state_dict(),
                    "optimizer": optimizer_tensors,
                },
                {
                    "optimizer": optimizer_values,
                    "lr_schedule": self.lr_schedule.state_dict(),
                    "ema_steps": self.ema.optimization_step,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "num_images": len(self.data),
                    "total_batch_size": self.total_batch,
                    "seed": self.config.seed,
                },
                keep=self.config.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self, which: str) -> None:
        found = find_checkpoint(self.output_dir, which)
        if found is None:
            self._say(f"no checkpoint in {str(self.output_dir)!r} yet, starting from the beginning")
            return
        path, tensors, state = found
        for name, here in (
            ("num_images", len(self.data)),
            ("total_batch_size", self.total_batch),
            ("seed", self.config.seed),
        ):
            if state[name] != here:
                raise ValueError(
                    f"{str(path)!r} was trained with {name} {state[name]}, and this run has {here}; resume with the "
                    "same setting, or start anew in another folder"
                )
        self.unet.load_state_dict(tensors["model"])
        names = [name for name, _ in self.unet.named_parameters()]
        self.ema.shadow_params = [tensors["ema"][name].to(self.device) for name in names]
        self.ema.optimization_step = state["ema_steps"]
        self.optimizer.load_state_dict(unflatten_optimizer_state(tensors["optimizer"], state["optimizer"]))
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def _ema_state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the network's own names."""
        averaged = dict(zip((name for name, _ in self.unet.named_parameters()), self.ema.shadow_params, strict=True))
        return {**self.unet.state_dict(), **averaged}

    # ------------------------------------------------------------------ the published model

    def _pipeline(self) -> DDPMPipeline:
        """The averaged weights in a float32 pipeline of their own, apart from the network in training."""
        unet = UNet2DModel(**self.recipe.unet)
        unet.load_state_dict(self._ema_state_dict())
        pipe = DDPMPipeline(unet.to(self.device), DDPMScheduler(**self.recipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _sample_grid(self, pipe: DDPMPipeline, name: str) -> None:
        config = self.config
        if not self.accelerator.is_main_process:
            return
        batches = generate(
            with_sampler(pipe, config.sampler),
            range(config.num_sample_images),
            num_inference_steps=min(config.ddpm_num_inference_steps, self.scheduler.config.num_train_timesteps),
        )
        path = self.output_dir / name
        save_picture(image_grid(torch.cat([images for _, images in batches])), path)
        self._say(f"wrote {path}")

    def _publish(self) -> DDPMPipeline:
        """Write the pipeline (safetensors), sample grid, report and card into `output_dir`."""
        pipe = self._pipeline()
        if self.accelerator.is_main_process:
            folder = self.output_dir / ".pipeline"
            write_directory(folder, lambda partial: pipe.save_pretrained(partial))
            for entry in sorted(folder.iterdir()):
                target = self.output_dir / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                entry.replace(target)
            folder.rmdir()
            self._say(f"wrote the pipeline to {self.output_dir}")
            self._sample_grid(pipe, "samples.png")
            report = self._evaluate(pipe)
            write_model_card(
                self.output_dir / "README.md",
                title=self.output_dir.resolve().name,
                image_shape=pipe.image_shape,
                parameters=parameter_count(self.unet),
                dataset=self.data.name,
                recipe=self._recipe_for_card(),
                report=report,
                sample="samples.png",
            )
            self._say(f"wrote {self.output_dir / 'README.md'}")
        self.accelerator.wait_for_everyone()
        return pipe

    def _evaluate(self, pipe: DDPMPipeline) -> EvaluationReport | None:
        config = self.config
        if not config.eval_num_images or not (config.validation_split or "dataset" in config.images_given()):
            return None
        report = evaluate_likelihood(
            pipe,
            self._load("validation"),
            "validation",
            num_images=config.eval_num_images,
            num_evaluations=config.eval_num_evaluations,
        )
        report.save(self.output_dir / "evaluation.json")
        value = report.values["bits_per_dim"]
        self._say(
            f"bits/dim on {report.num_images} held-out images: {value['value']:.3f} +- {value['standard_error']:.3f}"
        )
        return report

    def _recipe_for_card(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "images": f"{len(self.data)} of {self.data.name}" + (", random flips" if recipe.random_flip else ""),
            "updates": f"{self.step} of {self.total_batch} images, seed {self.config.seed}",
            "optimizer": f"Adam(0.9, 0.999), learning rate {recipe.learning_rate:g} after {recipe.lr_warmup_steps} "
            f"warm-up updates, then {recipe.lr_scheduler}, gradient norm at most {recipe.max_grad_norm:g}",
            "averaged weights": f"decay {recipe.ema_decay}" + (" after a warm-up" if recipe.ema_warmup else ""),
            "objective": f"{recipe.loss}, {recipe.timestep_sampling} timesteps, dropout {recipe.unet['dropout']:g}",
            "precision": {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
            "hardware": f"{self.accelerator.num_processes} x {self._device_name()}",
        }

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _set_cpu_threads(wanted: int | None, num_processes: int) -> None:
    """Use all cores: `accelerate launch` starts every process with one thread unless it is told otherwise."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if wanted is None and launched:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        physical = psutil.cpu_count(logical=False) or cores  # a core's second thread only gets in the way
        wanted = max(1, min(cores, physical) // num_processes)
    if wanted is not None:
        torch.set_num_threads(wanted)


@contextmanager
def stop_signals() -> Iterator[dict[str, bool]]:
    """SIGINT and SIGTERM set `["requested"]` once; a second SIGINT interrupts at once. Only in the main thread."""
    stop = {"requested": False}

    def request(signum: int, frame: Any) -> None:
        if stop["requested"] and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop["requested"] = True

    try:
        before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are someone else's
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
