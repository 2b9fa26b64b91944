"""`ddpm-hf convert`: other implementations' weights as a folder that diffusers opens."""

from collections.abc import Sequence

from ..training.configuration import paper_value
from .command_line import Parser


def convert_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf convert`; flags have the names that other training scripts have, too."""
    parser = Parser(prog, "Other implementations' weights as a folder that stock diffusers opens.")
    flag = parser.group("formats and files")
    formats = "official_tf, pesser (also ermongroup), pytorch_ddpm, improved_diffusion, guided_diffusion or diffusers"
    flag("--from", str, None, formats, required=True)
    flag("--checkpoint", str, None, "the file (TensorFlow: without its ending), or the repository", required=True)
    flag("--output", str, None, "the folder to make", required=True)
    flag("--no_ema", bool, False, "take the raw weights instead of the EMA weights")
    flag = parser.group("model, where the file does not say")
    flag("--sample_size --image_size --img_size", int, None, f"height and width; {paper_value('sample_size')}")
    flag("--preset", str, None, "one of the paper's experiments or released models (docs/convert.md): gives the rest")
    flag("--num_heads", int, None, "attention heads (improved_diffusion, guided_diffusion); the paper: 1")
    flag("--num_heads_upsample", int, None, "attention heads of the up blocks, if another number")
    flag("--num_head_channels", int, None, "channels per attention head (guided_diffusion)")
    flag("--use_new_attention_order", bool, None, "how attention is split into heads (guided_diffusion)")
    flag = parser.group("diffusion process, where the file does not say")
    schedules = "linear, cosine, quad, const, jsd, sigmoid, warmup10 or warmup50, where the format's code has it"
    flag("--noise_schedule --beta_schedule", str, None, f"{schedules}; {paper_value('beta_schedule')}")
    flag("--diffusion_steps --T", int, None, f"timesteps of the training; {paper_value('num_train_timesteps')}")
    flag("--beta_start --beta_1", float, None, f"the first beta; {paper_value('beta_start')}")
    flag("--beta_end --beta_T", float, None, f"the last beta; {paper_value('beta_end')}")
    flag("--rescale_timesteps", bool, None, "the network saw t * 1000 / T; improved_diffusion's default: true")
    flag("--predict_xstart", bool, None, "the network predicts x_0 (improved_diffusion, guided_diffusion)")
    flag("--prediction_type", str, None, "epsilon, sample or posterior_mean (official_tf)")
    flag("--learn_sigma", bool, None, "the variance is learned; only compared with the file")
    flag("--variance_type --var_type", str, None, f"of the scheduler; {paper_value('variance_type')}")
    flag("--sigma_small", bool, None, "as --variance_type fixed_small (improved_diffusion)")
    flag("--clip_sample --clip_denoised", bool, None, "clip the predicted x_0; default: as the original sampler does")
    return parser


def convert(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf convert`."""
    values = vars(convert_parser(prog).parse_args(arguments))
    source, checkpoint, output, no_ema = (values.pop(name) for name in ("from", "checkpoint", "output", "no_ema"))
    from ..convert import convert as write_converted

    write_converted(source, checkpoint, output, tell=print, ema=not no_ema, **values)
