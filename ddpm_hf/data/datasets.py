"""Images in, uint8 tensors out: the entry point `load_images`.

`[n, C, H, W]` and `[n]` int64 labels (or `None`) come in one of three kinds: an `ImageDataset` in memory,
`StreamedImages`, or a `LazyImageDataset`, decoded batch by batch (what does not fit, or is cropped at random).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..utils.errors import UserError
from ..utils.progress import progress_bar
from ..utils.randomness import derived_generator
from ..utils.text import nearest
from .decoding import DecodeOptions, decode_all, leave_out_bad
from .folders import open_folder
from .streams import StreamedImages
from .tables import TableOptions, open_rows
from .tensors import ImageDataset, LazyImageDataset, Source

_CHUNK = 512  # so many images are read, then decoded in parallel, while a dataset is decoded once and for all

Images = ImageDataset | LazyImageDataset | StreamedImages


def load_images(
    *,
    dataset: str | None = None,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    validation_split: float = 0.0,
    streaming: bool = False,
    **options: Any,
) -> Images:
    """Load images from exactly one of a built-in dataset, a Hub id or local path, or a folder.

    Args:
        dataset: A built-in dataset: `digits`.
        dataset_name: Hub id or local path for `datasets`.
        train_data_dir: A folder of images, of `.npy`/`.npz` arrays or of parquet files, or one array or parquet file.
        split: `train`, or `validation` for what is held out of training; with `dataset_name` also one of the dataset's
            own, such as `test`, or `validation` where nothing is held out.
        validation_split: Share (0..1) of `train` to hold out, chosen before anything is decoded; of a stream by the
            content of each image, so that it is about this share.
        streaming: Read a dataset of `dataset_name` or parquet files without keeping it: `StreamedImages`.
        options: The fields of `TableOptions` and of `DecodeOptions`; `resolution` may be one number.

    Raises a UserError for none or several of the three, and if the images cannot be loaded or do not fit.
    """
    given = [name for name in (dataset, dataset_name, train_data_dir) if name is not None]
    if len(given) != 1:
        raise UserError(f"give exactly one of --dataset, --dataset_name and --train_data_dir, got {len(given)}")
    if not 0 <= validation_split < 1:
        raise UserError(f"--validation_split must be at least 0 and less than 1, got {validation_split}")
    of_tables = {field.name for field in dataclasses.fields(TableOptions)} & set(options)
    table = TableOptions(**{name: options.pop(name) for name in of_tables})
    if isinstance(size := options.get("resolution"), int):
        options["resolution"] = (size, size)
    decode = DecodeOptions(**options)
    found: Source | None = None
    if dataset is not None:
        if dataset != "digits":
            near = nearest(dataset, ["digits"])
            raise UserError(f"unknown built-in dataset {dataset!r}{near}; for one from the Hub use --dataset_name")
        digits = load_digits(split)
        if decode.channels == 1 and decode.resolution in (None, (8, 8)) and not streaming:
            return digits
        grey = digits.images[:, 0].numpy()
        found = Source("digits", len(digits), lambda rows: [Image.fromarray(grey[row]) for row in rows], str)
        found.labels, found.class_names = digits.labels, digits.class_names
        split, validation_split = "train", 0.0  # of what was just taken
    # Of `train` a share may be held out, which is then the split `validation`; other splits are the dataset's own.
    own = dataset_name is not None and split != "train" and not (split == "validation" and validation_split)
    if not own and split not in ("train", "validation"):
        raise UserError(f"split must be train or validation, got {split!r}{nearest(split, ('train', 'validation'))}")
    name, split_read = given[0], split if own else "train"
    if train_data_dir is not None:
        found = open_folder(Path(train_data_dir), decode)
    if found is not None and streaming:
        raise UserError("streaming is for --dataset_name and for parquet files; others are read as needed without it")
    share, held_out = (0.0, False) if own else (validation_split, split == "validation")
    if streaming:
        return StreamedImages(name, split_read, table, decode, share, held_out)
    source = found or open_rows(name, split_read, table, decode)
    order = torch.randperm(source.count, generator=derived_generator(0, "validation split"))
    count = round(share * source.count)
    return _load(source, (order[:count] if held_out else order[count:]).sort().values, decode)


def load_digits(split: str = "train") -> ImageDataset:
    """Load handwritten digits of this package, 8x8 grey (UCI optical recognition test set, 1,797 images, CC BY 4.0).

    Every sixth image of each class is held out (`validation`, 296; `train` 1,501; `all`). 0..16 are scaled to 0..255.
    """
    if split not in ("train", "validation", "all"):
        raise UserError(f"digits has the splits train, validation and all, not {split!r}")
    file = load_file(Path(__file__).with_name("digits.safetensors"))
    labels = file["labels"].long()
    whole = ImageDataset(file["images"], labels, "digits", [str(digit) for digit in range(10)])
    if split == "all":
        return whole
    held_out = torch.zeros(len(whole), dtype=torch.bool)
    for label in range(10):
        held_out[(labels == label).nonzero().flatten()[5::6]] = True
    return whole.subset((held_out == (split == "validation")).nonzero().flatten())


def _load(source: Source, rows: Tensor, options: DecodeOptions) -> ImageDataset | LazyImageDataset:
    """Load the images at `rows` of a source: into memory, or as needed if they do not fit or are cropped at random."""
    limit, size, random = options.memory_limit_bytes, options.resolution, options.crop == "random"
    if (random and not size) or (size and len(rows) * options.channels * size[0] * size[1] > limit):
        return LazyImageDataset(source, rows, options)
    images = np.empty((0, options.channels, *(size or (0, 0))), dtype=np.uint8)
    good: list[int] = []
    bad: dict[str, ValueError] = {}
    # The bar appears only where there is something to wait for.
    with progress_bar(len(rows), f"reading {source.name}", delay=2, leave=False) as bar:
        for chunk in rows.split(_CHUNK):
            for row, pixels in zip(chunk.tolist(), decode_all(source.fetch(chunk.tolist()), options), strict=True):
                if isinstance(pixels, ValueError):
                    bad[source.where(row)] = pixels
                    continue
                good.append(row)
                if random:
                    continue  # decoded all the same: what cannot be read is better known before training than in it
                height, width = pixels.shape[1:]
                if len(good) == 1:
                    if len(rows) * pixels.nbytes > limit:
                        what = f"the images of {source.name} do not fit into {limit:,} bytes"
                        raise UserError(f"{what}; choose one size with --resolution (they have {height}x{width})")
                    images = np.empty((len(rows), *pixels.shape), dtype=np.uint8)
                elif pixels.shape != images.shape[1:]:
                    sizes = "{}x{}, and {}x{} in {}".format(*images.shape[2:], height, width, source.where(row))
                    raise UserError(f"the images have different sizes ({sizes}); choose one with --resolution")
                images[len(good) - 1] = pixels
            bar.update(len(chunk))
    leave_out_bad(bad, len(rows), options)
    if random:
        return LazyImageDataset(source, torch.tensor(good, dtype=torch.long), options)
    labels = None if source.labels is None else source.labels[good]
    return ImageDataset(torch.from_numpy(images[: len(good)]), labels, source.name, source.class_names)
