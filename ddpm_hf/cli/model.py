"""Which model a command works with and how it is sampled: the flags, and what they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..training.configuration import paper_value
from ..utils.errors import UserError
from .command_line import Parser, UsageError

# Network evaluations that are worth a minute of compiling on a GPU, and on a CPU a rounding that is not stock's.
_LONG_RUN = 5000


def add_sampler_flags(parser: Parser) -> None:
    """How samples are drawn; the numbers and images of two commands with the same flags belong together."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler", type=str, default="ddpm", help="ddpm (Algorithm 2; the paper), ddim, dpmsolver++ or unipc"
    )
    group.add_argument(
        "--num_inference_steps",
        type=int | None,
        default=None,
        help=f"sampler steps; default: T; {paper_value(lambda p: p.scheduler['num_train_timesteps'])}",
    )
    group.add_argument(
        "--variance_type",
        type=str | None,
        default=None,
        help="of ddpm, instead of the model's: fixed_small, fixed_large, or optimal after ddpm-hf optimal_variance; "
        + paper_value(lambda p: p.scheduler["variance_type"]),
    )
    group.add_argument(
        "--timestep_spacing",
        type=str | None,
        default=None,
        help="which timesteps a short chain takes: leading, linspace or trailing; default: the model's",
    )
    group.add_argument(
        "--eta", type=float | None, default=None, help="noise of ddim: 0 (the default) none, 1 as much as ddpm"
    )
    group.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="classifier-free guidance; 1: none, more exaggerates the class",
    )
    group.add_argument(
        "--dtype",
        type=str,
        default="float32",
        help="the network's: float32, bfloat16 or float16 (GPU); not the chain's",
    )
    group.add_argument(
        "--tf32",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="NVIDIA GPUs: faster float32 products with 10 bits of mantissa",
    )
    group.add_argument(
        "--optimize",
        type=str,
        default="auto",
        help="how the network is computed: no (as stock computes it), yes (as is fast on the device, on NVIDIA GPUs "
        "by CUDA graphs; images differ by rounding only), compile (by torch.compile as well), auto (yes on GPUs, with "
        "compile for long runs; on CPUs yes for long runs)",
    )


def load_pipeline(model: str, dtype: str = "float32", tf32: bool = False) -> Any:
    """The `DDPMPipeline` in a folder or on the Hub, on this process's device; without `tf32` float32 is just that.

    Raises:
        UsageError: There is none, or a weight is NaN or infinite.
    """
    import torch
    from diffusers.utils import logging

    from ..models.unet_2d import check_weights
    from ..pipelines.pipeline_ddpm import DDPMPipeline
    from ..utils.machine import use_tf32
    from ..utils.processes import processes

    use_tf32(tf32)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    logging.disable_progress_bar()  # loading takes no time worth a bar
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise UsageError(f"--model {model} holds no pipeline: there is no model_index.json in it")
    try:
        pipe = DDPMPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
        check_weights(pipe.unet)  # before hours of work, not after them
        return pipe.to(processes().device)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load --model {model}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error


def check_optimize(word: str) -> None:
    """`--optimize`, before anything is loaded.

    Raises:
        UsageError: Another word than those of the flag.
    """
    words = ("auto", "yes", "no", "compile")
    if word not in words:
        raise UsageError(f"--optimize must be one of {', '.join(words)}, got {word!r}")


def sampling_evaluations(pipe: Any, values: Any, count: int) -> int:
    """How many evaluations of the network, of a batch each, `count` images take with the sampler's flags."""
    batches = -(-count // values.batch_size)
    return batches * (values.num_inference_steps or pipe.scheduler.config.num_train_timesteps)


def inference_optimization(values: Any, evaluations: int) -> Callable[[Any], None] | None:
    """Return a function that makes a pipeline's network faster as `--optimize` says, and says how; or `None`.

    Args:
        values: The flags.
        evaluations: About how many evaluations of the network follow, of a batch each.
    """
    from ..utils.machine import compiler_problem
    from ..utils.processes import processes, say

    device, long = processes().device, evaluations >= _LONG_RUN
    if values.optimize == "no" or (values.optimize == "auto" and device.type == "cpu" and not long):
        return None
    auto_compile = values.optimize == "auto" and device.type == "cuda" and long and not compiler_problem(device)

    def optimize(pipe: Any) -> None:
        from ..pipelines.inference import optimize_for_inference

        say(f"network: {optimize_for_inference(pipe, compile=values.optimize == 'compile' or auto_compile)}")

    return optimize


def load_sampling_pipeline(values: Any) -> Any:
    """The model with the sampler that the flags name.

    Raises:
        ValueError: No such model or sampler.
    """
    from ..sampling.generation import with_sampler

    loaded = load_pipeline(values.model, values.dtype, values.tf32)
    return with_sampler(loaded, values.sampler, values.variance_type, values.timestep_spacing)


def read_images(flag: str, names: Sequence[str], image_shape: tuple[int, int, int]) -> Any:
    """Image files, scaled and cropped to fit, as `[N, C, H, W]` uint8.

    Raises:
        UsageError: One cannot be read.
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
            raise UsageError(f"cannot read --{flag} {name}: {error}") from error
    return torch.from_numpy(np.stack(pixels))
