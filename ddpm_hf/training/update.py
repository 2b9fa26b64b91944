"""One update of Algorithm 1: loss, gradients, clipping, Adam, moving average; on NVIDIA GPUs as captured CUDA graphs.

Launching the 2,700 kernels of an update one by one takes the host longer than they take the GPU. Captured once, they
are launched together: `CapturedUpdate` is the same update over tensors that stay where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..data.tensors import flip_images, to_model_range
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..utils.processes import say
from ..utils.randomness import derive_seed
from .batches import BatchPlan, MicroBatch
from .checkpointing import gather_shards

# Before the capture: compiling, choosing convolutions and creating Adam's moments may not happen inside it.
_WARM_UP = 3


@dataclass
class Update:
    """One optimizer update, from micro-batches on the device to new weights.

    Attributes:
        accelerator: The run's.
        model: The network as it was prepared (compiled, autocast, several processes).
        unet: The network itself.
        scheduler, objective: What the loss is made of.
        adam, optimizer: Adam, and as it was prepared.
        ema: The moving average of the weights.
        plan: How an update's images are cut.
        max_grad_norm: Gradients of a larger norm are scaled down.
        seed: The run's.
    """

    accelerator: Accelerator
    model: nn.Module
    unet: nn.Module
    scheduler: DDPMScheduler
    objective: Callable[..., Tensor]
    adam: torch.optim.Optimizer
    optimizer: Any
    ema: EMAModel
    plan: BatchPlan
    max_grad_norm: float
    seed: int
    _drop_gradients: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.loss, self.norm, self.skipped_in_a_row = torch.zeros(3, device=self.accelerator.device).unbind()

    def __call__(self, step: int, micro_batch: Callable[[int], MicroBatch]) -> tuple[Tensor, Tensor]:
        """Make update `step`.

        Args:
            step: Updates done so far.
            micro_batch: The update's micro-batches by number, on the device.

        Returns:
            Loss and norm of the gradients, 0-d on the device.
        """
        self.loss.zero_()
        for micro in range(self.plan.accumulation):
            batch = micro_batch(micro)
            torch.manual_seed(derive_seed(self.seed, "dropout", step, micro, self.plan.process_index))
            last = micro == self.plan.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                self.accumulate(batch)
        self.apply()
        return self.loss.clone(), self.norm.clone()

    def accumulate(self, batch: MicroBatch) -> None:
        """Add a micro-batch's share of the loss and of its gradients (Algorithm 1, lines 2 to 5)."""
        x_0 = to_model_range(flip_images(batch.images, batch.flip))  # [b, C, H, W]
        labels = {} if batch.labels is None else {"class_labels": batch.labels}
        losses = self.objective(self.model, self.scheduler, x_0, batch.t, batch.noise, **labels)  # [b]
        # Gradients are averaged over processes, so this adds up to the mean over the update's images.
        loss = losses.sum() / self.plan.total
        self.accelerator.backward(loss * self.accelerator.num_processes)
        self.loss += loss.detach()

    def apply(self) -> None:
        """Clip, step, average. Where gradients are not finite Adam is skipped, without asking the device."""
        self.norm.copy_(gather_shards(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)))
        # accelerate's step_was_skipped says no: a fused Adam is always called, and skips by itself.
        bad = (~self.norm.isfinite()).float()
        if self.accelerator.scaler is None:
            vars(self.adam)["found_inf"] = bad  # what the fused kernel looks at; a GradScaler sets it by itself
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._drop_gradients)
        self.average()
        self.skipped_in_a_row.add_(1).mul_(bad)

    def average(self) -> None:
        """Move the average towards the weights."""
        self.ema.step(self.unet.parameters())


