"""What the system does for processes, and what happens on systems that do not have it: the other branch, forced."""

import ctypes
import os
import signal
import sys

import psutil
import pytest
import torch

from ddpm_hf.utils import machine, processes
from ddpm_hf.utils.errors import UserError


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_folder_is_locked_and_on_windows_used_without_a_lock(tmp_path, monkeypatch):
    with processes.only_run_in(tmp_path):
        with pytest.raises(UserError, match="another run is writing into"), processes.only_run_in(tmp_path):
            pass
        monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it raises ImportError
        with processes.only_run_in(tmp_path):
            pass


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_only_linux_is_asked_for_a_signal_when_the_launcher_dies(platform, monkeypatch):
    asked = []

    class Library:
        def prctl(self, *arguments: int) -> None:
            asked.append(arguments)

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    processes.end_with_the_launcher()
    assert asked == ([(1, signal.SIGTERM)] if platform == "linux" else [])


@pytest.mark.parametrize(("cores", "physical", "here", "threads_each"), [(8, 8, 2, 4), (8, 4, 2, 2), (1, None, 2, 1)])
def test_threads_where_no_one_knows_which_cores_are_ours(cores, physical, here, threads_each, monkeypatch, threads):
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    processes.set_cpu_threads(None, here)
    assert torch.get_num_threads() == threads_each


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])  # macOS has no mallopt, Windows no CDLL(None)
def test_memory_is_handed_out_as_usual_where_the_c_library_is_not_glibc(error, monkeypatch):
    def no_library(name: None) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    machine.keep_freed_memory()
