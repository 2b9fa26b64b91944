"""What each update of a training run sees: images, labels, t, noise, flips; a function of (seed, update) alone.

Everything is drawn for the whole batch of the update and then cut into micro-batches and processes, so a run does not
depend on how it is cut, and a resumed run continues as if it had never stopped.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.datasets import ImageDataset, Images, StreamedImages
from ..data.tensors import crop_seeds
from ..utils.machine import to_device
from ..utils.randomness import derived_generator
from .configuration import TrainingError
from .run import Run, image_size


class MicroBatch(NamedTuple):
    """What one forward and backward pass sees, on the device."""

    images: Tensor  # [b, C, H, W] uint8; float32 trajectories, where a teacher is distilled
    flip: Tensor  # [b] bool
    t: Tensor  # [b] int64
    noise: Tensor  # [b, C, H, W] float32
    labels: Tensor | None  # [b] int64, for class-conditional networks


class Batches:
    """Reads the images of each update and draws the rest."""

    def __init__(self, run: Run):
        self.run, self.plan, self.seed, self.device = run, run.plan, run.config.seed, run.device
        self.data: Images = run.data.on(self.device) if isinstance(run.data, ImageDataset) else run.data
        self._dtype = self.data.images.dtype if isinstance(self.data, ImageDataset) else torch.uint8
        self._image_shape = (run.unet_config.get("in_channels", 3), *image_size(run.unet_config))
        self._order = (-1, torch.empty(0, dtype=torch.long))  # the current epoch and its permutation
        self._reader = ThreadPoolExecutor(1)  # decodes the next micro-batch while the network runs on this one
        self._next: tuple[tuple[int, int], Future] = (-1, 0), Future()  # update and micro-batch

    def close(self) -> None:
        """End the reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def micro_batch(self, step: int, micro: int, draws: dict[str, Tensor]) -> MicroBatch:
        """Return this process's share of a micro-batch of update `step`; TrainingError: an image has no class."""
        images, labels = self.read_ahead(step, micro)
        rows = self.plan.rows(micro)
        if not self.run.config.class_conditional:
            labels = None
        elif labels is None:  # a stream's images are not known before they are read
            what = f"--class_conditional needs a class for every image, and some of {self.data.name!r} have none"
            raise TrainingError(f"{what}; name their column with --label_column")
        else:
            labels = to_device(labels, self.device)
            drop = to_device(draws["drop_class"][rows], self.device)
            labels = torch.where(drop, self.run.unet_config.get("_null_class", 0), labels)
        flip, t = (to_device(draws[name][rows], self.device) for name in ("flip", "t"))
        return MicroBatch(to_device(images, self.device), flip, t, draws["noise"][rows], labels)

    def empty_micro_batch(self) -> MicroBatch:
        """Return a micro-batch of zeros: the same shapes and types in every update."""
        noise = torch.zeros(self.plan.micro, *self._image_shape, device=self.device)
        t = torch.zeros(self.plan.micro, dtype=torch.long, device=self.device)
        labels = t.clone() if self.run.config.class_conditional else None
        images = torch.zeros(self.plan.micro, *self.data.image_shape, dtype=self._dtype, device=self.device)
        return MicroBatch(images, t.bool(), t, noise, labels)

    def draws(self, step: int) -> dict[str, Tensor]:
        """Draw t, noise, flips and class dropout of the whole update, the same for every cut of it."""
        recipe, seed, n = self.run.recipe, self.seed, self.plan.total
        T = recipe.scheduler.get("num_train_timesteps", 1000)
        stream = derived_generator(seed, "t", step)
        if recipe.timestep_sampling == "stratified":  # one t in each of n equal parts of [0, T)
            u = (torch.randperm(n, generator=stream) + torch.rand(n, generator=stream, dtype=torch.float64)) / n
            t = (u * T).long().clamp_max(T - 1)
        else:
            t = torch.randint(T, (n,), generator=stream)
        stream = derived_generator(seed, "noise", step, device=self.device)
        noise = torch.randn(n, *self._image_shape, generator=stream, device=self.device)
        flip = torch.rand(n, generator=derived_generator(seed, "flip", step)) < 0.5 * recipe.random_flip
        drop = torch.rand(n, generator=derived_generator(seed, "class dropout", step)) < self.run.config.class_dropout
        return {"t": t, "noise": noise, "flip": flip, "drop_class": drop}

    def read(self, step: int, micro: int) -> tuple[Tensor, Tensor | None]:
        """Return the uint8 images and the labels of one micro-batch."""
        rows, total = self.plan.rows(micro), self.plan.total
        if isinstance(self.data, StreamedImages):
            return self.data.batch_at(step, range(rows.start, rows.stop), total, self.seed)
        seeds = None
        if not self.run.config.center_crop:
            seeds = crop_seeds(self.seed, torch.arange(rows.start, rows.stop) + step * total)
        return self.data.batch(self.image_indices(step)[rows], seeds)

    def read_ahead(self, step: int, micro: int) -> tuple[Tensor, Tensor | None]:
        """Return what `read` does, and start decoding the next micro-batch where images are not in memory."""
        if isinstance(self.data, ImageDataset):
            return self.read(step, micro)
        where, future = self._next
        if where != (step, micro):
            future = self._reader.submit(self.read, step, micro)
        result = future.result()
        following = (step, micro + 1) if micro + 1 < self.plan.accumulation else (step + 1, 0)
        self._next = following, self._reader.submit(self.read, *following)
        return result

    def image_indices(self, step: int) -> Tensor:
        """Return `[total]`: which images update `step` sees. Every epoch is a new permutation of all images."""
        assert not isinstance(self.data, StreamedImages)
        n = len(self.data)
        position = torch.arange(step * self.plan.total, (step + 1) * self.plan.total)
        epochs, within = position // n, position % n
        parts = []
        for epoch in epochs.unique_consecutive().tolist():
            if self._order[0] != epoch:
                self._order = epoch, torch.randperm(n, generator=derived_generator(self.seed, "order", epoch))
            parts.append(self._order[1][within[epochs == epoch]])
        return torch.cat(parts)
