"""Figure 5, and numbers over the EMA length and over a training run, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import write_whole

_BLUE = "#1f5fa8"


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG completely or not at all."""
    write_whole(path, lambda partial: figure.savefig(partial, format="png"))


def figure_class() -> Any:
    """Return matplotlib's `Figure`, which needs no screen, or raise UserError: it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures of an evaluation need matplotlib: pip install 'ddpm-hf[eval]'") from None
    return Figure


def _figure(width: float, height: float) -> Any:
    return figure_class()(figsize=(width, height), layout="constrained", dpi=120)


def rate_distortion_figure(rate: Tensor, rmse: Tensor, title: str) -> Any:
    """Draw Figure 5: distortion over reverse steps, rate over reverse steps, distortion over rate.

    `rate` `[T]` is in bits/dim sent before x_t is known; `rmse` `[T]` is that of decoding from x_t, in pixel values.
    """
    figure = _figure(12, 3.6)
    steps = len(rate) - np.arange(len(rate))  # at t, T - t reverse steps are done
    reverse = (steps, "reverse process steps (T - t)")
    bits, distortion = (rate.numpy(), "rate (bits/dim)"), (rmse.numpy(), "distortion (RMSE, pixel values)")
    panels = ((reverse, distortion), (reverse, bits), (bits, distortion))
    for axis, ((x, x_label), (y, y_label)) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.plot(x, y, color=_BLUE, linewidth=1.8)
        axis.set(xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def curve_figure(curve: Sequence[Mapping[str, Any]]) -> Any:
    """Draw each number of a run over the images that it had seen; `curve` are the entries of `curve.json`."""
    from matplotlib.ticker import EngFormatter

    names = list(
        dict.fromkeys(name for entry in curve for name in entry if name not in ("update", "images", "seconds"))
    )
    columns = min(4, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = _figure(4.2 * columns, 3.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        points = [(entry["images"], entry[name]) for entry in curve if entry.get(name) is not None]
        axis.plot(*zip(*points, strict=True), color=_BLUE, linewidth=1.8, marker="o", markersize=4)
        axis.set(xlabel="images seen in training", title=name)
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    return figure


def sweep_figure(lengths: Sequence[float], numbers: Mapping[str, Sequence[float]], paper: Mapping[str, float]) -> Any:
    """Draw each number over the averaging length sigma_rel; `paper` has that of the paper's EMA, a dashed line."""
    figure = _figure(4.2 * len(numbers), 3.6)
    axes = figure.subplots(1, len(numbers), squeeze=False)[0]
    for axis, (name, values) in zip(axes, numbers.items(), strict=True):
        axis.plot(lengths, values, color=_BLUE, linewidth=1.8, marker="o", markersize=4)
        if name in paper:
            axis.axhline(paper[name], color="#7f8c8d", linestyle="--", linewidth=1.2, label="the run's own EMA")
            axis.legend(fontsize=8)
        axis.set(xlabel="sigma_rel", title=name)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    return figure
