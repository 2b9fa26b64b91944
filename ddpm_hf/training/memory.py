"""What a run needs of memory at least, counted on a network that takes none, before anything is allocated."""

import os
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..models.unet_2d import UNet2DModel, parameter_count, use_plain_attention
from ..utils.errors import UserError
from ..utils.machine import obtainable_memory
from .configuration import TrainingConfig


class _Needs(NamedTuple):
    """Bytes that a process takes."""

    weights: int
    lasting: int  # `state_bytes`
    activations: int  # of a micro-batch, from its forward to its backward pass

    @property
    def total(self) -> int:
        """What is there at once, at least: gradients come while activations go."""
        return self.lasting + max(self.weights, self.activations)


def state_bytes(unet: UNet2DModel, averages: bool) -> int:
    """Return the bytes of all that lasts, and of a checkpoint: in float32 weights, EMA weights and Adam's two moments.

    With `averages` also the two that post-hoc EMA needs.
    """
    return 4 * parameter_count(unet) * (6 if averages else 4)


def check_memory(unet: UNet2DModel, config: TrainingConfig, accelerator: Accelerator, micro: int, eager: bool) -> None:
    """Raise UserError where a run with a network like `unet`, which is on the meta device, cannot fit into memory.

    On CPUs, where the system kills a process that takes too much, the activations of `micro` images count, unless the
    network is compiled (not `eager`) or computes them again. FSDP, which shards all of it, is not looked at.
    """
    device, processes = accelerator.device, 1
    if device.type not in ("cpu", "cuda") or accelerator.distributed_type == DistributedType.FSDP:
        return
    weights, activations = 4 * parameter_count(unet), 0
    if device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))  # which share the memory
        if eager and not config.gradient_checkpointing:
            activations = activation_bytes(unet, micro) // (1 if accelerator.mixed_precision == "no" else 2)
    needs = _Needs(weights, state_bytes(unet, config.posthoc_ema), activations)
    there, where = obtainable_memory(device)
    if (most := there // processes) < needs.total:
        has = f"{where} has {most / 1e9:.3g} GB for {'each process' if processes > 1 else 'it'}"
        raise UserError(_too_large(needs, config.posthoc_ema, micro, most, has))


def _too_large(needs: _Needs, posthoc_ema: bool, micro: int, most: int, has: str) -> str:
    """Return the sentence about a run that needs more than `most` bytes, with what would fit."""
    alone = needs.lasting + needs.weights
    parts = f"{alone / 1e9:.3g} GB for weights, gradients, Adam and averages of {needs.weights // 4:,} parameters"
    if alone > most:
        without = 5 * needs.weights
        advice = "train a smaller network, or on a machine with more"
        if posthoc_ema and without <= most:
            advice = f"--posthoc_ema false needs {without / 1e9:.3g} GB of it"
        return f"the training takes at least {parts}, and {has}; {advice}"
    each = needs.activations / micro
    fitting = [count for count in range(1, micro) if micro % count == 0 and needs.lasting + count * each <= most]
    advice = f"give --train_batch_size {fitting[-1]} or less, or" if fitting else "add"
    what = f"{needs.total / 1e9:.3g} GB, with micro-batches of {micro} images ({parts})"
    return f"the training takes at least {what}, and {has}; {advice} --gradient_checkpointing"


def activation_bytes(unet: UNet2DModel, images: int) -> int:
    """Return how many bytes a forward pass in float32 keeps for the backward pass; attention becomes plain."""
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # which views share
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    use_plain_attention(unet)
    size = unet.config.sample_size
    shape = (size, size) if isinstance(size, int) else tuple(size)
    x_t = torch.empty(images, unet.config.in_channels, *shape, device="meta")
    t = torch.zeros(images, dtype=torch.long, device="meta")
    labels = None if unet.class_embedding is None else t
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(x_t, t, labels).sample
    del output  # kept until here, as were all storages: a new one may get the number of one that is gone
    return sum(kept.values())
