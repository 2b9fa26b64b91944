"""The Space's app in a process of its own, which can reach nothing but this machine: for tests and the browser."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).parent / "space_guard.py"


@dataclass
class Running:
    """An app that answers at `url`; `left` lists what it tried to reach elsewhere."""

    url: str
    report: Path
    process: subprocess.Popen

    def left(self) -> list[str]:
        return self.report.read_text().splitlines()


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of an app for tests: no analytics switched off, no offline variables: the app itself has to be quiet."""
    dropped = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "GRADIO_ANALYTICS_ENABLED", "DDPM_HF_SPACE_MODELS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return (
        kept
        | {
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
            "GRADIO_TEMP_DIR": str(folder / "gradio"),
            "HF_HOME": str(folder / "home"),
            "PYTHONUNBUFFERED": "1",
        }
        | more
    )


@contextmanager
def running(program: Path, folder: Path, models: str | None, cwd: Path | None = None) -> Iterator[Running]:
    """Start `app.py` on a free port; it is gone afterwards.

    Raises:
        RuntimeError: It ended before it answered; with all that it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(folder) | ({} if models is None else {"DDPM_HF_SPACE_MODELS": models})
    report = folder / "left.txt"
    command = [sys.executable, str(GUARD), str(report), str(program)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=(folder / "stderr.txt").open("w"), text=True, env=env, cwd=cwd
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            raise RuntimeError(f"the app ended: {(folder / 'stderr.txt').read_text()}")
        yield Running(found[0], report, process)
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
