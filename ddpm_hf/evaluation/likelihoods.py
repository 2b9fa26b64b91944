"""The variational bound of a set of images, as rows on disk and as numbers of a report."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tensors import ImageDataset, to_model_range
from ..diffusion.likelihood import LikelihoodResult, bits_per_dim, stratified_bits_per_dim
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..pipelines.pipeline_ddpm import DDPMPipeline, evaluating
from ..sampling.shards import Rows, all_rows
from ..utils.digests import digest, images_digest, weights_digest
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.processes import processes, together
from ..utils.text import recorded_name
from . import plots
from .report import EvaluationReport


def evaluate_likelihood(
    pipe: DDPMPipeline,
    data: ImageDataset,
    split: str,
    *,
    num_evaluations: int | None = 50,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
    work_dir: Path | None = None,
    rate_distortion: bool = False,
    output: Path | None = None,
) -> EvaluationReport:
    """Bits/dim of images under the model (the variational bound, Eq. 5).

    Under `accelerate launch` every process evaluates a share of the images, and all return the same report.

    Args:
        pipe: The model.
        data: The images; they must have the network's size and channels.
        split: Their name in the report.
        num_evaluations: Network evaluations per image for the stratified estimate, or `None` for the whole sum.
        batch_size, seed, progress: See `likelihood.bits_per_dim`.
        work_dir: Where finished batches are kept, so that an interrupted evaluation goes on from there.
        rate_distortion: Also rate, distortion, L_T and the progressive lossy code (Section 4.3, Table 4, Figure 5).
        output: The folder for the pictures of the latter.

    Raises:
        ValueError: No images, images that do not fit the network, or rate and distortion from an estimate.
    """
    if not len(data):
        raise UserError(f"no images to evaluate on in {data.name!r} ({split})")
    pipe.check_images_fit(data)
    if rate_distortion and num_evaluations is not None:
        raise UserError("rate_distortion needs every term of the bound; leave out --num_evaluations")
    report = EvaluationReport(recorded_name(data.name), split, len(data))
    started = time.monotonic()
    rows = likelihood_rows(pipe, data, num_evaluations, batch_size, seed, progress, work_dir)
    total = rows["total"]
    settings: dict[str, Any] = {
        "estimator": "full sum" if num_evaluations is None else f"stratified, {num_evaluations} evaluations per image",
        "decoder": "tanh approximation of the official code",
        "split": split,
        "num_images": len(data),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 2),
        "scheduler": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        "dtype": pipe.settings["dtype"],
    }
    sampling_error = math.sqrt(rows["sampling_variance"].sum().item()) / len(total)
    report.add("bits_per_dim", *_mean(total), settings, sampling_standard_error=sampling_error)
    if rate_distortion:
        full = LikelihoodResult(rows["total"], rows["prior"], rows["terms"].double(), rows["mse"].double())
        _add_rate_distortion(report, full, split, settings, output)
    return report


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and standard error, which is NaN for one image."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan
    return values.mean().item(), error


def likelihood_rows(
    pipe: DDPMPipeline,
    data: ImageDataset,
    num_evaluations: int | None,
    batch_size: int,
    seed: int,
    progress: bool,
    work_dir: Path | None = None,
) -> Rows:
    """The bound of every image and its parts, in the images' order, whatever the number of processes.

    Args:
        pipe: The model; its scheduler is a `DDPMScheduler`.
        data: N images that fit the network.
        num_evaluations, batch_size, seed, progress, work_dir: See `evaluate_likelihood`.

    Returns:
        `total`, `prior` and `sampling_variance` `[N]` float64; for the whole sum also `terms` and `mse` `[N, T]`.

    Raises:
        ValueError: The model has no likelihood, or a class-conditional network gets no labels that it knows.
    """
    if not isinstance(pipe.scheduler, DDPMScheduler):
        raise UserError(f"the model was saved with a {type(pipe.scheduler).__name__}, which has no likelihood")
    labels = pipe.classes.of_dataset(data)
    folder = None
    if work_dir is not None:
        made_of = [weights_digest(pipe.unet), pipe.settings, images_digest(data), seed]
        folder = work_dir / digest(*made_of, num_evaluations, None if labels is None else digest(labels))[:16]

    # A bar over few batches would hardly move; each of them has its own then.
    inner_bars = progress and processes().is_main_process and len(data) <= 4 * batch_size

    def rows_of(ids: list[int]) -> Rows:
        x_0 = to_model_range(data.images[ids]).to(pipe.device)
        common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "image_ids": ids}
        common["progress"] = inner_bars
        if labels is not None:
            common["class_labels"] = labels[ids].to(pipe.device)
        if num_evaluations is None:
            full = bits_per_dim(pipe.network, pipe.scheduler, x_0, **common)
            total, prior = full.total_bpd.double(), full.prior_bpd.double()
            variance = torch.zeros(len(ids), dtype=torch.float64)
            return {
                "total": total,
                "prior": prior,
                "sampling_variance": variance,
                "terms": full.terms_bpd,
                "mse": full.mse,
            }
        few = stratified_bits_per_dim(pipe.network, pipe.scheduler, x_0, num_evaluations=num_evaluations, **common)
        return {"total": few.total_bpd, "prior": few.prior_bpd, "sampling_variance": few.sampling_variance}

    with evaluating(pipe.unet):
        return all_rows(
            len(data),
            rows_of,
            batch_size=batch_size,
            folder=folder,
            desc="bits/dim",
            progress=progress and not inner_bars,
        )


def _add_rate_distortion(
    report: EvaluationReport, full: LikelihoodResult, split: str, settings: dict[str, Any], output: Path | None
) -> None:
    """Rate, distortion and L_T into the report; Table 4; Figure 5 and its numbers beside it."""
    for name, values in (
        ("rate", full.rate_bpd.double()),
        ("distortion", full.distortion_bpd),
        ("prior", full.prior_bpd),
    ):
        meaning = {"rate": "L_1 + ... + L_T", "distortion": "L_0", "prior": "L_T"}[name]
        report.add(f"{name}_bpd", *_mean(values), {**settings, "estimator": f"{meaning}, {settings['estimator']}"})
    mse, mse_error = _mean(full.mse[:, 0])
    rmse = 127.5 * math.sqrt(mse)
    rmse_error = 127.5 * mse_error / (2 * math.sqrt(mse)) if mse > 0 else math.nan
    report.add("rmse", rmse, rmse_error, {**settings, "estimator": "of x_0, grey levels of 0..255"})
    rate, error, T = full.progressive_rate_bpd, full.rmse, len(full.rmse)
    steps = sorted({max(1, round(T * tenth / 10)) for tenth in range(1, 11)}, reverse=True)
    report.tables[f"Progressive lossy code, {split} (Table 4)"] = [
        {"reverse steps": k, "rate (bits/dim)": rate[T - k].item(), "distortion (RMSE)": error[T - k].item()}
        for k in steps
    ]
    if output is None:
        return
    name = f"rate_distortion_{split}"
    report.pictures.append(f"{name}.png")
    with together():
        if processes().is_main_process:
            title = f"Progressive lossy code, {report.num_images} images of {report.dataset}, {split}"
            plots.save_figure(plots.rate_distortion_figure(rate, error, title), output / f"{name}.png")
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(["t", "rate_bits_per_dim", "rmse_grey_levels", "term_bits_per_dim"])
            terms = full.terms_bpd.mean(0)
            writer.writerows(zip(range(T), rate.tolist(), error.tolist(), terms.tolist(), strict=True))
            write_text(output / f"{name}.csv", text.getvalue())
