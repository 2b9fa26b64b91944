"""A pipeline and images to one report of numbers, with what is needed to repeat them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..data.datasets import ImageDataset, Images, StreamedImages, load_images
from ..models.unet_2d import parameter_count
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..sampling.generation import check_sampler, with_sampler
from ..utils.digests import weights_digest
from ..utils.errors import UserError
from ..utils.files import default_cache_dir, writable_folder, write_text
from ..utils.processes import from_first, processes, raise_on_all_ranks
from ..utils.progress import showing_progress
from ..utils.text import nearest, recorded_name
from ..utils.visualize import image_grid, save_picture
from .features import FeatureExtractor, make_extractor
from .likelihoods import check_has_likelihood, evaluate_likelihood
from .neighbours import add_neighbours, find_neighbours, save_neighbours
from .options import EvaluationOptions
from .plots import figure_class
from .report import EvaluationReport, as_markdown
from .samples import SAMPLE_METRICS, RealImages, Samples, add_sample_metrics, draw_samples, real_images

Sets = dict[str, Images]  # by split
LIKELIHOOD_METRICS = ("nll", "rate_distortion")
METRICS = (*LIKELIHOOD_METRICS, *SAMPLE_METRICS)


def parse_metrics(text: str, known: Sequence[str] = METRICS, flag: str = "--metrics") -> list[str]:
    """Read `"nll,fid"` as `["nll", "fid"]`; raises a UserError for none, or one that is not among `known`."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in known:
            hint = f"; {name} is for finished models: ddpm-hf evaluate" if name in METRICS else nearest(name, known)
            raise UserError(f"{flag} knows {', '.join(known)}, got {name!r}{hint}")
    if not names:
        raise UserError(f"{flag} names no metric; it knows {', '.join(known)}")
    return list(dict.fromkeys(names))


def load_splits(
    splits: Sequence[str] | None, for_samples: bool, *, validation_split: float = 0.0, **options: Any
) -> dict[str, Images]:
    """Load the images of an evaluation by split, as `data.load_images` does.

    By default the held-out images, and `for_samples` the training images too. Held out is what `validation_split`
    says, `validation` of built-in datasets, `test` of others that have it; the training images where nothing is.
    """

    def load(split: str) -> Images:
        if split == "validation" and not validation_split and options.get("train_data_dir") is not None:
            raise UserError("a folder has no validation images of its own; give their share with --validation_split")
        return load_images(split=split, validation_split=validation_split, **options)

    if splits is not None:
        return {split: load(split) for split in splits}
    held_out: dict[str, Images] = {}
    if options.get("dataset") is not None or validation_split:
        held_out = {"validation": load("validation")}
    elif options.get("dataset_name") is not None:
        try:
            held_out = {"test": load("test")}
        except UserError as error:
            if "unknown split" not in str(error).lower():  # in the words of datasets
                raise
    return held_out if held_out and not for_samples else {"train": load("train"), **held_out}


def first_images(data: Images, count: int | None) -> ImageDataset:
    """Load the first `count` images (all for `None`, but not of a stream) into memory."""
    if isinstance(data, StreamedImages):
        if count is None:
            raise UserError(f"{data.name!r} is a stream: say how many images to take with --num_images")
        return data.take(count)
    rows = torch.arange(len(data))[:count]
    return ImageDataset(*data.batch(rows), data.name, data.class_names)


