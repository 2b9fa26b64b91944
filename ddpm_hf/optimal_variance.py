"""The training-free optimal variance of Analytic-DPM (Bao et al. 2022, arXiv 2201.06503): one pass over data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .image_tensors import ImageDataset, to_model_range
from .likelihood import bits_per_dim
from .pipeline_ddpm import DDPMPipeline, evaluating
from .processes import processes


def prediction_error(
    pipe: DDPMPipeline, data: ImageDataset, *, batch_size: int = 256, seed: int = 0, progress: bool = False
) -> Tensor:
    """How far the network's predicted x_0 is off at every t: what `DDPMScheduler.set_prediction_error` takes.

    The paper estimates E||eps||^2 and infers this error from it, which holds for a perfect network. Measured directly
    it is right for the network at hand and for a clipped x_0, and its own error is smaller where eps is nearly known.
    It costs T network evaluations per image. Under `accelerate launch` every process takes a share of the images, and
    all return the same numbers.

    Args:
        pipe: The model; its scheduler is a `DDPMScheduler`.
        data: Images that the model was trained on or for; a hundred do.
        batch_size, seed, progress: See `likelihood.bits_per_dim`.

    Returns:
        `[T]` float64: E (x_0 - predicted x_0)^2 per pixel, in the [-1, 1] scale.

    Raises:
        ValueError: No images, images of another shape, or a class-conditional network without labels.
    """
    if not len(data):
        raise ValueError(f"{data.name!r} has no images to measure the network on")
    if data.image_shape != pipe.image_shape:
        raise ValueError(
            f"the images of {data.name!r} are {data.image_shape} (channels, height, width), and the model makes "
            f"{pipe.image_shape}"
        )
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    here = processes()
    mine = range(here.process_index, len(data), here.num_processes)
    if (labels := pipe.labels_of(data)) is not None:
        options["class_labels"] = labels[list(mine)].to(pipe.device)
    rows: list[tuple[int, Tensor]] = []
    if mine:
        x_0 = to_model_range(data.images[list(mine)]).to(pipe.device)
        shown = progress and here.is_main_process
        with evaluating(pipe.unet):
            result = bits_per_dim(pipe.unet, pipe.scheduler, x_0, image_ids=mine, progress=shown, **options)
        rows = list(zip(mine, result.mse.double(), strict=True))
    # Summed in the images' own order, so that the number of processes does not show in the last digit.
    everyone = sorted(gather_object(rows), key=lambda row: row[0])
    return torch.stack([row for _, row in everyone]).mean(0)


def save_optimal_variance(model: str | Path, pipe: DDPMPipeline, error: Tensor, use: bool = True) -> None:
    """Write the error into the scheduler's configuration of a saved pipeline, and nothing else.

    Args:
        model: The pipeline's folder.
        pipe: What was loaded from it.
        error: See `prediction_error`.
        use: Make `optimal` the model's variance; otherwise only keep the numbers for `variance_type="optimal"`.
    """
    config = {**pipe.scheduler.config, **({"variance_type": "optimal"} if use else {})}
    scheduler = type(pipe.scheduler).from_config(config)
    scheduler.set_prediction_error(error)
    path = Path(model) / "scheduler" / "scheduler_config.json"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(scheduler.to_json_string())
    os.replace(partial, path)
