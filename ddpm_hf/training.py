"""Algorithm 1: the training loop, with its recipe, checkpoints and the model it publishes.

Everything random in update n (which images, flips, t, noise, dropout) is a function of (seed, n), drawn for the whole
batch of the update and then cut into micro-batches and processes. So a run does not depend on how it was cut, and a
resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from .checkpointing import (
    find_checkpoint,
    list_checkpoints,
    remove_leftovers,
    restore_training_state,
    save_checkpoint,
    share_of,
    training_state,
    whole,
)
from .configuration import TrainingConfig, TrainingError
from .data import ImageDataset, Images, StreamedImages, flip_images, load_images, to_model_range
from .evaluation import EvaluationReport, evaluate_likelihood, first_images
from .generation import generate, with_sampler
from .hub import write_model_card, write_pipeline
from .objectives import OBJECTIVES
from .pipeline_ddpm import DDPMPipeline
from .processes import (
    cpu_only,
    end_with_the_launcher,
    interruptible,
    known_tracker,
    lonely_launch,
    only_run_in,
    set_cpu_threads,
    stop_signals,
)
from .randomness import derive_seed
from .scheduling_ddpm import DDPMScheduler
from .training_batches import Batches, BatchPlan
from .unet_2d import UNet2DModel, parameter_count
from .visualize import image_grid, save_picture

# How often the progress bar reads the loss from the device.
_SECONDS_BETWEEN_READINGS = 1.0

# fp16's loss scale starts high and is halved after each overflow, so a few skipped updates are nothing unusual.
_MOST_SKIPPED_UPDATES = 20
_UPDATES_BETWEEN_CHECKS = 10


# They keep the optimizer's state for themselves and write it with pickle.
_NOT_OURS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


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
        self._check_output_is_ours()

        self.accelerator = Accelerator(
            cpu=cpu_only(),
            mixed_precision=config.mixed_precision,
            log_with=known_tracker(config.report_to),
            project_dir=str(self.output_dir / config.logging_dir),
        )
        self.device = self.accelerator.device
        fsdp = (
            self.accelerator.state.fsdp_plugin if self.accelerator.distributed_type == DistributedType.FSDP else None
        )
        if self.accelerator.distributed_type in _NOT_OURS or (fsdp is not None and fsdp.fsdp_version != 2):
            raise ValueError(
                f"{self.accelerator.distributed_type.value} saves its state with pickle or as one flat tensor, which "
                "checkpoints here do not hold; use several processes (examples/accelerate/multi_gpu.yaml) or "
                "FSDP 2 (examples/accelerate/fsdp2.yaml)"
            )
        if self.device.type == "cpu":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.accelerator.num_processes))
            set_cpu_threads(config.num_cpu_threads, local)
        micro, accumulation, _ = config.batch_plan(self.accelerator.num_processes)
        self.plan = BatchPlan(micro, accumulation, self.accelerator.process_index, self.accelerator.num_processes)

        self.scheduler = DDPMScheduler(**self.recipe.scheduler)
        self._check_size()
        self.data = self._load("train")
        if not isinstance(self.data, StreamedImages) and not len(self.data):
            raise ValueError(f"{self.data.name!r} has no images to train on")
        self._held_out = self._load_held_out()
        self.unet_config = {**self.recipe.unet, **self._class_config()}
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.unet = self._fresh_unet().to(self.device)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if config.channels_last:
            self.unet = self.unet.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(
            self.unet.parameters(), lr=self.recipe.learning_rate, betas=(0.9, 0.999), fused=True
        )
        self.lr_schedule = get_scheduler(
            "constant_with_warmup" if self.recipe.lr_scheduler == "constant" else self.recipe.lr_scheduler,
            optimizer,
            num_warmup_steps=self.recipe.lr_warmup_steps,
            num_training_steps=self.recipe.max_train_steps,
        )
        network = torch.compile(self.unet) if config.compile else self.unet
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.ema = EMAModel(
            self.unet.parameters(),  # after they were prepared: FSDP replaces them by shards
            decay=self.recipe.ema_decay,
            # diffusers ramps up to the decay unless the smallest one equals it, and skips the first update unless told
            # that averaging began before it; the paper's average has its full decay from the first update.
            min_decay=0.0 if self.recipe.ema_warmup else self.recipe.ema_decay,
            update_after_step=-1,
            foreach=True,
        )
        self._adam = optimizer
        self._bad_in_a_row = torch.zeros((), device=self.device)
        self.step = 0  # optimizer updates done
        self.batches = Batches(
            self.data,
            self.plan,
            image_shape=(self.unet.config.in_channels, *self._image_size),
            num_train_timesteps=self.scheduler.config.num_train_timesteps,
            seed=config.seed,
            device=self.device,
            center_crop=config.center_crop,
            random_flip=self.recipe.random_flip,
            class_dropout=config.class_dropout,
            timestep_sampling=self.recipe.timestep_sampling,
        )
        if config.resume_from_checkpoint:
            self._resume(config.resume_from_checkpoint)

    def _check_output_is_ours(self) -> None:
        """A run is not mixed with another, nor with anything else that lies in its folder."""
        config = self.config
        if not config.resume_from_checkpoint and list_checkpoints(self.output_dir):
            raise ValueError(
                f"--output_dir {config.output_dir!r} already holds a run; go on with --resume_from_checkpoint latest, "
                "or name another folder"
            )
        written = ("model_index.json", "unet", "scheduler", "README.md", "samples.png", "evaluation.json")
        if not (self.output_dir / "training_config.yaml").exists():
            for name in written:
                if (self.output_dir / name).exists():
                    raise ValueError(
                        f"--output_dir {config.output_dir!r} holds {name}, which a run would overwrite, and no run of "
                        "this package; name another folder"
                    )

    # ------------------------------------------------------------------ data and draws

    def _load_held_out(self) -> ImageDataset | None:
        """What bits/dim are measured on, or `None` where nothing is held out or nothing is asked for."""
        config = self.config
        if not config.validation_split and "dataset" not in config.images_given():
            if config.validation_steps:
                raise ValueError("--validation_steps needs images that are held out; add --validation_split 0.05")
            return None
        if not config.eval_num_images:
            return None
        held_out = first_images(self._load("validation"), config.eval_num_images)
        if not len(held_out):
            raise ValueError(
                f"--validation_split {config.validation_split} of {held_out.name!r} holds out no image; use a larger "
                "share, or --eval_num_images 0"
            )
        return held_out

    @property
    def _image_size(self) -> tuple[int, int]:
        size = self.recipe.unet["sample_size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    def _check_size(self) -> None:
        """A size that the network cannot halve, said before any image is read."""
        with torch.device("meta"):
            UNet2DModel(**self.recipe.unet)

    def _load(self, split: str) -> Images:
        options = self.config.image_options()
        if split != "train":
            options |= {"crop": "center"} if "crop" in options else {}
        return load_images(
            **self.config.images_given(),
            split=split,
            channels=self.recipe.unet.get("in_channels", 3),
            resolution=self._image_size,
            validation_split=self.config.validation_split,
            **options,
        )

    def _class_config(self) -> dict[str, Any]:
        """`UNet2DModel` arguments for the images' classes; with class dropout, one more class stands for none."""
        if not self.config.class_conditional:
            return {}
        names = self.data.class_names
        if names is None:
            raise ValueError(
                f"--class_conditional needs classes, and {self.data.name!r} has none: use a folder of folders, or a "
                "dataset with a label column (--label_column)"
            )
        config: dict[str, Any] = {"num_class_embeds": len(names), "_class_names": list(names)}
        if self.config.class_dropout:
            config |= {"num_class_embeds": len(names) + 1, "_null_class": len(names)}
        return config

    def _fresh_unet(self) -> UNet2DModel:
        return UNet2DModel(**self.unet_config)

    # ------------------------------------------------------------------ one update

    def _update(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer update; its loss and gradient norm, still on the device."""
        draws = self.batches.draws(step)
        objective = OBJECTIVES[self.recipe.loss]
        accelerator = self.accelerator
        loss_sum = torch.zeros((), device=self.device)
        for micro in range(self.plan.accumulation):
            rows = self.batches.rows(micro)
            images, labels = self.batches.read_ahead(step, micro)
            images = flip_images(images, draws["flip"][rows])
            options = {}
            if self.config.class_conditional:
                assert labels is not None
                labels = torch.where(draws["drop_class"][rows], self.unet.config.get("_null_class") or 0, labels)
                options["class_labels"] = labels.to(self.device, non_blocking=True)
            torch.manual_seed(derive_seed(self.config.seed, "dropout", step, micro, accelerator.process_index))
            last = micro == self.plan.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                losses = objective(
                    self.model,
                    self.scheduler,
                    to_model_range(images.to(self.device, non_blocking=True)),
                    draws["t"][rows].to(self.device, non_blocking=True),
                    draws["noise"][rows],
                    **options,
                )
                # Gradients are averaged over processes, so this adds up to the mean over the update's images.
                loss = losses.sum() / self.plan.total
                accelerator.backward(loss * accelerator.num_processes)
            loss_sum += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self._step_optimizer(loss_sum, norm)
        return loss_sum, norm

    def _step_optimizer(self, loss: Tensor, norm: Tensor) -> None:
        """Adam, schedule and average; an update whose gradients are not finite is skipped, without asking the device.

        Raises:
            TrainingError: Too many updates in a row were skipped.
        """
        if self.accelerator.scaler is None:
            norm = whole(norm)
            bad = (~norm.isfinite()).float()
            vars(self._adam)["found_inf"] = bad  # what Adam's fused kernel looks at to leave everything as it is
        self.optimizer.step()
        if self.accelerator.scaler is not None:
            bad = torch.tensor(float(self.optimizer.step_was_skipped), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_schedule.step()
        self.ema.step(self.unet.parameters())
        self._bad_in_a_row = (self._bad_in_a_row + 1) * bad
        # Reading it waits for the device, so it is not read after every update.
        if (self.step + 1) % _UPDATES_BETWEEN_CHECKS == 0 and self._bad_in_a_row.item() >= _MOST_SKIPPED_UPDATES:
            self._give_up(loss, norm)

    def _give_up(self, loss: Tensor, norm: Tensor) -> None:
        kept = list_checkpoints(self.output_dir)
        raise TrainingError(
            f"loss {loss.item()} and gradient norm {norm.item()} at update {self.step + 1}: "
            f"{int(self._bad_in_a_row.item())} updates in a row were skipped because their gradients are not finite "
            f"(learning rate {self.lr_schedule.get_last_lr()[0]:.3g}, precision {self._precision}); "
            f"lower the learning rate; the last checkpoint is {kept[-1] if kept else 'none yet'}"
        )

    # ------------------------------------------------------------------ the run

    def train(self) -> DDPMPipeline | None:
        """Train to the last update, then publish the model, its samples, numbers and card in `output_dir`.

        Returns:
            The published pipeline (averaged weights), or `None` where the run was asked to stop: its state is saved.

        Raises:
            TrainingError: Loss or gradients are no longer finite.
            OSError: The disk refuses; the last checkpoint is intact.
        """
        self._say(self._introduction())
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to --output_dir {self.config.output_dir}: {error.strerror}") from error
        with only_run_in(self.output_dir) if self.accelerator.is_main_process else nullcontext():
            self._prepare_output()
            try:
                return self._publish() if self._run_updates() else None
            finally:
                self.batches.close()
                self.accelerator.end_training()

    def _run_updates(self) -> bool:
        """The updates that are left; whether all were made (`False`: the run was asked to stop)."""
        config, last = self.config, self.recipe.max_train_steps
        end_with_the_launcher()
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
                if now - shown > _SECONDS_BETWEEN_READINGS or self.step == last:
                    self._show(bar, loss, norm, (self.step - first) * self.plan.total / (now - started))
                    shown = now
                saved = self._due(config.checkpointing_steps) or self.step == last
                if saved:
                    self._save()
                if self.step < last:
                    self._watch(stop)
                stopping = self._all_agree_to_stop(stop)
                if stopping and not saved:
                    self._save()
                if stopping and self.step < last:
                    bar.close()
                    self._say(
                        f"stopped after update {self.step}; go on with --resume_from_checkpoint latest "
                        f"--output_dir {config.output_dir}"
                    )
                    return False
        seconds = time.monotonic() - started
        images_per_second = (self.step - first) * self.plan.total / seconds
        self._say(f"trained {self.step - first} updates in {seconds:.1f} s, {images_per_second:.0f} images/s")
        return True

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def _prepare_output(self) -> None:
        """The configuration in the output folder, without what killed runs left there, and the trackers."""
        if self.accelerator.is_main_process:
            remove_leftovers(self.output_dir)
            self.config.save(self.output_dir / "training_config.yaml")
        if self.config.report_to:
            plain = {key: value for key, value in dataclasses.asdict(self.config).items() if value is not None}
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in plain.items()}
            self.accelerator.init_trackers("ddpm_hf", config=plain)

    def _watch(self, stop: dict[str, bool]) -> None:
        """Sample grid and held-out bits/dim of the averaged weights, where they are due; all processes take part.

        A stop signal breaks it off, unless other processes would wait for this one's share.
        """
        pictures, numbers = self._due(self.config.save_images_steps), self._due(self.config.validation_steps)
        if not pictures and not numbers:
            return
        with interruptible(stop) if self.accelerator.num_processes == 1 else nullcontext():
            pipe = self._pipeline()
            if pictures:
                self._sample_grid(pipe, f"samples-{self.step}.png")
            if numbers and (report := self._evaluate(pipe)) is not None:
                self.accelerator.log({"bits_per_dim": report.values["bits_per_dim"]["value"]}, step=self.step)

    def _introduction(self) -> str:
        config, a = self.config, self.accelerator
        lines = [
            f"{config.preset}: {parameter_count(self.unet):,} parameters, {self._count_of_images()}"
            f"{self.data.name}, {self.recipe.max_train_steps - self.step} updates of {self.plan.total} images "
            f"on {self.device.type} ({a.num_processes} process(es), precision {self._precision})",
        ]
        if self.plan.accumulation > 1:
            lines.append(
                f"each update gathers {self.plan.accumulation} micro-batches of {self.plan.micro} images per process"
            )
        if lonely_launch():
            lines.append(
                "this is one process: accelerate launch --cpu starts several only with MPI; use torchrun "
                "--nproc_per_node N, or accelerate launch --multi_gpu, which works on CPUs too"
            )
        if self.step:
            lines.append(f"resumed after update {self.step}")
        return "\n".join(lines)

    @property
    def _precision(self) -> str:
        """What the network computes in."""
        return {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)

    def _count_of_images(self) -> str:
        return "a stream of " if isinstance(self.data, StreamedImages) else f"{len(self.data)} images of "

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _show(self, bar: Any, loss: Tensor, norm: Tensor, images_per_second: float) -> None:
        """Read the numbers from the device, show them and hand them to the trackers."""
        values = {
            "loss": loss.item() * self.accelerator.num_processes,  # from this process's share, scaled to the whole
            "lr": self.lr_schedule.get_last_lr()[0],
            "grad_norm": norm.item(),
            "images_per_second": images_per_second,
        }
        bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, grad {values['grad_norm']:.2f}, "
            f"{images_per_second:.0f} images/s"
        )
        self.accelerator.log(values, step=self.step)

    def _all_agree_to_stop(self, stop: dict[str, bool]) -> bool:
        if self.accelerator.num_processes == 1:
            return stop["requested"]
        if self.step % _UPDATES_BETWEEN_CHECKS and not self._due(self.config.checkpointing_steps):
            return False  # asking the others waits for the device
        flag = torch.tensor(float(stop["requested"]), device=self.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0

    # ------------------------------------------------------------------ state

    def _save(self) -> None:
        """Write a checkpoint: the main process does, from what all have."""
        weights, optimizer_tensors, optimizer_values = training_state(self.model, self._adam)
        averaged = self._ema_state_dict()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.output_dir,
                self.step,
                {"model": weights, "ema": averaged, "optimizer": optimizer_tensors},
                {
                    "optimizer": optimizer_values,
                    "ema_steps": self.ema.optimization_step,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    **self._identity(),
                    "recipe": self._changeable(),
                },
                keep=self.config.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def _num_images(self) -> int | None:
        return None if isinstance(self.data, StreamedImages) else len(self.data)

    def _identity(self) -> dict[str, Any]:
        """What makes two runs different runs: a checkpoint of one is refused by the other."""
        return {
            "network": {k: v for k, v in self.unet_config.items() if k != "dropout"},
            "scheduler": dict(self.recipe.scheduler),
            "loss": self.recipe.loss,
            "images": self.data.name,
            "num_images": self._num_images(),
            "total_batch_size": self.plan.total,
            "seed": self.config.seed,
        }

    def _changeable(self) -> dict[str, Any]:
        """What may be changed on the way; the run says so, and does not end in the same bits then."""
        names = "learning_rate lr_scheduler lr_warmup_steps max_train_steps max_grad_norm ema_decay ema_warmup "
        names += "random_flip timestep_sampling"
        return {name: getattr(self.recipe, name) for name in names.split()} | {"dropout": self.recipe.unet["dropout"]}

    def _resume(self, which: str) -> None:
        found = find_checkpoint(self.output_dir, which)
        if found is None:
            self._say(f"no checkpoint in {str(self.output_dir)!r} yet, starting from the beginning")
            return
        path, tensors, state = found
        # As plain JSON values, which is what the checkpoint holds: tuples are lists there.
        for name, here in json.loads(json.dumps(self._identity())).items():
            if state.get(name) != here:
                raise ValueError(
                    f"{str(path)!r} was trained with {name} {state.get(name)}, and this run has {here}; resume with "
                    "the same setting, or start anew in another folder"
                )
        for name, here in self._changeable().items():
            if (was := state["recipe"].get(name)) != here:
                self._say(f"changed since {path.name}: {name} was {was} and is {here} from now on")
        later = [other.name for other in list_checkpoints(self.output_dir) if _step_of(other) > state["step"]]
        if later and which != "latest":  # latest has passed over damaged ones, which the run will write again
            raise ValueError(
                f"{str(self.output_dir)!r} also holds {', '.join(later)}, which {path.name} would lead away from; "
                "remove them, or resume in another --output_dir"
            )
        if state["step"] > self.recipe.max_train_steps:
            raise ValueError(f"{path.name} is already past --max_train_steps {self.recipe.max_train_steps}")
        restore_training_state(self.model, self._adam, tensors["model"], tensors["optimizer"], state["optimizer"])
        self.ema.shadow_params = [
            share_of(tensors["ema"][name], like=parameter) for name, parameter in self.unet.named_parameters()
        ]
        self.ema.optimization_step = state["ema_steps"]
        # The schedule is a function of the update, so a changed learning rate counts from here on.
        self.lr_schedule.last_epoch = state["step"]
        for group, base, factor in zip(
            self._adam.param_groups, self.lr_schedule.base_lrs, self.lr_schedule.lr_lambdas, strict=True
        ):
            group["initial_lr"] = base
            group["lr"] = base * factor(state["step"])
        self.lr_schedule._last_lr = [group["lr"] for group in self._adam.param_groups]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def _ema_state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, whole, under the network's own names; all processes have to call this."""
        names = (name for name, _ in self.unet.named_parameters())
        averaged = {name: whole(value) for name, value in zip(names, self.ema.shadow_params, strict=True)}
        return {**dict(self.unet.named_buffers()), **averaged}

    # ------------------------------------------------------------------ the published model

    def _pipeline(self) -> DDPMPipeline:
        """The averaged weights in a float32 pipeline of their own, apart from the network in training."""
        unet = self._fresh_unet()
        unet.load_state_dict(self._ema_state_dict())
        pipe = DDPMPipeline(unet.to(self.device), DDPMScheduler(**self.recipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _sample_grid(self, pipe: DDPMPipeline, name: str) -> None:
        """Images 0, 1, ... in a grid; every process draws a share of them."""
        config, a = self.config, self.accelerator
        seeds = range(a.process_index, config.num_sample_images, a.num_processes)
        classes = self.data.class_names if config.class_conditional else None
        batches = generate(
            with_sampler(pipe, config.sampler),
            seeds,
            num_inference_steps=min(config.ddpm_num_inference_steps, self.scheduler.config.num_train_timesteps),
            class_labels=[seed % len(classes) for seed in seeds] if classes else None,
        )
        drawn = gather_object(
            [(seed, image) for part, images in batches for seed, image in zip(part, images, strict=True)]
        )
        if a.is_main_process:
            images = torch.stack([image for _, image in sorted(drawn, key=lambda pair: pair[0])])
            path = self.output_dir / name
            save_picture(image_grid(images), path)
            self._say(f"wrote {path}")

    def _publish(self) -> DDPMPipeline:
        """Write the pipeline (safetensors), sample grid, report and card into `output_dir`."""
        pipe = self._pipeline()
        if self.accelerator.is_main_process:
            write_pipeline(pipe, self.output_dir)
            self._say(f"wrote the pipeline to {self.output_dir}")
        self._sample_grid(pipe, "samples.png")
        report = self._evaluate(pipe)
        if self.accelerator.is_main_process:
            if report is not None:
                report.save(self.output_dir / "evaluation.json")
            write_model_card(
                self.output_dir / "README.md",
                title=self.output_dir.resolve().name,
                image_shape=pipe.image_shape,
                parameters=parameter_count(self.unet),
                dataset=self.data.name,
                recipe=self._recipe_for_card(),
                report=report,
                sample="samples.png",
                class_conditional=self.config.class_conditional,
            )
            self._say(f"wrote {self.output_dir / 'README.md'}")
        self.accelerator.wait_for_everyone()
        return pipe

    def _evaluate(self, pipe: DDPMPipeline) -> EvaluationReport | None:
        """Held-out bits/dim, or `None` where nothing is held out."""
        if self._held_out is None:
            return None
        evaluations = self.config.eval_num_evaluations
        report = evaluate_likelihood(pipe, self._held_out, "validation", num_evaluations=evaluations)
        value = report.values["bits_per_dim"]
        self._say(
            f"bits/dim on {report.num_images} held-out images: {value['value']:.3f} +- {value['standard_error']:.3f}"
        )
        return report

    def _recipe_for_card(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "images": self._count_of_images() + self.data.name + (", random flips" if recipe.random_flip else ""),
            "updates": f"{self.step} of {self.plan.total} images, seed {self.config.seed}",
            "optimizer": f"Adam(0.9, 0.999), learning rate {recipe.learning_rate:g} after {recipe.lr_warmup_steps} "
            f"warm-up updates, then {recipe.lr_scheduler}, gradient norm at most {recipe.max_grad_norm:g}",
            "averaged weights": f"decay {recipe.ema_decay}" + (" after a warm-up" if recipe.ema_warmup else ""),
            "objective": f"{recipe.loss}, {recipe.timestep_sampling} timesteps, dropout {recipe.unet['dropout']:g}",
            **(
                {"classes": f"{len(self.data.class_names or [])}, dropped for {self.config.class_dropout:.0%}"}
                if self.config.class_conditional
                else {}
            ),
            "precision": self._precision,
            "hardware": f"{self.accelerator.num_processes} x {self._device_name()}",
        }

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
