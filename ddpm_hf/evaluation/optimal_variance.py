"""The training-free optimal variance of Analytic-DPM (Bao et al. 2022, arXiv 2201.06503): one pass over data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.tensors import ImageDataset
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..utils.files import write_text
from .likelihoods import likelihood_rows
from .options import EvaluationOptions


def prediction_error(pipe: DDPMPipeline, data: ImageDataset, **options: Any) -> Tensor:
    """Measure E (x_0 - predicted x_0)^2 per pixel at every t, `[T]` float64, for `DDPMScheduler.set_prediction_error`.

    Bao et al. infer it from E||eps||^2, which holds for a perfect network; measured directly it is right for this
    network and a clipped x_0. It costs T network evaluations per image; about a hundred images are enough. `options`
    are `batch_size`, `seed`, `progress`; errors as in `likelihood_rows`.
    """
    return likelihood_rows(pipe, data, EvaluationOptions(**options))["mse"].double().mean(0)


def save_optimal_variance(model: str | Path, pipe: DDPMPipeline, error: Tensor, use: bool = True) -> None:
    """Write the error `[T]` of `prediction_error` into the scheduler's configuration of a saved pipeline.

    `use` makes `optimal` the model's variance; otherwise the numbers are only kept for `variance_type="optimal"`.
    """
    config = {**pipe.scheduler.config, **({"variance_type": "optimal"} if use else {})}
    scheduler = type(pipe.scheduler).from_config(config)
    scheduler.set_prediction_error(error)
    save_scheduler(model, scheduler)


def save_scheduler(model: str | Path, scheduler: Any) -> None:
    """Write the scheduler's configuration into a saved pipeline."""
    write_text(Path(model) / "scheduler" / "scheduler_config.json", scheduler.to_json_string())
