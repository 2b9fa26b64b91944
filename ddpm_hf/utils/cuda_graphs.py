"""Record the kernels that a function launches, and launch all of them at once: CUDA graphs.

A graph reads and writes the same memory whenever it is replayed, so what changes from one replay to the next has to
lie in tensors that keep their place. (PyTorch, "CUDA semantics", section "CUDA Graphs".)
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

# Calls before the recording: compiling, choosing algorithms and making workspaces may not happen inside it.
WARM_UP = 3

# How often the default generator's state was replaced: graphs recorded before that draw from the one it had.
renewals = 0


def record(run: Callable[[], Any], device: torch.device) -> Any:
    """Return a graph of the kernels that `run` launches, which was called before, to warm up; on a CPU it calls `run`.

    The device may be another than PyTorch's current one: kernels are recorded on a stream of the device that they are
    for, else the graph would be empty. Raises RuntimeError where CUDA does not let something of it into a graph; the
    device can be used as before.
    """
    if device.type != "cuda":
        return SimpleNamespace(replay=run)
    with torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads (reading ahead, uploading) may allocate meanwhile.
            own = _capture_stream(torch.cuda.current_device())
            with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
                run()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # the capture's own may have been left behind
            torch.cuda.empty_cache()
            _renew_default_generator()
            raise
    return graph


@functools.cache
def _capture_stream(device: int) -> Any:
    """Return the stream to record on: one per device, as each has cuBLAS's workspace beside it."""
    return torch.cuda.Stream(device)


def _renew_default_generator() -> None:
    """Copy the default generator's state: before PyTorch 2.14 a failed capture left the old one refusing to draw."""
    global renewals
    renewals += 1
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator(generator.device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def warm_up(run: Callable[[], Any], device: torch.device) -> None:
    """Call `run` a few times, on a stream of its own, as PyTorch asks for before a recording."""
    if device.type != "cuda":
        for _ in range(WARM_UP):
            run()
        return
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
