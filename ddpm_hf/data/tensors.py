"""Images as uint8 tensors in memory, and what is done to a batch: the network's range, flips, where to crop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.machine import to_device
from ..utils.randomness import derive_seed


@dataclass(frozen=True)
class ImageDataset:
    """Images in memory.

    Attributes:
        images: `[N, C, H, W]` uint8.
        labels: `[N]` int64 class indices, or `None`.
        name: For reports and cards.
        class_names: One for each class index, or `None` if there are no labels or no names.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(C, H, W)`."""
        return tuple(self.images.shape[1:])

    def batch(self, indices: Tensor, crop_seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The images `[n, C, H, W]` at `indices` and their labels `[n]`.

        Args:
            indices: `[n]` int64, in any order, also repeated.
            crop_seeds: Without effect: these images are cropped already.
        """
        indices = to_device(indices, self.images.device)
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def on(self, device: torch.device) -> ImageDataset:
        """The same images on a device, where batches of them are gathered without the host.

        Those that would take more than a quarter of an NVIDIA GPU's free memory stay where they are.
        """
        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return ImageDataset(self.images.to(device), labels, self.name, self.class_names)

    def subset(self, indices: Tensor) -> ImageDataset:
        """The images at `indices`, in that order."""
        return ImageDataset(*self.batch(indices), self.name, self.class_names)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 [-1, 1], "scaled linearly" as in Section 3.3 of the paper."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to uint8 0..255, rounded to the nearest level; values outside are clipped."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def flip_images(images: Tensor, flip: Tensor) -> Tensor:
    """The images `[B, C, H, W]` for which `flip` (`[B]` bool) is true mirrored left to right."""
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def crop_seeds(seed: int, positions: Tensor) -> Tensor:
    """Where to crop, as a function of the run's seed and the image's global position in it: `[n]` int64."""
    return torch.tensor([derive_seed(seed, "crop", position) for position in positions.tolist()], dtype=torch.long)
