"""uint8 images to pictures that a person can look at."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def image_grid(images: Tensor, columns: int | None = None, tile: int = 64, gap: int = 2) -> Image.Image:
    """Images side by side, small ones enlarged by a whole factor (nearest), with a gap between tiles.

    Args:
        images: `[N, C, H, W]` uint8 with 1 or 3 channels.
        columns: Tiles per row; about as many as rows by default.
        tile: Smallest height and width of a tile in pixels.
        gap: Pixels between tiles and around them.

    Raises:
        ValueError: No images, or a number of channels that no picture has.
    """
    n, channels, height, width = images.shape
    if n == 0 or channels not in (1, 3):
        raise ValueError(f"a grid needs at least one image of 1 or 3 channels, got shape {tuple(images.shape)}")
    columns = columns or math.ceil(math.sqrt(n))
    scale = max(1, math.ceil(tile / min(height, width)))
    tiles = images.cpu().numpy().transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    rows, (h, w) = math.ceil(n / columns), tiles.shape[1:3]
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, channels), 255, dtype=np.uint8)
    for i, picture in enumerate(tiles):
        top, left = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        canvas[top : top + h, left : left + w] = picture
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG completely or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG")
    partial.replace(path)
