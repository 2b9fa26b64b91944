"""Measuring two ways of doing the same thing side by side, and saying no more than was seen."""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ddpm_hf.utils.machine import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory

# mallopt(3), glibc's malloc.h
_M_MMAP_THRESHOLD = -3

_SHORT = 10.0  # seconds


@dataclass
class Row:
    """One line of the table.

    Attributes:
        what: What is measured.
        target: What was aimed for, as text.
        check: What shows that both ways come to the same, with its numbers.
        stock, ours: Seconds of every round, or megabytes.
        unit: Of both.
        gflop: Of the work that the seconds are of, where it is a network's; with plain convolutions.
        low_precision: Whether the peak to compare with is bf16's.
    """

    what: str
    target: str
    check: str = ""
    stock: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    unit: str = "s"
    gflop: float = 0.0
    low_precision: bool = False

    @property
    def ratios(self) -> list[float]:
        """Stock over ours, round by round: what else the machine did met both."""
        return [a / b for a, b in zip(self.stock, self.ours, strict=True)]

    def claim(self) -> str:
        """The ratio, or why there is none: a spread larger than the effect shows nothing."""
        if not self.stock:
            return "-"
        ratios = sorted(self.ratios)
        middle = median(ratios)
        if len(ratios) > 1 and ratios[0] < 1 < ratios[-1]:
            return f"none ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        return f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def as_glibc_does() -> None:
    """Take `keep_freed_memory` back, for stock's side: glibc's thresholds at the largest that it adapts them to."""
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20)):
        mallopt(parameter, value)


def interleaved(row: Row, stock: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> Row:
    """A B A B ..., each with its own way of handing out memory; the first round warms up and is not counted.

    Nor is a run right after the change from one way to the other, which takes the memory again, where it is short.
    """
    for round_ in range(rounds + 1):
        for run, handing_out, seconds in ((stock, as_glibc_does, row.stock), (ours, keep_freed_memory, row.ours)):
            handing_out()
            start = time.perf_counter()
            run()
            if time.perf_counter() - start < _SHORT:
                start = time.perf_counter()
                run()
            if round_:
                seconds.append(time.perf_counter() - start)
    print(f"{row.what}: {row.claim()}", flush=True)
    return row


def matrix_product_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a 2048 x 2048 product, the best of forty."""
    a = torch.randn(2048, 2048).to(dtype)
    seconds = []
    for _ in range(40):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds) / 1e9


def peak_memory(script: str, *arguments: str) -> float:
    """MB that a process of its own had in memory at most; the script prints them last."""
    out = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def high_water_mark() -> float:
    """MB that this process had in memory at most so far (Linux; `getrusage` would count its parent's, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def table(rows: list[Row], peaks: dict[str, float]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what | stock | ours | ratio (rounds) | target | GFLOP/s (share of peak) | the same? |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = ""
        if row.gflop:
            peak = peaks["bf16" if row.low_precision else "fp32"]
            speed = f"{row.gflop / median(row.ours):.0f} ({100 * row.gflop / median(row.ours) / peak:.0f} %)"
        values = [f"{median(v):.4g} {row.unit}" if v else "-" for v in (row.stock, row.ours)]
        lines.append(f"| {row.what} | {' | '.join(values)} | {row.claim()} | {row.target} | {speed} | {row.check} |")
    return "\n".join(lines) + "\n"


def write(rows: list[Row], peaks: dict[str, float], folder: Path) -> None:
    """`speed.json` and `speed.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"peaks_gflops": peaks, "threads": torch.get_num_threads(), "torch": torch.__version__}
    made["rows"] = [{**asdict(row), "claim": row.claim()} for row in rows]
    (folder / "speed.json").write_text(json.dumps(made, indent=2) + "\n")
    (folder / "speed.md").write_text(table(rows, peaks))
