"""The variational bound of a set of images, as rows on disk and as numbers of a report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tensors import ImageDataset, to_model_range
from ..diffusion.likelihood import LikelihoodEstimate, LikelihoodResult, bits_per_dim, stratified_bits_per_dim
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..pipelines.pipeline_ddpm import DDPMPipeline, evaluating
from ..pipelines.schedulers import set_timesteps
from ..sampling.shards import Rows, all_rows
from ..utils.digests import digest, images_digest, weights_digest
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.processes import processes, raise_on_all_ranks
from ..utils.text import recorded_name
from . import plots
from .metrics import mean_estimate
from .options import EvaluationOptions
from .report import EvaluationReport, describe_pipeline


def evaluate_likelihood(
    pipe: DDPMPipeline,
    data: ImageDataset,
    split: str,
    options: EvaluationOptions,
    rate_distortion: bool = False,
    steps: int | None = None,
) -> EvaluationReport:
    """Compute bits/dim of all images of a split under the model (the variational bound, Eq. 5).

    With `steps` the model is its chain of so few steps, whose bound has as many terms: `bits_per_dim_<steps>_steps`.

    With `rate_distortion` also rate, distortion, L_T and the progressive lossy code (Section 4.3, Table 4, Figure 5),
    from the full sum only. Under `accelerate launch` every process evaluates a share, and all return the same report.
    """
    started, K = time.monotonic(), options.num_evaluations
    if rate_distortion and K is not None:
        raise UserError("rate_distortion needs every term of the bound; leave out --num_evaluations")
    report = EvaluationReport(recorded_name(data.name), split, len(data))
    timesteps = None
    if steps is not None:
        check_has_likelihood(pipe)
        set_timesteps(pipe.scheduler, steps)
        timesteps = pipe.scheduler.timesteps.tolist()
    rows = likelihood_rows(pipe, data, options, timesteps)
    all_terms = steps or pipe.scheduler.config.num_train_timesteps
    how = f"{'full sum' if K is None else 'stratified'}, {K or all_terms} evaluations per image"
    settings: dict[str, Any] = {
        "estimator": how if steps is None else f"{how}, of the chain of {steps} steps",
        **({} if steps is None else {"timesteps": timesteps}),
        "decoder": "tanh approximation of the official code",
        "split": split,
        "num_images": len(data),
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 2),
        **describe_pipeline(pipe),
    }
    sampling_error = math.sqrt(rows["sampling_variance"].sum().item()) / len(data)
    name = "bits_per_dim" if steps is None else f"bits_per_dim_{steps}_steps"
    report.add(name, *mean_estimate(rows["total"]), settings, sampling_standard_error=sampling_error)
    if rate_distortion:
        full = LikelihoodResult(rows["total"], rows["prior"], rows["terms"].double(), rows["mse"].double())
        _add_rate_distortion(report, full, settings, options.output)
    return report


def check_has_likelihood(pipe: DDPMPipeline) -> None:
    """Raise a UserError for a model without a variational bound: a distilled one, or another scheduler's."""
    if (own := pipe.distilled_steps) is not None:
        what = f"a distilled model has no likelihood: it knows its own {own} timesteps only"
        raise UserError(f"{what}; measure the model that it was made from")
    if not isinstance(pipe.scheduler, DDPMScheduler):
        raise UserError(f"the model was saved with a {type(pipe.scheduler).__name__}, which has no likelihood")


def estimate_bits_per_dim(pipe: DDPMPipeline, pixels: Tensor, label: Any = None) -> tuple[LikelihoodEstimate, int]:
    """Estimate the bound of one image, `[C, H, W]` uint8, and return from how many network evaluations.

    There are 50, as in the docs' tables, but no more than two for each timestep. Raises a UserError for a model
    without a likelihood, or a class that it does not know.
    """
    check_has_likelihood(pipe)
    number, labels = min(50, 2 * pipe.scheduler.config.num_train_timesteps), pipe.classes.checked(label, 1.0, 1)
    options: dict[str, Any] = {} if labels is None else {"class_labels": labels.to(pipe.device)}
    x_0 = to_model_range(pixels[None]).to(pipe.device)
    return stratified_bits_per_dim(pipe.unet, pipe.scheduler, x_0, num_evaluations=number, **options), number


