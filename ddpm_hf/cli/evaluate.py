"""`ddpm-hf evaluate`: the paper's numbers for a model, in one report."""

import sys
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from ..training.configuration import NOT_NEGATIVE, POSITIVE
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
    text = "nll (bits/dim), rate_distortion, fid, is, kid, prc (precision and recall), dc (density and coverage), "
    text += "fd_infinity, mmd (cmmd on CLIP features), sw (sliced Wasserstein), auth (authenticity), nn (neighbours)"
    flag("--metrics", str, "nll", f"comma-separated: {text}")
    flag("--seed", int, 0, "of the likelihood's noise; sample i has the seed SEED + i", NOT_NEGATIVE)
    flag("--compare", str, None, "only print reports side by side: A.json B.json", nargs="+")
    flag = parser.group("images")
    add_image_flags(flag)
    text = "train, validation, test, or several: train,test; left out: the likelihood of held-out images, and samples "
    flag("--split", str, None, text + "beside training and held-out images")
    flag("--validation_split", float, 0.0, "the share that was held out in training")
    flag = parser.group("likelihood (nll, rate_distortion)")
    flag("--num_images", int, None, "the first this many images; all if left out", POSITIVE)
    text = "network evaluations per image, for an estimate; left out: all T, the paper's full sum, or with "
    text += "--num_inference_steps K (and --sampler ddpm) the bound of the chain of K steps, for nll"
    flag("--num_evaluations", int, None, text)
    model.add_sampler_flags(parser)
    flag = parser.group("comparison of samples (fid, is, kid, prc, dc, fd_infinity, mmd, sw, auth, nn)")
    flag("--num_samples", int, 50_000, "samples to draw; the paper: 50000", POSITIVE)
    text = "sets of so many samples, each with its own seeds; the numbers are means, and +- is from the sets' spread"
    flag("--num_sets", int, 1, text, POSITIVE)
    text = "what images are compared by: inception (the paper), pixels (tiny images), efficientnet-lite0, a vision "
    flag("--features", str, "inception", text + "model such as facebook/dinov2-base, or several: inception,pixels")
    flag("--inception_weights", str, None, "Inception weights file; torch-fidelity's own if left out")
    flag = parser.group("output")
    flag("--output", str, None, "a folder for report.json, report.md and pictures; or FILE.json")
    text = "where features of real images are kept; default: $DDPM_HF_CACHE, or ~/.cache/ddpm_hf"
    flag("--cache_dir", str, None, text)


def evaluate(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf evaluate`."""
    values = evaluate_parser(prog).parse_args(arguments)
    (measure if values.compare is None else _compare)(values)


def measure(values: Any) -> None:
    """Evaluate the model that the flags name."""
    if values.model is None:
        raise UserError("give the model as --model FOLDER_OR_NAME, or reports as --compare A.json B.json")
    output = None if values.output is None else Path(values.output)
    file = output if output is not None and output.suffix == ".json" else None
    if file is None and output is not None and output.is_file():
        raise UserError(f"--output {output} is a file; name a folder, or FILE.json")
    from ..evaluation import run
    from ..utils.files import writable_folder
    from ..utils.processes import log, processes, raise_on_all_ranks, start_process

    metrics = run.parse_metrics(values.metrics)
    if file is not None:
        writable_folder(file.parent, "--output")
    start_process()
    splits = None if values.split is None else [part.strip() for part in values.split.split(",")]
    likelihood, samples = (set(metrics) & set(known) for known in (run.LIKELIHOOD_METRICS, run.SAMPLE_METRICS))
    with raise_on_all_ranks():
        pipe = model.load_guided_pipeline(values)
        images = image_arguments(values, pipe.image_shape)
        sets = run.load_splits(splits, bool(samples), validation_split=values.validation_split, **images)
    # About how many evaluations of the network follow, of a batch each.
    T, size = pipe.scheduler.config.num_train_timesteps, sum(len(x) for x in sets.values() if isinstance(x, Sized))
    evaluations = min(values.num_images or size, size) * (values.num_evaluations or T) * bool(likelihood)
    samples_in_all = values.num_samples * values.num_sets * bool(samples)
    evaluations += samples_in_all * (values.num_inference_steps or pipe.distilled_steps or T)
    of_few_steps = values.sampler in (None, "ddpm") and values.num_evaluations is None
    if values.num_inference_steps and not (samples or of_few_steps):
        log(f"the likelihood is of the ddpm process and all {T} steps: --num_inference_steps is for samples here")
    names = ["num_images", "num_evaluations", "num_samples", "num_sets", "batch_size", "seed"]
    names += ["features", "inception_weights", "cache_dir"]
    options = {"model_name": values.model, "output": None if file is not None else output, "progress": True}
    # What is held out comes first.
    options |= {"likelihood_splits": splits and sorted(sets, key=lambda split: split == "train")}
    options |= {"likelihood_steps": values.num_inference_steps if of_few_steps else None}
    options |= {"prepare": model.inference_optimization(values, evaluations // values.batch_size)}
    options |= given(values, *names) | vars(model.sampling_options(values))
    try:
        report = run.evaluate(pipe, sets, metrics, **options)
    except KeyboardInterrupt:
        print("finished batches are kept: the same command resumes from there", file=sys.stderr)
        raise
    log("\n".join([*report.lines(), *(f"note: {warning}" for warning in report.warnings)]))
    with raise_on_all_ranks():
        if file is not None and processes().is_main_process:
            report.save(file)
    if output is not None:
        log(f"wrote {output}")


def _compare(values: Any) -> None:
    """Print reports side by side."""
    if strangers := list(given(values, "model", "output", *IMAGE_SOURCES)):
        raise UserError(f"--compare only reads reports: leave out --{strangers[0]}")
    if len(set(values.compare)) < max(2, len(values.compare)):
        raise UserError("--compare takes at least two reports, each once: --compare A.json B.json")
    from ..evaluation.report import EvaluationReport, compare

    print(compare({path: EvaluationReport.load(path) for path in values.compare}))
