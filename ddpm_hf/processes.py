"""What surrounds the code: sibling processes, cores, signals, trackers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.tracking import get_available_trackers


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


def known_tracker(name: str | None) -> str | None:
    """A tracker that accelerate knows and that is installed."""
    if name is None:
        return None
    installed = [str(tracker) for tracker in get_available_trackers()]
    if name not in installed:
        have = ", ".join(installed) or "none"
        raise ValueError(f"--report_to {name!r} is not an installed tracker (installed: {have}); pip install it first")
    return name


@contextmanager
def stop_signals() -> Iterator[dict[str, bool]]:
    """SIGINT and SIGTERM set `["requested"]` once; a second SIGINT interrupts at once. Only in the main thread."""
    stop = {"requested": False}

    def request(signum: int, frame: Any) -> None:
        if stop["requested"] and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop["requested"] = True

    try:
        before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are someone else's
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
