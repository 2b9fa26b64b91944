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
        RuntimeError: CUDA does not let something of it into a graph.
    """
    if not cuda:
        return Rehearsal(run)
    graph = torch.cuda.CUDAGraph()
    # Other threads (reading ahead, uploading) may allocate meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


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