def likelihood_rows(
    pipe: DDPMPipeline, data: ImageDataset, options: EvaluationOptions, timesteps: Sequence[int] | None = None
) -> Rows:
    """Compute the bound of each of N images and its parts, in the images' order, whatever the number of processes.

    `timesteps` are those of a shorter chain, of K terms instead of T. Returns `total`, `prior` and
    `sampling_variance` `[N]` float64; for a full sum also `terms` and `mse` `[N, T]` (or `[N, K]`). Raises a UserError
    for a model without a likelihood, no images or images of another shape, or unknown labels.
    """
    check_has_likelihood(pipe)
    if not len(data):
        raise UserError(f"there are no images to evaluate on in {data.name!r}")
    pipe.check_images_fit(data)
    labels = pipe.classes.of_dataset(data)
    folder, K = None, options.num_evaluations
    if options.work_dir is not None:
        made_of = [weights_digest(pipe.unet), pipe.settings, images_digest(data), options.seed]
        made_of += [] if timesteps is None else [timesteps]
        folder = options.work_dir / "likelihood" / digest(*made_of, K, None if labels is None else digest(labels))[:16]
    # a bar over few batches would hardly move; each of them has its own then
    bar_per_batch = options.progress and processes().is_main_process and len(data) <= 4 * options.batch_size

    def rows_of(ids: list[int]) -> Rows:
        x_0 = to_model_range(data.images[ids]).to(pipe.device)  # [B, C, H, W]
        common: dict[str, Any] = {"batch_size": options.batch_size, "seed": options.seed, "image_ids": ids}
        common |= {} if timesteps is None else {"timesteps": timesteps}
        common |= {"progress": bar_per_batch, "class_labels": None if labels is None else labels[ids].to(pipe.device)}
        if K is not None:
            few = stratified_bits_per_dim(pipe.network, pipe.scheduler, x_0, num_evaluations=K, **common)
            return {"total": few.total_bpd, "prior": few.prior_bpd, "sampling_variance": few.sampling_variance}
        full = bits_per_dim(pipe.network, pipe.scheduler, x_0, **common)
        sums = {"total": full.total_bpd.double(), "prior": full.prior_bpd.double()}
        exact = torch.zeros(len(ids), dtype=torch.float64)
        return {**sums, "sampling_variance": exact, "terms": full.terms_bpd, "mse": full.mse}

    progress = options.progress and not bar_per_batch
    with evaluating(pipe.unet):
        return all_rows(len(data), rows_of, options.batch_size, folder, "bits/dim", progress)


def _add_rate_distortion(
    report: EvaluationReport, full: LikelihoodResult, settings: dict[str, Any], output: Path | None
) -> None:
    """Add rate, distortion and L_T in bits/dim, the RMSE in pixel values 0..255, and Table 4; draw Figure 5."""
    parts = {"rate": full.rate_bpd.double(), "distortion": full.distortion_bpd, "prior": full.prior_bpd}
    for (name, values), terms in zip(parts.items(), ("L_1 + ... + L_T", "L_0", "L_T"), strict=True):
        how = {**settings, "estimator": f"{terms}, {settings['estimator']}"}
        report.add(f"{name}_bpd", *mean_estimate(values), how)
    mse, mse_error = mean_estimate(full.mse[:, 0])
    # d sqrt(mse) = d mse / (2 sqrt(mse)); [-1, 1] is 127.5 pixel values to either side
    error = 127.5 * mse_error / (2 * math.sqrt(mse)) if mse > 0 else math.nan
    report.add("rmse", 127.5 * math.sqrt(mse), error, {**settings, "estimator": "of x_0, pixel values of 0..255"})
    rate, distortion, T = full.progressive_rate_bpd, full.rmse, len(full.rmse)  # [T] each
    steps = sorted({max(1, round(T * tenth / 10)) for tenth in range(1, 11)}, reverse=True)
    report.tables[f"Progressive lossy code, {report.split} (Table 4)"] = [
        {"reverse steps": k, "rate (bits/dim)": rate[T - k].item(), "distortion (RMSE)": distortion[T - k].item()}
        for k in steps
    ]
    if output is None:
        return
    name = f"rate_distortion_{report.split}"
    report.pictures.append(f"{name}.png")
    with raise_on_all_ranks():
        if processes().is_main_process:
            title = f"Progressive lossy code, {report.num_images} images of {report.dataset}, {report.split}"
            plots.save_figure(plots.rate_distortion_figure(rate, distortion, title), output / f"{name}.png")
            rows = zip(range(T), rate.tolist(), distortion.tolist(), full.terms_bpd.mean(0).tolist(), strict=True)
            lines = ["t,rate_bits_per_dim,rmse_grey_levels,term_bits_per_dim", *(",".join(map(str, r)) for r in rows)]
            write_text(output / f"{name}.csv", "\r\n".join([*lines, ""]))
