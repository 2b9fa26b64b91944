"""Images in, uint8 tensors out. The only place that knows about file formats.

Everything becomes `[N, C, H, W]` uint8 in memory, decoded once. What happens to unusual images:

| image | becomes |
|---|---|
| palette, 1-bit, CMYK | its colours as RGB (or grey) |
| alpha | composited on `background` (white by default) |
| 16-bit grey | scaled to 8 bits, not clipped |
| EXIF orientation | turned upright |
| animated | its first frame |
| not square | resized (antialiased) until the shorter side fits, centre cropped |
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file
from torch import Tensor

from .presets import nearest
from .randomness import derived_generator

_DIGITS_FILE = Path(__file__).with_name("digits.safetensors")
BUILT_IN = ("digits",)


@dataclass(frozen=True)
class ImageDataset:
    """Images in memory.

    Attributes:
        images: `[N, C, H, W]` uint8.
        labels: `[N]` int64 class indices, or `None`.
        name: For reports and cards.
    """

    images: Tensor
    labels: Tensor | None
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> ImageDataset:
        """The images at `indices`, in that order."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageDataset(self.images[indices], labels, self.name)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 [-1, 1], "scaled linearly" as in Section 3.3 of the paper."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to uint8 0..255, rounded to the nearest level; values outside are clipped."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2. `[B, C, H, W]`."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)


# ---------------------------------------------------------------------- one image


def decode_image(
    image: Image.Image, channels: int = 3, resolution: tuple[int, int] | None = None, background: str = "white"
) -> np.ndarray:
    """One PIL image as uint8 `[C, H, W]`; the module's table says what becomes of unusual ones.

    Args:
        image: Any mode but 32-bit float.
        channels: 3 for RGB, 1 for grey.
        resolution: `(height, width)`, or `None` to keep the image's own.
        background: Colour under transparent pixels.

    Raises:
        ValueError: A mode or a number of channels that has no meaning here.
    """
    if channels not in (1, 3):
        raise ValueError(f"image files have 1 or 3 channels, and the network has in_channels={channels}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("32-bit float images have no fixed range; save them as 8-bit or 16-bit files")
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion clips at 255
        levels = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.round(levels.clip(0, 65535) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if resolution is not None and image.size != resolution[::-1]:
        image = ImageOps.fit(image, resolution[::-1], Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _stack(
    sources: Iterable[tuple[str, Callable[[], Image.Image]]],
    channels: int,
    resolution: tuple[int, int] | None,
    background: str,
) -> Tensor:
    """Decode all images; every one that cannot be read is named, and then nothing is returned."""
    arrays, bad = [], []
    for name, opened in sources:
        try:
            arrays.append(decode_image(opened(), channels, resolution, background))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            bad.append(f"{name} ({' '.join(str(error).split()) or type(error).__name__})")
    if bad:
        shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"cannot read {len(bad)} of {len(bad) + len(arrays)} images: {shown}")
    sizes = {array.shape[1:] for array in arrays}
    if len(sizes) > 1:
        few = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:4])
        raise ValueError(f"the images have {len(sizes)} different sizes ({few} ...); choose one with --resolution")
    return torch.from_numpy(np.stack(arrays))


# ---------------------------------------------------------------------- whole datasets


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
        raise ValueError(f"digits has the splits train, validation and all, not {split!r}")
    file = load_file(_DIGITS_FILE)
    labels = file["labels"].long()
    whole = ImageDataset(file["images"], labels, "digits")
    if split == "all":
        return whole
    held_out = torch.zeros(len(whole), dtype=torch.bool)
    for label in range(10):
        held_out[(labels == label).nonzero().flatten()[5::6]] = True
    return whole.subset((held_out if split == "validation" else ~held_out).nonzero().flatten())


