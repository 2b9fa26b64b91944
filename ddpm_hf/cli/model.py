"""Which model a command loads and how it is sampled: the flags, and what they name."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..training.configuration import POSITIVE, one_of, paper_value
from ..utils.errors import UserError
from .command_line import Parser, given

# Network evaluations that are worth a minute of compiling on a GPU, and on a CPU a rounding that is not stock's.
_LONG_RUN = 5000


_WEIGHTS = "of a checkpoint: ema (the paper's), or raw (those that the last update left)"


def add_model_flags(flag: Callable[..., None], batch_size: int, required: bool = True) -> None:
    """Add the flags for a model and its batches."""
    text = "a pipeline's folder, its name on the Hub, a run that was stopped, or one of its checkpoints"
    flag("--model", str, None, text, required=required)
    flag("--weights", str, "ema", _WEIGHTS, one_of("ema", "raw"))
    flag("--batch_size", int, batch_size, "images at a time; changes no image and no number", POSITIVE)


def add_run(flag: Callable[..., None]) -> None:
    """Add the folder of a model, by itself or after --model."""
    text = "a folder: a run's, stopped or finished, a checkpoint's, or what save_pretrained wrote"
    flag("run", str, argparse.SUPPRESS, text, metavar="RUN", nargs="?")
    flag("--model", str, None, "the same RUN, as other commands call it", dest="run")
    flag("--weights", str, "ema", _WEIGHTS, one_of("ema", "raw"))


def run_folder(values: Any) -> str:
    """Return the folder that `add_run` took, or raise UserError: none was given."""
    if values.run is None:
        raise UserError("give the folder of the run or model: RUN, or --model RUN")
    return str(values.run)


def published_folder(values: Any, instead: str) -> Path:
    """Return the folder of `--model`, whose scheduler is to be rewritten, or raise UserError: it is not published.

    A stopped run and a checkpoint have no scheduler's file: one beside them would be read by nobody.
    """
    from ..utils.hub_errors import INDEX

    folder = Path(values.model)
    if values.weights == "raw" or not (folder / INDEX).is_file():
        what = f"--model {values.model!r} is no published model here whose scheduler can be rewritten"
        raise UserError(f"{what}; {instead}")
    return folder


def add_chain_flags(flag: Callable[..., None]) -> None:
    """Add the flags of the chain that is sampled from."""
    text = "ddpm (Algorithm 2; the paper; the default), ddim, dpmsolver++, unipc, heun, deis or sa_solver"
    flag("--sampler", str, None, f"{text}; a distilled model has its own")
    text = f"sampler steps; default: T, or what a model is distilled for; {paper_value('num_train_timesteps')}"
    flag("--num_inference_steps", int, None, text)
    text = "of ddpm, instead of the model's: fixed_small, fixed_large, or optimal after ddpm-hf optimal_variance; "
    flag("--variance_type", str, None, text + paper_value("variance_type"))
    text = "timesteps of a short chain: leading, linspace, trailing, best (see best_timesteps); default: the model's"
    flag("--timestep_spacing", str, None, text)
    flag("--eta", float, None, "noise of ddim: 0 (the default) none, 1 as much as ddpm")


def add_sampler_flags(parser: Parser) -> None:
    """Add the flags of sampling, with which `sample` and `evaluate` draw the same images."""
    flag = parser.group("sampling")
    add_chain_flags(flag)
    text = "classifier-free guidance, or that of --guide; 1: none; larger values exaggerate the class, or the model"
    flag("--guidance_scale", float, 1.0, text)
    flag("--guide", str, None, "autoguidance: guide by this worse model, such as an earlier checkpoint of the run")
    flag("--guide_weights", str, "ema", "of --guide, where it is a checkpoint: ema or raw", one_of("ema", "raw"))
    flag("--guidance_interval", float, None, "the first and last timestep to be guided, such as 100 600", nargs=2)
    text = "epsilon scaling: divide the predicted epsilon by B, or with B K by K t + B (see scale_epsilon)"
    flag("--epsilon_scale", float, None, text, nargs="+")
    dtypes = one_of("float32", "bfloat16", "float16")
    flag("--dtype", str, "float32", "the network's, not the chain's: float32, bfloat16 or float16 (GPU)", dtypes)
    flag("--tf32", bool, False, "NVIDIA GPUs: faster float32 products with 10 bits of mantissa")
    text = "how the network is computed: no (as stock computes it), yes (as is fast on the device, on NVIDIA GPUs by "
    text += "CUDA graphs; images differ by rounding only), compile (by torch.compile as well), auto (yes on GPUs, "
    text += "with compile for long runs; on CPUs yes for long runs)"
    flag("--optimize", str, "auto", text, one_of("auto", "yes", "no", "compile"))


def sampling_options(values: Any) -> Any:
    """Return the `SamplingOptions` of the flags."""
    from ..sampling.generation import SamplingOptions

    found = given(values, *(field.name for field in fields(SamplingOptions) if hasattr(values, field.name)))
    if len(found.get("epsilon_scale", [])) == 1:
        (found["epsilon_scale"],) = found["epsilon_scale"]
    return SamplingOptions(**found)


def load_guided_pipeline(values: Any) -> Any:
    """Return the model of the flags with that of `--guide`, or raise UserError: no such model, or nothing to guide."""
    pipe = load_pipeline(values.model, values.dtype, values.tf32, values.weights)
    if values.guide is None and values.guidance_scale != 1 and pipe.classes.count is None:
        raise UserError("--guidance_scale needs --guide, a worse model, or a class-conditional --model; this is none")
    if values.guide is not None:
        if values.guidance_scale == 1:
            raise UserError("--guide needs --guidance_scale, such as 2; at 1 nothing is guided")
        pipe.guide = load_pipeline(values.guide, values.dtype, values.tf32, values.guide_weights, flag="--guide")
    return pipe


def load_pipeline(
    model: str, dtype: str = "float32", tf32: bool = False, weights: str = "ema", flag: str = "--model"
) -> Any:
    """Return the `DDPMPipeline` of a flag on this process's device, or raise UserError: none, or not finite."""
    import torch

    from ..pipelines.pipeline_ddpm import load_named
    from ..utils.machine import use_tf32
    from ..utils.processes import processes

    use_tf32(tf32)
    return load_named(flag, model, weights=weights, dtype=getattr(torch, dtype)).to(processes().device)


