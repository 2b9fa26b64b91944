"""Recording kernels: on CPUs as a rehearsal; what a failed capture leaves behind needs a GPU."""

import pytest
import torch

from ddpm_hf.utils.cuda_graphs import record


def test_a_rehearsal_calls_the_function_again():
    x = torch.zeros(())
    graph = record(lambda: x.add_(1), cuda=False)
    assert x == 0  # as a capture, it computes nothing
    graph.replay()
    graph.replay()
    assert x == 2


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
        record(lambda: draw().sum().item(), cuda=True)  # a capture may not wait for the device
    assert torch.cuda.current_stream() == stream
    assert torch.equal(draw(), expected)
