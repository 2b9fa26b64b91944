"""A pipeline and images to one report of numbers, with what is needed to repeat them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..data.datasets import ImageDataset, Images, StreamedImages, load_images
from ..models.unet_2d import parameter_count
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..sampling.generation import check_sampler, with_sampler
from ..utils.digests import weights_digest
from ..utils.errors import UserError
from ..utils.files import default_cache_dir, writable_folder, write_text
from ..utils.processes import from_first, processes, together
from ..utils.text import nearest, recorded_name
from ..utils.visualize import image_grid, save_picture
from . import plots
from .features import FeatureExtractor, make_extractor
from .likelihoods import evaluate_likelihood
from .report import EvaluationReport, as_markdown
from .samples import (
    Neighbours,
    RealImages,
    Samples,
    add_neighbours,
    add_sample_metrics,
    draw_samples,
    find_neighbours,
    real_images,
)

__all__ = [
    "METRICS",
    "EvaluationReport",
    "evaluate",
    "evaluate_likelihood",
    "first_images",
    "load_splits",
    "parse_metrics",
]

LIKELIHOOD_METRICS = ("nll", "rate_distortion")
SAMPLE_METRICS = ("fid", "is", "kid", "prc", "nn")
METRICS = LIKELIHOOD_METRICS + SAMPLE_METRICS


def parse_metrics(text: str) -> list[str]:
    """`"nll,fid"` to `["nll", "fid"]`.

    Raises:
        ValueError: Not the name of a metric.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics knows {', '.join(METRICS)}, got {name!r}{nearest(name, METRICS)}")
    if not names:
        raise UserError(f"--metrics names no metric; it knows {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def load_splits(
    splits: Sequence[str] | None,
    for_samples: bool,
    *,
    dataset: str | None = None,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    validation_split: float = 0.0,
    **options: Any,
) -> dict[str, Images]:
    """The images of an evaluation by split.

    Args:
        splits: Which; if left out the held-out images, and for samples the training images too. Held out is what
            `validation_split` says, `validation` of built-in datasets, `test` of others that have it; the training
            images stand in where nothing is.
        for_samples: Whether samples are to be compared with them.
        dataset, dataset_name, train_data_dir, validation_split, options: See `data.load_images`.

    Raises:
        ValueError: As `load_images`, or the dataset has no such split.
    """
    source = {"dataset": dataset, "dataset_name": dataset_name, "train_data_dir": train_data_dir}
    given: dict[str, Any] = {name: value for name, value in source.items() if value is not None}

    def load(split: str) -> Images:
        if split == "validation" and not validation_split and "train_data_dir" in given:
            raise UserError("a folder has no validation images of its own; say with --validation_split how many")
        return load_images(**given, split=split, validation_split=validation_split, **options)

    if splits is not None:
        return {split: load(split) for split in splits}
    if dataset is not None or validation_split:
        held_out = {"validation": load("validation")}
    elif dataset_name is not None and len(given) == 1:
        try:
            held_out = {"test": load("test")}
        except UserError as error:
            if "unknown split" not in str(error).lower():  # in the words of datasets; anything else is to be heard
                raise
            held_out = {}
    else:
        held_out = {}
    if held_out and not for_samples:
        return held_out
    return {"train": load("train"), **held_out}


def first_images(data: Images, count: int | None) -> ImageDataset:
    """The first `count` images (all for `None`) in memory.

    Raises:
        ValueError: All images of a stream.
    """
    if isinstance(data, StreamedImages):
        if count is None:
            raise UserError(f"{data.name!r} is a stream: say how many images to take")
        return data.take(count)
    rows = torch.arange(len(data) if count is None else min(count, len(data)))
    images, labels = data.batch(rows)
    return ImageDataset(images, labels, data.name, data.class_names)


