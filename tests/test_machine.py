"""What is set on the machine, seen from outside: by page faults, by PyTorch's own switches."""

import resource
import subprocess
import sys

import pytest
import torch

from ddpm_hf.machine import to_device, use_tf32

_FAULTS = """
import resource, sys
import torch
from ddpm_hf.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
sizes = [40 << 20, 30 << 20, 70 << 20]
for _ in range(4):  # until the pieces that are free have these sizes
    for size in sizes:
        torch.ones(size, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    for size in sizes:
        torch.ones(size, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_stays_with_the_process():
    """Tensors of 140 MB in all, made again and again, take no new pages from the system."""
    faults = {}
    for word in ("give", "keep"):
        out = subprocess.run([sys.executable, "-c", _FAULTS, word], capture_output=True, text=True, check=True).stdout
        faults[word] = int(out)
    pages = 5 * (140 << 20) // resource.getpagesize()
    assert faults["give"] > 0.5 * pages  # so there is something to gain
    assert faults["keep"] < 0.01 * pages


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_is_used_where_it_is_asked_for(wanted):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        use_tf32(wanted)
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
        assert torch.backends.cudnn.allow_tf32 is wanted  # on by default
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_tensor_that_is_there_is_not_copied():
    x = torch.arange(4)
    assert to_device(x, torch.device("cpu")).data_ptr() == x.data_ptr()
    assert to_device(x, torch.device("meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_copies_arrive_whole():
    x = torch.randn(1 << 20)
    there = to_device(x, torch.device("cuda"))
    torch.cuda.synchronize()
    assert torch.equal(there.cpu(), x)
