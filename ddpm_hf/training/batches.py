"""What each update of a training run sees: images, labels, t, noise, flips; a function of (seed, update) alone.

Everything is drawn for the whole batch of the update and then cut into micro-batches and processes, so a run does not
depend on how it is cut, and a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.datasets import ImageDataset, Images, StreamedImages, crop_seeds, load_images
from ..presets import Preset
from ..utils.randomness import derived_generator
from .configuration import TrainingConfig


def image_size(recipe: Preset) -> tuple[int, int]:
    """Height and width of the images that a recipe trains on."""
    size = recipe.unet["sample_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def image_arguments(config: TrainingConfig, center: bool) -> dict[str, Any]:
    """What `data.load_images` and `evaluation.load_splits` are to be told of a run's images, but for the split.

    Args:
        config: The run's.
        center: Crop them in the middle, whatever the run does.
    """
    recipe, options = config.resolved_preset(), config.image_options()
    if center and "crop" in options:
        options["crop"] = "center"
    return {
        **config.images_given(),
        "channels": recipe.unet.get("in_channels", 3),
        "resolution": image_size(recipe),
        "validation_split": config.validation_split,
        **options,
    }


def load_split(config: TrainingConfig, split: str) -> Images:
    """A run's images: `train`, or the `validation` images, which are never cropped at random.

    Raises:
        ValueError: As `data.load_images`.
    """
    return load_images(split=split, **image_arguments(config, center=split != "train"))


@dataclass(frozen=True)
class BatchPlan:
    """How the images of an update are cut.

    Attributes:
        micro: Images per micro-batch and process.
        accumulation: Micro-batches per update and process.
        process_index, num_processes: Which of how many processes this is.
    """

    micro: int
    accumulation: int
    process_index: int = 0
    num_processes: int = 1

    @property
    def total(self) -> int:
        """Images per update."""
        return self.micro * self.accumulation * self.num_processes


@dataclass
class MicroBatch:
    """What one forward and backward pass sees, on the device.

    Attributes:
        images: `[b, C, H, W]` uint8.
        flip: `[b]` bool.
        t: `[b]` int64.
        noise: `[b, C, H, W]` float32.
        labels: `[b]` int64, for class-conditional networks.
    """

    images: Tensor
    flip: Tensor
    t: Tensor
    noise: Tensor
    labels: Tensor | None

    def clone(self) -> MicroBatch:
        """Copy all tensors."""
        return MicroBatch(*(None if x is None else x.clone() for x in vars(self).values()))  # type: ignore[arg-type]

    def copy_(self, other: MicroBatch) -> None:
        """Write another one's values over these."""
        for mine, its in zip(vars(self).values(), vars(other).values(), strict=True):
            if mine is not None:
                mine.copy_(its, non_blocking=True)


@dataclass
class Batches:
    """What the updates of a run see.

    Attributes:
        data: Where the images come from.
        plan: How an update's images are cut.
        image_shape: Channels, height, width.
        num_train_timesteps: T.
        seed: The run's seed.
        device: Where the noise is drawn.
        center_crop, random_flip, class_dropout, timestep_sampling: See `TrainingConfig` and `Preset`.
    """

    data: Images
    plan: BatchPlan
    image_shape: tuple[int, int, int]
    num_train_timesteps: int
    seed: int
    device: torch.device
    center_crop: bool
    random_flip: bool
    class_dropout: float
    timestep_sampling: str

    def __post_init__(self) -> None:
        self._order = (-1, torch.empty(0, dtype=torch.long))  # the current epoch's permutation
        self._reader = ThreadPoolExecutor(1)  # decodes the next micro-batch while the network runs on this one
        self._next: tuple[tuple[int, int], Future] | None = None

    def close(self) -> None:
        """End the reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def image_indices(self, step: int) -> Tensor:
        """`[total_batch]`: which images update `step` sees; every epoch is a new permutation, without gaps between."""
        assert not isinstance(self.data, StreamedImages)
        n = len(self.data)
        position = torch.arange(step * self.plan.total, (step + 1) * self.plan.total)
        epochs, within = position // n, position % n
        return torch.cat(
            [self._epoch_order(int(epoch))[within[epochs == epoch]] for epoch in epochs.unique_consecutive()]
        )

    def _epoch_order(self, epoch: int) -> Tensor:
        assert not isinstance(self.data, StreamedImages)
        if self._order[0] != epoch:
            stream = derived_generator(self.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self.data), generator=stream)
        return self._order[1]

    def rows(self, micro: int) -> slice:
        """Which images of an update this process takes in micro-batch `micro`."""
        start = (micro * self.plan.num_processes + self.plan.process_index) * self.plan.micro
        return slice(start, start + self.plan.micro)

    def read(self, step: int, micro: int) -> tuple[Tensor, Tensor | None]:
        """The uint8 images and labels of one micro-batch."""
        rows, seed = self.rows(micro), self.seed
        if isinstance(self.data, StreamedImages):
            return self.data.batch_at(step, range(rows.start, rows.stop), self.plan.total, seed)
        seeds = None
        if not self.center_crop:
            seeds = crop_seeds(seed, torch.arange(rows.start, rows.stop) + step * self.plan.total)
        return self.data.batch(self.image_indices(step)[rows], seeds)

    def read_ahead(self, step: int, micro: int) -> tuple[Tensor, Tensor | None]:
        """`read`, with the micro-batch after it being decoded meanwhile where images are not in memory."""
        if isinstance(self.data, ImageDataset):
            return self.read(step, micro)
        if self._next is not None and self._next[0] == (step, micro):
            result = self._next[1].result()
        else:
            result = self._reader.submit(self.read, step, micro).result()
        following = (step, micro + 1) if micro + 1 < self.plan.accumulation else (step + 1, 0)
        self._next = following, self._reader.submit(self.read, *following)
        return result

    def draws(self, step: int) -> dict[str, Tensor]:
        """t, noise, flips and class dropout of the whole update, the same for every cut of it."""
        seed, n = self.seed, self.plan.total
        T = self.num_train_timesteps
        stream = derived_generator(seed, "t", step)
        if self.timestep_sampling == "stratified":
            u = (torch.randperm(n, generator=stream) + torch.rand(n, generator=stream, dtype=torch.float64)) / n
            t = (u * T).long().clamp_max(T - 1)
        else:
            t = torch.randint(T, (n,), generator=stream)
        shape = (n, *self.image_shape)
        noise_stream = derived_generator(seed, "noise", step, device=self.device)
        return {
            "t": t,
            "noise": torch.randn(shape, generator=noise_stream, device=self.device),
            "flip": torch.rand(n, generator=derived_generator(seed, "flip", step)) < 0.5 * self.random_flip,
            "drop_class": torch.rand(n, generator=derived_generator(seed, "class dropout", step)) < self.class_dropout,
        }
