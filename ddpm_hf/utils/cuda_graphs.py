"""Record the kernels that a function launches, and launch all of them at once: CUDA graphs.

A graph reads and writes the same memory whenever it is replayed, so what changes from one replay to the next has to
lie in tensors that keep their place. (PyTorch, "CUDA semantics", section "CUDA Graphs".)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Calls before the recording: compiling, choosing algorithms and making workspaces may not happen inside it.
WARM_UP = 3


class Rehearsal:
    """Stand for a graph on a CPU: a replay calls the function again."""

    def __init__(self, run: Callable[[], Any]):
        self.replay = run


def record(run: Callable[[], Any], cuda: bool) -> Any:
    """Return a graph of the kernels that `run` launches, or its `Rehearsal` on a CPU; call it before, to warm up.

    Raises:
        RuntimeError: CUDA does not let something of it into a graph; the device can be used as before.
    """
    if not cuda:
        return Rehearsal(run)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads (reading ahead, uploading) may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # the capture's own may have been left behind
        torch.cuda.empty_cache()
        _renew_default_generator()
        raise
    return graph


def _renew_default_generator() -> None:
    """Give the default generator a new state object of the same seed and offset.

    Before PyTorch 2.14 a capture that failed left the old one refusing to draw outside of a capture.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator(generator.device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def warm_up(run: Callable[[], Any], cuda: bool) -> None:
    """Call `run` a few times, on a stream of its own, as PyTorch asks for before a recording."""
    if not cuda:
        for _ in range(WARM_UP):
            run()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
