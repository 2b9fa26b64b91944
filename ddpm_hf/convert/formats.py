"""Describe the formats that can be converted, the options that each takes, and the models that are known by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..presets import OFFICIAL_NETWORK, get_preset
from ..utils.errors import UserError
from ..utils.text import nearest
from .readers import Checkpoint, read_official_tf, read_openai, read_pesser, read_pytorch_ddpm


@dataclass(frozen=True)
class Format:
    """What sets one implementation's checkpoints apart."""

    read: Callable[[Path, bool], Checkpoint]  # the file, and whether EMA weights are wanted
    naming: str  # a column of `names._LAYERS`
    network: Mapping[str, Any]  # arguments of UNet2DModel that its networks share, and that shapes do not say
    options: tuple[str, ...]  # flags of `ddpm-hf convert` that it takes
    schedules: tuple[str, ...] = ("linear",)  # that its code has
    predictions: tuple[str, ...] = ("epsilon",)  # what its networks predict
    small_variance_from: float = float("inf")  # height from which its scripts sample with the posterior's variance
    rescales_timesteps: bool = False  # networks see t * 1000 / T unless its script is told otherwise
    clip_sample: bool = True  # its sampler clips the predicted x_0


_ANY = ("sample_size", "preset", "ema", "diffusion_steps", "variance_type", "clip_sample")
_BETAS = (*_ANY, "beta_start", "beta_end")
_SCHEDULES = ("linear", "quad", "const", "jsd")
_PYTORCH_DDPM_NETWORK = {**OFFICIAL_NETWORK, "downsample_padding": 1, "freq_shift": 0, "norm_eps": 1e-5}
_OPENAI: dict[str, Any] = {
    "read": read_openai,
    "naming": "openai",
    "network": {**_PYTORCH_DDPM_NETWORK, "flip_sin_to_cos": True},
    "schedules": ("linear", "cosine"),
    "predictions": ("epsilon", "sample"),
}
_HEADS = ("num_heads", "num_heads_upsample")
_OPENAI_OPTIONS = (*_ANY, *_HEADS, "noise_schedule", "rescale_timesteps", "predict_xstart", "learn_sigma")

FORMATS: dict[str, Format] = {
    "official_tf": Format(
        read_official_tf,
        "official",
        OFFICIAL_NETWORK,
        options=(*_BETAS, "noise_schedule", "prediction_type"),
        schedules=(*_SCHEDULES, "warmup10", "warmup50"),
        predictions=("epsilon", "sample", "posterior_mean"),
        small_variance_from=256,  # the paper's scripts for 256 x 256
    ),
    "pesser": Format(
        read_pesser,
        "official",
        OFFICIAL_NETWORK,
        options=(*_BETAS, "noise_schedule"),
        schedules=(*_SCHEDULES, "sigmoid"),
        small_variance_from=256,  # ddim's configurations for 256 x 256
    ),
    "pytorch_ddpm": Format(read_pytorch_ddpm, "pytorch_ddpm", _PYTORCH_DDPM_NETWORK, _BETAS, clip_sample=False),
    "improved_diffusion": Format(**_OPENAI, options=(*_OPENAI_OPTIONS, "sigma_small"), rescales_timesteps=True),
    "guided_diffusion": Format(**_OPENAI, options=(*_OPENAI_OPTIONS, "num_head_channels", "use_new_attention_order")),
}


@dataclass(frozen=True)
class KnownModel:
    """A preset: the options that go with it, and its network in arguments of `UNet2DModel`."""

    options: Mapping[str, Any]
    network: Mapping[str, Any]