def evaluate(
    pipe: DDPMPipeline,
    sets: Sets,
    metrics: Sequence[str] | str,
    options: EvaluationOptions | None = None,
    *,
    prepare: Callable[[DDPMPipeline], Any] | None = None,
    **changes: Any,
) -> EvaluationReport:
    """Compute the numbers of the paper's tables for a model, in one report. All processes return the same one.

    Args:
        pipe: The model.
        sets: Split to images. Samples are compared with each of them; `train` is what the model was trained on, the
            first other one is what was held out.
        metrics: Of `METRICS`; or "nll,fid".
        options, changes: How: `EvaluationOptions`, and fields of it: `num_samples=1000`. What does not fit together is
            a UserError before anything takes long.
        prepare: See `generation.write_samples`.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    options = dataclasses.replace(options or EvaluationOptions(), **given)
    metrics = parse_metrics(metrics if isinstance(metrics, str) else ",".join(metrics))
    sets = {split: sets[split] for split in sorted(sets, key=lambda split: split != "train")}  # training images first
    for_samples = [metric for metric in metrics if metric in SAMPLE_METRICS]
    splits: Sequence[str] = []  # of the likelihood
    if len(for_samples) < len(metrics):
        splits = options.likelihood_splits or [split for split in sets if split != "train"] or list(sets)
    with raise_on_all_ranks():  # what is missing on one machine is missing for all
        if splits and pipe.distilled_steps:
            check_has_likelihood(pipe)
        sampling_pipe, extractors = check_evaluation(pipe, sets, for_samples, options, bool(for_samples))
        options = dataclasses.replace(options, work_dir=_work_dir(options))
        if "rate_distortion" in metrics and options.output is not None:
            figure_class()  # the last thing that an evaluation needs
    if prepare is not None:
        prepare(pipe)
        sampling_pipe.network = pipe.network

    main_split = [*splits, *sets][0]
    images = sets[main_split]
    count = 0 if isinstance(images, StreamedImages) else len(images)
    report = EvaluationReport(recorded_name(images.name), main_split, count)
    report.model = _describe_model(pipe, options.model_name)
    for split in splits:
        with raise_on_all_ranks():
            data = first_images(sets[split], options.num_images)
        for part in _likelihoods(pipe, data, split, metrics, options):
            if split == main_split:
                report.num_images = part.num_images
            ending = "" if split == main_split else f"_{split}"  # the first split's numbers have the plain names
            report.values |= {name + ending: value for name, value in part.values.items()}
            report.settings |= {name + ending: value for name, value in part.settings.items()}
            report.tables |= part.tables
            report.pictures += part.pictures
    if for_samples:
        with showing_progress(options.progress and processes().is_main_process):
            _evaluate_samples(report, sampling_pipe, sets, for_samples, extractors, options)
        report = from_first(report)
    with raise_on_all_ranks():
        if options.output is not None and processes().is_main_process:
            report.save(options.output / "report.json")
            write_text(options.output / "report.md", as_markdown(report))
    return report


def _likelihoods(
    pipe: DDPMPipeline, data: ImageDataset, split: str, metrics: Sequence[str], options: EvaluationOptions
) -> Iterator[EvaluationReport]:
    """Compute the bound of the chain of few steps, of all T, or of both, as the metrics and options say."""
    steps, rate_distortion = options.likelihood_steps, "rate_distortion" in metrics
    few = steps is not None and steps != pipe.scheduler.config.num_train_timesteps
    if few and "nll" in metrics:  # the bound is the ancestral process's
        bound_pipe = with_sampler(pipe, "ddpm", options.variance_type, options.timestep_spacing)
        yield evaluate_likelihood(bound_pipe, data, split, options, steps=steps)
    if rate_distortion or not few:
        bound_pipe = with_sampler(pipe, "ddpm", options.variance_type)
        yield evaluate_likelihood(bound_pipe, data, split, options, rate_distortion)


def _evaluate_samples(
    report: EvaluationReport, pipe: DDPMPipeline, sets: Sets, metrics: list[str], extractors: Any, options: Any
) -> None:
    """Draw samples and compare them with all sets; the first process adds the numbers to its report."""
    real = {split: real_images(split, images, extractors, options) for split, images in sets.items()}
    train, held_out = real.get("train"), next((split for split in sets if split != "train"), None)
    first, parts = _compare_sets(pipe, list(real.values()), metrics, extractors, options)
    report.settings["sampling"] = first.settings
    report.settings["features"] = {e.name: {"description": e.description, "sha256": e.fingerprint} for e in extractors}
    with raise_on_all_ranks():
        if not processes().is_main_process:
            return
        report.add_sets(parts)
        output = options.output if first.first.shape[1] in (1, 3) else None  # for pictures
        if output is not None:
            save_picture(image_grid(first.first[:64]), output / "samples.png")
            report.pictures.append("samples.png")
        if "nn" in metrics and train is not None:
            found = find_neighbours(first, train, real.get(held_out or ""), [e.name for e in extractors])
            add_neighbours(report, found, train, held_out)
            if output is not None:
                report.pictures += save_neighbours(first, train, found, output)


def _compare_sets(
    pipe: DDPMPipeline, real: list[RealImages], metrics: list[str], extractors: Any, options: Any
) -> tuple[Samples, list[EvaluationReport]]:
    """Draw the sets of samples; return the first one, and on the first process the numbers of each."""
    train = next((images.images for images in real if images.split == "train"), None)
    device = pipe.device if pipe.device.type == "cuda" else torch.device("cpu")  # float64 is not everywhere
    seeds = range(options.seed, options.seed + options.num_samples * options.num_sets)
    found: list[Samples] = []
    parts: list[EvaluationReport] = []
    for seed in seeds[:: options.num_samples]:
        samples = draw_samples(pipe, extractors, dataclasses.replace(options, seed=seed), train)
        found = found or [samples]
        with raise_on_all_ranks():
            if processes().is_main_process:
                parts.append(EvaluationReport("", "", 0))
                add_sample_metrics(parts[-1], metrics, samples, real, device)
        del samples  # before the next set is there
    if options.num_sets > 1:
        found[0].settings |= {"num_sets": options.num_sets, "seeds": f"{seeds[0]}-{seeds[-1]}"}
    return found[0], parts


def check_evaluation(
    pipe: DDPMPipeline, sets: Sets, metrics: Sequence[str], options: EvaluationOptions, samples: bool = True
) -> tuple[DDPMPipeline, list[FeatureExtractor]]:
    """Check all that `evaluate` needs, before hours of work; return what draws samples and what computes features.

    `metrics` are those of samples. Without `samples` the sampler's settings are not looked at.
    """
    if not sets:
        raise UserError("no images to evaluate on")
    for name in ("batch_size", "num_sets", "num_images"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    for split in options.likelihood_splits or ():
        if split not in sets:
            raise UserError(f"there are no images of the split {split!r}; there are {', '.join(sets)}")
    sampling_pipe = options.pipeline(pipe)
    if samples:
        check_sampler(sampling_pipe, **options.chain)
    extractors = checked_extractors(pipe, sets, metrics, options) if metrics else []
    if metrics:  # features of real images are kept there
        usual = options.cache_dir == default_cache_dir()
        writable_folder(options.cache_dir, "$DDPM_HF_CACHE" if usual else "--cache_dir")
    if options.output is not None:
        writable_folder(options.output, "--output")
    return sampling_pipe, extractors


def _work_dir(options: EvaluationOptions) -> Path | None:
    """Return where finished batches are kept; `None` for a likelihood without any folder, which cannot be resumed."""
    folder = options.output or options.cache_dir
    with suppress(UserError):
        writable_folder(folder, "--cache_dir")
        return folder / "work"
    return None


def checked_extractors(
    pipe: DDPMPipeline, sets: dict[str, Images], wanted: Sequence[str], options: EvaluationOptions
) -> list[FeatureExtractor]:
    """Make what computes the features, if there are the samples and images that the metrics need."""
    need, metric = max((SAMPLE_METRICS[metric].at_least, metric) for metric in wanted)
    if options.num_samples < need:
        raise UserError(f"{metric} needs at least {need} samples, got --num_samples {options.num_samples}")
    if "nn" in wanted and "train" not in sets:
        raise UserError("nn needs the images that the model was trained on; give the split train")
    # the Inception score alone looks at no real image, but two are the least that statistics are made of
    need, metric = max((SAMPLE_METRICS[m].at_least if SAMPLE_METRICS[m].of_real else 2, m) for m in wanted)
    for split, images in sets.items():
        if isinstance(images, StreamedImages):
            raise UserError(f"samples are compared with whole datasets, and {images.name!r} ({split}) is a stream")
        if len(images) < need:
            has = f"{images.name!r} ({split}) has {len(images)}"
            raise UserError(f"{metric} needs at least {need} real images, and {has}")
        pipe.check_images_fit(images)
    named = options.features.split(",") if isinstance(options.features, str) else options.features
    features = list(dict.fromkeys(name.strip() for name in named if name.strip()))
    if "is" in wanted and "inception" not in features:
        raise UserError("is is the score of a classifier: it needs --features inception")
    if not features:
        raise UserError("--features names nothing to compare images by: inception, pixels, facebook/dinov2-base, ...")
    extractors = [make_extractor(name, pipe.image_shape, options.inception_weights, pipe.device) for name in features]
    called = [extractor.name for extractor in extractors]
    if len(set(called)) < len(called):
        raise UserError(f"two --features are called {max(called, key=called.count)!r}; evaluate them one by one")
    return extractors


def _describe_model(pipe: DDPMPipeline, name: str | None) -> dict[str, Any]:
    """Return which model it was: its name, its revision if it is from the Hub, its weights' hash."""
    found: dict[str, Any] = {
        "name": recorded_name(name) if name else "a model",
        "weights_sha256": weights_digest(pipe.unet),
        "parameters": parameter_count(pipe.unet),
        "image_shape": list(pipe.image_shape),
    }
    if name is not None and not Path(name).exists():
        with suppress(HFValidationError):  # a name that is no repository's
            if isinstance(file := try_to_load_from_cache(name, "model_index.json"), str):
                found["revision"] = Path(file).parent.name
    return found
