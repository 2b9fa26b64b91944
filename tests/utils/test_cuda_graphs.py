"""Recording kernels: on CPUs as a rehearsal; what a failed capture leaves behind needs a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ddpm_hf.utils import cuda_graphs
from ddpm_hf.utils.cuda_graphs import record, warm_up


def test_a_rehearsal_calls_the_function_again():
    x = torch.zeros(())
    graph = record(lambda: x.add_(1), torch.device("cpu"))
    assert x == 0  # as a capture, it computes nothing
    graph.replay()
    graph.replay()
    assert x == 2


def test_kernels_are_recorded_on_their_own_device(monkeypatch):
    """Which need not be PyTorch's current one, on whose streams nothing would be found."""
    current, seen = [0], []

    @contextmanager
    def within(device):
        current.append(torch.device(device).index)
        yield
        current.pop()

    @contextmanager
    def on(stream):
        assert stream.device == current[-1]
        seen.append(stream.device)
        yield

    def make_stream(device=None):
        device = current[-1] if device is None else device
        return SimpleNamespace(device=device, wait_stream=lambda other: seen.append(other.device))

    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", make_stream)
    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, capture_error_mode: on(stream))
    cuda_graphs._capture_stream.cache_clear()
    for device in (torch.device("cuda", 1), torch.device("cuda", 0)):
        seen.clear()
        warm_up(lambda: seen.append(current[-1]), device)
        record(lambda: seen.append(current[-1]), device)
        assert set(seen) == {device.index}
        assert current == [0]
    cuda_graphs._capture_stream.cache_clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_of_the_second_gpu_computes():
    x = torch.zeros((), device="cuda:1")
    graph = record(lambda: x.add_(1), x.device)
    assert x == 0
    graph.replay()
    assert x == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_after_a_capture_that_failed_the_same_random_numbers_are_drawn():
    def draw() -> torch.Tensor:
        return torch.randn(4, device="cuda")

    torch.manual_seed(3)
    draw()
    expected, stream = draw(), torch.cuda.current_stream()
    torch.manual_seed(3)
    draw()
    with pytest.raises(RuntimeError):
        record(lambda: draw().sum().item(), torch.device("cuda"))  # a capture may not wait for the device
    assert torch.cuda.current_stream() == stream
    assert torch.equal(draw(), expected)
