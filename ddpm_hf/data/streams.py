"""Images of datasets larger than the disk: read sequentially, in an order that can be resumed at any update."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.randomness import derived_generator
from .decoding import Reading, refuse_bad
from .files import read_bytes
from .tables import bytes_or_path, choose_columns, open_table
from .tensors import ImageDataset, crop_seeds

_GIVE_UP_AFTER = 100  # unreadable images of a stream in a row


class StreamedImages:
    """Images that are read from beginning to end and never kept, for datasets larger than the disk.

    Epoch e is the stream in an order drawn from (seed, e): its files shuffled, then its images in a buffer of
    `shuffle_buffer`. Update `step` of a run takes the positions step * total to (step + 1) * total of all epochs in a
    row, so it sees the same images after a restart. Going on at a later step reads past the images before it in their
    epoch without decoding them; the first epoch is read, too, if its length is not known yet.

    An unreadable image raises, or (`on_bad_image="skip"`) is reported and replaced by the next readable one.

    Attributes:
        name, class_names, image_shape: As in [`ImageDataset`].
        num_images: Images in one epoch, known (not `None`) after it was read once.
    """

    def __init__(
        self,
        stream: Any,
        name: str,
        column: str,
        label_column: str | None,
        class_names: list[str] | None,
        reading: Reading,
        keep: Callable[[bytes], bool] | None,
        labels_needed: bool,
    ):
        if reading.form.resolution is None:
            raise UserError(f"the images of {name} are streamed; choose one size with --resolution")
        self.name, self.class_names = name, class_names
        self.image_shape = (reading.form.channels, *reading.form.resolution)
        self.num_images: int | None = None
        self._stream, self._column, self._label_column = stream, column, label_column
        self._reading, self._keep, self._labels_needed = reading, keep, labels_needed
        self._said_unlabelled = False
        # Where the reading is: the seed, an iterator, what it gave that is still needed, and the position of that.
        self._seed: int | None = None
        self._iterator: Iterator[dict[str, Any]] = iter(())
        self._ahead: deque[dict[str, Any]] = deque()
        self._position = 0
        self._reported: set[int] = set()

    def batch_at(self, step: int, rows: range, total: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """What one process decodes of the images of one update.

        Args:
            step: The update, from 0.
            rows: Which of the update's images, within `range(total)`.
            total: Images in an update, over all processes and micro-batches.
            seed: The run's seed: of the order, and of the places of random crops.

        Returns:
            Images `[len(rows), C, H, W]` uint8 and their labels `[len(rows)]` int64; `None` for labels where there are
            none, or one of these images has none and no label column was asked for.

        Raises:
            ValueError: Images that cannot be read, each of them named, or without a label in the column that was asked
                for, or a stream without images.
            ConnectionError: A server from which images come cannot be reached.
        """
        positions = [step * total + row for row in rows]
        if not positions:
            return torch.empty(0, *self.image_shape, dtype=torch.uint8), None
        self._read_until(min(positions), max(positions) + 1, seed)
        raw = [self._ahead[position - self._position] for position in positions]
        seeds: list[int | None] = [None] * len(positions)
        if self._reading.crop == "random":
            seeds = crop_seeds(seed, torch.tensor(positions)).tolist()
        decoded = self._reading.decode([bytes_or_path(row[self._column]) for row in raw], seeds)
        refuse_bad(
            [
                (self._where(position), x)
                for position, x in zip(positions, decoded, strict=True)
                if isinstance(x, ValueError) and self._reading.on_bad_image == "error"
            ],
            len(positions),
            self._reading.report,
        )
        images = np.empty((len(positions), *self.image_shape), dtype=np.uint8)
        for place, (position, pixels) in enumerate(zip(positions, decoded, strict=True)):
            following = position
            while isinstance(pixels, ValueError):
                self._report_once(following, pixels)
                following += 1
                if following - position > _GIVE_UP_AFTER:
                    raise UserError(f"{_GIVE_UP_AFTER} images of {self.name} in a row cannot be read: {pixels}")
                self._read_until(min(positions), following + 1, seed)
                raw[place] = self._ahead[following - self._position]
                pixels = self._reading.decode([bytes_or_path(raw[place][self._column])], [seeds[place]])[0]
            images[place] = pixels
        return torch.from_numpy(images), self._labels(raw)

    def take(self, n: int) -> ImageDataset:
        """The first `n` images in the stream's own order, in memory: held-out images to evaluate on.

        Raises:
            ValueError: Images that cannot be read, if they are not to be skipped; or without a label, see `batch_at`.
            ConnectionError: A server from which images come cannot be reached.
        """
        images: list[np.ndarray] = []
        raw: list[dict[str, Any]] = []
        for number, row in enumerate(self._kept(self._stream)):
            if len(images) == n:
                break
            pixels = self._reading.decode([bytes_or_path(row[self._column])], [None])[0]
            if isinstance(pixels, ValueError):
                where = f"image {number} of the stream {self.name}"
                if self._reading.on_bad_image == "error":
                    refuse_bad([(where, pixels)], number + 1, self._reading.report)
                self._reading.report(f"skipped {where}: {pixels}")
                continue
            images.append(pixels)
            raw.append(row)
        stack = np.stack(images) if images else np.empty((0, *self.image_shape), dtype=np.uint8)
        return ImageDataset(torch.from_numpy(stack), self._labels(raw), self.name, self.class_names)

    def _where(self, position: int) -> str:
        epoch = "" if self.num_images is None else f" (epoch {position // self.num_images})"
        return f"image {position} of the shuffled stream {self.name}{epoch}"

    def _report_once(self, position: int, error: ValueError) -> None:
        if position not in self._reported:
            self._reported.add(position)
            self._reading.report(f"skipped {self._where(position)}, the next image takes its place: {error}")

    def _labels(self, raw: list[dict[str, Any]]) -> Tensor | None:
        """`[n]`. Nobody may need labels that were not asked for, so a missing one of those stops nothing."""
        if self._label_column is None:
            return None
        labels = [row[self._label_column] for row in raw]
        unlabelled = sum(label is None or label < 0 for label in labels)  # -1 is what datasets writes for unknown
        if not unlabelled:
            return torch.tensor(labels, dtype=torch.long)
        said = f"{unlabelled} of {len(raw)} images of the stream {self.name} have no label in {self._label_column!r}"
        if self._labels_needed:
            raise UserError(f"{said}; remove them, or name another column with --label_column, or none")
        if not self._said_unlabelled:
            self._said_unlabelled = True
            self._reading.report(f"{said}, so none of these has one here, and the same where it happens again")
        return None

    def _kept(self, stream: Any) -> Iterator[dict[str, Any]]:
        """The part of a stream that belongs to this split, by content: not by order nor by where its files are."""
        for row in stream:
            if self._keep is None:
                yield row
                continue
            try:
                content = read_bytes(bytes_or_path(row[self._column]))
            except (MemoryError, ConnectionError):
                raise
            except Exception:  # whatever fsspec and archives come up with; decoding will say it
                content = b""
            else:
                row = {**row, self._column: {"bytes": content, "path": None}}  # not to be fetched twice
            if self._keep(content):
                yield row

    def _read_until(self, start: int, stop: int, seed: int) -> None:
        """Have the rows of positions `start` to `stop` in `_ahead`, and none before."""
        if seed != self._seed or start < self._position:
            self._seed, self._position = seed, 0
            self._ahead.clear()
            self._iterator = self._endless(seed, 0)
        if self.num_images is not None and start // self.num_images > self._position // self.num_images:
            epoch = start // self.num_images
            self._position = epoch * self.num_images
            self._ahead.clear()
            self._iterator = self._endless(seed, epoch)
        while self._position < start and self._ahead:
            self._ahead.popleft()
            self._position += 1
        while self._position + len(self._ahead) < stop:
            row = next(self._iterator)
            if self._position < start:
                self._position += 1
            else:
                self._ahead.append(row)

    def _endless(self, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
        while True:
            count = 0
            for row in self._shuffled(seed, epoch):
                count += 1
                yield row
            if not count:
                raise UserError(f"the stream {self.name} has no images in this split")
            self.num_images = count
            epoch += 1

    def _shuffled(self, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
        """One epoch: the files in random order, and their images mixed in a buffer.

        Done here and not by the stream's own `shuffle`, whose order is that of one version of `datasets`, and which in
        version 5.2 waits for five seconds at the end of every epoch over several files.
        """
        generator = derived_generator(seed, "stream", epoch)
        num_files = self._stream.num_shards
        buffer: list[dict[str, Any]] = []
        for file in torch.randperm(num_files, generator=generator).tolist():
            for row in self._kept(self._stream.shard(num_shards=num_files, index=file)):
                if len(buffer) < self._reading.shuffle_buffer:
                    buffer.append(row)
                    continue
                place = int(torch.randint(len(buffer), (1,), generator=generator))
                yield buffer[place]
                buffer[place] = row
        for place in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[place]


def open_stream(
    name: str,
    config_name: str | None,
    image_column: str | None,
    label_column: str | None,
    reading: Reading,
    keep: Callable[[bytes], bool] | None,
) -> StreamedImages:
    """The `train` split of a dataset as a stream.

    Args:
        name, config_name, image_column, label_column: As `dataset_name` and the others of `load_images`.
        reading: How its images are read.
        keep: Decides by the bytes of an image whether it belongs; `None` if all do, and none has to be read for that.

    Raises:
        ValueError: The dataset cannot be loaded, has no images or no such columns, or a label column that does not say
            which classes there are; or no size is chosen.
    """
    import datasets

    stream = open_table(name, "train", config_name, None, streaming=True)
    features = stream.features
    if features is None:  # they are not written down; datasets reads the first images to see
        stream = stream._resolve_features()
        features = stream.features
    if not features:
        raise UserError(f"the dataset {name!r} has no images in split 'train'")
    image, label = choose_columns(name, features, image_column, label_column, reading.report)
    names = None
    if label is not None and isinstance(features[label], datasets.ClassLabel):
        names = list(features[label].names)
    elif label_column is not None:
        raise UserError(
            f"the column {label!r} of {name!r} does not say which classes there are, and a stream cannot be read "
            "through beforehand; load it without --streaming, or give the column the type ClassLabel"
        )
    else:
        label = None
    stream = stream.select_columns([image] if label is None else [image, label])
    stream = stream.cast_column(image, datasets.Image(decode=False))
    return StreamedImages(stream, name, image, label, names, reading, keep, labels_needed=label_column is not None)


def belongs(content: bytes, held_out_share: float, validation: bool) -> bool:
    """Whether an image of a stream is in this split: a hash of its bytes decides, whatever the order and the place."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return (int.from_bytes(digest, "little") < held_out_share * 2**64) == validation
