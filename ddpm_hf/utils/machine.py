"""Settings of the machine that decide how fast, and to which bits, tensors are computed, handed out and copied."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.utils.deterministic
from torch import Tensor

from .errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3), glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor, where the C library is glibc; else it comes again page by page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> str:
    """Return how much memory this process has taken at most, on a CUDA device or in all, and how much there is."""
    if device.type == "cuda":
        most, there, where = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1], "of the GPU"
    else:
        here = psutil.Process().memory_info()
        most, there, where = getattr(here, "peak_wset", here.rss), psutil.virtual_memory().total, "of this machine"
        with suppress(ImportError):  # Windows has peak_wset instead
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            most = peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux
    return f"{most / 1e9:.1f} GB at most, of the {there / 1e9:.0f} GB {where}"


def obtainable_memory(device: torch.device) -> tuple[int, str]:
    """Return how many bytes this process can have at most, with those that it has already, and where that is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), "the GPU"
    memory = psutil.virtual_memory()
    if sys.platform != "linux":  # elsewhere memory is compressed, and swap made, as it is needed
        return memory.total, "this machine"
    there = memory.available + psutil.swap_memory().free + psutil.Process().memory_info().rss
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: cgroups version 2 and 1
        with suppress(OSError, ValueError):  # ValueError: "max"
            there = min(there, int(Path("/sys/fs/cgroup", limit).read_text()))
    return there, "this machine"


def use_tf32(wanted: bool) -> None:
    """Let NVIDIA GPUs compute float32 products and convolutions with 10 bits of mantissa instead of 23, or not."""
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted


def choose_precision(wanted: str | None) -> str:
    """Return a run's precision: as requested (or UserError), else the launcher's, else bf16 on GPUs that have it."""
    gpu = torch.cuda.is_available()
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = wanted or os.environ.get("ACCELERATE_MIXED_PRECISION")  # `accelerate launch` always sets it
    if wanted == "bf16" and gpu and not has_bf16:
        name = torch.cuda.get_device_name()
        raise UserError(f"--mixed_precision bf16 is not there on {name}; use fp16, or no for float32")
    return wanted.lower() if wanted else ("bf16" if has_bf16 else "no")


def compiler_problem(device: torch.device) -> str | None:
    """Return what `torch.compile` lacks for a device, in a few words; `None` where it can compile."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton, or a GPU that it supports, is not there"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "there is no C++ compiler"
    return None


def has_deterministic_algorithms(device: torch.device) -> bool:
    """Return whether `deterministic_algorithms` is for this device: for NVIDIA GPUs; CPUs need nothing.

    Earlier versions of PyTorch refuse products in that mode unless CUBLAS_WORKSPACE_CONFIG was set before the first
    product on a GPU. It is set here; `False` where this is too late.
    """
    if device.type != "cuda":
        return False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    one = torch.ones(1, 1, device=device)
    try:
        with deterministic_algorithms():
            one @ one
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        return False
    return True


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Make NVIDIA GPUs compute the same bits every time, within.

    By default float32 gradients of convolutions, attention and embeddings are sums in whatever order the threads
    arrive, and cuDNN's algorithms and compiled kernels' sizes are chosen by time. New memory is not filled: nothing
    reads it before it is written. PyTorch raises a RuntimeError at an operation that has no deterministic algorithm.
    """
    filling: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills, times = filling.fill_uninitialized_memory, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        filling.fill_uninitialized_memory, cudnn.benchmark = fills, times


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; to GPUs it goes through pinned memory, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


class DelayedScalar:
    """A 0-d tensor, changed in place, whose value the host reads without holding up the device (CPUs: directly).

    Each `read` starts a copy into pinned memory and returns what the `read` before has copied: the same in every run.
    """

    def __init__(self, value: Tensor, delayed: bool | None = None):
        self.value = value
        self.delayed = value.is_cuda if delayed is None else delayed
        self._copy = torch.zeros((), pin_memory=value.is_cuda)
        self._copied: torch.cuda.Event | None = None

    def read(self) -> float:
        """Return the value at the `read` before (0 at the first one); on CPUs the value now."""
        if not self.delayed:
            return self.value.item()
        before = 0.0
        if self._copied is not None:
            self._copied.synchronize()
            before = self._copy.item()
        self._copy.copy_(self.value, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return before