def load_folder(
    folder: str | Path, channels: int = 3, resolution: tuple[int, int] | None = None, background: str = "white"
) -> ImageDataset:
    """All images of a folder and its subfolders, in the order of their paths; subfolders are class labels.

    Raises:
        ValueError: No such folder, no images in it, or images that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"the image folder {str(folder)!r} {what}")
    Image.init()
    try:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.EXTENSION and p.is_file())
    except OSError as error:
        raise ValueError(f"cannot list the image folder {str(folder)!r}: {error.strerror}") from None
    if not files:
        raise ValueError(
            f"no images in {str(folder)!r}; it should hold files such as .png or .jpg, or folders of them"
        )
    images = _stack(((str(p), partial(Image.open, p)) for p in files), channels, resolution, background)
    parents = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in files]
    names = sorted(set(parents))
    labels = torch.tensor([names.index(parent) for parent in parents]) if len(names) > 1 else None
    return ImageDataset(images, labels, folder.resolve().name)


def load_hub_dataset(
    name: str,
    split: str = "train",
    channels: int = 3,
    resolution: tuple[int, int] | None = None,
    background: str = "white",
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> ImageDataset:
    """A dataset by its Hub id or local path, through `datasets`; the first image column is taken.

    Raises:
        ValueError: The dataset cannot be loaded, has no such split or no image column, or has unreadable images.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except Exception as error:  # whatever the loading script, the network or the file format came up with
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the dataset {name!r} (split {split!r}): {reason}") from error
    features = data.features
    column = next((key for key, value in features.items() if isinstance(value, datasets.Image)), None)
    if column is None:
        raise ValueError(f"the dataset {name!r} has no image column; its columns are {', '.join(features)}")
    if not len(data):
        raise ValueError(f"the dataset {name!r} has no images in split {split!r}")
    label = next((key for key, value in features.items() if isinstance(value, datasets.ClassLabel)), None)
    # Bytes instead of decoded images: what datasets would decode has lost 16-bit levels and alpha by then.
    raw = data.cast_column(column, datasets.Image(decode=False))

    def opener(row: dict[str, Any]) -> Callable[[], Image.Image]:
        return lambda: Image.open(io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"])

    sources = ((f"image {i} of {name}", opener(row)) for i, row in enumerate(raw[column]))
    images = _stack(sources, channels, resolution, background)
    labels = torch.tensor(raw[label]) if label is not None else None
    return ImageDataset(images, labels, name)


def load_images(
    *,
    dataset: str | None = None,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    channels: int = 3,
    resolution: tuple[int, int] | None = None,
    validation_split: float = 0.0,
    **options: Any,
) -> ImageDataset:
    """The one door for images: a built-in dataset, a Hub id or local path, or a folder.

    Args:
        dataset: A built-in dataset (`digits`), or the name of a preset's dataset on the Hub (`cifar10`).
        dataset_name: Hub id or local path for `datasets`.
        train_data_dir: A folder of images.
        split: `train`, or `validation` for what is held out of training.
        channels, resolution: What the network takes.
        validation_split: Share (0..1) to hold out where the dataset has no fixed split of its own.
        options: `background`, and for `dataset_name` also `config_name` and `cache_dir`.

    Raises:
        ValueError: None or several of the three given, or the images cannot be loaded or do not fit.
    """
    given = [name for name in (dataset, dataset_name, train_data_dir) if name is not None]
    if len(given) != 1:
        raise ValueError(
            "give the images as exactly one of --dataset (built in: digits), --dataset_name (Hub id or local path) "
            f"and --train_data_dir (a folder), got {len(given)}"
        )
    if not 0 <= validation_split < 1:
        raise ValueError(f"validation_split must be at least 0 and less than 1, got {validation_split}")
    if dataset == "digits":
        data = load_digits(split)
        if channels != 1 or resolution not in (None, (8, 8)):
            data = _refit(data, channels, resolution, options.get("background", "white"))
        return data
    if dataset is not None:
        raise ValueError(
            f"unknown built-in dataset {dataset!r}{nearest(dataset, BUILT_IN)}; built in: {', '.join(BUILT_IN)}; use "
            "--dataset_name for one from the Hub"
        )
    if train_data_dir is not None:
        options = {key: value for key, value in options.items() if key == "background"}
        data = load_folder(train_data_dir, channels, resolution, **options)
    else:
        assert dataset_name is not None
        data = load_hub_dataset(dataset_name, "train", channels, resolution, **options)
    held_out = round(validation_split * len(data))
    order = torch.randperm(len(data), generator=derived_generator(0, "validation split"))
    chosen = order[:held_out] if split == "validation" else order[held_out:]
    return data.subset(chosen.sort().values)


def _refit(data: ImageDataset, channels: int, resolution: tuple[int, int] | None, background: str) -> ImageDataset:
    """The same images with other channels or another size."""
    sources = ((f"image {i}", partial(Image.fromarray, x.numpy())) for i, x in enumerate(data.images[:, 0]))
    return ImageDataset(_stack(sources, channels, resolution, background), data.labels, data.name)
