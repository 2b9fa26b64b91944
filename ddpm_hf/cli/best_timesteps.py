"""`ddpm-hf best_timesteps`: the best K of the T timesteps, found once and kept in the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..training.configuration import NOT_NEGATIVE, POSITIVE, one_of
from ..utils.errors import UserError
from . import model
from .command_line import Parser, add_image_flags, given, image_arguments


def best_timesteps_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf best_timesteps`."""
    parser = Parser(prog, "Find the best few timesteps, and write them into the model's scheduler.")
    flag = parser.group("model and objective")
    model.add_model_flags(flag, batch_size=256)
    text = "bound: bits/dim of the ddpm chain with the optimal variance, exactly; samples: a short search"
    flag("--objective", str, "bound", text, one_of("bound", "samples"))
    model.add_sampler_flags(parser)
    flag = parser.group("images")
    add_image_flags(flag)
    flag("--validation_split", float, 0.0, "the share that was held out in training")
    text = "how many; default: 128 training images (2T evaluations each) for bound, all held-out ones for samples"
    flag("--num_images", int, None, text, POSITIVE)
    flag("--seed", int, 0, "of the noise, and the first of the samples", NOT_NEGATIVE)
    flag = parser.group("search for samples")
    flag("--num_samples", int, 500, "samples for each distance", POSITIVE)
    flag("--num_trials", int, 60, "sets of timesteps to try", POSITIVE)
    flag("--features", str, "inception", "what images are compared by: inception, pixels, or a vision model")
    flag("--inception_weights", str, None, "Inception weights file; torch-fidelity's own if left out")
    return parser


def best_timesteps(arguments: Sequence[str], prog: str | None = None) -> int:
    """Run `ddpm-hf best_timesteps`."""
    values = best_timesteps_parser(prog).parse_args(arguments)
    values.sampler = values.sampler or "ddpm"
    if (K := values.num_inference_steps) is None:
        raise UserError("give the number of timesteps as --num_inference_steps")
    if values.objective == "bound" and values.sampler != "ddpm":
        raise UserError("--objective bound is of the ddpm chain; leave out --sampler, or take --objective samples")
    model.published_folder(values, "ddpm-hf publish makes one of a run or a checkpoint")
    from ..evaluation.optimal_variance import save_scheduler
    from ..pipelines.schedulers import checked_steps
    from ..utils.processes import log, processes, start_process

    start_process()
    if processes().num_processes > 1:
        raise UserError("best_timesteps runs in one process; start it without torchrun or accelerate launch")
    pipe = model.load_pipeline(values.model, values.dtype, values.tf32, values.weights)
    model.check_not_distilled(pipe, "best_timesteps")
    checked_steps(pipe.scheduler, K)
    found = (_for_bound if values.objective == "bound" else _for_samples)(values, pipe)
    if found is None:
        log("the search found no timesteps that are better on seeds it did not see; nothing was written")
        return 0
    saved = dict(pipe.scheduler.config.get("_timesteps") or {}) | {str(K): found}
    pipe.scheduler.register_to_config(_timesteps=dict(sorted(saved.items(), key=lambda item: int(item[0]))))
    save_scheduler(values.model, pipe.scheduler)
    log(f"wrote {K} timesteps into {values.model}/scheduler, for --timestep_spacing best: {' '.join(map(str, found))}")
    return 0


def _for_bound(values: Any, pipe: Any) -> list[int]:
    """Return the best timesteps for the bound; the error of the network, if it was not measured, is kept as well."""
    import torch

    from ..data.datasets import load_images
    from ..evaluation.optimal_variance import prediction_error
    from ..evaluation.run import first_images
    from ..evaluation.timesteps import best_for_bound
    from ..utils.processes import log

    data = load_images(split="train", **image_arguments(values, pipe.image_shape))
    images = first_images(data, values.num_images or 128)
    options = {"batch_size": values.batch_size, "seed": values.seed}
    if (error := pipe.scheduler.config.get("_prediction_error")) is None:
        error = prediction_error(pipe, images, progress=True, **options)
        pipe.scheduler.set_prediction_error(error)
    error = torch.as_tensor(pipe.scheduler.config["_prediction_error"], dtype=torch.float64)
    chain, bound = best_for_bound(pipe, images, error, values.num_inference_steps, progress=True, **options)
    log(f"{bound:.4f} bits/dim on these {len(images)} images, with --variance_type optimal --timestep_spacing best")
    return chain


def _for_samples(values: Any, pipe: Any) -> list[int] | None:
    """Return the timesteps of the search, or `None` where the sampler's own are as good."""
    from ..evaluation.features import make_extractor
    from ..evaluation.options import EvaluationOptions
    from ..evaluation.run import first_images, load_splits
    from ..evaluation.samples import real_images
    from ..evaluation.timesteps import best_for_samples
    from ..sampling.generation import with_sampler
    from ..utils.processes import log

    images = image_arguments(values, pipe.image_shape)
    splits = load_splits(None, False, validation_split=values.validation_split, **images)
    (split, data), *_ = splits.items()
    names = ("num_samples", "batch_size", "seed", "features", "inception_weights")
    options = EvaluationOptions(**given(values, *names), **vars(model.sampling_options(values)), progress=True)
    extractor = make_extractor(values.features, pipe.image_shape, values.inception_weights, pipe.device)
    real = real_images(split, first_images(data, values.num_images), [extractor], options)
    sampler = options.pipeline(pipe)
    if sampler is pipe:  # the search changes its scheduler
        sampler = with_sampler(pipe, "ddpm", timestep_spacing=pipe.scheduler.config.timestep_spacing)
    features = real.features[extractor.name]
    found, best, own = best_for_samples(sampler, features, extractor, options, values.num_trials, log)
    log(f"distance to {split} images on other seeds: {best:.4g}, with the sampler's own timesteps {own:.4g}")
    return found if best < own else None
