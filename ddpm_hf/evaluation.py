"""A pipeline and images to one report of numbers, with what is needed to repeat them."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.utils import gather_object

from .data import ImageDataset, Images, StreamedImages, to_model_range
from .likelihood import bits_per_dim, stratified_bits_per_dim
from .pipeline_ddpm import DDPMPipeline, evaluating
from .processes import processes


@dataclass
class EvaluationReport:
    """Numbers of one model on one dataset.

    Attributes:
        dataset, split, num_images: What was evaluated on.
        values: Metric name to `{"value", "standard_error", ...}`; likelihoods are in bits/dim.
        settings: How each number was made.
        versions: Of Python and the libraries.
    """

    dataset: str
    split: str
    num_images: int
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }
    )

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Read a report that `save` wrote."""
        return cls(**json.loads(Path(path).read_text()))


def first_images(data: Images, count: int | None) -> ImageDataset:
    """The first `count` images (all for `None`) in memory."""
    if isinstance(data, StreamedImages):
        if count is None:
            raise ValueError(f"{data.name!r} is a stream: say how many images to take")
        return data.take(count)
    rows = torch.arange(len(data) if count is None else min(count, len(data)))
    images, labels = data.batch(rows)
    return ImageDataset(images, labels, data.name, data.class_names)


def evaluate_likelihood(
    pipe: DDPMPipeline,
    data: ImageDataset,
    split: str,
    *,
    num_evaluations: int | None = 50,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> EvaluationReport:
    """Bits/dim of images under the model (the variational bound, Eq. 5).

    Under `accelerate launch` every process evaluates a share of the images, and all return the same report.

    Args:
        pipe: The model.
        data: The images; they must have the network's size and channels.
        split: Their name in the report.
        num_evaluations: Network evaluations per image for the stratified estimate, or `None` for the whole sum.
        batch_size, seed, progress: See `likelihood.bits_per_dim`.

    Raises:
        ValueError: No images, or images that do not fit the network.
    """
    images = data.images
    if not len(images):
        raise ValueError(f"no images to evaluate on in {data.name!r} ({split})")
    if tuple(images.shape[1:]) != pipe.image_shape:
        raise ValueError(
            f"the images of {data.name!r} are {tuple(images.shape[1:])} (channels, height, width), and the model "
            f"makes {pipe.image_shape}"
        )
    here = processes()
    mine = range(here.process_index, len(images), here.num_processes)
    x_0 = to_model_range(images[list(mine)]).to(pipe.device)
    report = EvaluationReport(data.name, split, len(images))
    started = time.monotonic()
    with evaluating(pipe.unet):
        common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "image_ids": mine}
        common["progress"] = progress and here.is_main_process
        if pipe.unet.config.num_class_embeds is not None:
            common["class_labels"] = _labels_for(pipe, data, list(mine)).to(pipe.device)
        if not mine:  # more processes than images
            total = sampling_variance = torch.empty(0, dtype=torch.float64)
        elif num_evaluations is None:
            full = bits_per_dim(pipe.unet, pipe.scheduler, x_0, **common)
            total, sampling_variance = full.total_bpd.double(), torch.zeros(len(mine), dtype=torch.float64)
        else:
            few = stratified_bits_per_dim(pipe.unet, pipe.scheduler, x_0, num_evaluations=num_evaluations, **common)
            total, sampling_variance = few.total_bpd, few.sampling_variance
    # In the images' own order, whatever the number of processes, so that the sums are the same to the bit.
    rows = sorted(gather_object(list(zip(mine, total.tolist(), sampling_variance.tolist(), strict=True))))
    total = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    sampling_error = math.sqrt(sum(row[2] for row in rows)) / len(rows)
    standard_error = (total.std() / len(total) ** 0.5).item() if len(total) > 1 else float("nan")
    report.values["bits_per_dim"] = {
        "value": total.mean().item(),
        "standard_error": standard_error,
        "sampling_standard_error": sampling_error,
    }
    report.settings["bits_per_dim"] = {
        "estimator": "full sum" if num_evaluations is None else f"stratified, {num_evaluations} evaluations per image",
        "decoder": "tanh approximation of the official code",
        "seed": seed,
        "seconds": round(time.monotonic() - started, 2),
        "scheduler": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
    }
    return report


def _labels_for(pipe: DDPMPipeline, data: ImageDataset, rows: list[int]) -> torch.Tensor:
    """The images' own classes, or "no class" where they have none and the network knows it."""
    if data.labels is not None:
        known = list(pipe.unet.config.get("_class_names") or data.class_names or [])
        names = data.class_names or known
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"the network knows no class {unknown[0]!r}; it was trained on {', '.join(known)}")
        return torch.tensor([known.index(names[label]) for label in data.labels[rows].tolist()])
    if pipe.null_class is None:
        raise ValueError(f"the network is class-conditional, and the images of {data.name!r} have no labels")
    return torch.full((len(rows),), pipe.null_class)
