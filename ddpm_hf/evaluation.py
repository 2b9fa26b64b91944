"""A pipeline and images to one report of numbers, with what is needed to repeat them."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from .data import ImageDataset, to_model_range
from .likelihood import bits_per_dim, stratified_bits_per_dim
from .pipeline_ddpm import DDPMPipeline, evaluating


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


def evaluate_likelihood(
    pipe: DDPMPipeline,
    data: ImageDataset,
    split: str,
    *,
    num_evaluations: int | None = 50,
    num_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> EvaluationReport:
    """Bits/dim of images under the model (the variational bound, Eq. 5).

    Args:
        pipe: The model.
        data: The images; they must have the network's size and channels.
        split: Their name in the report.
        num_evaluations: Network evaluations per image for the stratified estimate, or `None` for the whole sum.
        num_images: Take the first this many.
        batch_size, seed, progress: See `likelihood.bits_per_dim`.

    Raises:
        ValueError: No images, or images that do not fit the network.
    """
    images = data.images[:num_images]
    if not len(images):
        raise ValueError(f"no images to evaluate on in {data.name!r} ({split})")
    if tuple(images.shape[1:]) != pipe.image_shape:
        raise ValueError(
            f"the images of {data.name!r} are {tuple(images.shape[1:])} (channels, height, width), and the model "
            f"makes {pipe.image_shape}"
        )
    x_0 = to_model_range(images).to(pipe.device)
    report = EvaluationReport(data.name, split, len(images))
    started = time.monotonic()
    with evaluating(pipe.unet):
        common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
        if num_evaluations is None:
            full = bits_per_dim(pipe.unet, pipe.scheduler, x_0, **common)
            total, sampling_error = full.total_bpd.double(), 0.0
        else:
            few = stratified_bits_per_dim(pipe.unet, pipe.scheduler, x_0, num_evaluations=num_evaluations, **common)
            total, sampling_error = few.total_bpd, few.sampling_standard_error
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
