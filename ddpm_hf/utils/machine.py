"""Settings of the machine that decide how fast, and to which bits, tensors are computed, handed out and copied."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from .errors import UserError

# mallopt(3), glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let memory that is freed stay with this process, for the next tensor (glibc; elsewhere nothing is changed).

    By default large tensors' memory goes back to the system whenever they are freed, and comes again page by page. In
    a network this happens for every activation of every step; how often depends on what else was allocated, so it also
    makes equal runs differ in speed. The largest amount in use stays what it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, _LARGEST_INT)


def use_tf32(wanted: bool) -> None:
    """Whether NVIDIA GPUs may compute float32 products and convolutions with 10 bits of mantissa instead of 23.

    PyTorch does so in convolutions unless it is told otherwise; what is asked for in float32 is computed in float32
    here. No effect without such a GPU.
    """
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted


def default_precision() -> str | None:
    """Return the mixed precision of a run that does not say: bf16 on NVIDIA GPUs that compute in it.

    A launcher (`accelerate launch`) always says one, which counts. `None` leaves it to accelerate.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None


def check_precision(precision: str | None) -> None:
    """Check that the GPU computes in bf16 where that is asked for.

    Raises:
        UserError: It does not.
    """
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise UserError(f"--mixed_precision bf16 is not there on {name}; use fp16, or no for float32")


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
    """Whether `deterministic_algorithms` is for this device: for NVIDIA GPUs, CPUs need nothing.

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
    """Within, NVIDIA GPUs compute the same bits every time.

    By default the gradients of float32 convolutions, of attention and of embeddings are sums in whatever order the
    threads arrive, cuDNN's algorithms may be chosen by time (`benchmark`), and compiled kernels' sizes are. PyTorch's
    deterministic mode has other algorithms for all of these, and turns on Inductor's. New memory is not filled, as it
    would be in that mode by default: nothing reads it before it is written.

    Raises:
        RuntimeError: Within, by PyTorch, at an operation that has no deterministic algorithm.
    """
    filling: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    enabled, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills, times = filling.fill_uninitialized_memory, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        filling.fill_uninitialized_memory, cudnn.benchmark = fills, times


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; to GPUs through pinned memory, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