def _openai_model(
    options: dict[str, Any], size: int, channels: int, blocks: int, attention: tuple[int, ...], **network: Any
) -> KnownModel:
    """`create_model` in `script_util.py`: widths by image size, attention at the given resolutions, learned sigmas."""
    multiples = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}[size]
    plain = "ResnetDownsampleBlock2D" if "num_head_channels" in options else "DownBlock2D"  # resblock_updown
    attends = [size >> level in attention for level in range(len(multiples))]
    network = {"out_channels": 6, "layers_per_block": blocks, "resnet_time_scale_shift": "scale_shift"} | network
    network["block_out_channels"] = tuple(channels * m for m in multiples)
    network["down_block_types"] = tuple("AttnDownBlock2D" if a else plain for a in attends)
    common = {"sample_size": size, "prediction_type": "epsilon", "learn_sigma": True, "rescale_timesteps": False}
    return KnownModel(common | options, network)


# README of improved-diffusion, "Models and Hyperparameters"; the rest is model_and_diffusion_defaults.
_COSINE_4000 = {"noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True, "num_heads": 4}
_CIFAR10 = _openai_model(_COSINE_4000, 32, 128, 3, (16, 8), dropout=0.3)
_LINEAR = {"noise_schedule": "linear", "diffusion_steps": 1000}
_LSUN = _openai_model(_LINEAR | {"num_heads": 1}, 256, 128, 2, (16,), resnet_time_scale_shift="default")
# README of guided-diffusion, "Sampling from pre-trained models"; the rest is diffusion_defaults.
_GUIDED = {**_LINEAR, "num_head_channels": 64, "use_new_attention_order": False}
_GUIDED_64 = {**_GUIDED, "noise_schedule": "cosine", "use_new_attention_order": True}
_AT = (32, 16, 8)  # attention_resolutions
_GUIDED_LSUN = _openai_model(_GUIDED, 256, 256, 2, _AT, dropout=0.1)

# OpenAI's released models that fit `UNet2DModel`, by format and file.
RELEASED = {
    "improved_diffusion_cifar10_uncond_50M_500K": _CIFAR10,
    "improved_diffusion_cifar10_uncond_vlb_50M_500K": _CIFAR10,
    "improved_diffusion_lsun_uncond_100M_1200K_bs128": _LSUN,
    "improved_diffusion_lsun_uncond_100M_2400K_bs64": _LSUN,
    "guided_diffusion_64x64_diffusion": _openai_model(_GUIDED_64, 64, 192, 3, _AT, num_class_embeds=1000, dropout=0.1),
    "guided_diffusion_256x256_diffusion": _openai_model(_GUIDED, 256, 256, 2, _AT, num_class_embeds=1000),
    "guided_diffusion_256x256_diffusion_uncond": _openai_model(_GUIDED, 256, 256, 2, _AT),
    "guided_diffusion_lsun_bedroom": _GUIDED_LSUN,
    "guided_diffusion_lsun_cat": _GUIDED_LSUN,
    "guided_diffusion_lsun_horse": _GUIDED_LSUN,
    "guided_diffusion_lsun_horse_nodropout": _openai_model(_GUIDED, 256, 256, 2, _AT),
}


def find_model(preset: str, from_format: str) -> KnownModel:
    """Return what `--preset` names: a released model of this format, or one of the paper's experiments.

    Raises:
        UserError: There is no such model, or it is of another format.
    """
    family = next((name for name in FORMATS if preset.startswith(f"{name}_")), from_format)
    if family != from_format:
        raise UserError(f"--preset {preset} goes with --from {family}, not {from_format}")
    if preset in RELEASED:
        return RELEASED[preset]
    if preset.startswith(from_format):
        known = [name for name in RELEASED if name.startswith(from_format)]
        raise UserError(f"unknown preset {preset!r}{nearest(preset, known)}; see docs/convert.md")
    recipe = get_preset(preset)
    names = {"noise_schedule": "beta_schedule", "diffusion_steps": "num_train_timesteps"}
    names |= {name: name for name in ("beta_start", "beta_end", "prediction_type", "variance_type")}
    options = {option: recipe.scheduler[name] for option, name in names.items() if name in recipe.scheduler}
    return KnownModel({"sample_size": recipe.unet["sample_size"], **options}, recipe.unet)
