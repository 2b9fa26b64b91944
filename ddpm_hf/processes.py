"""How many processes there are, and what each of them may use."""

from __future__ import annotations

import os

import psutil
import torch
from accelerate import PartialState


def cpu_only() -> bool:
    """Whether there is no accelerator. accelerate joins CPU processes together only if it is told so."""
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """accelerate's view of this process among its siblings; one process alone is one of one."""
    return PartialState(cpu=cpu_only())


def lonely_launch() -> bool:
    """Whether `accelerate launch --cpu --num_processes N` was asked for several processes and started one.

    Without MPI accelerate's launcher starts a single process then, and only leaves the address for the others behind.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and "MASTER_ADDR" in os.environ
    return asked and not any(name in os.environ for name in ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))


def set_cpu_threads(wanted: int | None, num_processes: int) -> None:
    """Use all cores: launchers start every process with one thread unless they are told otherwise.

    Args:
        wanted: Threads of this process, or `None`: an even share of the cores if a launcher started it, else what
            `OMP_NUM_THREADS` or PyTorch says.
        num_processes: On this machine.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
    if wanted is None and launched:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        physical = psutil.cpu_count(logical=False) or cores  # a core's second thread only gets in the way
        wanted = max(1, min(cores, physical) // num_processes)
    if wanted is not None:
        torch.set_num_threads(wanted)