class CapturedUpdate(Update):
    """The same update, captured once as CUDA graphs and replayed: one graph, or two where gradients are accumulated.

    What changes from update to update lies in tensors that keep their place: the micro-batch, the learning rate, the
    weight of the average. Dropout draws from the default generator, whose seed a replay reads when it starts. For one
    process without loss scaling. Where the capture fails, one line says so and updates are made without.

    On CPUs a replay calls the same function again, which shows that all that changes is in those tensors.
    """

    @classmethod
    def of(cls, update: Update) -> CapturedUpdate:
        """The same run's update, captured."""
        return cls(**{part.name: getattr(update, part.name) for part in fields(Update) if part.init})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._batch: MicroBatch | None = None
        self._graphs: list[Any] = []  # none where the capture failed
        self._learning_rate, self._ema_weight = torch.zeros(2, device=self.accelerator.device).unbind()
        self._drop_gradients = self.plan.accumulation == 1  # else they are shared by two graphs, and keep their place

    def __call__(self, step: int, micro_batch: Callable[[int], MicroBatch]) -> tuple[Tensor, Tensor]:
        """Make update `step`, see `Update`. The first call captures.

        Raises:
            OutOfMemoryError: The device has too little memory for a micro-batch.
        """
        self._set_numbers()
        if self._batch is None:
            first = micro_batch(0)
            self._batch = first.clone()
            self._capture()
            micro_batch = partial(_after, first, micro_batch)  # a stream is read once
        if not self._graphs:
            return super().__call__(step, micro_batch)
        self.loss.zero_()
        for micro in range(self.plan.accumulation):
            self._batch.copy_(micro_batch(micro))
            torch.manual_seed(derive_seed(self.seed, "dropout", step, micro, self.plan.process_index))
            self._graphs[0].replay()
        for graph in self._graphs[1:]:
            graph.replay()
        return self.loss.clone(), self.norm.clone()

    def _set_numbers(self) -> None:
        """Write this update's learning rate and EMA decay where the graphs read them."""
        self.ema.optimization_step += 1
        self.ema.cur_decay_value = self.ema.get_decay(self.ema.optimization_step)
        self._learning_rate.fill_(self.adam.param_groups[0]["lr"])
        self._ema_weight.fill_(1 - self.ema.cur_decay_value)

    @torch.no_grad()
    def average(self) -> None:
        """Move the EMA weights towards the weights as `EMAModel.step` does, by a weight that is a tensor."""
        difference = torch._foreach_sub(self.ema.shadow_params, list(self.unet.parameters()))
        torch._foreach_mul_(difference, self._ema_weight)
        torch._foreach_sub_(self.ema.shadow_params, difference)

    # ------------------------------------------------------------------ the capture

    def _capture(self) -> None:
        """Record the update's kernels; weights, moments and EMA weights stay as they are.

        What fails in the updates before the capture would fail without one, and is raised.
        """
        (group,) = self.adam.param_groups
        plain = {name: group[name] for name in ("lr", "capturable")}
        kept = [tensor.detach().to("cpu", copy=True) for tensor in self._state()]
        cuda = self.accelerator.device.type == "cuda"
        try:
            if cuda:
                group |= {"lr": self._learning_rate, "capturable": True}
            self._warm_up()
            self._record_all(cuda)
        finally:
            group |= plain
            with torch.no_grad():
                for index, tensor in enumerate(self._state()):  # Adam's moments may not have been there before
                    tensor.copy_(kept[index]) if index < len(kept) else tensor.zero_()
            self.skipped_in_a_row.zero_()

    def _record_all(self, cuda: bool) -> None:
        """Record the graphs; none, and a line about it, where CUDA does not let something into them."""
        stream = torch.cuda.current_stream() if cuda else None
        try:
            if self._drop_gradients:
                self._graphs = [_record(self._whole, cuda)]
            else:
                self._graphs = [_record(self._accumulate_static, cuda), _record(self.apply, cuda)]
        except RuntimeError as error:  # whatever CUDA, a driver or the compiler refuses; too little memory for a copy
            self._graphs, self._drop_gradients = [], True
            self.optimizer.zero_grad(set_to_none=True)
            if stream is not None:  # a capture that failed may have left its own stream behind
                torch.cuda.set_stream(stream)
                torch.cuda.empty_cache()
            reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
            say(
                f"the update could not be captured as a CUDA graph ({reason}); training continues without, more slowly"
            )

    def _warm_up(self) -> None:
        """Let everything happen that may not happen while capturing: compiling, choices, Adam's first step."""
        side = torch.cuda.Stream() if self.accelerator.device.type == "cuda" else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)  # Adam's, of steps outside a capture
            for _ in range(_WARM_UP):
                self._whole()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)

    def _whole(self) -> None:
        self._accumulate_static()
        self.apply()

    def _accumulate_static(self) -> None:
        assert self._batch is not None
        self.accumulate(self._batch)

    def _state(self) -> list[Tensor]:
        """Everything that an update changes and that lasts; Adam's part is there after its first step."""
        moments = [value for state in self.adam.state.values() for value in state.values()]
        return [*self.unet.parameters(), *self.ema.shadow_params, *moments]


def _after(first: MicroBatch, micro_batch: Callable[[int], MicroBatch], micro: int) -> MicroBatch:
    """An update's micro-batches of which the first was read already."""
    return first if micro == 0 else micro_batch(micro)


class _Rehearsed:
    """What stands for a captured graph on CPUs."""

    def __init__(self, run: Callable[[], Any]):
        self.replay = run


def _record(run: Callable[[], Any], cuda: bool) -> Any:
    """A graph of the kernels that `run` launches."""
    if not cuda:
        return _Rehearsed(run)
    graph = torch.cuda.CUDAGraph()
    # Other threads (reading ahead, pushing) may allocate meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph
