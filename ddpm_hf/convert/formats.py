"""Describe the formats that can be converted, the options that each takes, and the models that are known by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.unet_2d import UNet2DModel, parameter_count
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
_OPENAI_PROCESS = ("noise_schedule", "rescale_timesteps", "predict_xstart", "learn_sigma")
_OPENAI_OPTIONS = (*_ANY, *_OPENAI_PROCESS, "num_heads", "num_heads_upsample")
# Both the paper's scripts for 256 x 256 images and ddim's configurations sample with the posterior's variance.
_OFFICIAL: dict[str, Any] = {"naming": "official", "network": OFFICIAL_NETWORK, "small_variance_from": 256}

FORMATS: dict[str, Format] = {
    "official_tf": Format(
        read_official_tf,
        options=(*_BETAS, "noise_schedule", "prediction_type"),
        schedules=(*_SCHEDULES, "warmup10", "warmup50"),
        predictions=("epsilon", "sample", "posterior_mean"),
        **_OFFICIAL,
    ),
    "pesser": Format(
        read_pesser, options=(*_BETAS, "noise_schedule"), schedules=(*_SCHEDULES, "sigmoid"), **_OFFICIAL
    ),
    "pytorch_ddpm": Format(read_pytorch_ddpm, "pytorch_ddpm", _PYTORCH_DDPM_NETWORK, _BETAS, clip_sample=False),
    "improved_diffusion": Format(**_OPENAI, options=(*_OPENAI_OPTIONS, "sigma_small"), rescales_timesteps=True),
    "guided_diffusion": Format(**_OPENAI, options=(*_OPENAI_OPTIONS, "num_head_channels", "use_new_attention_order")),
}


@dataclass(frozen=True)
class KnownModel:
    """A preset: the options that go with it, its network's number of weights, and the dropout of its training."""

    options: Mapping[str, Any]
    parameters: int
    dropout: float = 0.0


_LEARNED = {"prediction_type": "epsilon", "learn_sigma": True}
# README of improved-diffusion, "Models and Hyperparameters"; the rest is model_and_diffusion_defaults.
_COSINE_4000 = {"noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True, "num_heads": 4}
_CIFAR10 = KnownModel({"sample_size": 32, **_LEARNED, **_COSINE_4000}, 52_546_438, 0.3)
_PLAIN_1000 = {"noise_schedule": "linear", "diffusion_steps": 1000, "rescale_timesteps": False}
_LSUN = KnownModel({"sample_size": 256, **_LEARNED, **_PLAIN_1000, "num_heads": 1}, 113_676_678)
# README of guided-diffusion, "Sampling from pre-trained models"; the rest is diffusion_defaults.
_HEADS_OF_64 = {"num_head_channels": 64, "use_new_attention_order": False}
_GUIDED = {"sample_size": 256, **_LEARNED, **_PLAIN_1000, **_HEADS_OF_64}
_GUIDED_64 = {**_GUIDED, "sample_size": 64, "noise_schedule": "cosine", "use_new_attention_order": True}

# OpenAI's released models that fit `UNet2DModel`, by format and file.
RELEASED = {
    "improved_diffusion_cifar10_uncond_50M_500K": _CIFAR10,
    "improved_diffusion_cifar10_uncond_vlb_50M_500K": _CIFAR10,
    "improved_diffusion_lsun_uncond_100M_1200K_bs128": _LSUN,
    "improved_diffusion_lsun_uncond_100M_2400K_bs64": _LSUN,
    "guided_diffusion_64x64_diffusion": KnownModel(_GUIDED_64, 295_904_454, 0.1),
    "guided_diffusion_256x256_diffusion": KnownModel(_GUIDED, 553_838_086),
    "guided_diffusion_256x256_diffusion_uncond": KnownModel(_GUIDED, 552_814_086),
    "guided_diffusion_lsun_bedroom": KnownModel(_GUIDED, 552_814_086, 0.1),
    "guided_diffusion_lsun_cat": KnownModel(_GUIDED, 552_814_086, 0.1),
    "guided_diffusion_lsun_horse": KnownModel(_GUIDED, 552_814_086, 0.1),
    "guided_diffusion_lsun_horse_nodropout": KnownModel(_GUIDED, 552_814_086),
}


def find_model(preset: str, from_format: str) -> KnownModel:
    """Return what `--preset` names: a released model of this format, or one of the paper's experiments.

    Raises a UserError if there is no such model, or it is of another format.
    """
    released = [name for name in RELEASED if name.startswith(f"{from_format}_")]
    if preset in released:
        return RELEASED[preset]
    if preset.startswith(tuple(FORMATS)):
        known = nearest(preset, released)
        raise UserError(f"--preset {preset} is no released model of {from_format}{known}; see docs/convert.md")
    recipe = get_preset(preset)
    names = {"noise_schedule": "beta_schedule", "diffusion_steps": "num_train_timesteps"}
    names |= {name: name for name in ("beta_start", "beta_end", "prediction_type", "variance_type")}
    options = {option: recipe.scheduler[name] for option, name in names.items() if name in recipe.scheduler}
    with torch.device("meta"):
        parameters = parameter_count(UNet2DModel(**recipe.unet))
    options["sample_size"] = recipe.unet["sample_size"]
    return KnownModel(options, parameters, recipe.unet.get("dropout", 0.0))
