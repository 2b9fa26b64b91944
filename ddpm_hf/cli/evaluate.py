"""`ddpm-hf evaluate | optimal_variance`: numbers of a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from .command_line import Parser, UsageError, add_image_flags, image_arguments
from .model import add_sampler_flags, check_optimize, inference_optimization, load_pipeline


def evaluate_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf evaluate`."""
    parser = Parser(prog, "The numbers of the paper's tables for a model.")
    group = parser.add_argument_group("model and numbers")
    group.add_argument("--model", type=str | None, default=None, help="a pipeline's folder, or its name on the Hub")
    group.add_argument(
        "--metrics",
        type=str,
        default="nll",
        help="comma-separated: nll (bits/dim), rate_distortion, fid, is, kid, prc (precision and recall), nn (nearest "
        "neighbours)",
    )
    group.add_argument("--batch_size", type=PositiveInt, default=256, help="images at a time; changes no number")
    group.add_argument("--seed", type=int, default=0, help="of the likelihood's noise; sample i has the seed SEED + i")
    group.add_argument(
        "--compare", type=str, nargs="+", default=None, help="only print reports side by side: A.json B.json"
    )
    group = parser.add_argument_group("images")
    add_image_flags(group)
    group.add_argument(
        "--split",
        type=str | None,
        default=None,
        help="train, validation, test, or several: train,test; left out: the likelihood of held-out images, and "
        "samples beside training and held-out images",
    )
    group.add_argument("--validation_split", type=float, default=0.0, help="the share that was held out in training")
    group = parser.add_argument_group("likelihood (nll, rate_distortion)")
    group.add_argument(
        "--num_images", type=PositiveInt | None, default=None, help="the first this many images; all if left out"
    )
    group.add_argument(
        "--num_evaluations",
        type=int | None,
        default=None,
        help="network evaluations per image, for an estimate; left out: all T, the paper's full sum",
    )
    add_sampler_flags(parser)
    group = parser.add_argument_group("comparison of samples (fid, is, kid, prc, nn)")
    group.add_argument("--num_samples", type=PositiveInt, default=50_000, help="samples to draw; the paper: 50000")
    group.add_argument(
        "--features",
        type=str,
        default="inception",
        help="what images are compared by: inception (the paper), pixels (tiny images), a vision model such as "
        "facebook/dinov2-base, or several of them: inception,pixels",
    )
    group.add_argument(
        "--inception_weights",
        type=str | None,
        default=None,
        help="torch-fidelity's weights file; default: where it keeps them",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=str | None, default=None, help="a folder for report.json, report.md, pictures; or FILE.json"
    )
    group.add_argument(
        "--cache_dir",
        type=str | None,
        default=None,
        help="where features of real images are kept; default: $DDPM_HF_CACHE, or ~/.cache/ddpm_hf",
    )
    return parser


