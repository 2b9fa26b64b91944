"""Record the kernels that a function launches, and launch all of them at once: CUDA graphs.

A graph reads and writes the same memory whenever it is replayed, so what changes from one replay to the next has to
lie in tensors that keep their place. (PyTorch, "CUDA semantics", section "CUDA Graphs".)
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def record(run: Callable[[], Any], cuda: bool) -> Any:
    """Return a graph of the kernels that `run` launches; call `warm_up` before. On a CPU a replay calls `run` again.

    Raises:
        RuntimeError: CUDA does not let something of it into a graph; the device can be used as before.
    """
    if not cuda:
        return SimpleNamespace(replay=run)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads (reading ahead, uploading) may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # the capture's own may have been left behind
        torch.cuda.empty_cache()
        # Before PyTorch 2.14 a failed capture leaves the default generator refusing to draw outside of a capture: give
        # it a new state object of the same seed and offset.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        fresh = torch.Generator(generator.device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph


def warm_up(run: Callable[[], Any], cuda: bool) -> None:
    """Call `run` before a recording, on a stream of its own: to compile, choose algorithms and make workspaces."""
    side = torch.cuda.Stream() if cuda else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # no effect for `None`
        for _ in range(3):
            run()
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
