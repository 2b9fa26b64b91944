"""Which model a command loads and how it is sampled: the flags, and what they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..training.configuration import POSITIVE, one_of, paper_value
from ..utils.errors import UserError, first_line
from .command_line import Parser, given

# Network evaluations that are worth a minute of compiling on a GPU, and on a CPU a rounding that is not stock's.
_LONG_RUN = 5000


def add_model_flags(flag: Callable[..., None], batch_size: int, required: bool = True) -> None:
    """Add the flags for a model and its batches."""
    flag("--model", str, None, "a pipeline's folder, or its name on the Hub", required=required)
    flag("--batch_size", int, batch_size, "images at a time; changes no image and no number", POSITIVE)


def add_sampler_flags(parser: Parser) -> None:
    """Add the flags of sampling, with which `sample` and `evaluate` draw the same images."""
    flag = parser.group("sampling")
    flag("--sampler", str, "ddpm", "ddpm (Algorithm 2; the paper), ddim, dpmsolver++, unipc, heun, deis or sa_solver")
    flag("--num_inference_steps", int, None, f"sampler steps; default: T; {paper_value('num_train_timesteps')}")
    flag(
        "--variance_type",
        str,
        None,
        "of ddpm, instead of the model's: fixed_small, fixed_large, or optimal after ddpm-hf optimal_variance; "
        + paper_value("variance_type"),
    )
    spacings = "leading, linspace, trailing, or best (after ddpm-hf best_timesteps)"
    flag("--timestep_spacing", str, None, f"timesteps of a short chain: {spacings}; default: the model's")
    flag("--eta", float, None, "noise of ddim: 0 (the default) none, 1 as much as ddpm")
    flag("--guidance_scale", float, 1.0, "classifier-free guidance; 1: none; larger values exaggerate the class")
    dtypes = one_of("float32", "bfloat16", "float16")
    flag("--dtype", str, "float32", "the network's, not the chain's: float32, bfloat16 or float16 (GPU)", dtypes)
    flag("--tf32", bool, False, "NVIDIA GPUs: faster float32 products with 10 bits of mantissa")
    flag(
        "--optimize",
        str,
        "auto",
        "how the network is computed: no (as stock computes it), yes (as is fast on the device, on NVIDIA GPUs by "
        "CUDA graphs; images differ by rounding only), compile (by torch.compile as well), auto (yes on GPUs, with "
        "compile for long runs; on CPUs yes for long runs)",
        one_of("auto", "yes", "no", "compile"),
    )


def sampler_arguments(values: Any) -> dict[str, Any]:
    """Return what `generation.with_sampler` takes of the flags."""
    return given(values, "sampler", "variance_type", "timestep_spacing")


def sampling_arguments(values: Any) -> dict[str, Any]:
    """Return what `DDPMPipeline` takes of the flags."""
    return given(values, "num_inference_steps", "eta", "guidance_scale")


def load_pipeline(model: str, dtype: str = "float32", tf32: bool = False) -> Any:
    """Return the `DDPMPipeline` in a folder or on the Hub, on this process's device.

    Raises:
        UserError: There is no pipeline, or a weight is NaN or infinite.
    """
    import torch
    from diffusers.utils import logging

    from ..models.unet_2d import check_weights
    from ..pipelines.pipeline_ddpm import DDPMPipeline
    from ..utils.machine import use_tf32
    from ..utils.processes import processes

    use_tf32(tf32)
    logging.disable_progress_bar()  # loading takes no time worth a bar
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise UserError(f"--model {model} holds no pipeline: there is no model_index.json in it")
    try:
        pipe = DDPMPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
        check_weights(pipe.unet)  # before hours of work, not after them
        return pipe.to(processes().device)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load --model {model}: {first_line(error)}") from error


def load_sampling_pipeline(values: Any) -> Any:
    """Return the model with the sampler that the flags name.

    Raises:
        UserError: No such model or sampler.
    """
    from ..sampling.generation import with_sampler

    return with_sampler(load_pipeline(values.model, values.dtype, values.tf32), **sampler_arguments(values))


def sampling_evaluations(pipe: Any, values: Any, count: int) -> int:
    """Return how many evaluations of the network, of a batch each, `count` images take."""
    batches = -(-count // values.batch_size)
    return batches * (values.num_inference_steps or pipe.scheduler.config.num_train_timesteps)


def inference_optimization(values: Any, evaluations: int) -> Callable[[Any], None] | None:
    """Return a function that makes a pipeline's network faster as `--optimize` says, or `None`.

    `evaluations` is about how many evaluations of the network follow, of a batch each.
    """
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
    """Return image files, scaled and cropped to fit, as `[N, C, H, W]` uint8.

    Raises:
        UserError: One cannot be read.
    """
    import numpy as np
    import torch

    from ..data.decoding import DecodeOptions, read_image

    channels, height, width = image_shape
    pixels = []
    for name in names:
        try:
            pixels.append(read_image(Path(name), DecodeOptions(channels, (height, width))))
        except UserError as error:
            raise UserError(f"cannot read --{flag} {name}: {error}") from error
    return torch.from_numpy(np.stack(pixels))
