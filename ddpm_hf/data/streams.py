"""Images of datasets larger than the disk: read sequentially, in an order that can be resumed at any update."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.randomness import derived_generator
from .decoding import DecodeOptions, decode_all, read_bytes, refuse_bad
from .tables import TableOptions, choose_columns, open_table
from .tensors import DecodedOnDemand, ImageDataset, crop_seeds

Row = dict[str, Any]  # of a table: values by column


class StreamedImages(DecodedOnDemand):
    """Images that are read from beginning to end and never kept, for datasets larger than the disk.

    Epoch e is the stream in an order drawn from (seed, e): its files shuffled, then its images in a buffer of
    `shuffle_buffer`. Update `step` of a run takes the positions step * total to (step + 1) * total of all epochs in a
    row, so it sees the same images after a restart. Resuming reads past the images before it without decoding them.

    Args:
        name, split, table, options: The dataset, as for `open_rows`, which says what a UserError is raised for.
        share: Share (0..1) of the images that is held out: a hash of their bytes decides which.
        held: Stream the held-out images instead of the others.
    """

    most_replacements = 100

    def __init__(self, name: str, split: str, table: TableOptions, options: DecodeOptions, share: float, held: bool):
        import datasets

        stream = open_table(name, split, table, streaming=True)
        if stream.features is None:  # they are not written down; datasets reads the first images to see
            stream = stream._resolve_features()
        if not stream.features:
            raise UserError(f"the dataset {name!r} has no images in split {split!r}")
        image, label, class_names = choose_columns(name, stream.features, table, options)
        if class_names is None and table.label_column is not None:
            advice = "load it without --streaming, or give the column the type ClassLabel"
            raise UserError(f"the column {label!r} of {name!r} does not say which classes there are; {advice}")
        super().__init__(name, class_names, options)
        self._image, self._label = image, None if class_names is None else label
        self._labels_needed = table.label_column is not None
        self._where = lambda position: f"image {position} of the shuffled stream {name}"
        stream = stream.select_columns([image] if self._label is None else [image, self._label])
        self._stream = stream.cast_column(image, datasets.Image(decode=False))
        self._share, self._held = share, held
        self.num_images: int | None = None  # in one epoch, known after it was read once
        # The order that is read, what is left of it, and the rows ahead, from `_position` on, that are still needed.
        self._seed: int | None = None
        self._iterator: Iterator[Row] = iter(())
        self._ahead: deque[Row] = deque()
        self._position = 0

    def batch_at(self, step: int, rows: range, total: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Decode images of update `step` of the run with this seed: `rows` of the `total` that all processes see.

        Returns images `[n, C, H, W]` uint8 and labels `[n]` int64, or `None` where one has none and no column was
        asked for. Raises a UserError that names images which cannot be read, or for a missing label; a ConnectionError
        for a server.
        """
        if not (positions := [step * total + row for row in rows]):
            return torch.empty(0, *self.image_shape, dtype=torch.uint8), None
        self._skip_to(min(positions), seed)
        images, used = self._decode(positions, crop_seeds(seed, torch.tensor(positions)).tolist())
        return images, self._labels_of([self._ahead[position - self._position] for position in used])

    def take(self, n: int) -> ImageDataset:
        """Return the first `n` images in the stream's own order, in memory; raises as `batch_at`."""
        images: list[np.ndarray] = []
        used: list[Row] = []
        for number, row in enumerate(self._of_this_split(self._stream)):
            if len(images) == n:
                break
            pixels = decode_all([row[self._image]], self._options)[0]
            if isinstance(pixels, ValueError):
                where = f"image {number} of the stream {self.name}"
                refuse_bad({where: pixels}, number + 1, self._options)
                self._options.report(f"skipped {where}: {pixels}")
            else:
                images.append(pixels)
                used.append(row)
        stack = np.array(images, dtype=np.uint8).reshape(-1, *self.image_shape)
        if (labels := self._labels_of(used)) is None and self._label is not None:
            self._options.report(f"some images of the stream {self.name} have no label, so none of them has one here")
        return ImageDataset(torch.from_numpy(stack), labels, self.name, self.class_names)

    def _fetch(self, positions: list[int]) -> list[Any]:
        while self._position + len(self._ahead) <= max(positions):
            self._ahead.append(next(self._iterator))
        return [self._ahead[position - self._position][self._image] for position in positions]

    def _labels_of(self, rows: list[Row]) -> Tensor | None:
        """Return `[n]`, or `None` if one has none and no column was asked for: training may not need them."""
        if self._label is None:
            return None
        labels = [row[self._label] for row in rows]
        unlabelled = sum(label is None or label < 0 for label in labels)  # -1 is what datasets writes for unknown
        if unlabelled and self._labels_needed:
            what = f"{unlabelled} of {len(rows)} images of the stream {self.name} have no label in {self._label!r}"
            raise UserError(f"{what}; remove them, or name another column with --label_column, or none")
        return None if unlabelled else torch.tensor(labels, dtype=torch.long)

    def _skip_to(self, start: int, seed: int) -> None:
        """Read on, or again from an epoch's beginning, so that `_ahead` begins with position `start`."""
        length = self.num_images or 0  # 0: not known, and reading begins with the first epoch
        epoch = start // length if length else 0
        if seed != self._seed or start < self._position or (length and epoch > self._position // length):
            self._seed, self._position = seed, epoch * length
            self._ahead.clear()
            self._iterator = self._epochs(seed, epoch)
        while self._position < start:
            self._fetch([self._position])
            self._ahead.popleft()
            self._position += 1

    def _epochs(self, seed: int, epoch: int) -> Iterator[Row]:
        """Give the rows of all epochs from one on: the files in random order, their images mixed in a buffer."""
        # The stream's own `shuffle` depends on the version of `datasets`.
        num_files = self._stream.num_shards
        while True:
            generator = derived_generator(seed, "stream", epoch)
            buffer: list[Row] = []
            count = 0
            for file in torch.randperm(num_files, generator=generator).tolist():
                for row in self._of_this_split(self._stream.shard(num_shards=num_files, index=file)):
                    count += 1
                    if len(buffer) < self._options.shuffle_buffer:
                        buffer.append(row)
                        continue
                    place = int(torch.randint(len(buffer), (1,), generator=generator))
                    yield buffer[place]
                    buffer[place] = row
            for place in torch.randperm(len(buffer), generator=generator).tolist():
                yield buffer[place]
            if not count:
                raise UserError(f"the stream {self.name} has no images in this split")
            self.num_images = count
            epoch += 1

    def _of_this_split(self, stream: Any) -> Iterator[Row]:
        """Give the rows that belong to this split, by a hash of their bytes: whatever the order and the place."""
        for row in stream:
            if self._share or self._held:
                try:
                    content = read_bytes(row[self._image])
                    row = {**row, self._image: {"bytes": content, "path": None}}  # not to be fetched twice
                except (MemoryError, ConnectionError):
                    raise
                except Exception:  # whatever fsspec and archives come up with; decoding will say it
                    content = b""
                number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
                if (number < self._share * 2**64) != self._held:
                    continue
            yield row
