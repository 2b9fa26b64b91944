"""One update of Algorithm 1: loss, gradients, clipping, Adam, EMA; on NVIDIA GPUs as captured CUDA graphs.

Launching the 2,700 kernels of an update one by one takes the host longer than they take the GPU. Captured once, they
are launched together: `CapturedUpdate` is the same update over tensors that keep their place.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Self

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..data.tensors import flip_images, to_model_range
from ..diffusion.objectives import OBJECTIVES
from ..pipelines.schedulers import make_scheduler
from ..utils import cuda_graphs
from ..utils.cuda_graphs import record, warm_up
from ..utils.errors import first_line
from ..utils.machine import DelayedScalar
from ..utils.processes import log
from ..utils.randomness import derive_seed
from .batches import Batches, MicroBatch
from .checkpointing import gather_shards
from .posthoc_ema import PowerAverages, move_averages
from .run import Run


@dataclass
class Update:
    """One optimizer update, from the images of a batch to new weights."""

    run: Run
    batches: Batches  # where x_0, t and epsilon come from
    model: nn.Module  # the network as accelerate prepared it: compiled, autocast, in several processes
    unet: nn.Module  # the network itself
    adam: torch.optim.Optimizer
    optimizer: Any  # Adam as accelerate prepared it
    ema: EMAModel
    powers: PowerAverages | None = None  # for post-hoc EMA
    _drop_gradients: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.accelerator: Accelerator = self.run.accelerator
        self.scheduler = make_scheduler(self.run.unet_config, self.run.recipe.scheduler)
        distillation = self.run.distillation
        self.objective: Callable[..., Tensor] = distillation.loss if distillation else OBJECTIVES[self.run.recipe.loss]
        self.loss, self.norm, self.skipped_in_a_row = torch.zeros(3, device=self.run.device).unbind()
        self.skipped_on_host = DelayedScalar(self.skipped_in_a_row)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Make update `step` (from 0): Algorithm 1 of Ho et al. (2020), cut into micro-batches.

        ```
        2: x_0 ~ q(x_0)
        3: t ~ Uniform({1, ..., T})        (here 0 to T - 1)
        4: epsilon ~ N(0, I)
        5: gradient step on || epsilon - epsilon_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, t) ||^2
        ```
        Returns loss and norm of the gradients, 0-d on the device.
        """
        plan = self.run.plan
        if self.powers is not None:
            self.powers.set_update(step + 1)
        self.loss.zero_()
        draws = self.batches.draws(step)  # lines 3 and 4, for the whole batch
        for micro in range(plan.accumulation):
            batch = self.batches.micro_batch(step, micro, draws)  # line 2: x_0, beside its t and epsilon
            self._seed_dropout(step, micro)
            last = micro == plan.accumulation - 1  # processes exchange their gradients once
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                self.accumulate(batch)
        self.apply()
        return self.loss.clone(), self.norm.clone()

    def accumulate(self, batch: MicroBatch) -> None:
        """Add a micro-batch's share to the loss and, by line 5, to the gradients."""
        x_0 = flip_images(batch.images, batch.flip)
        if self.run.distillation is None:  # else they are float32 already
            x_0 = to_model_range(x_0)  # [b, C, H, W] in [-1, 1]
        labels = {} if batch.labels is None else {"class_labels": batch.labels}
        # [b]; Eq. 14, where the loss is `simple`
        losses = self.objective(self.model, self.scheduler, x_0, batch.t, batch.noise, **labels)
        # Gradients are averaged over processes, so this adds up to the mean over the update's images.
        loss = losses.sum() / self.run.plan.total
        self.accelerator.backward(loss * self.accelerator.num_processes)
        self.loss += loss.detach()

    def apply(self) -> None:
        """Clip the gradients, step Adam, move the EMA; without a step where gradients are not finite.

        That is decided on the device: the fused Adam leaves weights and moments alone where `found_inf` is 1.
        """
        max_norm = self.run.recipe.max_grad_norm
        self.norm.copy_(gather_shards(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)))
        bad = (~self.norm.isfinite()).float()
        if self.accelerator.scaler is None:  # a GradScaler sets it by itself
            vars(self.adam)["found_inf"] = bad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._drop_gradients)
        self.average()
        # accelerate's step_was_skipped would say no: it calls a fused Adam in any case.
        self.skipped_in_a_row.add_(1).mul_(bad)

    def average(self) -> None:
        """Move the EMA weights, and the averages for post-hoc EMA, towards the weights."""
        self.ema.step(self.unet.parameters())
        if self.powers is not None:
            self.powers.average()

    def _seed_dropout(self, step: int, micro: int) -> None:
        torch.manual_seed(derive_seed(self.run.config.seed, "dropout", step, micro, self.run.plan.process_index))


