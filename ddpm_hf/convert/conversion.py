"""Convert other implementations' checkpoints to a `DDPMPipeline`, or to a folder that stock diffusers opens.

What a file does not say is an option, or a default of its training script that is reported as assumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDPMPipeline as StockPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..diffusion.noise_schedule import make_betas
from ..diffusion.scheduling_ddpm import LEARNED_VARIANCES, DDPMScheduler
from ..hub.model_card import CardFacts, ModelFacts, make_card
from ..models.unet_2d import UNet2DModel, check_size, parameter_count
from ..pipelines.checkpoints import is_run_or_checkpoint
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..presets import PAPER_PROCESS
from ..utils.errors import UserError
from ..utils.files import write_directory, write_text
from ..utils.weight_files import read_weights
from .formats import FORMATS, RELEASED, Format, KnownModel, find_model
from .names import Tensors, infer_architecture, shortened, split_attention, translate
from .readers import state_dict


def convert(
    from_format: str,
    checkpoint: str | Path,
    output: str | Path,
    tell: Callable[[str], Any] = lambda line: None,
    **options: Any,
) -> DDPMPipeline:
    """Write a stock-readable repository from another implementation's checkpoint, completely or not at all.

    Args:
        from_format, checkpoint, options: See `load_pipeline`.
        output: The folder to make; it must not exist, or be empty.
        tell: Gets what was read, assumed and written, line by line. The folder's card says it too.

    Raises:
        ValueError: See `load_pipeline`, or `output` is in use.
    """
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output {str(output)!r} exists already; name another folder, or remove it first")
    pipe, facts = load_pipeline(from_format, checkpoint, **options)

    def fill(folder: Path) -> None:
        pipe.save_pretrained(folder)
        if from_format != "diffusers":
            write_text(folder / "README.md", make_card(ModelFacts.read(folder), CardFacts(output.name, recipe=facts)))

    write_directory(output, fill)
    for name, text in facts.items():
        tell(f"{name}: {text}")
    unet, process = pipe.unet.config, pipe.scheduler.config
    height, width = np.broadcast_to(unet.sample_size, 2)
    tell(
        f"wrote {output}: {parameter_count(pipe.unet):,} parameters, {unet.in_channels} x {height} x {width} pixels, "
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

    Raises:
        ValueError: The file is missing, damaged, of another format or does not fit; an unknown format or preset; an
            option that is needed, that the format does not take, or that contradicts the file.
    """
    path = Path(checkpoint)
    options = {name: value for name, value in options.items() if value is not None and (name, value) != ("ema", True)}
    if from_format == "diffusers" and is_run_or_checkpoint(path):
        weights = "ema" if options.pop("ema", True) else "raw"
        if not options:
            return DDPMPipeline.from_pretrained(path, weights=weights), {"converted from": f"{path.name} (ddpm_hf)"}
    if from_format == "diffusers" and options:
        raise UserError(f"--from diffusers takes no {_flags(options)}: the repository says it; leave it out")
    if from_format == "diffusers":
        return _load_diffusers(path)
    if from_format not in FORMATS:
        raise UserError(f"unknown format {from_format!r}; it must be one of {', '.join((*FORMATS, 'diffusers'))}")
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
    _check_network(path, from_format, network, model)
    if model is not None:
        network["dropout"] = model.network.get("dropout", 0.0)
    process = _process(format, options, network["out_channels"] == 2 * network["in_channels"], assumed)
    unet = UNet2DModel(**network, sample_size=options["sample_size"])
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


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--no_ema" if name == "ema" else f"--{name}" for name in names)


def _resolve(from_format: str, path: Path, options: dict[str, Any]) -> tuple[dict[str, Any], KnownModel | None]:
    """Return the options in the names of `DDPMScheduler`, with those of the preset among them, and the preset."""
    format, options = FORMATS[from_format], dict(options)
    if refused := [name for name in options if name not in format.options]:
        one_head = format.naming != "openai" and any("head" in name for name in refused)
        reason = "its attention has one head" if one_head else "its code has no such setting"
        raise UserError(f"--from {from_format} takes no {_flags(refused)}: {reason}; leave it out")
    for name in ("sample_size", "num_heads", "num_heads_upsample", "num_head_channels", "diffusion_steps"):
        if name in options and np.min(options[name]) < 1:
            raise UserError(f"{name} must be at least 1, got {options[name]}")
    if (schedule := options.get("noise_schedule", "linear")) not in format.schedules:
        known = ", ".join(format.schedules)
        raise UserError(f"--noise_schedule of {from_format} must be one of {known}, got {schedule!r}")
    if "num_heads" in options and "num_head_channels" in options:
        raise UserError("give --num_heads or --num_head_channels: with the second, the original ignores the first")
    if "predict_xstart" in options:
        options["prediction_type"] = "sample" if options.pop("predict_xstart") else "epsilon"
    if options.pop("sigma_small", False):
        options.setdefault("variance_type", "fixed_small")
    if "variance_type" in options:  # the others' spelling is fixedlarge
        options["variance_type"] = re.sub("^fixed(?=small|large)", "fixed_", options["variance_type"])

    preset, released = options.get("preset"), f"{from_format}_{path.stem}"
    model = None if preset is None else find_model(preset, from_format)
    if model is None and released in RELEASED and not {"noise_schedule", "diffusion_steps"} <= options.keys():
        raise UserError(
            f"{path.name} is the name of a released model: give --preset {released}, or --noise_schedule and "
            "--diffusion_steps if it is another"
        )
    for name, value in (model.options if model else {}).items():
        # Sampling may use another variance than the preset's; everything else is a matter of the training.
        if options.setdefault(name, value) != value and name != "variance_type":
            raise UserError(f"--preset {preset} says {name}={value}, and the flags say {options[name]}")
    if (predicted := options.get("prediction_type", "epsilon")) not in format.predictions:
        raise UserError(f"the code of {from_format} trains no network that predicts {predicted!r} (flag or preset)")
    return options, model


def _head_channels(from_format: str, tensors: Tensors, options: dict[str, Any], assumed: dict[str, Any]) -> int | None:
    """Return the channels per attention head, the same at all levels, or `None` for one head over all channels."""
    widths = {value.shape[1] for key, value in tensors.items() if key.endswith(".to_qkv.weight")}
    if not widths:
        return None
    guided = from_format == "guided_diffusion"
    heads, size, upsample = map(options.get, ("num_heads", "num_head_channels", "num_heads_upsample"))
    parts = heads or size
    if parts is None:
        raise UserError(
            f"--num_heads{' or --num_head_channels' if guided else ''} is needed: a file of {from_format} does not "
            "say how its attention is cut into heads (--num_heads 4 is the default of its training script)"
        )
    if odd := sorted(width for width in widths if width % parts):
        asked = "num_heads" if heads else "num_head_channels"
        raise UserError(f"{asked}={parts} does not divide the {odd[0]} channels of an attention block")
    if upsample not in (None, heads):
        why = f"differs from --num_heads {heads}" if heads else "has no effect beside --num_head_channels"
        raise UserError(f"--num_heads_upsample {upsample} {why}; UNet2DModel has one head size for all")
    if heads is not None and upsample is None and options.get("preset") not in RELEASED:
        assumed["num_heads_upsample"] = heads
    if heads == 1 or widths == {size}:
        return None
    if heads is not None and len(widths) > 1:
        raise UserError(
            f"{heads} heads over attention widths {sorted(widths)} need a head size per level, and UNet2DModel has "
            "one for all, so this network cannot be converted"
        )
    if guided and "use_new_attention_order" not in options:
        raise UserError(
            "--use_new_attention_order is needed, true or false as in training (false is the default of its script): "
            "a file of guided_diffusion does not say it"
        )
    return size or widths.pop() // parts


def _check_network(path: Path, from_format: str, network: dict[str, Any], model: KnownModel | None) -> None:
    """Check that the network makes images out of noise alone, and is the preset's if there is one."""
    channels, outputs = network["in_channels"], network["out_channels"]
    if outputs not in (channels, 2 * channels) or (FORMATS[from_format].naming == "openai" and channels == 6):
        raise UserError(
            f"{str(path)!r} holds a network from {channels} channels to {outputs}, as for super-resolution; a DDPM "
            "gives as many channels as it takes, or twice as many with a learned variance"
        )
    if from_format == "improved_diffusion" and "downsample_type" in network:
        raise UserError(
            f"{str(path)!r} holds a network of guided-diffusion (resblock_updown); give --from guided_diffusion"
        )
    if model is None:
        return
    plain = {"in_channels": 3, "out_channels": 3, "num_class_embeds": None, "resnet_time_scale_shift": "default"}
    found, expected = plain | network, {**plain, **model.network}
    for name in (*plain, "block_out_channels", "layers_per_block", "down_block_types"):
        if found[name] != expected[name]:
            raise UserError(f"{str(path)!r} has {name}={found[name]}, and the preset has {expected[name]}")


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
        channels = "has" if learned else "has no"
        flag = f"learn_sigma={sigma}" if asked is None else f"variance_type={asked}"
        raise UserError(f"the network {channels} channels for a learned variance, and the flags say {flag}")
    if learned:
        process["variance_type"] = asked or ("learned_range" if format.naming == "openai" else "learned")
    else:
        small = np.min(options["sample_size"]) >= format.small_variance_from
        process["variance_type"] = option("variance_type", "fixed_small" if small else "fixed_large")
    process["clip_sample"] = options.get("clip_sample", format.clip_sample)
    return process


