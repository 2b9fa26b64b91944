"""Images in, uint8 tensors out: the one door, `load_images`, and what it gives.

Three kinds of datasets, all giving `[n, C, H, W]` uint8 and `[n]` int64 labels (or `None`):

- `ImageDataset`: decoded once, in memory. What fits into `memory_limit_bytes` becomes this.
- `LazyImageDataset`: decodes the images of a batch when it is asked for, in threads. What does not fit, and everything
  that is cropped at random, because a random crop needs the whole image again every time.
- `StreamedImages`: for datasets larger than the disk; read from beginning to end, shuffled in a buffer.

Where images come from is in `image_sources.py`, what becomes of unusual ones in `image_files.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..utils.errors import UserError
from ..utils.randomness import derived_generator
from ..utils.text import nearest
from .decoding import Reading, reading_of, refuse_bad
from .sources import Source, Tensors, open_folder, open_rows
from .streams import StreamedImages, belongs, open_stream
from .tensors import ImageDataset, crop_seeds, flip_images, to_model_range, to_uint8

__all__ = [
    "BUILT_IN",
    "ImageDataset",
    "Images",
    "LazyImageDataset",
    "StreamedImages",
    "crop_seeds",
    "flip_images",
    "load_digits",
    "load_folder",
    "load_hub_dataset",
    "load_images",
    "to_model_range",
    "to_uint8",
]

_DIGITS_FILE = Path(__file__).with_name("digits.safetensors")
BUILT_IN = ("digits",)
# So many images are read, then decoded in parallel, while a dataset is decoded once and for all.
_CHUNK = 512


class LazyImageDataset:
    """Images that are decoded when a batch of them is asked for; made by `load_images`.

    An image that turns out to be unreadable raises, or (`on_bad_image="skip"`) is reported once and replaced by the
    next readable one, so that a batch depends on nothing but its indices.

    Attributes:
        labels: `[N]` int64 class indices, or `None`.
        name, class_names, image_shape: As in [`ImageDataset`].
    """

    def __init__(self, source: Source, rows: Tensor, reading: Reading):
        resolution = reading.form.resolution
        if resolution is None:
            raise UserError(f"the images of {source.name} are decoded as needed; choose one size with --resolution")
        self.name, self.class_names = source.name, source.class_names
        self.labels = None if source.labels is None else source.labels[rows]
        self.image_shape = (reading.form.channels, *resolution)
        self._source, self._rows, self._reading = source, rows, reading
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor, seeds_of_crops: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The images `[n, C, H, W]` at `indices` and their labels `[n]`.

        Args:
            indices: `[n]` int64, in any order, also repeated.
            seeds_of_crops: `[n]` int64, one number for each image that says where to crop it (see `crop_seeds`), if
                the dataset crops at random; from the centre where it is `None`.

        Raises:
            ValueError: Images that cannot be read, each of them named.
        """
        wanted = indices.tolist()
        seeds: list[int | None] = [None] * len(wanted)
        if seeds_of_crops is not None and self._reading.crop == "random":
            seeds = seeds_of_crops.tolist()
        decoded = self._decode(wanted, seeds)
        refuse_bad(
            [
                (self._source.where(int(self._rows[i])), x)
                for i, x in zip(wanted, decoded, strict=True)
                if isinstance(x, ValueError) and self._reading.on_bad_image == "error"
            ],
            len(wanted),
            self._reading.report,
        )
        used, images = [], np.empty((len(wanted), *self.image_shape), dtype=np.uint8)
        for place, (index, seed, pixels) in enumerate(zip(wanted, seeds, decoded, strict=True)):
            while isinstance(pixels, ValueError):
                self._report_once(index, pixels)
                index = (index + 1) % len(self)
                if index == wanted[place]:
                    raise UserError(f"none of the {len(self)} images of {self.name} can be read: {pixels}")
                pixels = self._decode([index], [seed])[0]
            images[place] = pixels
            used.append(index)
        return torch.from_numpy(images), None if self.labels is None else self.labels[used]

    def _decode(self, indices: list[int], seeds: list[int | None]) -> list[np.ndarray | ValueError]:
        return self._reading.decode(self._source.fetch(self._rows[indices].tolist()), seeds)

    def _report_once(self, index: int, error: ValueError) -> None:
        row = int(self._rows[index])
        if row not in self._reported:
            self._reported.add(row)
            self._reading.report(f"skipped {self._source.where(row)}, the next image takes its place: {error}")

    def subset(self, indices: Tensor) -> LazyImageDataset:
        """The images at `indices`, in that order; still not decoded."""
        return LazyImageDataset(self._source, self._rows[indices], self._reading)


Images = ImageDataset | LazyImageDataset | StreamedImages


