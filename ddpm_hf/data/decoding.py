"""Decoding many images with a dataset's settings: in threads, results in order, every unreadable image named.

What becomes of each single image is in `image_files.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.errors import UserError
from ..utils.text import nearest
from .files import ImageFormat, read_array, read_image

MEMORY_LIMIT_BYTES = 4 * 2**30


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@dataclass(frozen=True)
class Reading:
    """How the images of a dataset are read; `load_images` explains the settings."""

    form: ImageFormat
    crop: str = "center"
    on_bad_image: str = "error"
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES
    num_workers: int = 4
    shuffle_buffer: int = 4096
    report: Callable[[str], None] = _warn

    def __post_init__(self) -> None:
        for name, value, known in (
            ("crop", self.crop, ("center", "random")),
            ("on_bad_image", self.on_bad_image, ("error", "skip")),
        ):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
        for name, number in (("memory_limit_bytes", self.memory_limit_bytes), ("num_workers", self.num_workers)):
            if number < 0:
                raise UserError(f"{name} must not be negative, got {number}")
        if self.shuffle_buffer < 1:
            raise UserError(f"shuffle_buffer must be at least 1, got {self.shuffle_buffer}")

    def decode(self, sources: Sequence[Any], seeds: Sequence[int | None]) -> list[np.ndarray | ValueError]:
        """Decode in threads (Pillow lets go of the interpreter's lock while it works), results in order."""
        threads = min(self.num_workers, len(sources))
        if threads < 2:
            return list(map(self._decode, sources, seeds))
        # Each thread takes every `threads`-th image: to hand out small ones singly costs more than to decode them.
        results: list[Any] = [None] * len(sources)

        def work(first: int) -> None:
            for i in range(first, len(sources), threads):
                results[i] = self._decode(sources[i], seeds[i])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))  # list: to raise what a thread raised
        return results

    def _decode(self, source: Any, seed: int | None) -> np.ndarray | ValueError:
        """Errors are returned: every bad image of a batch has to be named, not only the first."""
        try:
            return (read_array if isinstance(source, np.ndarray) else read_image)(source, self.form, seed)
        except ValueError as error:
            return error


def reading_of(
    channels: int,
    resolution: tuple[int, int] | None,
    background: str = "white",
    value_range: tuple[float, float] | None = None,
    array_layout: str | None = None,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> Reading:
    """A [`Reading`] from the arguments of `load_images`.

    Raises:
        ValueError: A setting that has no meaning; says which values have one.
    """
    resolution = None if resolution is None else (int(resolution[0]), int(resolution[1]))
    form = ImageFormat(channels, resolution, background, value_range, array_layout)
    return Reading(form, report=report or _warn, **options)


def refuse_bad(bad: list[tuple[str, ValueError]], total: int, report: Callable[[str], None]) -> None:
    """Raise if there are bad images; every one is named, in the error or (where they are many) in a warning each.

    Raises:
        ValueError: There are bad images.
    """
    if not bad:
        return
    shown = 20
    for where, error in bad[shown:]:
        report(f"cannot read {where}: {error}")
    sentence = "; ".join(f"{where} ({error})" for where, error in bad[:shown])
    more = f"; and {len(bad) - shown} more, named above" if len(bad) > shown else ""
    raise UserError(
        f"cannot read {len(bad)} of {total} images: {sentence}{more}; fix or remove them, or leave them out with "
        "--on_bad_image skip"
    )