class CapturedUpdate(Update):
    """The same update, captured once as CUDA graphs and replayed: one graph, or two where gradients are accumulated.

    What changes from update to update lies in tensors that keep their place: the micro-batch, the learning rate, the
    weights of the averages. Dropout draws from the default generator, whose seed a replay reads when it starts. For
    one process without loss scaling. If the capture fails, one line says so and updates are made without. A graph
    knows addresses, not names: it is captured again where weights, EMA weights, moments, gradients, Adam's constants
    or the state of the default generator (after a capture of samples that failed) have been replaced from Python.
    """

    @classmethod
    def of(cls, update: Update) -> Self:
        """Return the same run's update, captured."""
        return cls(**{part.name: getattr(update, part.name) for part in fields(Update) if part.init})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._inputs = self.batches.empty_micro_batch()
        self._graphs: list[Any] = []  # none before the capture, and where it failed
        self._captured: tuple[Any, ...] | None = None  # what the graphs are bound to
        self._learning_rate, self._ema_weight = torch.zeros(2, device=self.run.device).unbind()
        self._drop_gradients = self.run.plan.accumulation == 1  # else two graphs share them, and they keep their place

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Make update `step`, see `Update`; the first call captures, or raises OutOfMemoryError for a micro-batch."""
        # This update's learning rate and EMA decay, where the graphs read them.
        self.ema.optimization_step += 1
        self.ema.cur_decay_value = self.ema.get_decay(self.ema.optimization_step)
        self._learning_rate.fill_(self.adam.param_groups[0]["lr"])
        self._ema_weight.fill_(1 - self.ema.cur_decay_value)
        if self.powers is not None:
            self.powers.set_update(step + 1)
        # 1,640 addresses of the CIFAR-10 network take the host 0.4 ms, while the device is busy with earlier updates.
        if self._captured is None or (self._graphs and self._captured != self._bindings()):
            self._capture()
            self._captured = self._bindings()
        if not self._graphs:
            return super().__call__(step)
        self.loss.zero_()
        draws = self.batches.draws(step)
        for micro in range(self.run.plan.accumulation):
            for mine, new in zip(self._inputs, self.batches.micro_batch(step, micro, draws), strict=True):
                if mine is not None and new is not None:
                    mine.copy_(new, non_blocking=True)
            self._seed_dropout(step, micro)
            self._graphs[0].replay()
        for apply in self._graphs[1:]:
            apply.replay()
        return self.loss.clone(), self.norm.clone()

    @torch.no_grad()
    def average(self) -> None:
        """Move the averages towards the weights: the EMA as `EMAModel.step` does, by a weight that is a tensor."""
        move_averages(self.ema.shadow_params, list(self.unet.parameters()), self._ema_weight)
        if self.powers is not None:
            self.powers.average()

    # ------------------------------------------------------------------ the capture

    def _state(self) -> list[Tensor]:
        """Return all that an update changes and that lasts; Adam's part is there after its first step."""
        moments = [value for state in self.adam.state.values() for value in state.values()]
        powers = [] if self.powers is None else self.powers.state_dict().values()
        return [*self.unet.parameters(), *self.ema.shadow_params, *powers, *moments]

    def _bindings(self) -> tuple[Any, ...]:
        """Return what graphs are bound to: addresses of the state and of lasting gradients, constants, generator."""
        gradients = [p.grad for p in self.unet.parameters() if p.grad is not None]
        (group,) = self.adam.param_groups
        constants = [group[name] for name in ("betas", "eps", "weight_decay")]
        return (*(tensor.data_ptr() for tensor in (*self._state(), *gradients)), *constants, cuda_graphs.renewals)

    def _capture(self) -> None:
        """Record the update's kernels; weights, moments and EMA weights stay as they are."""
        (group,) = self.adam.param_groups
        before = {name: group[name] for name in ("lr", "capturable")}
        kept = [tensor.detach().to("cpu", copy=True) for tensor in self._state()]
        skipped = self.skipped_in_a_row.clone()
        cuda = self.run.device.type == "cuda"
        self._graphs = []
        try:
            if cuda:
                group |= {"lr": self._learning_rate, "capturable": True}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)  # of Adam's steps before a capture
                warm_up(self._whole, self.run.device)  # compiling, choosing convolutions, creating Adam's moments
            self._record_all()
        finally:
            group |= before
            with torch.no_grad():
                for index, tensor in enumerate(self._state()):  # Adam's moments may not have been there before
                    tensor.copy_(kept[index]) if index < len(kept) else tensor.zero_()
            self.skipped_in_a_row.copy_(skipped)

    def _record_all(self) -> None:
        """Record the graphs; none, and a line about it, where CUDA refuses."""
        accumulate = partial(self.accumulate, self._inputs)
        parts: list[Callable[[], Any]] = [self._whole] if self._drop_gradients else [accumulate, self.apply]
        try:
            self._graphs = [record(part, self.run.device) for part in parts]
        except RuntimeError as error:  # whatever CUDA, a driver or the compiler refuses; too little memory for a copy
            self._graphs, self._drop_gradients = [], True
            self.optimizer.zero_grad(set_to_none=True)
            why = first_line(error)
            log(f"the update could not be captured as a CUDA graph ({why}); training continues without, more slowly")

    def _whole(self) -> None:
        self.accumulate(self._inputs)
        self.apply()
