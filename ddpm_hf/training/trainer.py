"""The training run: updates of Algorithm 1, checkpoints, and when to show what.

`run.py` resolves the configuration, `update.py` is Algorithm 1, `batches.py` what it sees, `publishing.py` what a run
shows, `checkpointing.py` what it resumes from. Everything random in update n is a function of (seed, n).
"""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from ..data.datasets import StreamedImages
from ..models.unet_2d import UNet2DModel, parameter_count, use_plain_attention
from ..pipelines import checkpoints
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..pipelines.schedulers import make_scheduler
from ..utils.errors import UserError
from ..utils.files import remove_leftovers, writable_folder
from ..utils.machine import deterministic_algorithms, has_deterministic_algorithms
from ..utils.processes import StopFlag, log, only_run_in, raise_on_all_ranks, same_everywhere, stop_signals
from ..utils.progress import progress_bar
from ..utils.randomness import derive_seed
from . import checkpointing, time_limit
from .batches import Batches
from .configuration import DistillationConfig, TrainingConfig, TrainingError, due
from .distillation import Distillation
from .dry_run import dry_run
from .estimate import Pace
from .evaluation import TrainingEvaluation
from .initialization import InitialModel, initialize, open_initial_model
from .memory import state_bytes
from .posthoc_ema import PowerAverages, discard_snapshots, is_due, save_snapshot
from .publishing import Publisher
from .run import Run, resolve, start_accelerator
from .time_limit import TimeLimit
from .tracking import Tracking
from .update import CapturedUpdate, Update

# How often the progress bar reads the loss, for which the host waits for the device.
_SECONDS_BETWEEN_READINGS = 1.0

# fp16's loss scale starts high and is halved after each overflow, so a few skipped updates are nothing unusual.
_MOST_SKIPPED_UPDATES = 20
_UPDATES_BETWEEN_CHECKS = 10


