"""Settings of the machine that decide how fast tensors are computed, handed out and copied."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; to GPUs through pinned memory, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