def check_not_distilled(pipe: Any, command: str) -> None:
    """Raise a UserError for a distilled model, whose sampler and steps are fixed, so that a command has no choice."""
    if (own := pipe.distilled_steps) is not None:
        what = f"a model that is distilled into {own} steps leaves ddpm-hf {command} nothing to choose"
        raise UserError(f"{what}; give the model that it was made from")


def load_sampling_pipeline(values: Any) -> Any:
    """Return the model with the sampler that the flags name, or raise UserError: there is no such model or sampler."""
    return sampling_options(values).pipeline(load_guided_pipeline(values))


def sampling_evaluations(pipe: Any, values: Any, count: int) -> int:
    """Return how many evaluations of the network, of a batch each, `count` images take."""
    batches = -(-count // values.batch_size)
    return batches * pipe.checked_steps(values.num_inference_steps)


def inference_optimization(values: Any, evaluations: int) -> Callable[[Any], None] | None:
    """Return what makes a pipeline's network faster as `--optimize` says for about so many evaluations, or `None`."""
    from ..pipelines.inference import optimize_for_inference
    from ..utils.machine import compiler_problem
    from ..utils.processes import log, processes

    device, long = processes().device, evaluations >= _LONG_RUN
    if values.optimize == "no" or (values.optimize == "auto" and device.type == "cpu" and not long):
        return None
    auto_compile = values.optimize == "auto" and device.type == "cuda" and long and not compiler_problem(device)
    compiles = values.optimize == "compile" or auto_compile
    return lambda pipe: log(f"network: {optimize_for_inference(pipe, compile=compiles)}")


def read_images(flag: str, names: Sequence[str], image_shape: tuple[int, int, int]) -> Any:
    """Return image files, scaled and cropped to fit, as `[N, C, H, W]` uint8, or raise UserError for one."""
    import numpy as np
    import torch

    from ..data.decoding import DecodeOptions, read_image

    pixels = []
    for name in names:
        try:
            pixels.append(read_image(Path(name), DecodeOptions(image_shape[0], image_shape[1:])))
        except UserError as error:
            why = re.sub("; .*--.*", "; save it as 8-bit PNG", str(error))  # its flags are those of data sets
            raise UserError(f"cannot read --{flag} {name}: {why}") from error
    return torch.from_numpy(np.stack(pixels))