def evaluate(
    pipe: DDPMPipeline,
    sets: dict[str, Images],
    metrics: Sequence[str],
    *,
    likelihood_splits: Sequence[str] | None = None,
    num_samples: int = 50_000,
    num_images: int | None = None,
    num_evaluations: int | None = None,
    batch_size: int = 256,
    sampler: str = "ddpm",
    variance_type: str | None = None,
    timestep_spacing: str | None = None,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    features: Sequence[str] = ("inception",),
    inception_weights: str | Path | None = None,
    cache_dir: Path | None = None,
    output: Path | None = None,
    model_name: str | None = None,
    progress: bool = False,
    prepare: Callable[[DDPMPipeline], Any] | None = None,
) -> EvaluationReport:
    """The numbers of the paper's tables for a model, in one report. All processes return the same one.

    Args:
        pipe: The model.
        sets: Split to images. Samples are compared with each of them; `train` is what the model was trained on, the
            first other one is what was held out.
        metrics: Of `METRICS`.
        likelihood_splits: Which of `sets` the likelihood is of, the first one's with the plain names; all that are not
            `train` if left out, else `train`.
        num_samples: How many samples; 50,000 in the paper.
        num_images: The first this many images of each split, for the likelihood only.
        num_evaluations: See `evaluate_likelihood`; `None` for the whole sum.
        batch_size: Images at a time; changes no number.
        sampler, variance_type, timestep_spacing, num_inference_steps: See `generation.with_sampler`; for samples only.
        eta, guidance_scale: See `DDPMPipeline`; for samples only.
        seed: Of the noise of the likelihood; sample i has the seed `seed + i`.
        features: What to compare images with, see `features.make_extractor`.
        inception_weights: See `features.Inception`.
        cache_dir: Where features of real images are kept.
        output: A folder for `report.json`, `report.md`, pictures, and unfinished work.
        model_name: For the report.
        progress: Show progress bars.
        prepare: See `generation.write_samples`.

    Raises:
        ValueError: Anything that does not fit together, in one sentence, before anything takes long.
    """
    metrics = list(metrics)
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    work_dir: Path | None = cache_dir / "work" if output is None else output / "work"
    here = processes()
    wanted = [metric for metric in metrics if metric in SAMPLE_METRICS]
    # Training images come first among the sets, and their likelihood last: the held-out one has the plain names.
    sets = {split: sets[split] for split in sorted(sets, key=lambda split: split != "train")}
    held_out = next((split for split in sets if split != "train"), None)
    if not sets:
        raise UserError("no images to evaluate on")
    if likelihood_splits is None:
        likelihood_splits = [split for split in sets if split != "train"] or list(sets)
    with together():  # what is missing on one machine is missing for all
        extractors = checked_extractors(pipe, sets, wanted, num_samples, features, inception_weights)
        if "rate_distortion" in metrics and num_evaluations is not None:
            raise UserError("rate_distortion needs every term of the bound; leave out --num_evaluations")
        sampling_pipe = with_sampler(pipe, sampler, variance_type, timestep_spacing)
        if wanted:
            check_sampler(
                sampling_pipe, num_inference_steps=num_inference_steps, eta=eta, guidance_scale=guidance_scale
            )
        if seed < 0:
            raise UserError(f"seed must be at least 0, got {seed}")
        if output is not None:
            writable_folder(output, "--output")
        try:
            writable_folder(cache_dir, "$DDPM_HF_CACHE" if cache_dir == default_cache_dir() else "--cache_dir")
        except UserError:
            if wanted:
                raise
            work_dir = None if output is None else work_dir  # the likelihood does without, and cannot be resumed

    if prepare is not None:
        prepare(pipe)
        sampling_pipe.network = pipe.network
    main_split = likelihood_splits[0] if set(metrics) & set(LIKELIHOOD_METRICS) else next(iter(sets))
    report = EvaluationReport(recorded_name(sets[main_split].name), main_split, _count(sets[main_split]))
    report.model = _model_settings(pipe, model_name)
    if set(metrics) & set(LIKELIHOOD_METRICS):
        bound_pipe = with_sampler(pipe, "ddpm", variance_type)  # the bound is the ancestral process's
        for position, split in enumerate(likelihood_splits):
            with together():
                data = first_images(sets[split], num_images)
            part = evaluate_likelihood(
                bound_pipe,
                data,
                split,
                num_evaluations=num_evaluations,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
                work_dir=None if work_dir is None else work_dir / "likelihood",
                rate_distortion="rate_distortion" in metrics,
                output=output,
            )
            # The first split's numbers have the plain names.
            ending = f"_{split}" if position else ""
            report.values |= {name + ending: value for name, value in part.values.items()}
            report.settings |= {name + ending: value for name, value in part.settings.items()}
            report.tables |= part.tables
            report.pictures += part.pictures
            if not position:
                report.num_images = part.num_images
    if wanted and work_dir is not None:
        real = [
            real_images(split, images, extractors, cache_dir, batch_size=batch_size, progress=progress)
            for split, images in sets.items()
            if not isinstance(images, StreamedImages)
        ]
        train = next((entry for entry in real if entry.split == "train"), None)
        samples = draw_samples(
            sampling_pipe,
            num_samples,
            extractors,
            work_dir / "samples",
            seed=seed,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            eta=eta,
            guidance_scale=guidance_scale,
            train=None if train is None else train.images,
            progress=progress,
        )
        report.settings["sampling"] = samples.settings
        report.settings["features"] = {
            extractor.name: {"description": extractor.description, "sha256": extractor.fingerprint}
            for extractor in extractors
        }
        with together():
            if here.is_main_process:
                # float64 is not everywhere
                device = pipe.device if pipe.device.type == "cuda" else torch.device("cpu")
                add_sample_metrics(report, wanted, samples, real, cache_dir, device)
                if output is not None:
                    _save_samples(report, samples, output)
                if "nn" in wanted and train is not None:
                    other = next((entry for entry in real if entry.split == held_out), None)
                    names = [extractor.name for extractor in extractors]
                    found = find_neighbours(samples, train, other, names)
                    add_neighbours(report, found, train, held_out)
                    if output is not None:
                        _save_neighbours(report, samples, train, found, held_out, output)
        report = from_first(report)
    with together():
        if output is not None and here.is_main_process:
            report.save(output / "report.json")
            write_text(output / "report.md", as_markdown(report))
    return report