def _load(source: Source, rows: Tensor, reading: Reading) -> ImageDataset | LazyImageDataset:
    """The images at `rows` of a source: in memory if they fit, to be decoded as needed if they do not.

    Raises:
        ValueError: Images that cannot be read, of different sizes, or none.
    """
    form, resolution = reading.form, reading.form.resolution
    if resolution is not None:
        fits = len(rows) * form.channels * resolution[0] * resolution[1] <= reading.memory_limit_bytes
        if not fits:
            return LazyImageDataset(source, rows, reading)
    elif reading.crop == "random":
        raise UserError("crop 'random' needs to know the size to crop to; choose one with --resolution")
    good, images = _decode_all(source, rows, reading)
    if images is None:
        # Decoded nevertheless: what cannot be read is better known before training than in the middle of it.
        return LazyImageDataset(source, good, reading)
    labels = None if source.labels is None else source.labels[good]
    return ImageDataset(images, labels, source.name, source.class_names)


def _decode_all(source: Source, rows: Tensor, reading: Reading) -> tuple[Tensor, Tensor | None]:
    """The rows that can be read, and their images `[N, C, H, W]`; no images where they are cropped at random.

    Raises:
        ValueError: Images that cannot be read, or (without a resolution) of different sizes, or more than fit.
    """
    channels, resolution = reading.form.channels, reading.form.resolution
    images = None
    if resolution is not None and reading.crop == "center":
        images = np.empty((len(rows), channels, *resolution), dtype=np.uint8)
    good: list[int] = []
    bad: list[tuple[str, ValueError]] = []
    arrays: list[np.ndarray] = []  # only where the size is not known beforehand
    num_bytes = 0  # of these
    # The bar appears only where there is something to wait for.
    with tqdm(total=len(rows), desc=f"reading {source.name}", unit="image", delay=2, leave=False) as bar:
        for chunk in rows.split(_CHUNK):
            wanted = chunk.tolist()
            decoded = reading.decode(source.fetch(wanted), [None] * len(wanted))
            for row, pixels in zip(wanted, decoded, strict=True):
                if isinstance(pixels, ValueError):
                    bad.append((source.where(row), pixels))
                    continue
                if images is not None:
                    images[len(good)] = pixels
                elif resolution is None:
                    arrays.append(pixels)
                    num_bytes += pixels.nbytes
                    if num_bytes > reading.memory_limit_bytes:
                        height, width = pixels.shape[1:]
                        raise UserError(
                            f"the images of {source.name} do not fit into {reading.memory_limit_bytes:,} bytes, and "
                            "only those of one known size can be decoded as needed; choose one size with --resolution "
                            f"(the last one read has {height}x{width})"
                        )
                good.append(row)
            bar.update(len(wanted))
    if bad and reading.on_bad_image == "error":
        refuse_bad(bad, len(rows), reading.report)
    for where, error in bad:
        reading.report(f"left out {where}: {error}")
    if bad and not good:
        raise UserError(f"none of the {len(rows)} images of {source.name} can be read; the first: {bad[0][1]}")
    if resolution is None:
        sizes = {array.shape[1:] for array in arrays}
        if len(sizes) > 1:
            few = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:4])
            raise UserError(f"the images have {len(sizes)} different sizes ({few} ...); choose one with --resolution")
        images = np.stack(arrays) if arrays else np.empty((0, channels, 0, 0), dtype=np.uint8)
    return torch.tensor(good, dtype=torch.long), None if images is None else torch.from_numpy(images[: len(good)])


# ---------------------------------------------------------------------- the sources by themselves


def load_digits(split: str = "train") -> ImageDataset:
    """Handwritten digits, 8x8 grey (UCI optical recognition test set, 1,797 images, CC BY 4.0), part of this package.

    Every sixth image of each class is held out (296), the other 1,501 are for training. Grey levels 0..16 of the
    original are scaled to 0..255.

    Args:
        split: `train`, `validation` or `all`.

    Raises:
        ValueError: Another split.
    """
    if split not in ("train", "validation", "all"):
        raise UserError(f"digits has the splits train, validation and all, not {split!r}")
    file = load_file(_DIGITS_FILE)
    labels = file["labels"].long()
    whole = ImageDataset(file["images"], labels, "digits", [str(digit) for digit in range(10)])
    if split == "all":
        return whole
    held_out = torch.zeros(len(whole), dtype=torch.bool)
    for label in range(10):
        held_out[(labels == label).nonzero().flatten()[5::6]] = True
    return whole.subset((held_out if split == "validation" else ~held_out).nonzero().flatten())


def load_folder(
    folder: str | Path,
    channels: int = 3,
    resolution: tuple[int, int] | None = None,
    background: str = "white",
    **options: Any,
) -> ImageDataset | LazyImageDataset:
    """All images of a folder and its subfolders, in the order of their paths; first-level folders are class labels.

    Args:
        folder: A folder of image files, or of `.npy` and `.npz` arrays, or one such array file.
        channels, resolution, background: See `load_images`.
        options: `crop`, `on_bad_image`, `value_range`, `array_layout`, `memory_limit_bytes`, `num_workers` and
            `report` of `load_images`.

    Raises:
        ValueError: No such folder, no images in it, or images that cannot be read.
    """
    reading = reading_of(channels, resolution, background, **options)
    source = open_folder(Path(folder), reading)
    if source is None:
        raise UserError(f"{str(folder)!r} holds parquet files, or what save_to_disk wrote; load_hub_dataset reads it")
    return _load(source, torch.arange(len(source)), reading)


