"""`ddpm-hf convert`: other people's weights to ours, ours to the official format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .command_line import Parser, UsageError
from .configuration import paper_value


def convert_parser(prog: str | None = None) -> Parser:
    """The parser of `ddpm-hf convert`."""
    parser = Parser(prog, "Other people's weights to a stock-readable folder, or ours to TensorFlow.")
    group = parser.add_argument_group("formats and files")
    group.add_argument(
        "--from",
        type=str | None,
        default=None,
        help="official_tf, pesser (also ermongroup), pytorch_ddpm, improved_diffusion or diffusers",
    )
    group.add_argument(
        "--to", type=str | None, default=None, help="official_tf: write our weights for the official code"
    )
    group.add_argument(
        "--checkpoint",
        type=str,
        required=True,
        help="the file (TensorFlow: without its ending); with --to, a model's folder or checkpoint-N",
    )
    group.add_argument("--output", type=str, required=True, help="the folder to make")
    group.add_argument("--no_ema", action="store_true", help="take the raw weights instead of the averaged ones")
    group = parser.add_argument_group("model, where the file does not say")
    group.add_argument(
        "--sample_size",
        type=int | None,
        default=None,
        help=f"height and width of the images; {paper_value(lambda p: p.unet['sample_size'])}",
    )
    group.add_argument("--preset", type=str | None, default=None, help="gives sample size and diffusion process")
    group.add_argument("--num_heads", type=int, default=1, help="attention heads (improved_diffusion); the paper: 1")
    group.add_argument(
        "--variance_type",
        type=str | None,
        default=None,
        help=f"of the scheduler; {paper_value(lambda p: p.scheduler['variance_type'])}",
    )
    return parser


def convert(arguments: Sequence[str], prog: str | None = None) -> int:
    """`ddpm-hf convert`."""
    values = convert_parser(prog).parse_args(list(arguments))
    if (values["from"] is None) == (values["to"] is None):
        raise UsageError("give either --from FORMAT (to ours) or --to official_tf (from ours)")
    from . import convert as conversion
    from .unet_2d import parameter_count

    options: dict[str, Any] = {
        "sample_size": values["sample_size"],
        "preset": values["preset"],
        "ema": not values["no_ema"],
        "num_heads": values["num_heads"],
        "variance_type": values["variance_type"],
    }
    if values["to"] is not None:
        if values["to"] != "official_tf":
            raise UsageError(f"--to knows official_tf, got {values['to']!r}")
        if given := conversion.options_given(**options):
            raise UsageError(f"--to official_tf takes no {', '.join(given)}: the model's folder says it; leave it out")
        print(f"wrote {conversion.convert_to_official(values['checkpoint'], values['output'])}")
        return 0
    pipe = conversion.convert(values["from"], values["checkpoint"], values["output"], **options)
    count, variance = parameter_count(pipe.unet), pipe.scheduler.config.variance_type
    print(f"wrote {values['output']}: {count:,} parameters, variance {variance}")
    return 0
