"""Convert other implementations' checkpoints to a `DDPMPipeline`, or to a folder that stock diffusers opens.

What a file does not say is an option, or a default of its training script that is reported as assumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..diffusion.noise_schedule import make_betas
from ..diffusion.scheduling_ddpm import LEARNED_VARIANCES, DDPMScheduler
from ..hub.files import write_model
from ..hub.model_card import CardFacts
from ..models.unet_2d import UNet2DModel, check_size, parameter_count
from ..pipelines.checkpoints import is_run_or_checkpoint
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..presets import PAPER_PROCESS
from ..utils.errors import UserError
from ..utils.files import check_new_folder, write_directory
from ..utils.hub_errors import check_pipeline
from ..utils.weight_files import read_weights
from .formats import FORMATS, RELEASED, Format, KnownModel, find_model
from .names import Tensors, infer_architecture, shortened, split_attention, translate
from .readers import state_dict


def convert(
    from_format: str, checkpoint: str | Path, output: str | Path, tell: Callable[[str], Any] = str, **options: Any
) -> DDPMPipeline:
    """Write a stock-readable repository from another implementation's checkpoint, completely or not at all.

    Args:
        from_format, checkpoint, options: See `load_pipeline`.
        output: The folder to make; it must not exist, or be empty.
        tell: Gets what was read, assumed and written, line by line. The folder's card says it too.

    Raises a ValueError as `load_pipeline`, or if `output` is in use.
    """
    output = Path(output)
    check_new_folder(output)
    pipe, facts = load_pipeline(from_format, checkpoint, **options)
    if from_format == "diffusers":
        write_directory(output, pipe.save_pretrained)
    else:
        write_model(output, pipe, CardFacts(output.name, recipe=facts))
    for name, text in facts.items():
        tell(f"{name}: {text}")
    process = pipe.scheduler.config
    tell(
        f"wrote {output}: {parameter_count(pipe.unet):,} parameters, {' x '.join(map(str, pipe.image_shape))} pixels, "
        f"T = {process.num_train_timesteps}, prediction {process.prediction_type}, variance {process.variance_type}, "
        f"x_0 {'clipped' if process.clip_sample else 'not clipped'}"
    )
    return pipe


def load_pipeline(from_format: str, checkpoint: str | Path, **options: Any) -> tuple[DDPMPipeline, dict[str, str]]:
    """Return a pipeline from another implementation's checkpoint, and what a person should know of the conversion.

    The architecture is inferred from the names and shapes of the tensors; a `diffusers` repository says it, and
    everything else, itself, so that it takes no options.

    Args:
        from_format: One of `FORMATS`, or `diffusers`.
        checkpoint: The file (for TensorFlow the path without ending; for `diffusers` the folder, also that of a
            training run of this package, or of one of its checkpoints).
        options: What the file does not say, by the names of `ddpm-hf convert`'s flags (docs/convert.md), of which each
            format takes some; `None` is not said. `ema=False` takes the raw weights.

    Raises a ValueError for a file that is missing, damaged, of another format or does not fit, an unknown format or
    preset, and an option that is needed, that the format does not take, or that contradicts the file.
    """
    path = Path(checkpoint)
    options = {name: value for name, value in options.items() if value is not None and (name, value) != ("ema", True)}
    if from_format not in (*FORMATS, "diffusers"):
        raise UserError(f"unknown format {from_format!r}; it must be one of {', '.join((*FORMATS, 'diffusers'))}")
    if from_format == "diffusers" and is_run_or_checkpoint(path) and not options.keys() - {"ema"}:
        weights = "ema" if options.get("ema", True) else "raw"
        return DDPMPipeline.from_pretrained(path, weights=weights), {"converted from": f"{path.name} (ddpm_hf)"}
    known = FORMATS[from_format].options if from_format in FORMATS else ()
    if refused := ["--no_ema" if name == "ema" else f"--{name}" for name in options if name not in known]:
        raise UserError(f"--from {from_format} takes no {', '.join(refused)}; leave it out")
    if from_format == "diffusers":
        return _load_diffusers(path)
    format = FORMATS[from_format]
    options, model = _resolve(from_format, path, options)
    source = format.read(path, options.get("ema", True))
    for name, value in (("sample_size", source.sample_size), ("diffusion_steps", source.diffusion_steps)):
        if value is not None and options.setdefault(name, value) != value:
            raise UserError(f"the file's tensors say {name}={value}, and the flags or the preset {options[name]}")
    if "sample_size" not in options:
        raise UserError("--sample_size is needed: the file does not say how large its images are (or give --preset)")

    names = translate(source.tensors, format.naming)
    tensors = {key: source.tensors[name] for key, name in names.items()}
    assumed: dict[str, Any] = {}
    head_channels = _head_channels(from_format, tensors, options, assumed)
    tensors = split_attention(tensors, head_channels, options.get("use_new_attention_order", False))
    network = {**infer_architecture(tensors, format.network), "attention_head_dim": head_channels}
    network |= {"sample_size": options["sample_size"], "dropout": model.dropout if model else 0.0}
    _check_network(path, from_format, network)
    unet = UNet2DModel(**network)
    if model and (count := parameter_count(unet)) != model.parameters:
        what = f"a network of {count:,} parameters, and that of --preset {options['preset']} has {model.parameters:,}"
        raise UserError(f"{str(path)!r} holds {what}")
    process = _process(format, options, network["out_channels"] == 2 * network["in_channels"], assumed)
    check_size(unet, *np.broadcast_to(unet.config.sample_size, 2).tolist())
    _load_weights(unet, tensors, names, path)

    facts = {"converted from": f"{path.name} ({from_format})", "weights": source.weights}
    if kinds := {str(value.dtype).removeprefix("torch.") for value in tensors.values()} - {"float32"}:
        facts["precision"] = f"{', '.join(sorted(kinds))} in the file, float32 here"
    if "trained_betas" in process:
        T = options["diffusion_steps"]
        facts["timesteps"] = f"1000, every {T // 1000}th of {T}: those that the network saw as 0, 1, 2, ..."
    if assumed:
        flags = ", ".join(f"--{name} {value}" for name, value in assumed.items())
        facts["assumed, as nothing says otherwise"] = flags.lower()  # true and false as they are typed
    if source.remark and "clip_sample" not in options:
        facts["clipping"] = source.remark
    return DDPMPipeline(unet.eval(), DDPMScheduler(**process)), facts


def _resolve(from_format: str, path: Path, options: dict[str, Any]) -> tuple[dict[str, Any], KnownModel | None]:
    """Return the options in the names of `DDPMScheduler`, with those of the preset among them, and the preset."""
    format, options = FORMATS[from_format], dict(options)
    for name in ("sample_size", "num_heads", "num_heads_upsample", "num_head_channels", "diffusion_steps"):
        if name in options and np.min(options[name]) < 1:
            raise UserError(f"{name} must be at least 1, got {options[name]}")
    if "predict_xstart" in options:
        options["prediction_type"] = "sample" if options.pop("predict_xstart") else "epsilon"
    if options.pop("sigma_small", False):
        options.setdefault("variance_type", "fixed_small")
    if "variance_type" in options:  # the others' spelling is fixedlarge
        options["variance_type"] = re.sub("^fixed(?=small|large)", "fixed_", options["variance_type"])

    preset, released = options.get("preset"), f"{from_format}_{path.stem}"
    model = None if preset is None else find_model(preset, from_format)
    if model is None and released in RELEASED and not {"noise_schedule", "diffusion_steps"} <= options.keys():
        otherwise = "--noise_schedule and --diffusion_steps if it is another"
        raise UserError(f"{path.name} is the name of a released model: give --preset {released}, or {otherwise}")
    for name, value in (model.options if model else {}).items():
        # Sampling may use another variance than the preset's; everything else is a matter of the training.
        if options.setdefault(name, value) != value and name != "variance_type":
            raise UserError(f"--preset {preset} says {name}={value}, and the flags say {options[name]}")
    for name, known in (("noise_schedule", format.schedules), ("prediction_type", format.predictions)):
        if (value := options.get(name, known[0])) not in known:
            raise UserError(f"{name} of {from_format} must be one of {', '.join(known)}, got {value!r}")
    return options, model


def _head_channels(from_format: str, tensors: Tensors, options: dict[str, Any], assumed: dict[str, Any]) -> int | None:
    """Return the channels per attention head, the same at all levels, or `None` for one head over all channels."""
    widths = {value.shape[1] for key, value in tensors.items() if key.endswith(".to_qkv.weight")}
    if not widths:
        return None
    guided = from_format == "guided_diffusion"
    heads, size, upsample = map(options.get, ("num_heads", "num_head_channels", "num_heads_upsample"))
    parts = heads or size
    if parts is None or (heads and size):
        flags = f"--num_heads (4 in its training script){' or --num_head_channels' if guided else ''}"
        raise UserError(f"give {flags}: a file of {from_format} does not say how its attention is cut into heads")
    if odd := sorted(width for width in widths if width % parts):
        what = f"do not divide the {odd[0]} channels of an attention block"
        raise UserError(f"{parts} heads or channels per head {what}")
    if upsample not in (None, heads):
        raise UserError(f"--num_heads_upsample {upsample} is not --num_heads; UNet2DModel has one head size for all")
    if heads is not None and upsample is None and options.get("preset") not in RELEASED:
        assumed["num_heads_upsample"] = heads
    if heads == 1 or widths == {size}:
        return None
    if heads is not None and len(widths) > 1:
        raise UserError(f"{heads} heads over attention widths {sorted(widths)}: UNet2DModel has one head size for all")
    if guided and "use_new_attention_order" not in options:
        raise UserError("give --use_new_attention_order, true or false as in training: the file does not say it")
    return size or widths.pop() // parts


def _check_network(path: Path, from_format: str, network: dict[str, Any]) -> None:
    """Check that the network makes images out of noise alone, and is of this format."""
    channels, outputs = network["in_channels"], network["out_channels"]
    if outputs not in (channels, 2 * channels) or (FORMATS[from_format].naming == "openai" and channels == 6):
        what = f"a network from {channels} channels to {outputs}, as for super-resolution"
        raise UserError(f"{str(path)!r} holds {what}; a DDPM gives as many as it takes, or twice as many")
    if from_format == "improved_diffusion" and "downsample_type" in network:
        what = "a network of guided-diffusion (resblock_updown); give --from guided_diffusion"
        raise UserError(f"{str(path)!r} holds {what}")


def _process(format: Format, options: dict[str, Any], learned: bool, assumed: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `DDPMScheduler`: the process of the training, sampled as the original does.

    `learned`: the network has channels for the variance; `assumed` gets the flags that stand for what is not said.
    """

    def option(name: str, default: Any) -> Any:
        if name not in options:
            assumed[name] = default
        return options.get(name, default)

    T = option("diffusion_steps", PAPER_PROCESS["num_train_timesteps"])
    schedule = option("noise_schedule", "linear") if len(format.schedules) > 1 else "linear"
    process: dict[str, Any] = {"num_train_timesteps": T, "beta_schedule": schedule}
    process["prediction_type"] = options.get("prediction_type", "epsilon")
    if "prediction_type" not in options and len(format.predictions) > 1:
        assumed |= {"prediction_type": "epsilon"} if "prediction_type" in format.options else {"predict_xstart": False}
    if format.naming == "openai":  # get_named_beta_schedule
        betas: dict[str, Any] = {"beta_start": 1e-4 * 1000 / T, "beta_end": 0.02 * 1000 / T}
        if schedule == "cosine":
            betas = {"beta_schedule": "squaredcos_cap_v2"}
        if T != 1000 and option("rescale_timesteps", format.rescales_timesteps):
            betas = _rescaled({"beta_schedule": schedule, "beta_start": 0, "beta_end": 0} | betas, T)
        process |= betas
    else:
        ends = {"jsd": (), "const": ("beta_end",)}.get(schedule, ("beta_start", "beta_end"))
        if unused := [name for name in ("beta_start", "beta_end") if name in options and name not in ends]:
            raise UserError(f"--noise_schedule {schedule} has no {' and no '.join(unused)}; leave it out")
        process |= {name: option(name, PAPER_PROCESS[name]) for name in ends}

    asked, sigma = options.get("variance_type"), options.get("learn_sigma", learned)
    if sigma != learned or (asked is not None and learned != (asked in LEARNED_VARIANCES)):
        flag = f"learn_sigma={sigma}" if asked is None else f"variance_type={asked}"
        channels = "has" if learned else "has no"
        raise UserError(f"the network {channels} channels for a learned variance, and the flags say {flag}")
    if learned:
        process["variance_type"] = asked or ("learned_range" if format.naming == "openai" else "learned")
    else:
        small = np.min(options["sample_size"]) >= format.small_variance_from
        process["variance_type"] = option("variance_type", "fixed_small" if small else "fixed_large")
    return {**process, "clip_sample": options.get("clip_sample", format.clip_sample)}


