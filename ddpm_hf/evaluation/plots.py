"""Pictures of an evaluation (matplotlib): rate and distortion (Figure 5), neighbours (Figures 12, 15), distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import write_whole

_BLUE = "#1f5fa8"


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Make a figure that needs no screen, and its axes, `[rows, columns]`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures of an evaluation need matplotlib: pip install 'ddpm-hf[eval]'") from None
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG completely or not at all."""
    write_whole(path, lambda partial: figure.savefig(partial, format="png"))


def rate_distortion_figure(rate: Tensor, rmse: Tensor, title: str) -> Any:
    """Draw Figure 5: distortion over reverse steps, rate over reverse steps, distortion over rate.

    `rate` `[T]` is in bits/dim sent before x_t is known; `rmse` `[T]` is that of decoding from x_t, in pixel values.
    """
    figure, axes = _figure(12, 3.6, 1, 3)
    steps = len(rate) - np.arange(len(rate))  # at t, T - t reverse steps are done
    reverse = (steps, "reverse process steps (T - t)")
    bits, distortion = (rate.numpy(), "rate (bits/dim)"), (rmse.numpy(), "distortion (RMSE, pixel values)")
    panels = ((reverse, distortion), (reverse, bits), (bits, distortion))
    for axis, ((x, x_label), (y, y_label)) in zip(axes[0], panels, strict=True):
        axis.plot(x, y, color=_BLUE, linewidth=1.8)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def neighbours_figure(samples: Tensor, neighbours: Tensor, distances: Tensor, title: str) -> Any:
    """Draw Figures 12 and 15: each row a sample, and its nearest training images, nearest first.

    `samples` `[n, C, H, W]` and `neighbours` `[n, k, C, H, W]` are uint8; `distances` `[n, k]` are written below.
    """
    n, k = neighbours.shape[:2]
    figure, axes = _figure(1.15 * (k + 1) + 0.6, 1.3 * n + 0.7, n, k + 1)
    for row in range(n):
        for column, image in enumerate([samples[row], *neighbours[row]]):
            pixels, axis = image.permute(1, 2, 0).numpy(), axes[row, column]
            axis.imshow(pixels, cmap="gray" if len(image) == 1 else None, vmin=0, vmax=255)  # [H, W, 1 or 3]
            axis.set(xticks=[], yticks=[])
            if column:
                axis.set_xlabel(f"{distances[row, column - 1].item():.3g}", fontsize=8)
        for spine in axes[row, 0].spines.values():
            spine.set(color="#c0392b", linewidth=2.5)
    for column, name in enumerate(["sample", "nearest", *(f"nearest {i}" for i in range(2, k + 1))]):
        axes[0, column].set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def distances_figure(samples: Tensor, held_out: Tensor, held_out_name: str, title: str) -> Any:
    """Draw how far samples `[N]`, and held-out images `[M]`, are from their nearest training image."""
    figure, ((axis,),) = _figure(7, 3.8)
    bins = np.linspace(0, max(samples.max().item(), held_out.max().item()) or 1.0, 41)
    for values, name, colour in ((held_out, held_out_name, "#7f8c8d"), (samples, "samples", _BLUE)):
        weights = np.full(len(values), 100 / len(values))
        axis.hist(values.numpy(), bins, weights=weights, alpha=0.55, color=colour, label=f"{name} ({len(values)})")
    median = {"color": "#2c3e50", "linestyle": "--", "linewidth": 1.2, "label": f"median of {held_out_name}"}
    axis.axvline(held_out.quantile(0.5).item(), **median)
    axis.set(xlabel="distance to the nearest training image", ylabel="percent")
    axis.legend()
    axis.set_title(title, fontsize=10)
    return figure


def sweep_figure(lengths: Sequence[float], numbers: Mapping[str, Sequence[float]], paper: Mapping[str, float]) -> Any:
    """Draw each number over the averaging length sigma_rel; `paper` has that of the paper's EMA, a dashed line."""
    figure, axes = _figure(4.2 * len(numbers), 3.6, 1, len(numbers))
    for axis, (name, values) in zip(axes[0], numbers.items(), strict=True):
        axis.plot(lengths, values, color=_BLUE, linewidth=1.8, marker="o", markersize=4)
        if name in paper:
            axis.axhline(paper[name], color="#7f8c8d", linestyle="--", linewidth=1.2, label="the run's own EMA")
            axis.legend(fontsize=8)
        axis.set(xlabel="sigma_rel", title=name)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    return figure
