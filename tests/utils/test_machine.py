"""What is set on the machine, seen from outside: by page faults, by PyTorch's own switches."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from ddpm_hf.utils import machine
from ddpm_hf.utils.errors import UserError
from ddpm_hf.utils.machine import (
    DelayedScalar,
    deterministic_algorithms,
    has_deterministic_algorithms,
    to_device,
    use_tf32,
)

_FAULTS = """
import resource, sys
import torch
from ddpm_hf.utils.machine import keep_freed_memory
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


def determinism() -> dict[str, bool]:
    """PyTorch's own switches of what the same numbers give."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "times cuDNN": torch.backends.cudnn.benchmark,
    }


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_algorithms_are_used_within_and_what_was_set_comes_back(monkeypatch, before):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        outside = determinism()
        with deterministic_algorithms():
            within = determinism()
        # errors rather than warnings: attention is deterministic only so
        assert within == {"algorithms": True, "warns only": False, "fills memory": False, "times cuDNN": False}
        assert determinism() == outside
        assert outside["algorithms"] is before
        assert outside["times cuDNN"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_gpus_use_deterministic_algorithms_unless_products_are_refused(monkeypatch):
    """Earlier versions of PyTorch refuse products, in these words, where the variable came too late."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert not has_deterministic_algorithms(torch.device("cpu"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    ones, sentence = torch.ones, None

    class Product(torch.Tensor):
        def __matmul__(self, other):
            if sentence and torch.are_deterministic_algorithms_enabled():
                raise RuntimeError(sentence)
            return super().__matmul__(other)

    monkeypatch.setattr(machine.torch, "ones", lambda *shape, device: ones(*shape).as_subclass(Product))
    assert has_deterministic_algorithms(torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    sentence = "To enable deterministic behavior in this case, you must set ... CUBLAS_WORKSPACE_CONFIG=:4096:8 or"
    assert not has_deterministic_algorithms(torch.device("cuda"))
    sentence = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        has_deterministic_algorithms(torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()


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


def test_a_delayed_scalar_is_the_one_of_the_read_before_and_waits_for_its_copy_only(monkeypatch):
    waited_for = []

    class Event:
        recorded = False

        def record(self):
            self.recorded = True

        def synchronize(self):
            assert self.recorded
            waited_for.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    value = torch.tensor(3.0)
    now, delayed = DelayedScalar(value), DelayedScalar(value, delayed=True)
    assert (now.read(), delayed.read()) == (3.0, 0.0)  # before the first copy there is nothing
    assert waited_for == []
    first = delayed._copied
    value.fill_(7.0)
    assert (now.read(), delayed.read()) == (7.0, 3.0)
    assert waited_for == [first]
    assert (now.read(), delayed.read()) == (7.0, 7.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_delayed_scalar_is_read_without_synchronizing():
    value = torch.zeros((), device="cuda")
    delayed = DelayedScalar(value)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for _ in range(3):
            value.add_(1)
            found.append(delayed.read())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == [0, 1, 2]


def test_bf16_is_the_default_where_the_card_has_it_and_no_launcher_speaks(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_precision(None) == "no"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, there=there: there)
        assert machine.choose_precision(None) == expected
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(
        UserError, match="mixed_precision='bf16' is not there on Tesla T4; use fp16, or no for float32"
    ):
        machine.choose_precision("bf16")
    assert machine.choose_precision("fp16") == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert machine.choose_precision(None) == "no"


def test_what_a_compiler_lacks(monkeypatch):
    assert machine.compiler_problem(torch.device("cpu")) is None  # PyTorch's compiled tests need one too
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert machine.compiler_problem(torch.device("cuda")) == "Triton, or a GPU that it supports, is not there"

    def fail():
        raise InvalidCxxCompiler()

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", fail)
    assert machine.compiler_problem(torch.device("cpu")) == "there is no C++ compiler"
