"""`ddpm-hf train | sample | evaluate | reproduce | convert | push ...`: flags and YAML in, exit codes out.

A user's mistake gets one sentence on stderr and exit code 2. Heavy libraries are imported by the command that needs
them.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from jsonargparse.typing import PositiveInt

from .command_line import Parser, UsageError, add_flags, add_image_flags, image_source, parse_configs
from .configuration import ReproductionConfig, TrainingConfig


def training_parser(prog: str | None = None) -> ArgumentParser:
    """The parser of `ddpm-hf train` and `examples/train.py`."""
    parser = Parser(allow_abbrev=False, prog=prog, description="Train a DDPM (Ho et al. 2020).")
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these flags; the command line wins")
    add_flags(parser, TrainingConfig)
    return parser


def parse_training_config(arguments: Sequence[str], prog: str | None = None) -> TrainingConfig:
    """Flags, and the YAML files they name, as a checked `TrainingConfig`.

    Raises:
        ValueError: Anything that cannot be taken, in one sentence.
    """
    return parse_configs(training_parser(prog), arguments, TrainingConfig)[0]


def train(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf train`, and all that `examples/train.py` does."""
    config = parse_training_config(arguments, prog)
    from .training import Trainer

    Trainer(config).train()
    return 0


def sample(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf sample`."""
    parser = Parser(allow_abbrev=False, prog=prog, description="Draw images from a trained model.")
    parser.add_argument("--model", type=str, required=True, help="a pipeline's folder, or its name on the Hub")
    parser.add_argument("--output", type=str, required=True, help="a folder of PNGs, FILE.npz, or FILE.png (a grid)")
    parser.add_argument(
        "--seeds",
        type=str | None,
        default=None,
        help="one image per seed, for example 0-63 or 0,5,8-11; default: 0-15",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time; does not change them")
    parser.add_argument("--num_inference_steps", type=int | None, default=None, help="sampler steps; default: T")
    parser.add_argument("--sampler", type=str, default="ddpm", help="ddpm (Algorithm 2), ddim, dpmsolver++ or unipc")
    parser.add_argument(
        "--variance_type",
        type=str | None,
        default=None,
        help="of ddpm, instead of the model's: fixed_small, fixed_large, or optimal after ddpm-hf optimal_variance",
    )
    parser.add_argument(
        "--timestep_spacing",
        type=str | None,
        default=None,
        help="which timesteps a short chain takes: leading, linspace or trailing; default: the model's",
    )
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim: 0 none, 1 as much as ddpm")
    parser.add_argument(
        "--dtype",
        type=str,
        default="float32",
        help="the network's: float32, bfloat16 or float16 (GPU); not the chain's",
    )
    parser.add_argument(
        "--class_labels", type=str | None, default=None, help="classes by name or number, in turn: cats,dogs or 0,1"
    )
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1: as learned; more exaggerates the class")
    _add_figure_flags(parser)
    values = parser.parse_args(list(arguments))
    if _wants_figure(values):
        return _draw_figure(values)
    from .generation import class_sequence, parse_seeds, with_sampler, write_samples
    from .processes import say

    seeds = parse_seeds("0-15" if values.seeds is None else values.seeds)
    loaded = _load_pipeline(values.model, values.dtype)
    pipe = with_sampler(loaded, values.sampler, values.variance_type, values.timestep_spacing)
    drawn = write_samples(
        pipe,
        seeds,
        values.output,
        batch_size=values.batch_size,
        num_inference_steps=values.num_inference_steps,
        progress=True,
        class_labels=class_sequence(pipe, values.class_labels, len(seeds)),
        guidance_scale=values.guidance_scale,
        eta=values.eta,
    )
    say(
        f"wrote {drawn} images to {values.output}"
        + (f", {len(seeds) - drawn} were there" if drawn < len(seeds) else "")
    )
    return 0


# What only some figures take, and which do.
_FIGURE_FLAGS = {
    "animation": ("progressive",),
    "images": ("interpolation", "coarse_to_fine"),
    "dataset": ("interpolation", "coarse_to_fine"),
    "dataset_name": ("interpolation", "coarse_to_fine"),
    "train_data_dir": ("interpolation", "coarse_to_fine"),
    "t": ("interpolation",),
}


def _add_figure_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the paper's figures")
    group.add_argument(
        "--figure",
        type=str | None,
        default=None,
        help="draw one into --output FILE.png: progressive, shared_latents, interpolation or coarse_to_fine",
    )
    group.add_argument("--animation", type=str | None, default=None, help="progressive too: FILE.gif, .webp or .png")
    group.add_argument(
        "--images", type=str, nargs="+", default=None, help="to interpolate between: A.png B.png, or several pairs"
    )
    group.add_argument("--dataset", type=str | None, default=None, help="instead: the first images of digits")
    group.add_argument("--dataset_name", type=str | None, default=None, help="of a dataset by Hub id or local path")
    group.add_argument("--train_data_dir", type=str | None, default=None, help="of a folder")
    group.add_argument("--t", type=int | None, default=None, help="diffusion steps before interpolation; default: T/2")


def _wants_figure(values: Any) -> bool:
    """Whether a figure is asked for; its flags may not stand without one."""
    if values.figure is None:
        for name, figures in _FIGURE_FLAGS.items():
            if values[name] is not None:
                raise UsageError(f"--{name} goes with --figure {' or '.join(figures)}")
    return values.figure is not None


def _draw_figure(values: Any) -> int:
    """`ddpm-hf sample --figure`: everything is checked before anything is sampled."""
    from . import figures
    from .generation import class_sequence, parse_seeds, with_sampler
    from .presets import nearest
    from .processes import processes
    from .visualize import animation_format, check_writable, save_animation, save_picture

    figure = values.figure
    if figure not in figures.FIGURES:
        raise UsageError(
            f"unknown --figure {figure!r}{nearest(figure, figures.FIGURES)}; there are {', '.join(figures.FIGURES)}"
        )
    for name, takers in _FIGURE_FLAGS.items():
        if values[name] is not None and figure not in takers:
            raise UsageError(f"--{name} goes with --figure {' or '.join(takers)}, not with {figure}")
    if Path(values.output).suffix.lower() != ".png":
        raise UsageError(f"--output of a figure must be FILE.png, got {values.output!r}")
    if values.animation is not None:
        animation_format(values.animation)
        if Path(values.animation).absolute() == Path(values.output).absolute():
            raise UsageError("--animation and --output name the same file")
    default = {"progressive": "0-7", "shared_latents": "0-8", "interpolation": "0-3", "coarse_to_fine": "0"}[figure]
    if values.seeds is None and values.images is not None:
        default = f"0-{max(len(values.images) // 2 - 1, 0)}"
    seeds = parse_seeds(default if values.seeds is None else values.seeds)
    interpolating = figure in _FIGURE_FLAGS["images"]
    if interpolating:
        _check_pairs(values, len(seeds))
    if not processes().is_main_process:
        return 0  # one picture, one process
    loaded = _load_pipeline(values.model, values.dtype)
    pipe = with_sampler(loaded, values.sampler, values.variance_type, values.timestep_spacing)
    if pipe.image_shape[0] not in (1, 3):
        raise UsageError(f"a figure needs images of 1 or 3 channels, and the model's have {pipe.image_shape[0]}")
    options = {
        "num_inference_steps": values.num_inference_steps,
        "batch_size": values.batch_size,
        "class_labels": class_sequence(pipe, values.class_labels, len(seeds)),
        "guidance_scale": values.guidance_scale,
        "eta": values.eta,
        "progress": True,
    }
    given = _given_images(values, 2 * len(seeds), pipe.image_shape) if interpolating else None
    check_writable(values.output)
    if values.animation is not None:
        check_writable(values.animation)

    made: Any
    if given is None:
        draw = figures.progressive_generation if figure == "progressive" else figures.shared_latents
        made = draw(pipe, seeds, **options)
    elif figure == "interpolation":
        made = figures.interpolate(pipe, given[0::2], given[1::2], values.t, seeds=seeds, **options)
    else:
        made = figures.coarse_to_fine(pipe, given[:1], given[1:], seed=seeds[0], **options)
    save_picture(made.draw(), values.output)
    print(f"wrote {values.output}")
    if values.animation is not None:
        save_animation(made.frames(), values.animation)
        print(f"wrote {values.animation}")
    return 0


def _check_pairs(values: Any, seeds: int) -> None:
    """As many pairs of images as seeds, from one place.

    Raises:
        UsageError: They are not.
    """
    sources = [name for name in ("images", "dataset", "dataset_name", "train_data_dir") if values[name] is not None]
    if len(sources) != 1:
        raise UsageError(
            f"--figure {values.figure} needs images to interpolate between: give --images A.png B.png, or exactly one "
            f"of --dataset, --dataset_name and --train_data_dir; got {' and '.join(sources) or 'none'}"
        )
    if values.figure == "coarse_to_fine" and (seeds != 1 or len(values.images or [0, 0]) != 2):
        raise UsageError("--figure coarse_to_fine is of one pair of images: give two images, and one seed or none")
    if values.images is not None and len(values.images) != 2 * seeds:
        hint = "" if values.seeds is None else f", one pair for each of the {seeds} seeds"
        raise UsageError(f"--images takes pairs of images, A.png B.png and so on{hint}, got {len(values.images)}")


def _given_images(values: Any, count: int, image_shape: tuple[int, int, int]) -> Any:
    """The images to interpolate between, `[count, C, H, W]` uint8."""
    import numpy as np
    import torch

    from .data import load_images
    from .evaluation import first_images
    from .image_files import ImageFormat, read_image

    channels, height, width = image_shape
    if values.images is None:
        images = first_images(
            load_images(**image_source(values), channels=channels, resolution=(height, width)), count
        ).images
        if len(images) < count:
            raise UsageError(f"{len(images)} images are too few for {count // 2} pairs; give fewer --seeds")
        return images
    pixels = []
    for name in values.images:
        try:
            pixels.append(read_image(Path(name), ImageFormat(channels, (height, width))))
        except ValueError as error:
            raise UsageError(f"cannot read --images {name}: {error}") from error
    return torch.from_numpy(np.stack(pixels))


def evaluate(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf evaluate`."""
    parser = Parser(allow_abbrev=False, prog=prog, description="The numbers of the paper's tables for a model.")
    parser.add_argument("--model", type=str | None, default=None, help="a pipeline's folder, or its name on the Hub")
    parser.add_argument(
        "--metrics",
        type=str,
        default="nll",
        help="of nll (bits/dim), rate_distortion, fid, is, kid, prc (precision and recall), nn (nearest neighbours)",
    )
    add_image_flags(parser)
    parser.add_argument(
        "--split",
        type=str | None,
        default=None,
        help="train, validation, test, or several: train,test; left out: the likelihood of held-out images, and "
        "samples beside training and held-out images",
    )
    parser.add_argument("--validation_split", type=float, default=0.0, help="as in training: what was held out")
    parser.add_argument("--num_samples", type=PositiveInt, default=50_000, help="samples for fid, is, kid, prc, nn")
    parser.add_argument(
        "--num_images", type=PositiveInt | None, default=None, help="the first this many images, for the likelihood"
    )
    parser.add_argument(
        "--num_evaluations", type=int | None, default=None, help="stratified estimate; the full sum if left out"
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=256, help="images at a time; changes no number")
    parser.add_argument("--num_inference_steps", type=int | None, default=None, help="sampler steps; default: T")
    parser.add_argument("--sampler", type=str, default="ddpm", help="ddpm (Algorithm 2), ddim, dpmsolver++ or unipc")
    parser.add_argument("--variance_type", type=str | None, default=None, help="of ddpm, as in ddpm-hf sample")
    parser.add_argument("--timestep_spacing", type=str | None, default=None, help="leading, linspace or trailing")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of the first sample")
    parser.add_argument(
        "--features",
        type=str,
        default="inception",
        help="what images are compared by: inception, pixels (tiny images), a vision model such as "
        "facebook/dinov2-base, or several of them: inception,pixels",
    )
    parser.add_argument(
        "--inception_weights", type=str | None, default=None, help="torch-fidelity's weights file; default: its place"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="a folder for report.json, report.md, pictures; or FILE.json"
    )
    parser.add_argument("--cache_dir", type=str | None, default=None, help="where features of real images are kept")
    parser.add_argument(
        "--compare", type=str, nargs="+", default=None, help="print reports side by side: A.json B.json"
    )
    values = parser.parse_args(list(arguments))
    if values.compare is not None:
        return _compare(values.compare)
    if values.model is None:
        raise UsageError("give the model as --model FOLDER_OR_NAME, or reports as --compare A.json B.json")
    output = None if values.output is None else Path(values.output)
    if output is not None and output.suffix != ".json" and output.is_file():
        raise UsageError(f"--output {values.output} is a file; name a folder, or FILE.json")
    from .evaluation import LIKELIHOOD_METRICS, default_cache_dir, load_splits, parse_metrics
    from .evaluation import evaluate as evaluate_model
    from .processes import end_with_the_launcher, processes, set_cpu_threads
    from .reports import writable_folder

    metrics = parse_metrics(values.metrics)
    if output is not None and output.suffix == ".json":
        writable_folder(output.parent, "--output")
    end_with_the_launcher()
    here = processes()
    set_cpu_threads(None, here.num_processes)
    pipe = _load_pipeline(values.model).to(here.device)
    channels, height, width = pipe.image_shape
    sets = load_splits(
        None if values.split is None else [part.strip() for part in values.split.split(",")],
        bool(set(metrics) - set(LIKELIHOOD_METRICS)),
        dataset=values.dataset,
        dataset_name=values.dataset_name,
        train_data_dir=values.train_data_dir,
        validation_split=values.validation_split,
        channels=channels,
        resolution=(height, width),
    )
    chosen = None if values.split is None else sorted(sets, key=lambda split: split == "train")  # held out comes first
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
            seed=values.seed,
            features=[part.strip() for part in values.features.split(",")],
            inception_weights=values.inception_weights,
            cache_dir=default_cache_dir() if values.cache_dir is None else Path(values.cache_dir),
            output=None if output is None or output.suffix == ".json" else output,
            model_name=values.model,
            progress=True,
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


def _print_report(report: Any) -> None:
    from .reports import number

    for name, value in report.values.items():
        if name == "bits_per_dim":
            print(f"bits/dim on {report.num_images} images: {value['value']:.4f} +- {value['standard_error']:.4f}")
        else:
            print(f"{name}: {number(value['value'], value['standard_error'])}")
    for warning in report.warnings:
        print(f"note: {warning}")


def _compare(paths: Sequence[str]) -> int:
    """`ddpm-hf evaluate --compare`: no model, no images, reports only."""
    if len(paths) < 2:
        raise UsageError("--compare takes at least two reports: --compare A.json B.json")
    from .reports import EvaluationReport, compare

    names = [path if paths.count(path) == 1 else f"{path} ({i + 1})" for i, path in enumerate(paths)]
    print(compare({name: EvaluationReport.load(path) for name, path in zip(names, paths, strict=True)}))
    return 0


def optimal_variance(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf optimal_variance`."""
    parser = Parser(
        allow_abbrev=False,
        prog=prog,
        description="Measure a network's error on images, for the best variance of the ddpm sampler (Analytic-DPM), "
        "and write it into the model's scheduler.",
    )
    parser.add_argument("--model", type=str, required=True, help="a pipeline's folder; its scheduler is rewritten")
    add_image_flags(parser)
    parser.add_argument("--num_images", type=PositiveInt, default=128, help="how many; each costs T evaluations")
    parser.add_argument("--batch_size", type=PositiveInt, default=256, help="images at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument(
        "--keep_variance_type",
        action="store_true",
        help="leave the model's own variance in use; take the new one with --variance_type optimal",
    )
    values = parser.parse_args(list(arguments))
    from .data import load_images
    from .evaluation import first_images
    from .optimal_variance import prediction_error, save_optimal_variance
    from .processes import processes, say, together

    if not Path(values.model).is_dir():
        raise UsageError(f"--model {values.model!r} must be a folder on this machine: its scheduler is rewritten")
    pipe = _load_pipeline(values.model)
    if not values.keep_variance_type and "learned" in pipe.scheduler.config.variance_type:
        raise UsageError("this network predicts its own variance; add --keep_variance_type")
    channels, height, width = pipe.image_shape
    data = load_images(**image_source(values), split="train", channels=channels, resolution=(height, width))
    images = first_images(data, values.num_images)
    error = prediction_error(pipe, images, batch_size=values.batch_size, seed=values.seed, progress=True)
    with together():
        if processes().is_main_process:
            save_optimal_variance(values.model, pipe, error, use=not values.keep_variance_type)
    say(f"wrote the error on {len(images)} images into {values.model}/scheduler")
    return 0


def reproduce(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf reproduce`."""
    parser = training_parser(prog)
    parser.description = "An experiment of the paper from start to end: train, sample, measure, compare."
    add_flags(parser, ReproductionConfig)
    config, options = parse_configs(parser, arguments, TrainingConfig, ReproductionConfig)
    from .processes import say
    from .reproduction import reproduce as reproduce_experiment

    try:
        found = reproduce_experiment(config, options)
    except KeyboardInterrupt:
        print("what is finished is kept: the same command goes on from there", file=sys.stderr)
        raise
    if found is None:
        say("not finished: the same command goes on from there")
        return 130
    say(f"{found.preset.name}: {found.preset.source}\n\n{found.table()}\n\nwrote {config.output_dir}/reproduction.md")
    return 0


def convert(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf convert`."""
    parser = Parser(prog=prog, description="Other people's weights to a stock-readable folder, or ours to TensorFlow.")
    parser.add_argument(
        "--from",
        type=str | None,
        default=None,
        help="official_tf, pesser (also ermongroup), pytorch_ddpm, improved_diffusion or diffusers",
    )
    parser.add_argument(
        "--to", type=str | None, default=None, help="official_tf: write our weights for the official code"
    )
    parser.add_argument("--checkpoint", type=str, required=True, help="the file; for TensorFlow without its ending")
    parser.add_argument("--output", type=str, required=True, help="the folder to make")
    parser.add_argument("--sample_size", type=int | None, default=None, help="height and width of the images")
    parser.add_argument("--preset", type=str | None, default=None, help="gives sample size and diffusion process")
    parser.add_argument("--no_ema", action="store_true", help="take the raw weights instead of the averaged ones")
    parser.add_argument("--num_heads", type=int, default=1, help="attention heads (improved_diffusion)")
    parser.add_argument("--variance_type", type=str | None, default=None, help="of the scheduler; see the docs")
    values = parser.parse_args(list(arguments))
    if (values["from"] is None) == (values["to"] is None):
        raise UsageError("give either --from FORMAT (to ours) or --to official_tf (from ours)")
    from . import convert as conversion

    if values["to"] is not None:
        if values["to"] != "official_tf":
            raise UsageError(f"--to knows official_tf, got {values['to']!r}")
        print(f"wrote {conversion.convert_to_official(values['checkpoint'], values['output'])}")
        return 0
    pipe = conversion.convert(
        values["from"],
        values["checkpoint"],
        values["output"],
        sample_size=values["sample_size"],
        preset=values["preset"],
        ema=not values["no_ema"],
        num_heads=values["num_heads"],
        variance_type=values["variance_type"],
    )
    count = sum(p.numel() for p in pipe.unet.parameters())
    print(f"wrote {values['output']}: {count:,} parameters, variance {pipe.scheduler.config.variance_type}")
    return 0


def push(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf push`."""
    parser = Parser(allow_abbrev=False, prog=prog, description="Publish a model's folder on the Hub, in one commit.")
    parser.add_argument("run", type=str, help="a run's output folder, or any folder that save_pretrained wrote")
    parser.add_argument("--repo_id", type=str, required=True, help="org/name on the Hub; made if it does not exist")
    parser.add_argument(
        "--private",
        "--hub_private_repo",
        type=bool,
        nargs="?",
        const=True,
        default=True,
        help="false: publish for everybody to see",
    )
    parser.add_argument(
        "--token",
        "--hub_token",
        type=str | None,
        default=None,
        help="better: 'hf auth login' or HF_TOKEN, which other users of the machine cannot see",
    )
    parser.add_argument("--license", type=str | None, default=None, help="for the card, such as apache-2.0")
    parser.add_argument(
        "--report", type=str | None, default=None, help="an evaluation to show instead of the run's own"
    )
    parser.add_argument("--commit_message", type=str, default="Upload a DDPM", help="what the commit is called")
    values = parser.parse_args(list(arguments))
    from .hub import Push, quiet_client

    quiet_client()
    job = Push(
        values.run,
        values.repo_id,
        private=values.private,
        token=values.token,
        license=values.license,
        report=values.report,
        commit_message=values.commit_message,
    )
    print(job.run())
    return 0


def space(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf space`."""
    parser = Parser(allow_abbrev=False, prog=prog, description="Make a web page (a Space) of a trained model.")
    parser.add_argument("run", type=str, help="a run's output folder, or any folder that save_pretrained wrote")
    parser.add_argument("--repo_id", type=str | None, default=None, help="org/name of the Space; made or renewed")
    parser.add_argument(
        "--output", type=str | None, default=None, help="only write it into this folder, to run FOLDER/app.py"
    )
    parser.add_argument(
        "--model_id", type=str | None, default=None, help="load the model by this name on the Hub, and copy none"
    )
    parser.add_argument(
        "--private", type=bool, nargs="?", const=True, default=True, help="false: a page for everybody to see"
    )
    parser.add_argument(
        "--token", "--hub_token", type=str | None, default=None, help="better: 'hf auth login' or HF_TOKEN"
    )
    parser.add_argument("--license", type=str | None, default=None, help="of the model; default: what its card says")
    values = parser.parse_args(list(arguments))
    if values.repo_id is None and values.output is None:
        raise UsageError("give --repo_id org/name to push the Space, or --output FOLDER to write it here")
    if values.repo_id is not None and values.output is not None:
        raise UsageError("give either --repo_id to push the Space, or --output to write it here")
    from .hub import quiet_client
    from .space import push_space, write_space

    quiet_client()
    options = {"model_id": values.model_id, "license": values.license, "token": values.token}
    if values.output is not None:
        write_space(values.run, values.output, **options)
        print(f"wrote {values.output}; try it with: python {Path(values.output) / 'app.py'}")
        return 0
    print(push_space(values.run, values.repo_id, private=values.private, **options))
    return 0


def _load_pipeline(model: str, dtype: str = "float32") -> Any:
    import torch
    from diffusers.utils import logging

    from .pipeline_ddpm import DDPMPipeline
    from .processes import processes

    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    logging.disable_progress_bar()  # loading takes no time worth a bar
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise UsageError(f"--model {model} holds no pipeline: there is no model_index.json in it")
    try:
        return DDPMPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(processes().device)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load --model {model}: {str(error).strip().splitlines()[0]}") from error


COMMANDS: dict[str, Callable[..., int]] = {
    "optimal_variance": optimal_variance,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "convert": convert,
    "push": push,
    "space": space,
}

_HELP = """usage: ddpm-hf COMMAND [flags]

  train      train a model; the same as examples/train.py
  sample     draw images from a model
  optimal_variance   measure a model for better samples in few steps
  evaluate   the paper's numbers for a model: bits/dim, FID, IS, KID, neighbours, ...
  reproduce  an experiment of the paper: train, sample, evaluate, compare
  convert    other people's weights to ours, ours to the official format
  push       publish a model on the Hub
  space      a web page on the Hub to try a model out

ddpm-hf COMMAND --help lists the flags of a command."""


def run(command: Callable[..., int], arguments: Sequence[str], prog: str) -> int:
    """Run one command; a user's mistake becomes one sentence on stderr and exit code 2, Ctrl-C exit code 130.

    The environment variable DDPM_HF_TRACEBACK=1 shows where the sentence came from.
    """
    try:
        return command(arguments, prog)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, ArgumentError, OSError) as error:
        if os.environ.get("DDPM_HF_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        _leave_processes()


def _leave_processes() -> None:
    """Part from sibling processes in order: one that just ends makes PyTorch abort now and then."""
    distributed = sys.modules.get("torch.distributed")  # else nothing was joined, and importing it takes seconds
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """The `ddpm-hf` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(f"error: unknown command {name!r}{hint}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(COMMANDS[name], rest, f"ddpm-hf {name}")


if __name__ == "__main__":
    sys.exit(main())
