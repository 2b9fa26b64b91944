"""A network prepared for sampling and likelihoods: the same function, computed faster.

Nothing of it is saved with a model. `docs/speed.md` has the measurements, and what did not help.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .. import __version__
from ..models.unet_2d import UNet2DModel, use_plain_attention
from ..models.winograd import WinogradConv2d, Workspace
from ..utils.digests import digest
from ..utils.errors import UserError
from ..utils.files import default_cache_dir, write_text
from ..utils.machine import keep_freed_memory
from ..utils.processes import from_first, processes, together
from .pipeline_ddpm import DDPMPipeline

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Other ways than stock's round differently, so they have to be at least 5 % faster.
_WORTH_IT = 0.95
_ROUNDS = 4  # the fastest of four is hardly disturbed by what else the machine does


@dataclass(frozen=True)
class Execution:
    """How a network is computed.

    Attributes:
        precision: `fp32`, `bf16` or `fp16`, of weights and activations; the chain stays in float32 around them.
        channels_last: Layout of activations. Large networks gain by it on some machines, small ones lose.
        winograd: Wide 3 x 3 convolutions by `WinogradConv2d`, in fp32 on CPUs; needs `channels_last`.
        compiled: By `torch.compile`; on CPUs with the weights as constants, on GPUs with CUDA graphs. The first call
            takes up to minutes, less once the machine has it on disk.

    Raises:
        ValueError: An unknown precision, or settings that exclude each other.
    """

    precision: str = "fp32"
    channels_last: bool = False
    winograd: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        ways = [name for name in ("channels_last", "winograd", "compiled") if getattr(self, name)]
        return ", ".join([self.precision, *(ways or ["stock's layout"])])

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be fp32, bf16 or fp16, got {self.precision!r}")
        if self.winograd and (self.precision != "fp32" or not self.channels_last or self.compiled):
            raise UserError("winograd goes with precision fp32 and channels_last, and not with compiled")


class InferenceNetwork:
    """A `UNet2DModel` in evaluation mode and without gradients, called as before and computed as an `Execution` says.

    Weights that need no conversion are shared; make a new one after changing or converting them. One thread at a time.

    Args:
        unet: The network.
        execution: How.
    """

    def __init__(self, unet: UNet2DModel, execution: Execution):
        self.unet = unet
        self.execution = execution
        self.dtype = PRECISIONS[execution.precision]
        self.device = unet.device
        self.made_from = unet.device, unet.dtype
        self.config = unet.config
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        network = copy.deepcopy(unet, shared if self.dtype == unet.dtype else None).eval()
        if self.dtype != unet.dtype:
            nn.Module.to(network, self.dtype)  # diffusers' own warns of what does not concern this network
        self._time = network.time_proj = _TimeProjection(network.time_proj)
        if unet.device.type == "cpu":
            keep_freed_memory()
            use_plain_attention(network)
            _rearrange(network, execution, Workspace())
        self._network: Callable[..., UNet2DOutput] = network
        self._compiled_batch = 0
        if execution.compiled:
            mode = None if unet.device.type == "cpu" else "reduce-overhead"  # CUDA graphs: no launch per kernel
            self._network = torch.compile(network, dynamic=False, mode=mode)

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | int, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """As `UNet2DModel.forward`; the output is in the network's precision."""
        n = len(sample)
        sample = sample.to(self.dtype)
        if self.execution.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        timestep = torch.as_tensor(timestep, device=sample.device)
        self._time.one_for_all = timestep.ndim == 0 or len(timestep) == 1
        if self.execution.compiled:
            # compiled once per batch size, so a smaller last batch is filled up
            missing = max(self._compiled_batch, n) - n
            self._compiled_batch = n + missing
            sample = _filled(sample, missing)
            class_labels = class_labels if class_labels is None else _filled(class_labels, missing)
            timestep = timestep if self._time.one_for_all else _filled(timestep, missing)
        with self._freezing():
            made = self._network(sample, timestep, class_labels).sample[:n]
        if self.execution.compiled and made.device.type != "cpu":
            made = made.clone()  # CUDA graphs write the next output to the same place
        return UNet2DOutput(sample=made) if return_dict else (made,)

    def _freezing(self) -> AbstractContextManager[Any]:
        """While it is compiled, on a CPU: the weights are constants, which are packed once for the processor."""
        if not self.execution.compiled or self.device.type != "cpu":
            return nullcontext()
        from torch._inductor import config  # takes a second, and a compiler, which others do without

        return config.patch(freezing=True)


