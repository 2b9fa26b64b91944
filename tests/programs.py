"""Runs Python programs in new processes that need no time to import: each is forked from one that has imported all.

That one process (of multiprocessing's `forkserver`) starts from nothing with the first program, imports PyTorch,
diffusers and this package, and computes nothing itself, so a program finds them as fresh as after a start of its own.
"""

import importlib
import io
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ddpm_hf.training.trainer", "ddpm_hf.sampling.generation", "ddpm_hf.evaluation.run"])


@dataclass
class Ended:
    """What a program left."""

    returncode: int | None
    stdout: str
    stderr: str


def run_program(
    *command: object, environment: dict[str, str] | None = None, input: str = "", timeout: float = 120
) -> Ended:
    """Run `python COMMAND`, which reads `input`; the command is `FILE.py ARGUMENTS` or `-m MODULE ARGUMENTS`."""
    return _run([(command, environment or {})], timeout, input)[0]


def run_ranks(*commands: list[str], environment: dict[str, str] | None = None, timeout: float = 120) -> list[Ended]:
    """Run the programs as the processes of one distributed run, as torchrun would start them."""
    place = {**(environment or {}), "WORLD_SIZE": str(len(commands)), "LOCAL_WORLD_SIZE": str(len(commands))}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(commands))]
    return _run(list(zip(commands, ranks, strict=True)), timeout)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(programs: list, timeout: float, input: str = "") -> list[Ended]:
    """Start all, wait for all; one that does not end in `timeout` seconds is killed and has no return code."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"out-{i}", Path(folder) / f"err-{i}") for i in range(len(programs))]
        processes = []
        for (command, environment), files in zip(programs, outputs, strict=True):
            arguments = ([str(word) for word in command], {**os.environ, **environment}, files, input)
            processes.append(CONTEXT.Process(target=_program, args=arguments))
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, outputs, strict=True)]


def _program(command: list[str], environment: dict[str, str], outputs: tuple[Path, Path], input: str) -> None:
    """A program's whole life."""
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if "HF_ENDPOINT" in environment:  # a Hub of the test's own; these have read the variables when they were imported
        for name in ("huggingface_hub.constants", "datasets.config"):
            importlib.reload(importlib.import_module(name))
        importlib.import_module("huggingface_hub.hf_api").api.endpoint = environment["HF_ENDPOINT"]
    sys.stdin = io.StringIO(input)
    os.chdir(ROOT)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
