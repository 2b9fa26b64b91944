"""A network prepared for sampling and likelihoods: the same function, computed faster.

Nothing of it is saved with a model. `docs/speed.md` has the measurements, and what did not help.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import logging
from torch import Tensor, nn

from ..utils.cuda_graphs import record, warm_up
from ..utils.errors import UserError, first_line
from ..utils.machine import compiler_problem, keep_freed_memory
from .unet_2d import UNet2DModel, use_plain_attention

logger = logging.get_logger(__name__)
T = TypeVar("T")

# Chains and batch sizes whose graphs are kept.
_MOST_GRAPHS = 4

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class InferenceOptions:
    """How a network is computed; an unknown precision raises a UserError."""

    precision: str = "fp32"  # `fp32`, `bf16` or `fp16`, of weights and activations; the chain stays in float32
    channels_last: bool = False  # layout of activations
    compiled: bool = False  # by `torch.compile`, on CPUs with the weights as constants; the first call takes long
    # As CUDA graphs, one per batch shape; with `DDPMScheduler` the sampling step is in it (`pipelines.denoising`). On
    # a CPU the same path runs without graphs, which is for tests.
    captured: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be fp32, bf16 or fp16, got {self.precision!r}")

    def __str__(self) -> str:
        return ", ".join([self.precision, *(f.name for f in fields(self)[1:] if getattr(self, f.name))])

    @classmethod
    def for_device(cls, device: torch.device, precision: str, compile: bool = False) -> InferenceOptions:
        """Return what is fast on a device, never by a timing; raise a UserError where nothing can be compiled."""
        if compile and (problem := compiler_problem(device)):
            raise UserError(f"the network cannot be compiled here: {problem}; leave compiling out")
        cuda = device.type == "cuda"
        # Uncompiled, oneDNN's convolutions are as fast in stock's layout.
        return cls(precision, channels_last=cuda or compile, compiled=compile, captured=cuda)


class InferenceNetwork:
    """A `UNet2DModel` in evaluation mode and without gradients, called as before and computed as options say.

    Weights that need no conversion are shared; make a new one after changing or converting them. One thread at a time.
    """

    def __init__(self, unet: UNet2DModel, options: InferenceOptions):
        self.unet, self.options, self.config = unet, options, unet.config
        self.dtype, self.device = PRECISIONS[options.precision], unet.device
        self.made_from = unet.device, unet.dtype
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        network = copy.deepcopy(unet, shared if self.dtype == unet.dtype else None).eval()
        if self.dtype != unet.dtype:
            nn.Module.to(network, self.dtype)  # diffusers' own warns of what does not concern this network
        self._time = network.time_proj = _TimeProjection(network.time_proj)
        if unet.device.type == "cpu":
            keep_freed_memory()
            use_plain_attention(network)
            _rearrange(network, options)
        elif options.channels_last:
            # cuDNN would transpose the weights of every convolution in every call; `unet` keeps its own layout
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    laid_out = module.weight.detach().contiguous(memory_format=torch.channels_last)
                    module.weight = nn.Parameter(laid_out, requires_grad=False)
        self._network = torch.compile(network, dynamic=False) if options.compiled else network
        self._batches: set[int] = set()  # sizes that are compiled or captured
        self._graphs: dict[Any, Any] = {}  # by what they were captured for; `None` where that failed

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | int, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """Return what `UNet2DModel.forward` does, in the network's precision."""
        n = len(sample)
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        filled = self.batch_size(n)
        sample, class_labels = fill(sample.to(self.dtype), filled), fill(class_labels, filled)
        timestep = timestep if len(timestep) == 1 else fill(timestep, filled)
        graph = None
        if self.options.captured:
            key = sample.shape, timestep.shape, class_labels is None
            graph = self.captured(key, lambda: CapturedNetwork(self, sample, timestep, class_labels))
        made = (graph or self.compute)(sample, timestep, class_labels)[:n]
        return UNet2DOutput(sample=made) if return_dict else (made,)

    def batch_size(self, n: int) -> int:
        """Return how many images `n` are filled up to, so that few sizes are compiled or captured."""
        if not (self.options.compiled or self.options.captured):
            return n
        # The last batch of many is smaller. It takes the code of the others, unless it is less than half of them.
        found = min((size for size in self._batches if n <= size <= 2 * n), default=n)
        self._batches.add(found)
        return found

    def captured(self, key: Hashable, make: Callable[[], T]) -> T | None:
        """Return what `make` captured for a key; `None`, and one line about it, where CUDA does not let it."""
        if key not in self._graphs:
            while len(self._graphs) >= _MOST_GRAPHS:  # each keeps memory for a batch
                del self._graphs[next(iter(self._graphs))]
            try:
                # Tensors of inference mode could not be written to by a later call outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    self._graphs[key] = make()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._graphs[key] = None
                reason = first_line(error)
                logger.warning(f"sampling could not be captured as a CUDA graph ({reason}); it is slower without")
        return self._graphs[key]

    def uncaptured(self) -> InferenceNetwork:
        """Return the same network, to be called inside of a capture."""
        plain = copy.copy(self)
        plain.options = replace(self.options, captured=False)
        return plain

    def compute(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """Return the network's output for a sample of its dtype and `[1]` or `[B]` timesteps, without a graph."""
        if self.options.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        self._time.one_for_all = len(timestep) == 1
        freezing: AbstractContextManager[Any] = nullcontext()
        if self.options.compiled and self.device.type == "cpu":
            from torch._inductor import config  # takes a second, and a compiler, which others do without

            freezing = config.patch(freezing=True)  # the weights are constants, packed once for the processor
        with freezing:
            return self._network(sample, timestep, class_labels).sample


class CapturedNetwork:
    """The network captured for one shape of its inputs."""

    def __init__(self, network: InferenceNetwork, *inputs: Tensor | None):
        self._inputs = [None if x is None else x.clone() for x in inputs]

        def run() -> None:
            self._output = network.compute(*self._inputs)  # type: ignore[arg-type]

        warm_up(run, network.device)
        self._graph = record(run, network.device)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        for place, x in zip(self._inputs, inputs, strict=True):
            if place is not None and x is not None:
                place.copy_(x)
        self._graph.replay()
        return self._output.clone()  # the next replay writes to the same place


def fill(x: Tensor | None, n: int) -> Any:
    """Repeat the last row until there are `n`."""
    return x if x is None or len(x) == n else torch.cat([x, x[-1:].expand(n - len(x), *x.shape[1:])])


class _TimeProjection(nn.Module):
    """Where all images are at the same t, its embedding and the blocks' projections of it are computed once."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection
        self.one_for_all = False

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.projection(timesteps[:1] if self.one_for_all else timesteps)


def _residual_block(block: ResnetBlock2D, x: Tensor, temb: Tensor) -> Tensor:
    """`ResnetBlock2D.forward` of the paper's network, writing over its own intermediate results."""
    h = block.conv1(F.silu(block.norm1(x), inplace=True))
    h += block.time_emb_proj(F.silu(temb))[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h), inplace=True))
    h += x if block.conv_shortcut is None else block.conv_shortcut(x)
    return h if block.output_scale_factor == 1 else h / block.output_scale_factor


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution: in channels_last it is a plain matrix product, which PyTorch does not notice."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight[:, :, 0, 0], conv.bias).permute(0, 3, 1, 2)


def _rearrange(network: nn.Module, options: InferenceOptions) -> None:
    """Let modules of stock compute the same by faster functions, where they are as in the paper's network."""
    for module in network.modules():
        if (
            type(module) is ResnetBlock2D
            and (module.time_embedding_norm, module.skip_time_act) == ("default", False)
            and module.time_emb_proj is not None
            and module.upsample is module.downsample is None
            and isinstance(module.nonlinearity, nn.SiLU)
        ):
            module.forward = MethodType(_residual_block, module)
        elif (
            options.channels_last
            and isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
        ):
            module.forward = MethodType(_pointwise, module)  # type: ignore[method-assign]