def _rescaled(betas: Mapping[str, Any], T: int) -> dict[str, Any]:
    """Return the chain over every T/1000th timestep t, which the network saw as the whole number t * 1000 / T.

    OpenAI's sampler does the same with `--timestep_respacing ddim1000`.
    """
    if T % 1000:
        raise UserError(
            f"with rescale_timesteps the network saw t * 1000 / {T}, and stock schedulers hand it t = 0, 1, 2, ...: "
            "only a multiple of 1000 timesteps can be converted (if it was trained without: --rescale_timesteps false)"
        )
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
        if not value.is_floating_point():
            raise UserError(f"{where} holds {value.dtype}, which is no type of weights")
        if not value.isfinite().all():
            raise UserError(f"{where} holds NaN or infinity; take an intact copy")
        state[key] = value.to(wanted[key].dtype)
    if lost := [names.get(key, key) for key in tensors if key not in wanted]:
        raise UserError(f"{str(file)!r}: no place for {shortened(lost)} in the network that the others describe")
    if missing := sorted(wanted.keys() - state.keys()):
        raise UserError(f"{str(file)!r}: nothing found for {shortened(missing)}")
    unet.load_state_dict(state)


_CURRENT = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY = r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\."


def _read_config(kind: Any, folder: Path, **where: str) -> dict[str, Any]:
    config: Any = kind.load_config(folder, **where)
    if not isinstance(config, dict):
        raise UserError(f"the {kind.config_name} of {str(folder)!r} holds a {type(config).__name__}, no configuration")
    return config


def _load_diffusers(folder: Path) -> tuple[DDPMPipeline, dict[str, str]]:
    """Read a stock repository: components in subfolders or in one, current or legacy keys, safetensors or `.bin`."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}")
    parts = _read_config(StockPipeline, folder) if (folder / "model_index.json").is_file() else {}
    parts = {name: part for name, part in parts.items() if isinstance(part, list) and part[0]}
    if others := parts.keys() - {"unet", "scheduler"}:
        raise UserError(f"{str(folder)!r} has more than a network and a scheduler: {', '.join(sorted(others))}")
    config = _read_config(UNet2DModel, folder, subfolder="unet")  # or in the folder itself
    if config.get("_class_name") not in (None, "UNet2DModel"):
        raise UserError(f"{str(folder)!r} holds a {config['_class_name']}, which is no DDPM network")
    process = _read_config(DDPMScheduler, folder, subfolder="scheduler")
    kind = process.get("_class_name", "DDPMScheduler")
    if kind not in DDPMScheduler._compatibles:
        raise UserError(f"the scheduler of {str(folder)!r} is a {kind}, whose process is no DDPM's")
    unet, scheduler = UNet2DModel.from_config(config), DDPMScheduler.from_config(process)
    variance = scheduler.config.variance_type
    if unet.config.out_channels != unet.config.in_channels * (2 if variance in LEARNED_VARIANCES else 1):
        raise UserError(
            f"{str(folder)!r} holds a network from {unet.config.in_channels} channels to {unet.config.out_channels} "
            f"with variance_type={variance!r}, which no DDPM samples with"
        )
    file_names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    files = [part / name for name in file_names for part in (folder / "unet", folder)]
    file = next((file for file in files if file.is_file()), files[0])
    weights = state_dict(file, read_weights(file))
    # Older versions called the layers of attention query, key, value and proj_attn.
    names = {re.sub(_LEGACY, lambda m: f"{m[1]}{_CURRENT[m[2]]}.", name): name for name in weights}
    _load_weights(unet, {key: weights[name] for key, name in names.items()}, names, file)
    facts = {"converted from": f"{folder.name} (diffusers)"}
    if kind != "DDPMScheduler":
        facts["scheduler"] = f"its {kind} as a DDPMScheduler over the same betas"
    return DDPMPipeline(unet.eval(), scheduler), facts