def evaluate(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf evaluate`."""
    values = evaluate_parser(prog).parse_args(list(arguments))
    if values.compare is not None:
        for name in ("model", "output", "dataset", "dataset_name", "train_data_dir"):
            if values[name] is not None:
                raise UsageError(f"--compare only reads reports: leave out --{name}")
        return _compare(values.compare)
    if values.model is None:
        raise UsageError("give the model as --model FOLDER_OR_NAME, or reports as --compare A.json B.json")
    output = None if values.output is None else Path(values.output)
    if output is not None and output.suffix != ".json" and output.is_file():
        raise UsageError(f"--output {values.output} is a file; name a folder, or FILE.json")
    from ..evaluation.run import LIKELIHOOD_METRICS, load_splits, parse_metrics
    from ..evaluation.run import evaluate as evaluate_model
    from ..utils.files import writable_folder
    from ..utils.processes import processes, start_process, together

    check_optimize(values.optimize)
    metrics = parse_metrics(values.metrics)
    if output is not None and output.suffix == ".json":
        writable_folder(output.parent, "--output")
    start_process()
    here = processes()
    with together():
        pipe = load_pipeline(values.model, values.dtype, values.tf32)
        channels, height, width = pipe.image_shape
        sets = load_splits(
            None if values.split is None else [part.strip() for part in values.split.split(",")],
            bool(set(metrics) - set(LIKELIHOOD_METRICS)),
            **image_arguments(values),
            validation_split=values.validation_split,
            channels=channels,
            resolution=(height, width),
        )
    chosen = None if values.split is None else sorted(sets, key=lambda split: split == "train")  # held out comes first
    num_images = sum(len(images) for images in sets.values() if isinstance(images, Sized))
    prepare = inference_optimization(values, _evaluations(pipe, values, metrics, num_images))
    try:
        report = evaluate_model(
            pipe,
            sets,
            metrics,
            likelihood_splits=chosen,
            num_samples=values.num_samples,
            num_images=values.num_images,
            num_evaluations=values.num_evaluations,
            batch_size=values.batch_size,
            sampler=values.sampler,
            variance_type=values.variance_type,
            timestep_spacing=values.timestep_spacing,
            num_inference_steps=values.num_inference_steps,
            eta=values.eta,
            guidance_scale=values.guidance_scale,
            seed=values.seed,
            features=[part.strip() for part in values.features.split(",")],
            inception_weights=values.inception_weights,
            cache_dir=None if values.cache_dir is None else Path(values.cache_dir),
            output=None if output is None or output.suffix == ".json" else output,
            model_name=values.model,
            progress=True,
            prepare=prepare,
        )
    except KeyboardInterrupt:
        print("finished batches are kept: the same command goes on from there", file=sys.stderr)
        raise
    if here.is_main_process:
        _print_report(report)
        if output is not None:
            if output.suffix == ".json":
                report.save(output)
            print(f"wrote {output}")
    return 0


def _evaluations(pipe: Any, values: Any, metrics: Sequence[str], num_images: int) -> int:
    """About how many evaluations of the network follow, of a batch each."""
    from ..evaluation.run import LIKELIHOOD_METRICS

    T = pipe.scheduler.config.num_train_timesteps
    for_likelihoods = min(values.num_images or num_images, num_images) * (values.num_evaluations or T)
    for_samples = values.num_samples * (values.num_inference_steps or T)
    likelihoods, samples = set(metrics) & set(LIKELIHOOD_METRICS), set(metrics) - set(LIKELIHOOD_METRICS)
    return (bool(likelihoods) * for_likelihoods + bool(samples) * for_samples) // values.batch_size


def _print_report(report: Any) -> None:
    from ..utils.text import number

    for name, value in report.values.items():
        if name == "bits_per_dim":
            error = value["standard_error"]
            known = f" +- {error:.4f}" if math.isfinite(error) else ""  # of one image it is not
            print(f"bits/dim on {report.num_images} images: {value['value']:.4f}{known}")
        else:
            print(f"{name}: {number(value['value'], value['standard_error'])}")
    for warning in report.warnings:
        print(f"note: {warning}")


def _compare(paths: Sequence[str]) -> int:
    """`ddpm-hf evaluate --compare`: no model, no images, reports only."""
    if len(paths) < 2:
        raise UsageError("--compare takes at least two reports: --compare A.json B.json")
    from ..evaluation.report import EvaluationReport, compare

    names = [path if paths.count(path) == 1 else f"{path} ({i + 1})" for i, path in enumerate(paths)]
    print(compare({name: EvaluationReport.load(path) for name, path in zip(names, paths, strict=True)}))
    return 0


def optimal_variance_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf optimal_variance`."""
    parser = Parser(
        prog,
        "Measure a network's error on images, for the best variance of the ddpm sampler (Analytic-DPM), and write it "
        "into the model's scheduler.",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=str, required=True, help="a pipeline's folder; its scheduler is rewritten")
    group.add_argument(
        "--keep_variance_type",
        action="store_true",
        help="leave the model's own variance in use; take the new one with --variance_type optimal",
    )
    group = parser.add_argument_group("images")
    add_image_flags(group)
    group.add_argument("--num_images", type=PositiveInt, default=128, help="how many; each costs T evaluations")
    group.add_argument("--batch_size", type=PositiveInt, default=256, help="images at a time")
    group.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser


def optimal_variance(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf optimal_variance`."""
    values = optimal_variance_parser(prog).parse_args(list(arguments))
    from ..data.datasets import load_images
    from ..evaluation.optimal_variance import prediction_error, save_optimal_variance
    from ..evaluation.run import first_images
    from ..utils.processes import processes, say, start_process, together

    if not Path(values.model).is_dir():
        raise UsageError(f"--model {values.model!r} must be a folder on this machine: its scheduler is rewritten")
    start_process()
    with together():
        pipe = load_pipeline(values.model)
        if not values.keep_variance_type and "learned" in (pipe.scheduler.config.get("variance_type") or ""):
            raise UsageError("this network predicts its own variance; add --keep_variance_type")
        channels, height, width = pipe.image_shape
        data = load_images(**image_arguments(values), split="train", channels=channels, resolution=(height, width))
        images = first_images(data, values.num_images)
    error = prediction_error(pipe, images, batch_size=values.batch_size, seed=values.seed, progress=True)
    with together():
        if processes().is_main_process:
            save_optimal_variance(values.model, pipe, error, use=not values.keep_variance_type)
    say(f"wrote the error on {len(images)} images into {values.model}/scheduler")
    return 0
