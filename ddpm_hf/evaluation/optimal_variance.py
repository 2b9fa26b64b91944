"""The training-free optimal variance of Analytic-DPM (Bao et al. 2022, arXiv 2201.06503): one pass over data."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..data.tensors import ImageDataset
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..utils.errors import UserError
from ..utils.files import write_text
from .likelihoods import likelihood_rows


def prediction_error(
    pipe: DDPMPipeline, data: ImageDataset, *, batch_size: int = 256, seed: int = 0, progress: bool = False
) -> Tensor:
    """How far the network's predicted x_0 is off at every t: what `DDPMScheduler.set_prediction_error` takes.

    Bao et al. estimate E||eps||^2 and infer this error from it, which holds for a perfect network. Measured directly
    it is right for the network at hand and for a clipped x_0, and its own error is smaller where eps is nearly known.
    It costs T network evaluations per image. Under `accelerate launch` every process takes a share of the images, and
    all return the same numbers.

    Args:
        pipe: The model; its scheduler is a `DDPMScheduler`.
        data: Images that the model was trained on or for; about a hundred are enough.
        batch_size, seed, progress: See `likelihood.bits_per_dim`.

    Returns:
        `[T]` float64: E (x_0 - predicted x_0)^2 per pixel, in the [-1, 1] scale.

    Raises:
        ValueError: No images, images of another shape, a class-conditional network without labels, another scheduler.
    """
    if not len(data):
        raise UserError(f"{data.name!r} has no images to measure the network on")
    pipe.check_images_fit(data)
    return likelihood_rows(pipe, data, None, batch_size, seed, progress)["mse"].double().mean(0)


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
    write_text(path, scheduler.to_json_string())
