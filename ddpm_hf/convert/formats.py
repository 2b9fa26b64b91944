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
    """What sets one implementation's checkpoints apart.

    Attributes:
        read: Reads a file; the second argument asks for EMA weights.
        naming: The layers' names (`names.translate`).
        network: Arguments of `UNet2DModel` that its networks share, and that shapes do not say.
        options: Which flags of `ddpm-hf convert` it takes besides `_COMMON`, by name.
        schedules: The noise schedules that its code has.
        predictions: What its networks predict.
        small_variance_from: Images of this height and more are sampled with the small variance by its scripts.
        rescales_timesteps: Networks see t * 1000 / T unless its script is told otherwise.
        clip_sample: Its sampler clips the predicted x_0.
    """

    read: Callable[[Path, bool], Checkpoint]
    naming: str
    network: Mapping[str, Any]
    options: tuple[str, ...]
    schedules: tuple[str, ...] = ("linear",)
    predictions: tuple[str, ...] = ("epsilon",)
    small_variance_from: float = float("inf")
    rescales_timesteps: bool = False
    clip_sample: bool = True

    def takes(self, option: str) -> bool:
        return option in _COMMON or option in self.options


_COMMON = ("sample_size", "preset", "ema", "diffusion_steps", "variance_type", "clip_sample")
_PYTORCH_DDPM_NETWORK = {**OFFICIAL_NETWORK, "downsample_padding": 1, "freq_shift": 0, "norm_eps": 1e-5}
_OPENAI_OPTIONS = (
    *("noise_schedule", "rescale_timesteps", "predict_xstart", "learn_sigma"),
    *("num_heads", "num_heads_upsample"),
)
_OPENAI: dict[str, Any] = {
    "read": read_openai,
    "naming": "openai",
    "network": {**_PYTORCH_DDPM_NETWORK, "flip_sin_to_cos": True},
    "schedules": ("linear", "cosine"),
    "predictions": ("epsilon", "sample"),
}

FORMATS: dict[str, Format] = {
    "official_tf": Format(
        read_official_tf,
        "official",
        OFFICIAL_NETWORK,
        ("beta_start", "beta_end", "noise_schedule", "prediction_type"),
        ("linear", "quad", "const", "jsd", "warmup10", "warmup50"),
        ("epsilon", "sample", "posterior_mean"),
        small_variance_from=256,  # the paper's scripts for 256 x 256
    ),
    "pesser": Format(
        read_pesser,
        "official",
        OFFICIAL_NETWORK,
        ("beta_start", "beta_end", "noise_schedule"),
        ("linear", "quad", "const", "jsd", "sigmoid"),
        small_variance_from=256,  # ddim's configurations for 256 x 256
    ),
    "pytorch_ddpm": Format(
        read_pytorch_ddpm, "pytorch_ddpm", _PYTORCH_DDPM_NETWORK, ("beta_start", "beta_end"), clip_sample=False
    ),
    "improved_diffusion": Format(**_OPENAI, options=(*_OPENAI_OPTIONS, "sigma_small"), rescales_timesteps=True),
    "guided_diffusion": Format(**_OPENAI, options=(*_OPENAI_OPTIONS, "num_head_channels", "use_new_attention_order")),
}


@dataclass(frozen=True)
class KnownModel:
    """A preset: the options that go with it, and its network in arguments of `UNet2DModel`."""

    options: Mapping[str, Any]
    network: Mapping[str, Any]


def _openai_model(
    options: dict[str, Any], size: int, channels: int, attention: tuple[int, ...], **network: Any
) -> KnownModel:
    """`create_model` in `script_util.py`: widths by image size, attention at the given resolutions, learned sigmas."""
    multiples = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}[size]
    plain = "ResnetDownsampleBlock2D" if "num_head_channels" in options else "DownBlock2D"  # resblock_updown
    attends = [size >> level in attention for level in range(len(multiples))]
    common = {"sample_size": size, "prediction_type": "epsilon", "learn_sigma": True, "rescale_timesteps": False}
    return KnownModel(
        common | options,
        {
            "block_out_channels": tuple(channels * m for m in multiples),
            "down_block_types": tuple("AttnDownBlock2D" if a else plain for a in attends),
            "layers_per_block": 2 if size == 256 else 3,
            "out_channels": 6,
            "resnet_time_scale_shift": "scale_shift",
            **network,
        },
    )


# README of improved-diffusion, "Models and Hyperparameters"; the rest is model_and_diffusion_defaults.
_COSINE_4000 = {"noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True, "num_heads": 4}
_LINEAR = {"noise_schedule": "linear", "diffusion_steps": 1000}
_CIFAR10 = _openai_model(_COSINE_4000, 32, 128, (16, 8), dropout=0.3)
_LSUN = _openai_model(_LINEAR | {"num_heads": 1}, 256, 128, (16,), resnet_time_scale_shift="default")
# README of guided-diffusion, "Sampling from pre-trained models"; the rest is diffusion_defaults.
_64 = {"num_head_channels": 64, "use_new_attention_order": True, "noise_schedule": "cosine", "diffusion_steps": 1000}
_256 = {**_LINEAR, "num_head_channels": 64, "use_new_attention_order": False}
_GUIDED_LSUN = _openai_model(_256, 256, 256, (32, 16, 8), dropout=0.1)
_GUIDED_256 = _openai_model(_256, 256, 256, (32, 16, 8))

# OpenAI's released models that fit `UNet2DModel`, by format and file.
RELEASED = {
    "improved_diffusion_cifar10_uncond_50M_500K": _CIFAR10,
    "improved_diffusion_cifar10_uncond_vlb_50M_500K": _CIFAR10,
    "improved_diffusion_lsun_uncond_100M_1200K_bs128": _LSUN,
    "improved_diffusion_lsun_uncond_100M_2400K_bs64": _LSUN,
    "guided_diffusion_64x64_diffusion": _openai_model(_64, 64, 192, (32, 16, 8), num_class_embeds=1000, dropout=0.1),
    "guided_diffusion_256x256_diffusion": _openai_model(_256, 256, 256, (32, 16, 8), num_class_embeds=1000),
    "guided_diffusion_256x256_diffusion_uncond": _GUIDED_256,
    "guided_diffusion_lsun_bedroom": _GUIDED_LSUN,
    "guided_diffusion_lsun_cat": _GUIDED_LSUN,
    "guided_diffusion_lsun_horse": _GUIDED_LSUN,
    "guided_diffusion_lsun_horse_nodropout": _GUIDED_256,
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
