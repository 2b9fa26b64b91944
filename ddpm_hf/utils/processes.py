"""Sibling processes, cores, signals, locks."""

import ctypes
import dataclasses
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from tqdm.auto import tqdm

from .errors import NotFiniteError, UserError

# How long processes wait for one that works for all. One that dies ends the others at once, however long this is.
_LONGEST_WAIT = timedelta(days=7)


def cpu_only() -> bool:
    """Return whether there is no accelerator; accelerate joins CPU processes together only if this is passed to it."""
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """Return accelerate's view of this process among its siblings; it may be alone."""
    return PartialState(cpu=cpu_only())


def log(text: str) -> None:
    """Print a line above the progress bar, from the main process only."""
    # Loading a model in a program of one's own must not start the process group.
    if processes().is_main_process if PartialState._shared_state else int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


# The default process group and that of `_waiting_group`. Weak references: a group of gloo's that outlives
# `destroy_process_group` aborts the process at its end.
_groups: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def _waiting_group() -> Any:
    """Return a group of all processes, who all call this; on GPUs the default group times out after 10 minutes."""
    world = torch.distributed.group.WORLD
    group = _groups[world]() if world in _groups else None
    if group is None:
        group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        _groups[world] = weakref.ref(group)
    return group


def gather(own: Any) -> list[Any]:
    """Return in every process what each passes, in their order; all wait for the last one, however long."""
    found = [own] * processes().num_processes
    if len(found) > 1:
        torch.distributed.all_gather_object(found, own, group=_waiting_group())
    return found


def from_first(own: Any) -> Any:
    """Return in every process what the first one passes."""
    return gather(own if processes().is_main_process else None)[0]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on all processes what one raises inside, instead of leaving the others waiting; all have to come here.

    The others raise a UserError (or NotFiniteError) where commands print that as a sentence, else a RuntimeError.
    """
    if processes().num_processes > 1:
        _waiting_group()  # while they are still near each other
    try:
        yield
    except Exception as error:
        sentences = (UserError, OSError, MemoryError, torch.OutOfMemoryError)
        kind = UserError if isinstance(error, sentences) else RuntimeError
        gather((NotFiniteError if isinstance(error, NotFiniteError) else kind, str(error) or type(error).__name__))
        raise
    for index, outcome in enumerate(gather(None)):
        if outcome is not None:
            raise outcome[0](f"process {index} failed: {outcome[1]}")


def same_everywhere(what: str, advice: str) -> None:
    """Raise UserError on every process unless all, on whatever machines, have the same."""
    first, *others = gather(what)
    for index, other in enumerate(others, 1):
        if other != first:
            raise UserError(f"process 0 has {first}, and process {index} has {other}; {advice}")


def reduce_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP 2 add up the processes' gradients in float32, as DDP does; accelerate's default is low precision."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if (low := plugin.mixed_precision_policy) is not None:
            plugin.mixed_precision_policy = dataclasses.replace(low, reduce_dtype=torch.float32)


def start_process() -> None:
    """Let this process end with its launcher and take its share of the cores: the first thing a command does."""
    end_with_the_launcher()
    here = processes()
    if here.device.type == "cpu":
        set_cpu_threads(None, here.num_processes)


def set_cpu_threads(wanted: int | None, num_processes: int) -> None:
    """Set the threads of this process; `None`: an even share of the cores if a launcher started it with one."""
    # `num_processes` are all of them; how many are on this machine a launcher says.
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if wanted is None and _launched():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        physical = psutil.cpu_count(logical=False) or cores  # a core's second thread only gets in the way
        wanted = max(1, min(cores, physical) // num_processes)
    if wanted is not None:
        torch.set_num_threads(wanted)


def end_with_the_launcher() -> None:
    """On Linux, get SIGTERM when the launcher dies, which would leave an orphan behind otherwise."""
    if sys.platform == "linux" and _launched():
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process, or raise UserError: another run writes into it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            how = "wait for it, or name another folder"
            raise UserError(f"another run is writing into {str(folder)!r}; {how}") from None
        except OSError:
            pass  # this file system has no locks
        yield


def _launched() -> bool:
    """Return whether `accelerate launch` or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ


@dataclass
class StopFlag:
    """What SIGINT and SIGTERM set, to be read between updates."""

    requested: bool = False  # a stop was asked for
    interrupts: bool = False  # a request also raises KeyboardInterrupt at once: for work that can be thrown away


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Let SIGINT and SIGTERM set a flag; a second SIGINT raises KeyboardInterrupt. In the main thread only."""
    stop, first = StopFlag(), 0.0

    def request(signum: int, frame: Any) -> None:
        nonlocal first
        # A launcher hands on a Ctrl-C that the terminal has sent already: two within a second are one.
        again = stop.requested and signum == signal.SIGINT and time.monotonic() - first > 1.0
        if not stop.requested:
            stop.requested, first = True, time.monotonic()
        if again or stop.interrupts:
            stop.interrupts = False
            raise KeyboardInterrupt

    try:
        before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # another thread, where Python does not allow it
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
