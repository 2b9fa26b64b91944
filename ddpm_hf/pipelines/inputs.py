"""What users hand to a pipeline - seeds, images, masks - as checked tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.decoding import DecodeOptions, read_image
from ..utils.errors import UserError
from ..utils.randomness import Generators, SeededNoise


@dataclass(frozen=True)
class KnownPixels:
    """What inpainting keeps.

    Attributes:
        image: `[B, C, H, W]` in [-1, 1].
        draw: `[B, 1, H, W]` bool, true where pixels are drawn anew.
    """

    image: Tensor
    draw: Tensor


def count_and_generators(
    batch_size: int | None, generator: Generators, seeds: Iterable[int] | None, device: torch.device | str = "cpu"
) -> tuple[int, Generators]:
    """How many images, and what their noise is drawn from.

    Args:
        batch_size: `None` is one image, or one per seed.
        generator: One for all, one per image, or the global one for `None`.
        seeds: One per image, instead of `generator`.
        device: Where noise of seeds is drawn: on the chain's own, no step waits for a copy.

    Raises:
        ValueError: A negative number of images, seeds and generators together, or counts that disagree.
    """
    if seeds is not None:
        if generator is not None:
            raise UserError("pass either seeds or generator, and not both")
        seeds = [_index("each of seeds", seed) for seed in seeds]
        if batch_size not in (None, len(seeds)):
            raise UserError(f"batch_size={batch_size} but {len(seeds)} seeds; leave batch_size out")
        return len(seeds), SeededNoise(seeds, device)
    batch_size = 1 if batch_size is None else _index("batch_size", batch_size)
    if batch_size < 0:
        raise UserError(f"batch_size must not be negative, got {batch_size}")
    if isinstance(generator, (list, tuple)):
        generator = list(generator)
        if len(generator) != batch_size:
            raise UserError(f"got {len(generator)} generators for batch_size={batch_size}; pass one per image")
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise UserError(f"generator must be a torch.Generator, or a list of them, got {one!r}")
    return batch_size, generator


def _index(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, got {value!r}") from None


def images_in_model_range(image: Any, image_shape: tuple[int, int, int]) -> Tensor:
    """Images as `[N, C, H, W]` float32 in [-1, 1].

    Args:
        image: PIL images (scaled and cropped to fit), arrays `[H, W, C]` or tensors `[C, H, W]` in [0, 1] or uint8,
            one, a batch, or a list.
        image_shape: Channels, height and width of the network's images.

    Raises:
        ValueError: Another shape or range, or no image at all.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise UserError("image is an empty list; give at least one image")
        return torch.cat([images_in_model_range(one, image_shape) for one in image])
    if isinstance(image, Image.Image):
        channels, height, width = image_shape
        pixels = read_image(image, DecodeOptions(channels, (height, width)))
        return torch.tensor(pixels).float()[None] / 127.5 - 1
    if isinstance(image, np.ndarray):
        array = torch.from_numpy(np.array(image))  # a copy: PIL's arrays are read-only, of which PyTorch warns
        image = array.movedim(-1, -3) if array.ndim > 2 else array[None]
    if not isinstance(image, Tensor):
        raise UserError(f"image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    images = image if image.ndim == 4 else image[None]
    if tuple(images.shape[1:]) != image_shape:
        raise UserError(
            f"image has shape {tuple(image.shape)}, and the network's images are {image_shape} (channels, height, "
            "width)"
        )
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    images = images.float()
    if len(images) and not (images.amin() >= 0 and images.amax() <= 1):
        raise UserError(f"image must lie in [0, 1], got {images.amin().item():g} to {images.amax().item():g}")
    return images * 2 - 1


def mask_of(mask: Any, image_shape: tuple[int, int, int], batch_size: int) -> Tensor:
    """`[B, 1, H, W]` bool, true where the mask is white (above one half).

    Args:
        mask: A PIL image (scaled and cropped to fit), or an array or tensor `[H, W]`, `[1, H, W]` or `[N, 1, H, W]`,
            uint8, bool or in [0, 1]; or a list of them.
        image_shape: Channels, height and width of the network's images.
        batch_size: B; one mask serves all images.

    Raises:
        ValueError: Another size or number of masks.
    """
    if isinstance(mask, (list, tuple)):
        if not mask:
            raise UserError("mask_image is an empty list; give one mask, or one per image")
        return one_per_image(torch.cat([mask_of(one, image_shape, 1) for one in mask]), batch_size, "mask_image")
    _, height, width = image_shape
    if isinstance(mask, Image.Image):
        mask = read_image(mask, DecodeOptions(1, (height, width)))  # as the image, or it would cover something else
    values = torch.tensor(mask) if isinstance(mask, np.ndarray) else torch.as_tensor(mask)
    if values.shape[-2:] != (height, width) or values.ndim > 4 or (values.ndim > 2 and values.shape[-3] != 1):
        raise UserError(f"mask_image has shape {tuple(values.shape)}, and the network's images are {height} x {width}")
    if values.dtype not in (torch.uint8, torch.bool) and values.numel() and not 0 <= values.min() <= values.max() <= 1:
        raise UserError(
            f"mask_image must be uint8, bool or lie in [0, 1], got {values.dtype} from {values.min().item():g} to "
            f"{values.max().item():g}"
        )
    if values.dtype == torch.uint8 and values.numel() and 0 < values.max() <= 1:
        raise UserError("mask_image is uint8 with values up to 1; white is 255, or give it as bool")
    half = 127.5 if values.dtype == torch.uint8 else 0.5
    return one_per_image(values.reshape(-1, 1, height, width) > half, batch_size, "mask_image")


def one_per_image(values: Tensor, batch_size: int, name: str) -> Tensor:
    """One value for all images, or one per image, as one per image.

    Raises:
        ValueError: Another number.
    """
    if len(values) not in (1, batch_size):
        raise UserError(f"got {len(values)} of {name} for {batch_size} images; give one, or one per image")
    return values.expand(batch_size, *values.shape[1:])