def _count(images: Images) -> int:
    return 0 if isinstance(images, StreamedImages) else len(images)


def checked_extractors(
    pipe: DDPMPipeline,
    sets: dict[str, Images],
    wanted: Sequence[str],
    num_samples: int,
    features: Sequence[str],
    inception_weights: str | Path | None,
) -> list[FeatureExtractor]:
    """What makes the features, and whether it can: before hours of sampling, not after them.

    Raises:
        ValueError: It cannot.
    """
    if not wanted:
        return []
    at_least = {"fid": 2, "kid": 4, "prc": 4, "is": 10, "nn": 1}
    need, metric = max((at_least[metric], metric) for metric in wanted)
    if num_samples < need:
        raise UserError(f"{metric} needs at least {need} samples, got --num_samples {num_samples}")
    if "nn" in wanted and "train" not in sets:
        raise UserError("nn needs the images that the model was trained on; give the split train")
    for split, images in sets.items():
        if isinstance(images, StreamedImages):
            raise UserError(f"samples are compared with whole datasets, and {images.name!r} ({split}) is a stream")
        real = [metric for metric in wanted if metric != "is"]
        need = max((at_least[metric] for metric in real), default=0)
        if len(images) < max(2, need):
            raise UserError(
                f"{' and '.join(real or wanted)} needs at least {max(2, need)} real images, and {images.name!r} "
                f"({split}) has {len(images)}"
            )
        pipe.check_images_fit(images)
    if "is" in wanted and "inception" not in features:
        raise UserError("is is the score of a classifier: it needs --features inception")
    features = [name for name in features if name]
    if not features:
        raise UserError("--features names nothing to compare images by: inception, pixels, facebook/dinov2-base, ...")
    extractors = [
        make_extractor(name, pipe.image_shape, inception_weights, pipe.device) for name in dict.fromkeys(features)
    ]
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < len(names):
        raise UserError(f"two --features are called {max(names, key=names.count)!r}; evaluate them one by one")
    return extractors


def _model_settings(pipe: DDPMPipeline, name: str | None) -> dict[str, Any]:
    """Which model it was: its name, its revision if it is from the Hub, its weights' hash."""
    found: dict[str, Any] = {
        "name": recorded_name(name) if name else "a model",
        "weights_sha256": weights_digest(pipe.unet),
        "parameters": parameter_count(pipe.unet),
        "image_shape": list(pipe.image_shape),
    }
    if name is not None and not Path(name).exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        file = None
        with suppress(HFValidationError):  # a name that is no repository's
            file = try_to_load_from_cache(name, "model_index.json")
        if isinstance(file, str) and (revision := re.search(r"snapshots[/\\]([0-9a-f]{40})", file)):
            found["revision"] = revision[1]
    return found


def _save_samples(report: EvaluationReport, samples: Samples, output: Path) -> None:
    if samples.first.shape[1] in (1, 3):
        save_picture(image_grid(samples.first[:64]), output / "samples.png")
        report.pictures.append("samples.png")


def _save_neighbours(
    report: EvaluationReport,
    samples: Samples,
    train: RealImages,
    found: list[Neighbours],
    held_out: str | None,
    output: Path,
) -> None:
    """One grid of the first samples and their neighbours, and one plot of distances, for every space."""
    if samples.first.shape[1] not in (1, 3):
        return
    for neighbours in found:
        rows = min(8, len(samples.first))
        where = neighbours.indices[:rows]
        images = train.images.batch(where.flatten())[0].unflatten(0, where.shape)
        title = f"Samples and their nearest training images ({neighbours.space})"
        figure = plots.neighbours_figure(samples.first[:rows], images, neighbours.distances[:rows], title)
        plots.save_figure(figure, output / f"neighbours_{neighbours.space}.png")
        report.pictures.append(f"neighbours_{neighbours.space}.png")
        if neighbours.held_out is not None:
            title = f"How new the samples are ({neighbours.space})"
            distances = neighbours.distances[:, 0]
            figure = plots.distances_figure(distances, neighbours.held_out, f"images of {held_out}", title)
            plots.save_figure(figure, output / f"distances_{neighbours.space}.png")
            report.pictures.append(f"distances_{neighbours.space}.png")