def load_hub_dataset(
    name: str,
    split: str = "train",
    channels: int = 3,
    resolution: tuple[int, int] | None = None,
    background: str = "white",
    config_name: str | None = None,
    cache_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    **options: Any,
) -> ImageDataset | LazyImageDataset:
    """A dataset by its Hub id or local path, through `datasets`.

    Args:
        name: Hub id, or a local folder or file that `datasets` reads, such as parquet.
        split: As the dataset calls it.
        config_name, cache_dir: As in `datasets.load_dataset`.
        image_column, label_column, channels, resolution, background, options: See `load_images`.

    Raises:
        ValueError: The dataset cannot be loaded, has no such split or no image column, or has unreadable images.
    """
    reading = reading_of(channels, resolution, background, **options)
    source = open_rows(name, split, config_name, cache_dir, image_column, label_column, reading.report)
    return _load(source, torch.arange(len(source)), reading)


# ---------------------------------------------------------------------- the one door


def load_images(
    *,
    dataset: str | None = None,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    channels: int = 3,
    resolution: tuple[int, int] | None = None,
    validation_split: float = 0.0,
    config_name: str | None = None,
    cache_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    **options: Any,
) -> Images:
    """The one door for images: a built-in dataset, a Hub id or local path, or a folder.

    Args:
        dataset: A built-in dataset: `digits`.
        dataset_name: Hub id or local path for `datasets`.
        train_data_dir: A folder of image files, of `.npy`/`.npz` arrays or of parquet files, or one array or parquet
            file.
        split: `train`, or `validation` for what is held out of training.
        channels: What the network takes: 1 or 3, for arrays any number.
        resolution: `(height, width)`; `None` if all images have one size that is to be kept.
        validation_split: Share (0..1) to hold out where the dataset has no fixed split of its own. Chosen before
            anything is decoded; of a stream by the content of each image, so that it is about this share.
        config_name, cache_dir: As in `datasets.load_dataset`.
        image_column: The first one of images if `None`.
        label_column: The first one of classes, or one that is called `label` or the like, if `None`.
        streaming: Read a dataset of `dataset_name` or parquet files from end to end without keeping it:
            [`StreamedImages`].
        options:
            - `background` ("white"): the colour under transparent pixels.
            - `crop` ("center"): or "random", for images of another shape than `resolution`. A random crop needs the
              whole image, so all images are decoded anew for every batch: [`LazyImageDataset`].
            - `on_bad_image` ("error"): or "skip"; either way every bad image is named.
            - `value_range`: the values that become 0 and 255, for arrays.
            - `array_layout`: "HWC" or "CHW", for arrays whose shape fits both.
            - `memory_limit_bytes` (4 GiB): images that take more as uint8 are decoded as needed; for that `resolution`
              has to be given.
            - `num_workers` (4): threads that decode.
            - `shuffle_buffer` (4096): so many images of a stream are mixed at any time.
            - `report`: is called with each warning; `warnings.warn` if it is not given.

    Raises:
        ValueError: None or several of the three given, or the images cannot be loaded or do not fit.
    """
    given = [name for name in (dataset, dataset_name, train_data_dir) if name is not None]
    if len(given) != 1:
        raise UserError(
            "give the images as exactly one of --dataset (built in: digits), --dataset_name (Hub id or local path) "
            f"and --train_data_dir (a folder), got {len(given)}"
        )
    if not 0 <= validation_split < 1:
        raise UserError(f"validation_split must be at least 0 and less than 1, got {validation_split}")
    reading = reading_of(channels, resolution, **options)
    if dataset is not None:
        if dataset != "digits":
            raise UserError(
                f"unknown built-in dataset {dataset!r}{nearest(dataset, BUILT_IN)}; built in: {', '.join(BUILT_IN)}; "
                "use --dataset_name for one from the Hub"
            )
        if streaming:
            raise UserError("streaming is for --dataset_name and for parquet files, and digits is small")
        digits = load_digits(split)
        if channels == 1 and resolution in (None, (8, 8)):
            return digits
        return _load(Tensors(digits), torch.arange(len(digits)), reading)

    if split not in ("train", "validation"):
        raise UserError(f"split must be train or validation, got {split!r}{nearest(split, ('train', 'validation'))}")
    source: Source | None = None
    if train_data_dir is not None:
        source = open_folder(Path(train_data_dir), reading)
        if source is not None and streaming:
            raise UserError(
                "streaming is for --dataset_name and for parquet files; image files and arrays in a folder are read "
                "as needed where they do not fit into memory"
            )
    name = dataset_name or train_data_dir
    assert name is not None
    if streaming:
        keep = None
        if validation_split or split == "validation":
            keep = partial(belongs, held_out_share=validation_split, validation=split == "validation")
        return open_stream(name, config_name, image_column, label_column, reading, keep)
    if source is None:
        source = open_rows(name, "train", config_name, cache_dir, image_column, label_column, reading.report)
    held_out = round(validation_split * len(source))
    order = torch.randperm(len(source), generator=derived_generator(0, "validation split"))
    chosen = order[:held_out] if split == "validation" else order[held_out:]
    return _load(source, chosen.sort().values, reading)
