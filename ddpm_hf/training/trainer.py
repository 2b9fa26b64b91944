"""Algorithm 1: the training loop, with its recipe and its checkpoints; what it shows of itself is in `publishing`.

Everything random in update n (which images, flips, t, noise, dropout) is a function of (seed, n), drawn for the whole
batch of the update and then cut into micro-batches and processes. So a run does not depend on how it was cut, and a
resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..data.datasets import ImageDataset, StreamedImages
from ..diffusion.objectives import OBJECTIVES
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.unet_2d import UNet2DModel, check_size, parameter_count, use_plain_attention
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..utils.errors import UserError
from ..utils.files import remove_leftovers
from ..utils.machine import (
    check_precision,
    compiler_problem,
    default_precision,
    deterministic_algorithms,
    has_deterministic_algorithms,
    keep_freed_memory,
    to_device,
    use_tf32,
)
from ..utils.processes import (
    cpu_only,
    end_with_the_launcher,
    forget_another_precision,
    interruptible,
    known_trackers,
    lonely_launch,
    only_run_in,
    reduce_in_float32,
    refuse_foreign_engines,
    same_everywhere,
    say,
    set_cpu_threads,
    stop_signals,
    together,
)
from ..utils.randomness import derive_seed
from .batches import Batches, BatchPlan, MicroBatch, image_size, load_split
from .checkpointing import (
    find_checkpoint,
    fingerprint,
    gather_shards,
    list_checkpoints,
    restore_training_state,
    save_checkpoint,
    shard_like,
    training_state,
)
from .configuration import TrainingConfig, TrainingError, due
from .evaluation import TrainingEvaluation
from .publishing import Publisher, describe_classes, describe_images, precision_name
from .run_identity import CONFIG, RunIdentity, check_output_is_ours
from .update import CapturedUpdate, Update

# How often the progress bar reads the loss from the device.
_SECONDS_BETWEEN_READINGS = 1.0

# fp16's loss scale starts high and is halved after each overflow, so a few skipped updates are nothing unusual.
_MOST_SKIPPED_UPDATES = 20
_UPDATES_BETWEEN_CHECKS = 10


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
        self.output_dir = Path(config.output_dir)
        refuse_foreign_engines()
        precision = config.mixed_precision or default_precision()
        check_precision(precision)
        forget_another_precision(precision)
        trackers: Any = known_trackers(config.report_to)
        try:
            self.accelerator = Accelerator(
                cpu=cpu_only(),
                mixed_precision=precision,
                log_with=trackers or None,
                project_dir=str(self.output_dir / config.logging_dir),
            )
        except (ValueError, ImportError) as error:  # what a launcher, or its configuration, asked for
            raise UserError(
                f"accelerate cannot do what it was launched for: {' '.join(str(error).split())}"
            ) from error
        self.device = self.accelerator.device
        self.precision = precision_name(self.accelerator)
        self._check_machine()
        reduce_in_float32(self.accelerator)
        self.channels_last, self.compiled, self.captured = self._computation()
        if self.device.type == "cpu":
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.accelerator.num_processes))
            set_cpu_threads(config.num_cpu_threads, local)
            keep_freed_memory()
        use_tf32(config.tf32)
        self._deterministic = has_deterministic_algorithms(self.device)
        if self.device.type == "cuda" and not self._deterministic:
            say(
                "this process has used the GPU already, so this run may not end in the same bits when it is repeated "
                "or resumed; set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"
            )
        micro, accumulation, _ = config.batch_plan(self.accelerator.num_processes)
        self.plan = BatchPlan(micro, accumulation, self.accelerator.process_index, self.accelerator.num_processes)

        self.scheduler = DDPMScheduler(**self.recipe.scheduler)
        with together():
            check_output_is_ours(config)
            self._check_size()
            self.data = load_split(config, "train")
            if not isinstance(self.data, StreamedImages) and not len(self.data):
                raise UserError(f"{self.data.name!r} has no images to train on")
            self.evaluation = TrainingEvaluation(config, self.data)
            self.unet_config = {**self.recipe.unet, **self._class_config()}
        computation = {"precision": self.precision, "channels_last": self.channels_last, "compile": self.compiled}
        computation["cuda_graphs"] = self.captured
        self.identity = RunIdentity(config, self.recipe, self.unet_config, self.data, self.plan, computation)
        same_everywhere("has", describe_images(self.data), "all of them need the same images")
        self.publisher = Publisher(
            config, self.recipe, self.unet_config, self.accelerator, self.data, self.evaluation, self.plan
        )
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.unet = UNet2DModel(**self.unet_config).to(self.device)
        with together():
            self.evaluation.check(DDPMPipeline(self.unet, DDPMScheduler(**self.recipe.scheduler)))
        if self.device.type == "cpu":
            use_plain_attention(self.unet)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if self.channels_last:
            self.unet = self.unet.to(memory_format=torch.channels_last)
        # fused=True, on CPUs too: only this kernel looks at `found_inf`, by which updates that are not finite are
        # skipped without asking the device.
        optimizer = torch.optim.Adam(
            self.unet.parameters(), lr=self.recipe.learning_rate, betas=(0.9, 0.999), fused=True
        )
        self.lr_schedule = get_scheduler(
            "constant_with_warmup" if self.recipe.lr_scheduler == "constant" else self.recipe.lr_scheduler,
            optimizer,
            num_warmup_steps=self.recipe.lr_warmup_steps,
            num_training_steps=self.recipe.max_train_steps,
        )
        network = torch.compile(self.unet) if self.compiled else self.unet
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
        self.step = 0  # optimizer updates done
        # For the trackers: update, loss and gradient norm, what else there is.
        self._unlogged: list[tuple[int, Tensor, dict[str, float]]] = []
        self.batches = Batches(
            self.data.on(self.device) if isinstance(self.data, ImageDataset) else self.data,
            self.plan,
            image_shape=(self.unet.config.in_channels, *image_size(self.recipe)),
            num_train_timesteps=self.scheduler.config.num_train_timesteps,
            seed=config.seed,
            device=self.device,
            center_crop=config.center_crop,
            random_flip=self.recipe.random_flip,
            class_dropout=config.class_dropout,
            timestep_sampling=self.recipe.timestep_sampling,
        )
        self.update = self._made_update()
        if config.resume_from_checkpoint:
            self._resume(config.resume_from_checkpoint)

    def _check_machine(self) -> None:
        """What accelerate was asked for, on a command line or in its configuration, and cannot be had here."""
        a = self.accelerator
        if a.distributed_type == DistributedType.FSDP and a.state.fsdp_plugin.fsdp_version != 2:
            raise UserError(
                "the first FSDP keeps one flat tensor per block, which checkpoints here do not hold; use FSDP 2 "
                "(examples/accelerate/fsdp2.yaml) or several processes (examples/accelerate/multi_gpu.yaml)"
            )
        if a.distributed_type == DistributedType.FSDP and self.config.channels_last:
            raise UserError("FSDP 2 does not shard weights in channels_last; leave --channels_last out")
        if a.mixed_precision == "fp16" and a.scaler is None:
            raise UserError(
                "--mixed_precision fp16 needs a GPU, and there is none here; use bf16, or leave it out for float32"
            )
        if a.mixed_precision not in ("no", "fp16", "bf16"):
            raise UserError(f"mixed precision {a.mixed_precision!r} is not supported; use bf16, fp16 or no")

    def _computation(self) -> tuple[bool, bool, bool]:
        """Whether the network is in channels_last, compiled, and its update captured: as told, else what is fast here.

        A function of the device and the settings, not of a timing, so that runs stay repeatable.

        Raises:
            UserError: Compiling is asked for, and there is no compiler.
        """
        config, a = self.config, self.accelerator
        # FSDP 2 shards no weights in channels_last, and was not tried with compiled networks.
        fast = self.device.type == "cuda" and a.distributed_type != DistributedType.FSDP
        channels_last = fast if config.channels_last is None else config.channels_last
        compiled = fast if config.compile is None else config.compile
        if compiled and (problem := compiler_problem(self.device)):
            if config.compile:
                raise UserError(f"--compile true is not possible here: {problem}; leave it out")
            say(f"the network is not compiled, which is slower: {problem}")
            compiled = False
        # Gradient checkpointing saves the generators' states, which a graph does not let it do.
        alone = a.distributed_type == DistributedType.NO and a.scaler is None and not config.gradient_checkpointing
        return channels_last, compiled, fast and alone and config.cuda_graphs

    def _check_size(self) -> None:
        """A size that the network cannot halve, said before any image is read."""
        with torch.device("meta"):
            check_size(UNet2DModel(**self.recipe.unet), *image_size(self.recipe))

    def _class_config(self) -> dict[str, Any]:
        """`UNet2DModel` arguments for the images' classes; with class dropout, one more class stands for none."""
        if not self.config.class_conditional:
            return {}
        names = self.data.class_names
        if names is None:
            raise UserError(
                f"--class_conditional needs classes, and {self.data.name!r} has none: use a folder of folders, or a "
                "dataset with a label column (--label_column)"
            )
        config: dict[str, Any] = {"num_class_embeds": len(names), "_class_names": list(names)}
        if self.config.class_dropout:
            config |= {"num_class_embeds": len(names) + 1, "_null_class": len(names)}
        return config

    # ------------------------------------------------------------------ one update

    def _made_update(self) -> Update:
        return (CapturedUpdate if self.captured else Update)(
            accelerator=self.accelerator,
            model=self.model,
            unet=self.unet,
            scheduler=self.scheduler,
            objective=OBJECTIVES[self.recipe.loss],
            adam=self._adam,
            optimizer=self.optimizer,
            ema=self.ema,
            plan=self.plan,
            max_grad_norm=self.recipe.max_grad_norm,
            seed=self.config.seed,
        )

    def _update(self, step: int) -> tuple[Tensor, Tensor]:
        """Make one optimizer update; return its loss and gradient norm, still on the device.

        Raises:
            TrainingError: Too many updates in a row were skipped.
        """
        draws = self.batches.draws(step)
        loss, norm = self.update(step, lambda micro: self._micro_batch(step, micro, draws))
        self.lr_schedule.step()
        # Reading it waits for the device, so it is not read after every update.
        if (step + 1) % _UPDATES_BETWEEN_CHECKS == 0 and self.update.skipped_in_a_row.item() >= _MOST_SKIPPED_UPDATES:
            self._give_up(loss, norm)
        return loss, norm

    def _micro_batch(self, step: int, micro: int, draws: dict[str, Tensor]) -> MicroBatch:
        """What this process sees of an update in one pass, on the device."""
        images, labels = self.batches.read_ahead(step, micro)
        rows = self.batches.rows(micro)
        if not self.config.class_conditional:
            labels = None
        elif labels is None:  # of a stream, where nobody looked at all of them before
            raise TrainingError(
                f"--class_conditional needs a class for every image, and some of {self.data.name!r} have none; name "
                "their column with --label_column"
            )
        else:
            labels = to_device(labels, self.device)
            drop = to_device(draws["drop_class"][rows], self.device)
            labels = torch.where(drop, self.unet.config.get("_null_class") or 0, labels)
        flip, t = (to_device(draws[name][rows], self.device) for name in ("flip", "t"))
        return MicroBatch(to_device(images, self.device), flip, t, draws["noise"][rows], labels)

    def _give_up(self, loss: Tensor, norm: Tensor) -> None:
        kept, skipped = list_checkpoints(self.output_dir), int(self.update.skipped_in_a_row.item())
        raise TrainingError(
            f"loss {loss.item()} and gradient norm {norm.item()} at update {self.step + 1}: "
            f"{skipped} updates in a row were skipped because their gradients are not "
            f"finite (learning rate {self.lr_schedule.get_last_lr()[0]:.3g}, precision {self.precision}); "
            f"lower the learning rate; the last checkpoint is {kept[-1] if kept else 'none yet'}"
        )

    def _settle_buckets(self) -> None:
        """A backward pass of no effect, after which several processes' gradients are added up as they will be always.

        DDP sends gradients in buckets, and arranges them anew after its first backward pass. With three processes and
        more, the order of the sums depends on them: a resumed run's first update would differ by rounding.
        """
        if not isinstance(self.model, DistributedDataParallel):
            return
        images = torch.zeros(self.plan.micro, *self.batches.image_shape, device=self.device)
        t = torch.zeros(self.plan.micro, dtype=torch.long, device=self.device)
        options = {"class_labels": t} if self.config.class_conditional else {}
        self.model(images, t, **options).sample.sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------ the run

    def train(self, end_processes: bool = True) -> DDPMPipeline | None:
        """Train to the last update, then publish the model, its samples, numbers and card in `output_dir`.

        Args:
            end_processes: Several processes part afterwards; `False` where they have more to do together.

        Returns:
            The published pipeline (averaged weights), or `None` where the run was asked to stop: its state is saved.

        Raises:
            TrainingError: Loss or gradients are no longer finite.
            OSError: The disk refuses; the last checkpoint is intact.
        """
        if precision_name(self.accelerator) != self.precision:  # accelerate's state is shared by all of them
            raise UserError(
                f"another Trainer with precision {precision_name(self.accelerator)} was made after this one with "
                f"{self.precision}; train the first before making the second"
            )
        say(self._introduction())
        with ExitStack() as held:
            with together():
                if self.accelerator.is_main_process:
                    self._make_output_dir()
                    held.enter_context(only_run_in(self.output_dir))
                    remove_leftovers(self.output_dir)
                    self.evaluation.begin(self.step)
                    self.config.save(self.output_dir / CONFIG)
            self.publisher.open_hub()
            self._start_trackers()
            try:
                with stop_signals() as stop:
                    pipe = self._publish(stop) if self._run_updates(stop) else None
                    if pipe is not None and self.publisher.pushes is not None:
                        with interruptible(stop):
                            self.publisher.pushes.finish()
                    return pipe
            finally:
                if self.publisher.pushes is not None:
                    self.publisher.pushes.stop()
                self.batches.close()
                if end_processes:
                    self.accelerator.end_training()
                else:
                    for tracker in self.accelerator.trackers:
                        tracker.finish()

    def _run_updates(self, stop: dict[str, bool]) -> bool:
        """The updates that are left; whether all were made (`False`: the run was asked to stop)."""
        config, last = self.config, self.recipe.max_train_steps
        end_with_the_launcher()
        self.model.train()
        deterministic = deterministic_algorithms if self._deterministic else nullcontext
        with deterministic():
            self._settle_buckets()
        started, first = time.monotonic(), self.step
        bar = tqdm(
            total=last, initial=first, desc="training", unit="step", disable=not self.accelerator.is_main_process
        )
        shown = started
        with bar:
            if 0 < self.step < last and self.evaluation.missed(self.step):  # ended between checkpoint and evaluation
                self._watch(stop)
            while self.step < last:
                with deterministic():
                    loss, norm = self._update(self.step)
                self.step += 1
                bar.update()
                now = time.monotonic()
                images_per_second = (self.step - first) * self.plan.total / (now - started)
                if self.accelerator.trackers and (due(self.step, config.logging_steps) or self.step == last):
                    values = {"lr": self.lr_schedule.get_last_lr()[0], "images_per_second": images_per_second}
                    self._unlogged.append((self.step, torch.stack([loss, norm]), values))
                if now - shown > _SECONDS_BETWEEN_READINGS or self.step == last:
                    self._show(bar, loss, norm, images_per_second)
                    shown = now
                saved = due(self.step, config.checkpointing_steps) or self.step == last
                if saved:
                    self._save()
                if self.step < last:
                    try:
                        self._watch(stop)
                    except (UserError, OSError, MemoryError):  # what was trained is not lost, and it is made again
                        if not saved:
                            self._save()
                        raise
                    if saved and config.push_to_hub:
                        self.publisher.push(self._ema_state_dict(), self.step)
                stopping = self._all_agree_to_stop(stop)
                if stopping and not saved:
                    self._save()
                if stopping and self.step < last:
                    self._log()
                    bar.close()
                    self._say_stopped()
                    return False
        seconds = time.monotonic() - started
        speed = (self.step - first) * self.plan.total / seconds
        say(f"trained {self.step - first} updates in {seconds:.1f} s, {speed:.0f} images/s")
        return True

    def _publish(self, stop: dict[str, bool]) -> DDPMPipeline | None:
        """The trained model; `None` where a stop signal breaks this off, which takes one process (see `_watch`)."""
        alone = self.accelerator.num_processes == 1
        with interruptible(stop) if alone else nullcontext():
            if not (alone and stop["requested"]):
                return self.publisher.publish(self._ema_state_dict(), self.step)
        self._say_stopped("; only the published model is not complete")
        return None

    def _say_stopped(self, remark: str = "") -> None:
        say(
            f"stopped after update {self.step}{remark}; go on with --resume_from_checkpoint latest "
            f"--output_dir {self.config.output_dir}"
        )

    def _make_output_dir(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to --output_dir {self.config.output_dir}: {error.strerror}") from error

    def _start_trackers(self) -> None:
        if self.accelerator.log_with:
            plain = {key: value for key, value in self.config.public_values().items() if value is not None}
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in plain.items()}
            with together():
                try:
                    self.accelerator.init_trackers("ddpm_hf", config=plain)
                except Exception as error:  # each has errors of its own, for a missing login for example
                    raise UserError(f"--report_to {self.config.report_to} cannot start: {error}") from error

    def _watch(self, stop: dict[str, bool]) -> None:
        """What the publisher has to show of the averaged weights after this update; all processes take part.

        A stop signal breaks it off, or lets it not begin, unless other processes would wait for this one's share. An
        evaluation that is missed is made by the resumed run; a sample grid alone is left out. Keeping the best model
        is not broken off.
        """
        if not self.publisher.due(self.step):
            return
        alone = self.accelerator.num_processes == 1
        report = None
        with interruptible(stop) if alone else nullcontext():
            if alone and stop["requested"]:  # before `interruptible`, which breaks off what comes after
                return
            pipe, report = self.publisher.watch(self._ema_state_dict(), self.step)
        if report is not None:
            self.evaluation.keep(pipe, report, self.step)
            self._log()  # some trackers take updates in their order only
            self.accelerator.log({name: entry["value"] for name, entry in report.values.items()}, step=self.step)

    def _in_words(self) -> list[str]:
        """How the network is computed."""
        chosen = {"channels_last": self.channels_last, "compiled": self.compiled, "CUDA graphs": self.captured}
        return [f"precision {self.precision}", *(name for name, on in chosen.items() if on)]

    def _introduction(self) -> str:
        config, a = self.config, self.accelerator
        lines = [
            f"{config.preset}: {parameter_count(self.unet):,} parameters, {describe_images(self.data)}, "
            f"{self.recipe.max_train_steps - self.step} updates of {self.plan.total} images "
            f"on {self.device.type} ({', '.join([f'{a.num_processes} process(es)', *self._in_words()])})",
        ]
        if classes := describe_classes(self.data, config.class_conditional):
            lines.append(classes)
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

    def _show(self, bar: Any, loss: Tensor, norm: Tensor, images_per_second: float) -> None:
        """Read the numbers from the device and show them; trackers get theirs."""
        if self.publisher.pushes is not None:
            self.publisher.pushes.poll()
        bar.set_postfix_str(
            f"loss {loss.item() * self.accelerator.num_processes:.4f}, lr {self.lr_schedule.get_last_lr()[0]:.2e}, "
            f"grad {norm.item():.2f}, {images_per_second:.0f} images/s"
        )
        self._log()

    def _log(self) -> None:
        """Hand the numbers of every `logging_steps`-th update to the trackers, read from the device at once."""
        noted, self._unlogged = self._unlogged, []
        read = torch.stack([pair for _, pair, _ in noted]).tolist() if noted else []
        for (step, _, values), (loss, norm) in zip(noted, read, strict=True):
            # The loss is of this process's share, scaled to the whole.
            loss *= self.accelerator.num_processes
            self.accelerator.log({"loss": loss, "grad_norm": norm, **values}, step=step)

    def _all_agree_to_stop(self, stop: dict[str, bool]) -> bool:
        if self.accelerator.num_processes == 1:
            return stop["requested"]
        if self.step % _UPDATES_BETWEEN_CHECKS and not due(self.step, self.config.checkpointing_steps):
            return False  # asking the others waits for the device
        flag = torch.tensor(float(stop["requested"]), device=self.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0

    # ------------------------------------------------------------------ state

    def _save(self) -> None:
        """Write a checkpoint: the main process does, from what all have."""
        weights, optimizer_tensors, optimizer_values = training_state(self.model, self._adam)
        averaged = self._ema_state_dict()
        scaler = self.accelerator.scaler
        with together():  # and nobody goes on before it is written
            if self.accelerator.is_main_process:
                save_checkpoint(
                    self.output_dir,
                    self.step,
                    {"model": weights, "ema": averaged, "optimizer": optimizer_tensors},
                    {
                        "optimizer": optimizer_values,
                        "ema_steps": self.ema.optimization_step,
                        "scaler": scaler.state_dict() if scaler is not None else None,
                        **self.identity.fixed(),
                        "recipe": self.identity.changeable(),
                    },
                    keep=self.config.checkpoints_total_limit,
                )

    def _resume(self, which: str) -> None:
        with together():
            found = find_checkpoint(self.output_dir, which)
        where = f"{found[0].name} ({fingerprint(found[0])[:12]})" if found else "no checkpoint"
        advice = "put --output_dir on a disk that all machines share, or copy the first one's folder to all of them"
        same_everywhere("has", where, advice)
        if found is None:
            say(f"no checkpoint in {str(self.output_dir)!r} yet, starting from the beginning")
            return
        path, tensors, state = found
        with together():
            self.identity.check_checkpoint(path, state)
        restore_training_state(self.model, self._adam, tensors["model"], tensors["optimizer"], state["optimizer"])
        self.ema.shadow_params = [
            shard_like(tensors["ema"][name], like=parameter) for name, parameter in self.unet.named_parameters()
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
        averaged = {name: gather_shards(value) for name, value in zip(names, self.ema.shadow_params, strict=True)}
        return {**dict(self.unet.named_buffers()), **averaged}
