"""Images as uint8 tensors, in memory or decoded when a batch asks for them; the network's range, flips, crop seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.machine import to_device
from ..utils.randomness import derive_seed
from .decoding import DecodeOptions, decode_all, refuse_bad


def to_model_range(images: Tensor) -> Tensor:
    """Scale uint8 0..255 to float32 [-1, 1], "scaled linearly" as in Section 3.3 of the paper."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Scale [-1, 1] to uint8 0..255, rounded; values outside are clipped."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def flip_images(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror those of the images `[B, C, H, W]` left to right for which `flip` (`[B]` bool) is true."""
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def crop_seeds(seed: int, positions: Tensor) -> Tensor:
    """Return where to crop, as a function of the run's seed and the image's global position in it: `[n]` int64."""
    return torch.tensor([derive_seed(seed, "crop", position) for position in positions.tolist()], dtype=torch.long)


@dataclass(frozen=True)
class ImageDataset:
    """Images in memory."""

    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor | None  # [N] int64 class indices
    name: str  # for reports and cards
    class_names: list[str] | None = None  # one for each class index, or `None` if there are no labels or no names

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(C, H, W)`."""
        return tuple(self.images.shape[1:])

    def batch(self, indices: Tensor, crop_seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the images `[n, C, H, W]` at `indices` (`[n]`) and their labels `[n]`; they are cropped already."""
        indices = to_device(indices, self.images.device)
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def on(self, device: torch.device) -> ImageDataset:
        """Move the images to a device, unless they would take more than a quarter of an NVIDIA GPU's free memory."""
        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return ImageDataset(self.images.to(device), labels, self.name, self.class_names)

    def subset(self, indices: Tensor) -> ImageDataset:
        """Return the images at `indices`, in that order."""
        return ImageDataset(*self.batch(indices), self.name, self.class_names)


@dataclass
class Source:
    """Images that are not decoded yet, as a folder or a table has them."""

    name: str
    count: int
    fetch: Callable[[list[int]], list[Any]]  # what `decode_all` takes, for each of some rows
    where: Callable[[int], str]  # what to call the image of a row in a message
    labels: Tensor | None = None  # [N] int64
    class_names: list[str] | None = None


class DecodedOnDemand:
    """Images that are decoded when a batch of them is asked for, which depends on nothing but their positions.

    An unreadable image raises, or (`on_bad_image="skip"`) is reported once and replaced by the next readable one.
    """

    most_replacements: int  # so many unreadable images in a row, and it gives up
    _fetch: Callable[[list[int]], list[Any]]  # as `Source.fetch`, by positions
    _where: Callable[[int], str]

    def __init__(self, name: str, class_names: list[str] | None, options: DecodeOptions):
        if options.resolution is None:
            raise UserError(f"the images of {name} are decoded when needed; choose one size with --resolution")
        self.name, self.class_names, self._options = name, class_names, options
        self.image_shape = (options.channels, *options.resolution)
        self._reported: set[str] = set()

    def _decode(self, positions: list[int], crop_seeds: Sequence[int] | None) -> tuple[Tensor, list[int]]:
        """Return images `[n, C, H, W]`, and the positions that they come from in the end."""
        decoded = decode_all(self._fetch(positions), self._options, crop_seeds)
        bad = {self._where(p): x for p, x in zip(positions, decoded, strict=True) if isinstance(x, ValueError)}
        refuse_bad(bad, len(positions), self._options)
        used, images = [], np.empty((len(positions), *self.image_shape), dtype=np.uint8)
        for i, (position, pixels) in enumerate(zip(positions, decoded, strict=True)):
            while isinstance(pixels, ValueError):
                if (where := self._where(position)) not in self._reported:
                    self._reported.add(where)
                    self._options.report(f"skipped {where}, the next image takes its place: {pixels}")
                position += 1
                if (tried := position - positions[i]) >= self.most_replacements:
                    raise UserError(f"{tried} images of {self.name} in a row cannot be read: {pixels}")
                pixels = decode_all(self._fetch([position]), self._options, crop_seeds and crop_seeds[i : i + 1])[0]
            images[i] = pixels
            used.append(position)
        return torch.from_numpy(images), used


class LazyImageDataset(DecodedOnDemand):
    """Images that do not fit into memory, or are cropped differently each time; made by `load_images`."""

    def __init__(self, source: Source, rows: Tensor, options: DecodeOptions):
        super().__init__(source.name, source.class_names, options)
        self.labels = None if source.labels is None else source.labels[rows]
        self._source, self._rows, self.most_replacements = source, rows, len(rows)
        self._fetch = lambda positions: source.fetch([int(rows[position % len(rows)]) for position in positions])
        self._where = lambda position: source.where(int(rows[position % len(rows)]))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor, crop_seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Decode the images `[n, C, H, W]` at `indices` (`[n]`), and return them with their labels `[n]`.

        `crop_seeds` (`[n]` int64) say where to crop, `None` in the centre. A UserError names what cannot be read.
        """
        images, used = self._decode(indices.tolist(), None if crop_seeds is None else crop_seeds.tolist())
        return images, None if self.labels is None else self.labels[[position % len(self) for position in used]]

    def subset(self, indices: Tensor) -> LazyImageDataset:
        """Return the images at `indices`, in that order; still not decoded."""
        return LazyImageDataset(self._source, self._rows[indices], self._options)
