"""Figure 5: rate and distortion of the progressive lossy code, drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import write_whole


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG completely or not at all."""
    write_whole(path, lambda partial: figure.savefig(partial, format="png"))


def rate_distortion_figure(rate: Tensor, rmse: Tensor, title: str) -> Any:
    """Draw Figure 5: distortion over reverse steps, rate over reverse steps, distortion over rate.

    `rate` `[T]` is in bits/dim sent before x_t is known; `rmse` `[T]` is that of decoding from x_t, in pixel values.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures of an evaluation need matplotlib: pip install 'ddpm-hf[eval]'") from None
    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)  # needs no screen
    steps = len(rate) - np.arange(len(rate))  # at t, T - t reverse steps are done
    reverse = (steps, "reverse process steps (T - t)")
    bits, distortion = (rate.numpy(), "rate (bits/dim)"), (rmse.numpy(), "distortion (RMSE, pixel values)")
    panels = ((reverse, distortion), (reverse, bits), (bits, distortion))
    for axis, ((x, x_label), (y, y_label)) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.plot(x, y, color="#1f5fa8", linewidth=1.8)
        axis.set(xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure
