"""`ddpm-hf evaluate`: the paper's numbers for a model, in one report."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from ..training.configuration import POSITIVE
from ..utils.errors import UserError
from . import model
from .command_line import IMAGE_SOURCES, Parser, add_image_flags, given, image_arguments


def evaluate_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf evaluate`."""
    parser = Parser(prog, "The numbers of the paper's tables for a model.")
    add_evaluation_flags(parser)
    return parser


def add_evaluation_flags(parser: Parser) -> None:
    """Add what `measure` takes."""
    flag = parser.group("model and numbers")
    model.add_model_flags(flag, batch_size=256, required=False)
    text = "nll (bits/dim), rate_distortion, fid, is, kid, prc (precision and recall), nn (nearest neighbours)"
    flag("--metrics", str, "nll", f"comma-separated: {text}")
    flag("--seed", int, 0, "of the likelihood's noise; sample i has the seed SEED + i")
    flag("--compare", str, None, "only print reports side by side: A.json B.json", nargs="+")
    flag = parser.group("images")
    add_image_flags(flag)
    flag(
        "--split",
        str,
        None,
        "train, validation, test, or several: train,test; left out: the likelihood of held-out images, and samples "
        "beside training and held-out images",
    )
    flag("--validation_split", float, 0.0, "the share that was held out in training")
    flag = parser.group("likelihood (nll, rate_distortion)")
    flag("--num_images", int, None, "the first this many images; all if left out", POSITIVE)
    text = "network evaluations per image, for an estimate; left out: all T, the paper's full sum"
    flag("--num_evaluations", int, None, text)
    model.add_sampler_flags(parser)
    flag = parser.group("comparison of samples (fid, is, kid, prc, nn)")
    flag("--num_samples", int, 50_000, "samples to draw; the paper: 50000", POSITIVE)
    flag(
        "--features",
        str,
        "inception",
        "what images are compared by: inception (the paper), pixels (tiny images), a vision model such as "
        "facebook/dinov2-base, or several of them: inception,pixels",
    )
    flag("--inception_weights", str, None, "Inception weights file; torch-fidelity's own if left out")
    flag = parser.group("output")
    flag("--output", str, None, "a folder for report.json, report.md and pictures; or FILE.json")
    text = "where features of real images are kept; default: $DDPM_HF_CACHE, or ~/.cache/ddpm_hf"
    flag("--cache_dir", str, None, text)


def evaluate(arguments: Sequence[str], prog: str | None = None) -> int:
    """Run `ddpm-hf evaluate`."""
    values = evaluate_parser(prog).parse_args(arguments)
    return measure(values) if values.compare is None else _compare(values)


def measure(values: Any) -> int:
    """Evaluate the model that the flags name."""
    if values.model is None:
        raise UserError("give the model as --model FOLDER_OR_NAME, or reports as --compare A.json B.json")
    output = None if values.output is None else Path(values.output)
    file = output if output is not None and output.suffix == ".json" else None
    folder = output if file is None else None
    if folder is not None and folder.is_file():
        raise UserError(f"--output {folder} is a file; name a folder, or FILE.json")
    from ..evaluation.options import LIKELIHOOD_METRICS, parse_metrics
    from ..evaluation.run import evaluate as evaluate_model
    from ..evaluation.run import load_splits
    from ..utils.files import writable_folder
    from ..utils.processes import processes, raise_on_all_ranks, start_process

    metrics = parse_metrics(values.metrics)
    if file is not None:
        writable_folder(file.parent, "--output")
    start_process()
    here = processes()
    with raise_on_all_ranks():
        pipe = model.load_pipeline(values.model, values.dtype, values.tf32)
        sets = load_splits(
            None if values.split is None else _parts(values.split),
            bool(set(metrics) - set(LIKELIHOOD_METRICS)),
            validation_split=values.validation_split,
            **image_arguments(values, pipe.image_shape),
        )
    num_images = sum(len(images) for images in sets.values() if isinstance(images, Sized))
    try:
        report = evaluate_model(
            pipe,
            sets,
            metrics,
            # what is held out comes first
            likelihood_splits=None if values.split is None else sorted(sets, key=lambda split: split == "train"),
            features=_parts(values.features),
            cache_dir=None if values.cache_dir is None else Path(values.cache_dir),
            output=folder,
            model_name=values.model,
            progress=True,
            prepare=model.inference_optimization(values, _evaluations(pipe, values, metrics, num_images)),
            **given(values, "num_images", "num_evaluations", "num_samples", "batch_size", "seed", "inception_weights"),
            **model.sampler_arguments(values),
            **model.sampling_arguments(values),
        )
    except KeyboardInterrupt:
        print("finished batches are kept: the same command resumes from there", file=sys.stderr)
        raise
    if here.is_main_process:
        _print_report(report)
        if file is not None:
            report.save(file)
        if output is not None:
            print(f"wrote {output}")
    return 0


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _evaluations(pipe: Any, values: Any, metrics: Sequence[str], num_images: int) -> int:
    """Return about how many evaluations of the network follow, of a batch each."""
    from ..evaluation.options import LIKELIHOOD_METRICS

    T = pipe.scheduler.config.num_train_timesteps
    found = 0
    if set(metrics) & set(LIKELIHOOD_METRICS):
        found += min(values.num_images or num_images, num_images) * (values.num_evaluations or T)
    if set(metrics) - set(LIKELIHOOD_METRICS):
        found += values.num_samples * (values.num_inference_steps or T)
    return found // values.batch_size


def _print_report(report: Any) -> None:
    from ..utils.text import number

    for name, value in report.values.items():
        if name == "bits_per_dim":
            error = value["standard_error"]
            known = f" +- {error:.4f}" if math.isfinite(error) else ""  # one image has none
            print(f"bits/dim on {report.num_images} images: {value['value']:.4f}{known}")
        else:
            print(f"{name}: {number(value['value'], value['standard_error'])}")
    for warning in report.warnings:
        print(f"note: {warning}")


def _compare(values: Any) -> int:
    """Print reports side by side."""
    for name in ("model", "output", *IMAGE_SOURCES):
        if getattr(values, name) is not None:
            raise UserError(f"--compare only reads reports: leave out --{name}")
    paths = values.compare
    if len(paths) < 2:
        raise UserError("--compare takes at least two reports: --compare A.json B.json")
    from ..evaluation.report import EvaluationReport, compare

    names = [path if paths.count(path) == 1 else f"{path} ({i + 1})" for i, path in enumerate(paths)]
    print(compare({name: EvaluationReport.load(path) for name, path in zip(names, paths, strict=True)}))
    return 0