class Trainer:
    """Trains one DDPM, or raises UserError, before anything is written: a setting does not fit."""

    def __init__(self, config: TrainingConfig):
        self._started, self._seconds_before = time_limit.clock(), 0.0
        self._others = 0.0  # seconds since the updates began in which none was made
        self.output_dir, self.accelerator = Path(config.output_dir), start_accelerator(config)
        self.device = self.accelerator.device
        deterministic = has_deterministic_algorithms(self.device)
        self.reproducible = deterministic_algorithms if deterministic else nullcontext  # around updates
        if self.device.type == "cuda" and not deterministic:
            what = "this process has used the GPU already, so this run may not end in the same bits when it is resumed"
            log(f"{what}; set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts")
        with raise_on_all_ranks():
            checkpointing.check_output_is_ours(config)
            state = checkpoints.recorded_state(self.output_dir, config.resume_from_checkpoint)
            initial: InitialModel | Distillation | None = open_initial_model(config, state)
            if isinstance(config, DistillationConfig):
                initial = Distillation.load(config)
                config = replace(config, class_conditional=initial.teacher.classes.count is not None)
            self.config, self.run = config, resolve(config, self.accelerator, initial)
            if isinstance(initial, Distillation):
                if state is not None:
                    checkpointing.check_settings(self.run, self.output_dir, state)
                self.run = self._with_trajectories(initial)
            self.evaluation = TrainingEvaluation(config, self.run.unet_config, self.run.data)
        self.recipe, self.data, self.plan = self.run.recipe, self.run.data, self.run.plan
        same_everywhere(self.run.describe_images(), "all of them need the same images")
        if initial is not None:
            same_everywhere(f"{initial.name} ({initial.digest[:12]})", "all of them need the same model to start from")
        self.tracking, self._pace = Tracking(self.accelerator, config), Pace()
        self.publisher = Publisher(config, checkpointing.settings_of(self.run), self.evaluation, self.tracking)
        self.limit = None if config.max_train_minutes is None else TimeLimit(config, self.recipe, self.seconds)
        self.unet = self._new_network()
        self._prepare_optimization()
        self.batches = Batches(self.run)
        powers = PowerAverages(self.unet) if config.posthoc_ema else None
        if powers is not None and any(isinstance(weight, DTensor) for weight in self.unet.parameters()):
            log("nothing is kept for post-hoc EMA, which does not go with FSDP")
            powers = None
        make_update = CapturedUpdate if self.run.computation.cuda_graphs else Update
        parts = (self.model, self.unet, self._adam, self.optimizer, self.ema, powers)
        self.update = make_update(self.run, self.batches, *parts)
        self.step, self._saved_at = 0, -1  # optimizer updates done, and those in the last checkpoint
        if config.resume_from_checkpoint:
            self._resume(config.resume_from_checkpoint)

    @property
    def last(self) -> int:
        """The last update of the run, as far as it is known."""
        return self.recipe.max_train_steps if self.limit is None else self.limit.last

    def seconds(self) -> float:
        """Return how long the run has taken, with the processes that it resumed from."""
        return self._seconds_before + time_limit.clock() - self._started

    def _with_trajectories(self, teacher: Distillation) -> Run:
        """Return the run with the images that the teacher makes; a resumed run makes them again."""
        run = self.run
        with self.reproducible():
            made = teacher.trajectories(run.config.seed, self.accelerator, run.plan.micro, run.computation.compile)
        return replace(run, data=made)

    def _new_network(self) -> UNet2DModel:
        """Return the network at its start, on the device, laid out as the run wants it."""
        torch.manual_seed(derive_seed(self.config.seed, "weights"))
        unet = UNet2DModel(**self.run.unet_config).to(self.device)
        if (initial := self.run.initial) is not None and initial.weights is not None:
            with raise_on_all_ranks():
                initialize(unet, initial)
        if (distillation := self.run.distillation) is not None:
            distillation.initialize(unet)
        with raise_on_all_ranks():  # can everything be measured that is to be measured on the way?
            self.evaluation.check(DDPMPipeline(unet, make_scheduler(unet.config, self.recipe.scheduler)))
        if self.device.type == "cpu":
            use_plain_attention(unet)
        if self.config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet.to(memory_format=torch.channels_last) if self.run.computation.channels_last else unet

    def _prepare_optimization(self) -> None:
        """Make Adam, its learning rate schedule and the EMA, and let accelerate prepare network and Adam."""
        recipe = self.recipe
        # fused=True, on CPUs too: only this kernel looks at `found_inf`, by which updates that are not finite are
        # skipped without asking the device.
        self._adam = torch.optim.Adam(self.unet.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.999), fused=True)
        self.lr_schedule = self._learning_rate_schedule(0)
        network = torch.compile(self.unet) if self.run.computation.compile else self.unet
        self.model, self.optimizer = self.accelerator.prepare(network, self._adam)
        self.ema = EMAModel(
            self.unet.parameters(),  # after they were prepared: FSDP replaces them by shards
            decay=recipe.ema_decay,
            # diffusers ramps up to the decay unless the smallest one equals it, and skips the first update unless
            # averaging began before it; the paper's EMA has its full decay from the first update.
            min_decay=0.0 if recipe.ema_warmup else recipe.ema_decay,
            update_after_step=-1,
            foreach=True,
        )

    def _learning_rate_schedule(self, step: int) -> Any:
        """Return the schedule as it is after `step` updates: a function of the update and the recipe alone."""
        for group in self._adam.param_groups:
            group["initial_lr"] = self.recipe.learning_rate
        if self.limit is not None:
            return LambdaLR(self._adam, self.limit.factor, last_epoch=step - 1)
        name = {"constant": "constant_with_warmup"}.get(self.recipe.lr_scheduler, self.recipe.lr_scheduler)
        counts = {"num_warmup_steps": self.recipe.lr_warmup_steps, "num_training_steps": self.recipe.max_train_steps}
        return get_scheduler(name, self._adam, **counts, last_epoch=step - 1)

    def train(self, end_processes: bool = True) -> DDPMPipeline | None:
        """Train to the last update, then publish the model, its samples, numbers and card in `output_dir`.

        Return the published pipeline (EMA weights), or `None` where the run was asked to stop: its state is saved, and
        after the last update its model too; only samples and numbers are left out. `end_processes=False` leaves the
        process group to processes that have more to do together.

        With `dry_run` all is checked and nothing written; this trainer's weights have moved then.

        Raises TrainingError (loss or gradients are no longer finite), OSError (the disk refuses; the last checkpoint
        is intact) or KeyboardInterrupt (a second Ctrl-C, or one while the last push is waited for).
        """
        log(self._introduction())
        with ExitStack() as cleanup:
            if self.config.dry_run:
                cleanup.callback(self._close, end_processes)
                dry_run(self)
                return None
            with raise_on_all_ranks():
                if self.accelerator.is_main_process:
                    writable_folder(self.output_dir, "--output_dir")
                    cleanup.enter_context(only_run_in(self.output_dir))
                    remove_leftovers(self.output_dir)
                    self.evaluation.discard_after(self.step)
                    discard_snapshots(self.output_dir, self.step)
                    self.config.save(self.output_dir / checkpoints.CONFIG)
            if self.step:  # a kill may have come between its checkpoint and its snapshot
                self._save_snapshot()
            self.publisher.open_hub()
            self.tracking.start(resumed=self.step > 0)
            cleanup.callback(self._close, end_processes)
            with stop_signals() as stop:
                self._run_updates(stop)
                pipe, complete = None, False
                if self.step >= self.last:
                    pipe = self.publisher.pipeline(self._ema_state_dict())
                    self.publisher.write_model(pipe, self.step)  # after a stop, too: a finished run has its model
                    make = partial(self.publisher.complete, pipe, self.step, self.seconds())
                    complete = self._unless_stopped(stop, make)
            if not complete:
                self._log_stop()
                return None
            if self.publisher.pushes is not None:
                self.publisher.pushes.finish()
            return pipe

    def _run_updates(self, stop: StopFlag) -> None:
        """Make the updates that are left, or those until the run is asked to stop."""
        config, first = self.config, self.step
        self.begin()
        started = shown = time_limit.clock()
        self._others = 0.0
        with progress_bar(self.last, "training", "step", self.accelerator.is_main_process, initial=first) as bar:
            if 0 < first < self.last and self.evaluation.is_missing(first):  # ended between checkpoint and evaluation
                self._show_progress(stop)
            while self.step < self.last:
                with self.reproducible():
                    loss, norm = self._update(self.step)
                self.step += 1
                bar.update()
                if self.limit is not None and self.limit.is_due(self.step):
                    loss.item()  # waits for the device
                    self._plan(self.limit)
                    bar.total = self.last

                last = self.last
                now = time_limit.clock()
                speed = (self.step - first) * self.plan.total / (now - started - self._others)
                if due(self.step, config.logging_steps) or self.step == last:
                    numbers = {"lr": self.lr_schedule.get_last_lr()[0], "images_per_second": speed}
                    self.tracking.note(self.step, loss, norm, numbers)
                if now - shown > _SECONDS_BETWEEN_READINGS or self.step == last:
                    self._read_numbers(bar, loss, norm, speed)
                    shown = now

                checkpoint = due(self.step, config.checkpointing_steps)
                if checkpoint or self.step == last:
                    self._save()
                elif is_due(self.step):
                    with self._timed("snapshot"):
                        self._save_snapshot()
                if self.step < last:
                    self._show_progress(stop)
                    if checkpoint and config.push_to_hub:
                        with self._timed("push"):
                            self.publisher.push(self._ema_state_dict(), self.step)
                if self._all_agree_to_stop(stop):
                    self._save()
                    if self.step < last:
                        return self.tracking.read()
        made, seconds = self.step - first, time_limit.clock() - started - self._others
        log(f"trained {made} updates in {seconds:.1f} s, {made * self.plan.total / max(seconds, 1e-9):.0f} images/s")

    def _update(self, step: int) -> tuple[Tensor, Tensor]:
        """Make one optimizer update; return its loss and gradient norm, still on the device."""
        loss, norm = self.update(step)
        self.lr_schedule.step()
        # On GPUs `read` gives the number at the check before, for which the host need not wait. All processes have the
        # same gradients, so the same number, and end at the same update.
        if (step + 1) % _UPDATES_BETWEEN_CHECKS == 0 and self.update.skipped_on_host.read() >= _MOST_SKIPPED_UPDATES:
            kept, skipped = checkpoints.list_checkpoints(self.output_dir), int(self.update.skipped_in_a_row.item())
            rate, precision = self._adam.param_groups[0]["lr"], f"precision {self.run.precision}"
            what = f"loss {loss.item()} and gradient norm {norm.item()} at update {step + 1}: {skipped} updates in a "
            what += f"row were skipped because their gradients are not finite (learning rate {rate:.3g}, {precision})"
            last = kept[-1] if kept else "none yet"
            raise TrainingError(f"{what}; lower the learning rate; the last checkpoint is {last}")
        return loss, norm

    def begin(self) -> None:
        """Get the network ready for updates."""
        self.model.train()
        with self.reproducible():
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Make a backward pass of no effect, after which DDP adds gradients up in the order of the rest of the run."""
        if isinstance(self.model, DistributedDataParallel):  # else a resumed run's first update differs by rounding
            batch = self.batches.empty_micro_batch()
            self.model(batch.noise, batch.t, class_labels=batch.labels).sample.sum().backward()
            self.optimizer.zero_grad(set_to_none=True)

    def _show_progress(self, stop: StopFlag) -> None:
        """Make what is due after this update; a stop interrupts it; a resumed run makes missing numbers."""
        for what, interval in (("grid", self.config.save_images_steps), ("numbers", self.config.validation_steps)):
            if not due(self.step, interval):
                continue
            try:
                with self._timed(what):
                    make = partial(self.publisher.show, what, self._ema_state_dict(), self.step, self.seconds())
                    self._unless_stopped(stop, make)
            except (UserError, OSError, MemoryError):
                self._save()  # what was trained is not lost
                raise

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Measure what is made within and is no update: for images per second, and estimates of the time."""
        self._pace.restart()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # updates that are still being computed are no part of it
        before = time_limit.clock()
        yield
        seconds = time_limit.clock() - before
        self._others += seconds
        if self.limit is not None:
            self.limit.took(what, self.step, seconds)

    def _plan(self, limit: TimeLimit) -> None:
        """Plan the last update, at first with an estimate of what comes after it."""
        if not limit.estimated:
            checkpoint = state_bytes(self.unet, self.update.powers is not None) / 1e8  # at 100 MB/s
            shown = self.publisher.seconds_to_complete(self._ema_state_dict(), self.step)
            limit.expect({"checkpoint": checkpoint, **shown})
        limit.plan(self.step, self._others)

    def _unless_stopped(self, stop: StopFlag, make: Callable[[], None]) -> bool:
        """Call `make` and return whether it ended: not after a stop, with one process also in between."""
        if self._all_agree_to_stop(stop):
            return False
        try:
            stop.interrupts = self.accelerator.num_processes == 1
            if stop.interrupts and stop.requested:  # since the line above
                return False
            make()
            return True
        except KeyboardInterrupt:
            if not stop.requested:
                raise
            return False
        finally:
            stop.interrupts = False

    def _all_agree_to_stop(self, stop: StopFlag) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.requested
        regular = self.step % _UPDATES_BETWEEN_CHECKS == 0 or due(self.step, self.config.checkpointing_steps)
        if not regular and self.step < self.last:
            return False  # asking the others waits for the device
        flag = torch.tensor(float(stop.requested), device=self.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0

    def _close(self, end_processes: bool) -> None:
        """End pushes, threads, trackers and, if asked for, the process group."""
        if self.publisher.pushes is not None:
            self.publisher.pushes.stop()
        self.batches.close()
        if end_processes:
            self.accelerator.end_training()
        else:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _log_stop(self) -> None:
        """Say what a stopped run has made, and the commands that come next, ready to be copied."""
        folder, last, resume = shlex.quote(self.config.output_dir), self.last, self._resume_command()
        if self.step >= last:
            missing = " and ".join(self.publisher.missing()) or "the end of its card"
            what = f"stopped after update {last}, the last: the model is in {folder}; missing: {missing}"
            return log(f"{what}, made by\n  {resume}")
        images = shlex.quote(f"{self.config.output_dir}/samples-{self.step}")
        log(
            f"stopped after update {self.step} of {last}, saved in {self.output_dir / f'checkpoint-{self.step}'}\n"
            f"  resume:   {resume}\n"
            f"  sample:   ddpm-hf sample --model {folder} --output {images}\n"
            f"  publish:  ddpm-hf publish {folder}"
        )

    def _resume_command(self) -> str:
        """Return what resumes this run; where its launcher has more to say than can be known here, that in words."""
        number, flag = self.accelerator.num_processes, "--resume_from_checkpoint latest"
        several_machines = int(os.environ.get("LOCAL_WORLD_SIZE", number)) != number
        if several_machines or self.accelerator.distributed_type == DistributedType.FSDP:
            return f"the command that started it, with {flag}"
        if self.config.mixed_precision is None and "ACCELERATE_MIXED_PRECISION" in os.environ:  # as its launcher chose
            flag += f" --mixed_precision {self.accelerator.mixed_precision}"
        command = "ddpm-hf" if number == 1 else f"torchrun --nproc_per_node {number} -m ddpm_hf.cli"
        command += " train" if self.run.distillation is None else " distill"
        return f"{command} --config {shlex.quote(str(self.output_dir / checkpoints.CONFIG))} {flag}"

    def _introduction(self) -> str:
        run, plan, limit = self.run, self.plan, self.config.max_train_minutes
        updates = f"{self.last - self.step:,} updates" if limit is None else f"{limit:g} minutes of updates"
        how = f"{self.device.type} ({plan.num_processes} process(es), {run.describe_computation()})"
        what = f"{self.recipe.name}: {parameter_count(self.unet):,} parameters, {run.describe_images()}"
        seen = "" if limit is not None else self._epochs(self.last - self.step)
        lines = [f"{what}, {updates} of {plan.total} images{seen} on {how}", run.describe_classes() or ""]
        if plan.accumulation > 1:
            lines.append(f"each update gathers {plan.accumulation} micro-batches of {plan.micro} images per process")
        if self.step:
            lines.append(f"resumed after update {self.step:,} of {self.last:,}")
        return "\n".join(filter(None, lines))

    def _epochs(self, updates: int) -> str:
        """Return how many images, and how often each of them, so many updates see; the teacher's are made anew."""
        seen = updates * self.plan.total
        if self.run.distillation is not None or isinstance(self.data, StreamedImages):
            return f" ({seen:,} in all)"
        return f" ({seen:,} in all, {seen / len(self.data):.3g} epochs)"

    def _read_numbers(self, bar: Any, loss: Tensor, norm: Tensor, images_per_second: float) -> None:
        """Read the numbers from the device, for the progress bar and the trackers."""
        if self.publisher.pushes is not None:
            self.publisher.pushes.poll()
        bar.set_postfix_str(
            f"loss {loss.item() * self.plan.num_processes:.4f}, lr {self.lr_schedule.get_last_lr()[0]:.2e}, "
            f"grad {norm.item():.2f}, {images_per_second:.0f} images/s"
        )
        self.tracking.read()
        # a time limit says what it plans
        if self.limit is None and (estimate := self._pace.estimate(self.step, self.last)) is not None:
            log(estimate)

    def _save(self) -> None:
        """Write a checkpoint of this update, if there is none: the main process does, from what all have."""
        if self._saved_at == self.step:
            return
        with self._timed("checkpoint"):
            self._write_checkpoint()
        self._saved_at = self.step

    def _write_checkpoint(self) -> None:
        weights, moments, values = checkpointing.training_state(self.model, self._adam)
        tensors = {"model": weights, "ema": self._ema_state_dict(), "optimizer": moments}
        scaler, keep = self.accelerator.scaler, self.config.checkpoints_total_limit
        state = {"optimizer": values, "ema_steps": self.ema.optimization_step, "seconds": self.seconds()}
        state |= {} if self.limit is None else {"time_limit": self.limit.state()}
        state |= {"scaler": None if scaler is None else scaler.state_dict(), **self.publisher.settings}
        if self.update.powers is not None:
            tensors["posthoc_ema"] = self.update.powers.state_dict()
        with raise_on_all_ranks():  # no process continues before it is written
            if self.accelerator.is_main_process:
                checkpoints.save_checkpoint(self.output_dir, self.step, tensors, state, keep)
        self._save_snapshot()

    def _save_snapshot(self) -> None:
        """Write what post-hoc EMA is made from, if it is kept."""
        if self.update.powers is None:
            return
        with raise_on_all_ranks():
            if self.accelerator.is_main_process:
                config = {"unet": self.run.unet_config, "scheduler": dict(self.recipe.scheduler)}
                averages, keep = self.update.powers.state_dict(), self.config.posthoc_ema_snapshots
                save_snapshot(self.output_dir, self.step, averages, config, keep)

    def _resume(self, which: str) -> None:
        with raise_on_all_ranks():
            found = checkpoints.find_checkpoint(self.output_dir, which)
        where = f"{found[0].name} ({checkpoints.fingerprint(found[0])[:12]})" if found else "no checkpoint"
        advice = "put --output_dir on a disk that all machines share, or copy the first one's folder to all of them"
        same_everywhere(where, advice)
        if found is None:
            log(f"no checkpoint in {str(self.output_dir)!r} yet, starting from the beginning")
            return
        path, tensors, state = found
        with raise_on_all_ranks():
            checkpointing.check_checkpoint(self.run, path, state)
        saved = (tensors["model"], tensors["optimizer"], state["optimizer"])
        checkpointing.restore_training_state(self.model, self._adam, *saved)
        parameters, ema = self.unet.named_parameters(), tensors["ema"]
        self.ema.shadow_params = [checkpointing.shard_like(ema[name], like=weight) for name, weight in parameters]
        self.ema.optimization_step = state["ema_steps"]
        if self.update.powers is not None and "posthoc_ema" in tensors:
            self.update.powers.load_state_dict(tensors["posthoc_ema"])
        elif self.update.powers is not None:
            log(f"{path.name} holds no averages for post-hoc EMA, so none are kept: they need all updates of a run")
            self.update.powers = None
        self._seconds_before = state.get("seconds", 0.0)
        if self.limit is not None:
            self.limit.resume(state["step"], state.get("time_limit"), state["recipe"].get("lr_scheduler"))
        self.lr_schedule = self._learning_rate_schedule(state["step"])  # a changed learning rate counts from here on
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self._saved_at = state["step"]

    def _ema_state_dict(self) -> dict[str, Tensor]:
        """Return the EMA weights, whole, under the network's own names; all processes have to call this."""
        pairs = zip(self.unet.named_parameters(), self.ema.shadow_params, strict=True)
        weights = {name: checkpointing.gather_shards(value) for (name, _), value in pairs}
        return {**dict(self.unet.named_buffers()), **weights}