def _filled(tensor: Tensor, missing: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


class _TimeProjection(nn.Module):
    """Where all images are at the same t, its embedding and the blocks' projections of it are computed once."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection
        self.one_for_all = False

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.projection(timesteps[:1] if self.one_for_all else timesteps)


class _ResidualBlock(nn.Module):
    """`ResnetBlock2D` of the paper's network, writing over its own intermediate results."""

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        self.norm1, self.norm2, self.conv1, self.conv2 = block.norm1, block.norm2, block.conv1, block.conv2
        self.time_emb_proj, self.conv_shortcut = block.time_emb_proj, block.conv_shortcut
        self.scale = block.output_scale_factor

    @staticmethod
    def fits(module: nn.Module) -> TypeGuard[ResnetBlock2D]:
        """Whether it is a block of the paper's kind: no resampling, time added, SiLU."""
        return (
            type(module) is ResnetBlock2D
            and module.time_embedding_norm == "default"
            and not module.skip_time_act
            and module.time_emb_proj is not None
            and module.upsample is None
            and module.downsample is None
            and isinstance(module.nonlinearity, nn.SiLU)
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h if self.scale == 1 else h / self.scale


class _PointwiseConv2d(nn.Module):
    """A 1 x 1 convolution: in channels_last it is a plain matrix product, which PyTorch does not notice."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    @staticmethod
    def fits(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether it is a 1 x 1 convolution and nothing else."""
        return isinstance(module, nn.Conv2d) and (
            (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.conv.weight[:, :, 0, 0], self.conv.bias).permute(0, 3, 1, 2)


def _rearrange(module: nn.Module, execution: Execution, workspace: Workspace) -> None:
    """Put faster modules with the same weights in place of stock's."""
    for name, child in module.named_children():
        made: nn.Module = child
        if _ResidualBlock.fits(child):
            made = _ResidualBlock(child)
        elif execution.winograd and WinogradConv2d.fits(child):
            made = WinogradConv2d(child, workspace)
        elif execution.channels_last and _PointwiseConv2d.fits(child):
            made = _PointwiseConv2d(child)
        setattr(module, name, made)
        if not isinstance(made, (WinogradConv2d, _PointwiseConv2d)):
            _rearrange(made, execution, workspace)


# ---------------------------------------------------------------------- the choice


def optimize_for_inference(
    pipe: DDPMPipeline,
    *,
    precision: str | None = None,
    compile: bool = False,
    batch_size: int = 16,
    execution: Execution | None = None,
    shared: bool = True,
) -> Execution:
    """Let a pipeline compute its network in the fastest way that this machine has for it: `pipe.network` afterwards.

    The ways are timed once, in about twenty evaluations, and the choice is kept for this machine and kind of network
    (`executions.json` in `$DDPM_HF_CACHE` or `~/.cache/ddpm_hf`). In fp32 images differ from the plain network's by
    rounding only, at most one level of uint8. `pipe.network = pipe.unet` goes back.

    Args:
        pipe: The pipeline; its `unet` stays as it is.
        precision: `fp32`, `bf16` or `fp16`; that of the weights by default.
        compile: Try `torch.compile` as well, which takes up to minutes, and a C++ compiler on CPUs.
        batch_size: Images per evaluation, for the timing.
        execution: This one, without timing any.
        shared: Whether all processes call this, for one choice; `False` where one does, and waits for no other.

    Returns:
        What was chosen, the same on all processes that share the choice.

    Raises:
        ValueError: An unknown precision, or no batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if execution is not None:
        pipe.network = InferenceNetwork(pipe.unet, execution)
        return execution
    if precision is None:
        precision = {dtype: name for name, dtype in PRECISIONS.items()}.get(pipe.unet.dtype, "fp32")
    pipe.network = _fastest(pipe, Execution(precision), compile, batch_size, shared)
    return pipe.network.execution


def _fastest(pipe: DDPMPipeline, plain: Execution, compile: bool, batch_size: int, shared: bool) -> InferenceNetwork:
    """The network computed as was chosen before, or as is chosen now; if `shared`, by the first process for all."""
    key = _fingerprint(pipe, plain.precision, compile)
    found = None
    with suppress(KeyError, TypeError, ValueError):  # not there, or another version's
        found = Execution(**_read_choices()[key])
    found = from_first(found) if shared else found
    if found is not None:
        return InferenceNetwork(pipe.unet, found)
    with together() if shared else nullcontext():
        networks = {way: InferenceNetwork(pipe.unet, way) for way in _candidates(pipe.unet, plain, compile)}
        seconds = _seconds(networks, pipe.image_shape, batch_size)
    best = min(seconds, key=lambda way: seconds[way])
    chosen = best if seconds[best] < _WORTH_IT * seconds[plain] else plain
    chosen = from_first(chosen) if shared else chosen
    if not shared or processes().is_main_process:
        _write_choices({**_read_choices(), key: asdict(chosen)})
    return networks[chosen]


def _candidates(unet: UNet2DModel, plain: Execution, compile: bool) -> list[Execution]:
    """Ways to compute it, stock's own first."""
    precision = plain.precision
    made = [plain, Execution(precision, channels_last=True)]
    if unet.device.type == "cpu" and precision == "fp32" and any(WinogradConv2d.fits(m) for m in unet.modules()):
        made.append(Execution(precision, channels_last=True, winograd=True))
    if compile:
        made.append(Execution(precision, channels_last=True, compiled=True))
    return made


def _seconds(
    networks: dict[Execution, InferenceNetwork], image_shape: tuple[int, int, int], batch_size: int
) -> dict[Execution, float]:
    """The shortest of a few evaluations of each, in turns, so that what else the machine does meets all of them."""
    unet = next(iter(networks.values())).unet
    labels = None
    if unet.config.num_class_embeds is not None:
        labels = torch.zeros(batch_size, dtype=torch.long, device=unet.device)
    x = torch.randn(batch_size, *image_shape, generator=torch.Generator().manual_seed(0)).to(unet.device)
    seconds = dict.fromkeys(networks, float("inf"))
    for round_ in range(_ROUNDS + 1):
        for candidate, network in networks.items():
            start = time.perf_counter()
            network(x, 0, labels)
            if unet.device.type != "cpu":
                torch.accelerator.synchronize()
            if round_:  # the first one warms up, and compiles
                seconds[candidate] = min(seconds[candidate], time.perf_counter() - start)
    return seconds


def _fingerprint(pipe: DDPMPipeline, precision: str, compile: bool) -> str:
    """What the choice depends on: the machine, the versions, the kind of network, but not its weights."""
    device = pipe.unet.device
    machine = platform.processor() or platform.machine()
    if device.type == "cpu" and (info := Path("/proc/cpuinfo")).is_file():
        machine = next((line for line in info.read_text().splitlines() if line.startswith("model name")), machine)
    elif device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    network = pipe.settings["unet"]
    return digest(machine, torch.get_num_threads(), torch.__version__, __version__, network, precision, compile)[:32]


def _choices_file() -> Path:
    return default_cache_dir() / "executions.json"


def _read_choices() -> dict[str, Any]:
    try:
        found = json.loads(_choices_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_choices(choices: dict[str, Any]) -> None:
    with suppress(OSError):  # timed again next time
        write_text(_choices_file(), json.dumps(choices, indent=2) + "\n")
