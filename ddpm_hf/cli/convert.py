"""`ddpm-hf convert`: other implementations' weights as a folder that diffusers opens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..training.configuration import paper_value
from .command_line import Parser


def convert_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf convert`."""
    parser = Parser(prog, "Other implementations' weights as a folder that stock diffusers opens.")
    group = parser.add_argument_group("formats and files")
    group.add_argument(
        "--from",
        type=str,
        required=True,
        help="official_tf, pesser (also ermongroup), pytorch_ddpm, improved_diffusion, guided_diffusion or diffusers",
    )
    group.add_argument(
        "--checkpoint", type=str, required=True, help="the file (TensorFlow: without its ending), or the repository"
    )
    group.add_argument("--output", type=str, required=True, help="the folder to make")
    group.add_argument("--no_ema", action="store_true", help="take the raw weights instead of the EMA weights")
    for title, flags in (
        ("model, where the file does not say", _model_flags()),
        ("diffusion process, where the file does not say", _process_flags()),
    ):
        group = parser.add_argument_group(title)
        for names, kind, text in flags:
            more: dict[str, Any] = {"nargs": "?", "const": True} if kind is bool else {}
            group.add_argument(*names.split(), type=kind | None, default=None, help=text, **more)
    return parser


def _model_flags() -> list[tuple[str, type, str]]:
    """Flags (with the names that other training scripts have), their type and help."""
    size = paper_value(lambda p: p.unet["sample_size"])
    return [
        ("--sample_size --image_size --img_size", int, f"height and width of the images; {size}"),
        ("--preset", str, "one of the paper's experiments, or a released model (docs/convert.md): gives the rest"),
        ("--num_heads", int, "attention heads (improved_diffusion, guided_diffusion); the paper: 1"),
        ("--num_heads_upsample", int, "their number on the way up, where it is another"),
        ("--num_head_channels", int, "channels per attention head (guided_diffusion)"),
        ("--use_new_attention_order", bool, "how attention is cut into heads (guided_diffusion)"),
    ]


def _process_flags() -> list[tuple[str, type, str]]:
    """The same for the diffusion process."""
    schedules = "linear, cosine, quad, const, jsd, sigmoid, warmup10 or warmup50, where the format's code has it"
    paper = {
        name: paper_value(lambda p, name=name: p.scheduler[name])  # type: ignore[misc]
        for name in ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "variance_type")
    }
    return [
        ("--noise_schedule --beta_schedule", str, f"{schedules}; {paper['beta_schedule']}"),
        ("--diffusion_steps --T", int, f"timesteps of the training; {paper['num_train_timesteps']}"),
        ("--beta_start --beta_1", float, f"the first beta; {paper['beta_start']}"),
        ("--beta_end --beta_T", float, f"the last beta; {paper['beta_end']}"),
        ("--rescale_timesteps", bool, "the network saw t * 1000 / T; default for improved_diffusion: true"),
        ("--predict_xstart", bool, "the network predicts x_0 (improved_diffusion, guided_diffusion)"),
        ("--prediction_type", str, "epsilon, sample or posterior_mean (official_tf)"),
        ("--learn_sigma", bool, "the variance is learned; checked only, as the file says it"),
        ("--variance_type --var_type", str, f"of the scheduler; {paper['variance_type']}"),
        ("--sigma_small", bool, "as --variance_type fixed_small (improved_diffusion)"),
        ("--clip_sample --clip_denoised", bool, "clip the predicted x_0; default: as the original sampler does"),
    ]


def convert(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf convert`."""
    values = convert_parser(prog).parse_args(list(arguments))
    from ..convert import convert as write_converted

    options = values.as_dict()
    source, checkpoint, output = (options.pop(name) for name in ("from", "checkpoint", "output"))
    write_converted(source, checkpoint, output, print, ema=not options.pop("no_ema"), **options)
    return 0
