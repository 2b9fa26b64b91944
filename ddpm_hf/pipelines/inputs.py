"""What users hand to a pipeline - seeds, images, masks - as checked tensors."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.class_labels import one_per_image
from ..data.decoding import DecodeOptions, read_image
from ..data.tensors import to_model_range
from ..diffusion.tables import whole_number
from ..utils.errors import UserError
from ..utils.randomness import Generators, SeededNoise


def count_and_generators(
    batch_size: int | None, generator: Generators, seeds: Iterable[int] | None, device: torch.device | str = "cpu"
) -> tuple[int, Generators]:
    """Return how many images, and what their noise is drawn from: `generator`, or `seeds`, on the chain's `device`."""
    if seeds is not None:
        if generator is not None:
            raise UserError("pass either seeds or generator, and not both")
        if not isinstance(seeds, Iterable):
            raise UserError(f"seeds must be one number per image, got {seeds!r}; write seeds=[{seeds!r}] for one")
        seeds = [whole_number("each of seeds", seed) for seed in seeds]
        if batch_size not in (None, len(seeds)):
            raise UserError(f"batch_size={batch_size} but {len(seeds)} seeds; leave batch_size out")
        return len(seeds), SeededNoise(seeds, device)
    batch_size = 1 if batch_size is None else whole_number("batch_size", batch_size)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    generator = list(generator) if isinstance(generator, tuple) else generator
    if isinstance(generator, list) and len(generator) != batch_size:
        raise UserError(f"got {len(generator)} generators for batch_size={batch_size}; pass one per image")
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise UserError(f"generator must be a torch.Generator, or a list of them, got {one!r}")
    return batch_size, generator


def images_in_model_range(image: Any, image_shape: tuple[int, int, int]) -> Tensor:
    """Return images as `[N, C, H, W]` float32 in [-1, 1]; a UserError refuses another shape or range.

    They are what `DDPMPipeline.__call__` takes as `image`. `image_shape` is the network's: channels, height, width.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise UserError("image is an empty list; give at least one image")
        return torch.cat([images_in_model_range(one, image_shape) for one in image])
    if isinstance(image, Image.Image):
        image = torch.tensor(read_image(image, DecodeOptions(image_shape[0], image_shape[1:])))
    if isinstance(image, np.ndarray):
        array = torch.from_numpy(np.array(image))  # a copy: PIL's arrays are read-only, of which PyTorch warns
        image = array.movedim(-1, -3) if array.ndim > 2 else array[None]
    if not isinstance(image, Tensor):
        raise UserError(f"image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    images = image if image.ndim == 4 else image[None]
    if tuple(images.shape[1:]) != image_shape:
        wanted = f"the network's images are {image_shape} (channels, height, width)"
        raise UserError(f"image has shape {tuple(image.shape)}, and {wanted}")
    if not len(images):
        raise UserError("image is an empty batch; give at least one image")
    if images.dtype == torch.uint8:
        return to_model_range(images)
    images = images.float()
    if not (images.amin() >= 0 and images.amax() <= 1):
        raise UserError(f"image must lie in [0, 1], got {images.amin().item():g} to {images.amax().item():g}")
    return images * 2 - 1


def mask_of(mask: Any, image_shape: tuple[int, int, int], batch_size: int) -> Tensor:
    """Return `[B, 1, H, W]` bool, true where the mask is white (above one half); one mask serves all images.

    It is a PIL image, or an array or tensor `[H, W]`, `[1, H, W]` or `[N, 1, H, W]`, uint8, bool or in [0, 1]; or a
    list of them. A UserError refuses another size or number.
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
        raise UserError(
            f"--mask_image has shape {tuple(values.shape)}, and the network's images are {height} x {width}"
        )
    if values.dtype not in (torch.uint8, torch.bool) and values.numel() and not 0 <= values.min() <= values.max() <= 1:
        got = f"{values.dtype} from {values.min().item():g} to {values.max().item():g}"
        raise UserError(f"mask_image must be uint8, bool or lie in [0, 1], got {got}")
    if values.dtype == torch.uint8 and values.numel() and 0 < values.max() <= 1:
        raise UserError("mask_image is uint8 with values up to 1; white is 255, or give it as bool")
    half = 127.5 if values.dtype == torch.uint8 else 0.5
    return one_per_image(values.reshape(-1, 1, height, width) > half, batch_size, "mask_image")
