"""`ddpm-hf scale_epsilon`: divide the predicted noise for a sampler of few steps, in weights that stock opens too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..training.configuration import NOT_NEGATIVE, POSITIVE, one_of
from ..utils.errors import UserError
from ..utils.files import check_new_folder
from ..utils.text import table
from . import model
from .command_line import Parser, add_image_flags, given, image_arguments


def scale_epsilon_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf scale_epsilon`."""
    parser = Parser(prog, "Find the epsilon scaling of a sampler and a number of steps, and write the scaled model.")
    flag = parser.group("model")
    model.add_model_flags(flag, batch_size=256)
    flag("--output", str, None, "a new folder for the scaled model; left out: measure only")
    model.add_chain_flags(parser.group("sampler"))
    flag = parser.group("search")
    text = "distance (Frechet, of samples from held-out images) or norms (of the predicted epsilon: equal on average)"
    flag("--objective", str, "distance", text, one_of("distance", "norms"))
    flag("--ramp", bool, False, "also find lambda(t) = k t + b, for --epsilon_scale of sample and evaluate")
    flag("--num_samples", int, 1000, "samples per distance; about 15 distances are computed", POSITIVE)
    flag("--features", str, "pixels", "what the distance is of: pixels, inception, facebook/dinov2-base, ...")
    flag("--inception_weights", str, None, "Inception weights file; torch-fidelity's own if left out")
    text = "of the first sample; the numbers at the end are of the seeds after those searched with"
    flag("--seed", int, 0, text, NOT_NEGATIVE)
    flag = parser.group("images")
    add_image_flags(flag)
    flag("--validation_split", float, 0.0, "the share that was held out in training")
    flag("--num_images", int, 1000, "the first this many", POSITIVE)
    return parser


def scale_epsilon(arguments: Sequence[str], prog: str | None = None) -> int:
    """Run `ddpm-hf scale_epsilon`."""
    values = scale_epsilon_parser(prog).parse_args(arguments)
    values.sampler = values.sampler or "ddpm"
    if values.num_inference_steps is None:
        raise UserError("give --num_inference_steps: the scale is one of a sampler and its number of steps")
    output = None if values.output is None else Path(values.output)
    if output is not None:
        check_new_folder(output)
    from ..evaluation import epsilon_scaling, run
    from ..evaluation.features import make_extractor
    from ..hub.files import facts_of_model, write_model
    from ..sampling.generation import check_sampler
    from ..utils.processes import log, processes, raise_on_all_ranks, start_process

    start_process()
    chain, steps = given(values, "num_inference_steps", "eta"), values.num_inference_steps
    with raise_on_all_ranks():
        pipe = model.load_pipeline(values.model, weights=values.weights)
        model.check_not_distilled(pipe, "scale_epsilon")
        if output is not None:
            epsilon_scaling.check_can_be_scaled(pipe)
        sampled = model.sampling_options(values).pipeline(pipe)
        check_sampler(sampled, **chain)
        arguments_of_images = image_arguments(values, pipe.image_shape)
        sets = run.load_splits(None, False, validation_split=values.validation_split, **arguments_of_images)
        images = run.first_images(next(iter(sets.values())), values.num_images)
        extractor = make_extractor(values.features, pipe.image_shape, values.inception_weights, pipe.device)
    common = {**chain, "batch_size": values.batch_size}
    main = processes().is_main_process
    norms = {**common, "seed": values.seed, "progress": True}
    distance, distance_of_others = (
        epsilon_scaling.sample_distance(
            sampled, images, extractor, range(first, first + values.num_samples), **common, progress=main
        )
        for first in (values.seed, values.seed + values.num_samples)
    )
    objective = distance
    if values.objective == "norms":
        objective = epsilon_scaling.norm_mismatch(sampled, images, **norms)
    scales = {"no scaling": (1.0, 0.0)} | _found(
        objective, pipe.scheduler.config.num_train_timesteps, values.ramp, main
    )
    log(_table({name: (scale, distance_of_others(scale)) for name, scale in scales.items()}))
    found = scales.values()
    biases = [epsilon_scaling.exposure_bias(sampled, images, epsilon_scale=scale, **norms) for scale in found]
    log("\n" + _norms(list(scales), biases))
    if output is not None:
        scaled = epsilon_scaling.scaled_model(pipe, scales["constant"][0], values.sampler, steps)
        with raise_on_all_ranks():
            if processes().is_main_process:
                write_model(output, scaled, facts_of_model(values.model, output.name, values.weights))
        log(f"wrote {output}: epsilon divided by {scales['constant'][0]:.4f}, for {values.sampler} over {steps} steps")
    return 0


def _found(objective: Callable[[Any], float], T: int, with_ramp: bool, show: bool) -> dict[str, tuple[float, float]]:
    """Return b and k of the best constant and, if asked for, of the best ramp; with a progress bar."""
    from ..evaluation.epsilon_scaling import EVALUATIONS, find_epsilon_scale
    from ..utils.progress import progress_bar

    with progress_bar(EVALUATIONS * (1 + with_ramp), "search", "scale", show) as bar:

        @functools.cache  # the search for a ramp begins with that for a constant
        def counted(scale: Any) -> float:
            value = objective(scale)
            bar.update()
            return value

        kinds = {"constant": False, "ramp": True} if with_ramp else {"constant": False}
        return {name: find_epsilon_scale(counted, T, ramp) for name, ramp in kinds.items()}


def _table(found: dict[str, tuple[tuple[float, float], float]]) -> str:
    """Return scales and their distances as Markdown."""
    rows = [[name, f"{b:.4f}", f"{k:.3g}", f"{d:.5g}"] for name, ((b, k), d) in found.items()]
    return table([["lambda(t) = k t + b", "b", "k per timestep", "distance, other seeds"], *rows])


def _norms(names: list[str], biases: list[Any]) -> str:
    """Return the ratios of norms at about ten timesteps as Markdown."""
    head = ["t", "norm of epsilon, training", *(f"sampling / training, {name}" for name in names)]
    K = len(biases[0].timesteps)
    rows = [
        [str(biases[0].timesteps[i]), f"{biases[0].training[i]:.4g}", *(f"{bias.ratio[i]:.4f}" for bias in biases)]
        for i in sorted({round(i * (K - 1) / 9) for i in range(10)})
    ]
    return table([head, *rows], texts=())
