"""Show uint8 images to people: grids, grids with titles, animations."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from .errors import UserError
from .files import write_whole

ANIMATION_FORMATS = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP"}
_GAP = 2  # pixels between the tiles of a grid and around them


def as_picture(pixels: np.ndarray) -> Image.Image:
    """Return `[H, W, C]` uint8 of 1 or 3 channels as a PIL image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def image_grid(images: Tensor, columns: int | None = None, tile: int = 64) -> Image.Image:
    """Draw `[N, C, H, W]` uint8 with 1 or 3 channels side by side, small ones enlarged by a whole factor (nearest).

    `columns` are tiles per row, by default about as many as rows; `tile` is their smallest height and width in pixels.
    """
    n, channels, height, width = images.shape
    if n == 0 or channels not in (1, 3):
        raise UserError(f"a grid needs at least one image of 1 or 3 channels, got shape {tuple(images.shape)}")
    columns = columns or math.ceil(math.sqrt(n))
    scale = _scale(height, width, tile)
    tiles = images.cpu().numpy().transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    gap, rows, (h, w) = _GAP, math.ceil(n / columns), tiles.shape[1:3]
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, channels), 255, dtype=np.uint8)  # white
    for i, pixels in enumerate(tiles):
        top, left = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        canvas[top : top + h, left : left + w] = pixels
    return as_picture(canvas)


def _scale(height: int, width: int, tile: int) -> int:
    return max(1, math.ceil(tile / min(height, width)))


def labelled_grid(
    images: Tensor, rows: Sequence[str] = (), columns: Sequence[str] = (), title: str = "", tile: int = 64
) -> Image.Image:
    """Draw an `image_grid` of `[R, C, channels, H, W]` with R titles on the left, C on top, and one above everything.

    The font is Pillow's own, which has Latin letters only; it grows with the tiles, and they with the column titles.
    """
    _, across, _, height, width = images.shape
    size = max(14, _scale(height, width, tile) * height // 8)
    font = ImageFont.load_default(size)
    pad = size // 2
    line = size + pad
    tile = max([tile, *(math.ceil(font.getlength(text)) for text in columns)])
    grid = image_grid(images.flatten(0, 1), across, tile)
    scale = _scale(height, width, tile)

    def width_of(text: str) -> int:
        return math.ceil(font.getlength(text)) + 2 * pad

    left = max(map(width_of, rows), default=0)
    lines: list[str] = []
    for word in title.split():
        if lines and width_of(f"{lines[-1]} {word}") <= left + grid.width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    top = line * (len(lines) + bool(columns))
    widest = max(map(width_of, lines), default=0)
    canvas = Image.new(grid.mode, (max(left + grid.width, widest), top + grid.height), "white")
    canvas.paste(grid, (left, top))
    write = partial(ImageDraw.Draw(canvas).text, fill="black", font=font)
    for i, text in enumerate(lines):
        write((pad, (i + 0.5) * line), text, anchor="lm")
    for c, text in enumerate(columns):
        write((left + _GAP + c * (scale * width + _GAP) + scale * width / 2, top - line / 2), text, anchor="mm")
    for r, text in enumerate(rows):
        write((left - pad, top + _GAP + r * (scale * height + _GAP) + scale * height / 2), text, anchor="rm")
    return canvas


def save_picture(picture: Image.Image, path: str | Path, durable: bool = True) -> None:
    """Write a PNG completely or not at all; `durable` as in `files.write_whole`."""
    write_whole(Path(path), lambda partial: picture.save(partial, format="PNG"), durable)


def save_animation(frames: Sequence[Image.Image], path: str | Path, duration: int = 60, hold: int = 2000) -> None:
    """Write an endless animation completely or not at all: GIF, animated PNG or lossless WebP, by the file's suffix.

    Smaller frames get a white border. `duration` is in milliseconds per frame, `hold` for the last one.
    """
    file_format = animation_format(path)
    width, height = max(frame.width for frame in frames), max(frame.height for frame in frames)
    borders = [(0, 0, width - frame.width, height - frame.height) for frame in frames]
    first, *others = [ImageOps.expand(frame, box, "white") for frame, box in zip(frames, borders, strict=True)]
    options = {"save_all": True, "append_images": others, "duration": [duration] * len(others) + [hold], "loop": 0}
    if file_format == "WEBP":
        options["lossless"] = True
    write_whole(Path(path), lambda partial: first.save(partial, file_format, **options))


def animation_format(path: str | Path) -> str:
    """Return Pillow's name of an animation's format, or raise a `ValueError` for a suffix that no animation has."""
    suffix = Path(path).suffix.lower()
    if suffix not in ANIMATION_FORMATS:
        raise UserError(f"an animation is written as FILE{', FILE'.join(ANIMATION_FORMATS)}, got {str(path)!r}")
    return ANIMATION_FORMATS[suffix]