def _rescaled(betas: Mapping[str, Any], T: int) -> dict[str, Any]:
    """Return the chain over every T/1000th timestep t, which the network saw as the whole number t * 1000 / T.

    OpenAI's sampler does the same with `--timestep_respacing ddim1000`.
    """
    if T % 1000:
        what = f"only a multiple of 1000 timesteps can be converted, not {T}"
        advice = "if it was trained without, give --rescale_timesteps false"
        raise UserError(f"with --rescale_timesteps {what}; {advice}")
    alpha_bar = np.cumprod(1 - make_betas(num_train_timesteps=T, **betas))[:: T // 1000]
    chain = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return {"beta_schedule": "linear", "num_train_timesteps": 1000, "trained_betas": chain.tolist()}


def _load_weights(unet: UNet2DModel, tensors: Tensors, names: Mapping[str, str], file: Path) -> None:
    """Give a network its weights, of which `names` are the names in the file: every tensor must find its place."""
    wanted = unet.state_dict()
    state: Tensors = {}
    for key in sorted(tensors.keys() & wanted.keys()):
        value, target, where = tensors[key], wanted[key].shape, f"{str(file)!r}: {names.get(key, key)}"
        if [n for n in value.shape if n != 1] == [n for n in target if n != 1]:
            value = value.reshape(target)  # 1x1 convolutions and matrices are the same numbers
        if value.shape != target:
            shapes = f"{tuple(value.shape)}, and the network asks for {tuple(target)}"
            raise UserError(f"{where} has shape {shapes} ({key})")
        if not (value.is_floating_point() and value.isfinite().all()):
            what = "holds NaN, infinity or no floating-point numbers"
            raise UserError(f"{where} ({value.dtype}) {what}; take an intact copy")
        state[key] = value.to(wanted[key].dtype)
    if lost := [names.get(key, key) for key in tensors if key not in wanted]:
        raise UserError(f"{str(file)!r}: no place for {shortened(lost)} in the network that the others describe")
    if missing := sorted(wanted.keys() - state.keys()):
        raise UserError(f"{str(file)!r}: nothing found for {shortened(missing)}")
    unet.load_state_dict(state)


# Older versions called the layers of attention differently.
_CURRENT = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY = r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\."


def _load_diffusers(folder: Path) -> tuple[DDPMPipeline, dict[str, str]]:
    """Read a stock repository: components in subfolders or in one, current or legacy keys, safetensors or `.bin`."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}")
    check_pipeline(folder)
    config: Any = UNet2DModel.load_config(folder, subfolder="unet")  # or in the folder itself
    process: Any = DDPMScheduler.load_config(folder, subfolder="scheduler")
    if not (isinstance(config, dict) and isinstance(process, dict)):
        raise UserError(f"a configuration in {str(folder)!r} is not a JSON object; download or save it again")
    unet, scheduler = UNet2DModel.from_config(config), DDPMScheduler.from_config(process)
    channels, outputs, variance = unet.config.in_channels, unet.config.out_channels, scheduler.config.variance_type
    if outputs != channels * (2 if variance in LEARNED_VARIANCES else 1):
        what = f"a network from {channels} channels to {outputs} with variance_type={variance!r}"
        raise UserError(f"{str(folder)!r} holds {what}, which no DDPM samples with")
    file_names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    files = [part / name for name in file_names for part in (folder / "unet", folder)]
    file = next((file for file in files if file.is_file()), files[0])
    weights = state_dict(file, read_weights(file))
    names = {re.sub(_LEGACY, lambda m: f"{m[1]}{_CURRENT[m[2]]}.", name): name for name in weights}
    _load_weights(unet, {key: weights[name] for key, name in names.items()}, names, file)
    facts = {"converted from": f"{folder.name} (diffusers)"}
    if (kind := process.get("_class_name", "DDPMScheduler")) != "DDPMScheduler":
        facts["scheduler"] = f"its {kind} as a DDPMScheduler over the same betas"
    return DDPMPipeline(unet.eval(), scheduler), facts
