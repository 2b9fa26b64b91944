"""Other people's DDPM weights to ours, and ours to the official TensorFlow format.

Every format is read into one naming (`weight_names.py`), from which the architecture is inferred and the state dict
made:

| format | what it reads |
|---|---|
| `official_tf` | TensorFlow checkpoints of hojonathanho/diffusion |
| `pesser` | state dicts of pesser/pytorch_diffusion and ermongroup/ddim (also its training checkpoints) |
| `pytorch_ddpm` | `ckpt.pt` of w86763777/pytorch-ddpm |
| `improved_diffusion` | `ema_*.pt` and `model*.pt` of openai/improved-diffusion, where `UNet2DModel` has its like |
| `guided_diffusion` | the same of openai/guided-diffusion |
| `diffusers` | stock repositories, old ones too: flat layout, legacy attention keys, `.bin` weights |

PyTorch files are read by `weight_files.py`: nothing in them is executed. What a file does not say is a flag
(`ForeignOptions`), or a default of its training script that is reported as assumed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..diffusion.noise_schedule import make_betas
from ..diffusion.scheduling_ddpm import LEARNED_VARIANCES, DDPMScheduler
from ..hub.model_card import CardFacts, ModelFacts, make_card
from ..models.unet_2d import UNet2DModel, check_size, parameter_count
from ..pipelines.pipeline_ddpm import DDPMPipeline
from ..presets import OFFICIAL_NETWORK, PAPER_PROCESS, get_preset
from ..training.checkpointing import MANIFEST_FILE, load_checkpoint
from ..utils.errors import UserError
from ..utils.files import write_directory, write_text
from ..utils.text import nearest
from ..utils.weight_files import read_weights
from .weight_names import (
    PYTORCH_DDPM_TABLE,
    ConversionError,
    Tensors,
    canonical_from_improved_diffusion,
    canonical_from_ours,
    canonical_from_pytorch_ddpm,
    canonical_from_tf,
    head_channels,
    infer_architecture,
    layout_from_tf,
    listed,
    our_key,
    split_qkv,
    tf_from_canonical,
)

EMA_SUFFIX = "/ExponentialMovingAverage"

# What each family of networks needs of UNet2DModel besides widths and blocks.
_OPENAI_NETWORK = {
    **OFFICIAL_NETWORK,
    "downsample_padding": 1,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "norm_eps": 1e-5,
}
_TRAITS: dict[str, dict[str, Any]] = {
    "official_tf": dict(OFFICIAL_NETWORK),
    "pesser": dict(OFFICIAL_NETWORK),
    "pytorch_ddpm": {**OFFICIAL_NETWORK, "downsample_padding": 1, "freq_shift": 0, "norm_eps": 1e-5},
    "improved_diffusion": _OPENAI_NETWORK,
    "guided_diffusion": _OPENAI_NETWORK,
}
FORMATS = (*_TRAITS, "diffusers")
_OPENAI = ("improved_diffusion", "guided_diffusion")

# The noise schedules that each format's code has; those not named here have the linear one only.
_SCHEDULES: dict[str, tuple[str, ...]] = {
    "official_tf": ("linear", "quad", "const", "jsd", "warmup10", "warmup50"),
    "pesser": ("linear", "quad", "const", "jsd", "sigmoid"),
    "improved_diffusion": ("linear", "cosine"),
    "guided_diffusion": ("linear", "cosine"),
}

# What networks of each format predict, if not only epsilon.
_PREDICTS: dict[str, tuple[str, ...]] = {
    "official_tf": ("epsilon", "sample", "posterior_mean"),
    "improved_diffusion": ("epsilon", "sample"),
    "guided_diffusion": ("epsilon", "sample"),
}

# Which of `ForeignOptions` each format takes.
_ANY = ("sample_size", "preset", "ema", "diffusion_steps", "variance_type", "clip_sample")
_BETAS = ("beta_start", "beta_end")
_OPENAI_TAKES = ("noise_schedule", "rescale_timesteps", "predict_xstart", "learn_sigma", "num_heads")
_TAKES: dict[str, tuple[str, ...]] = {
    "official_tf": (*_ANY, *_BETAS, "noise_schedule", "prediction_type"),
    "pesser": (*_ANY, *_BETAS, "noise_schedule"),
    "pytorch_ddpm": (*_ANY, *_BETAS),
    "improved_diffusion": (*_ANY, *_OPENAI_TAKES, "num_heads_upsample", "sigma_small"),
    "guided_diffusion": (
        *(*_ANY, *_OPENAI_TAKES, "num_heads_upsample"),
        *("num_head_channels", "use_new_attention_order"),
    ),
    "diffusers": (),
}


@dataclass(frozen=True)
class ForeignOptions:
    """What can be said of a checkpoint beside its tensors; `None` where it is not said.

    Attributes:
        sample_size: Height and width of the images.
        preset: One of the paper's experiments, or of OpenAI's released models (`RELEASED`); the network must agree.
        ema: Take the EMA weights; `False` takes the raw ones.
        num_heads, num_heads_upsample, num_head_channels, use_new_attention_order: How OpenAI's attention is cut into
            heads, as in its training scripts; its files do not say it.
        noise_schedule, diffusion_steps, beta_start, beta_end: The forward process.
        rescale_timesteps: The network saw t * 1000 / T.
        prediction_type, predict_xstart: What the network predicts, in the names of `DDPMScheduler` and of OpenAI.
        learn_sigma: Checked against the network's channels.
        variance_type, sigma_small: The reverse variance, in the names of `DDPMScheduler` and of OpenAI.
        clip_sample: Clip the predicted x_0; by default as the original sampler does.
    """

    sample_size: int | tuple[int, int] | None = None
    preset: str | None = None
    ema: bool = True
    num_heads: int | None = None
    num_heads_upsample: int | None = None
    num_head_channels: int | None = None
    use_new_attention_order: bool | None = None
    noise_schedule: str | None = None
    diffusion_steps: int | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    rescale_timesteps: bool | None = None
    prediction_type: str | None = None
    predict_xstart: bool | None = None
    learn_sigma: bool | None = None
    variance_type: str | None = None
    sigma_small: bool | None = None
    clip_sample: bool | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not left as they are."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def flags(self) -> list[str]:
        """The flags of `given`."""
        return [_flag(name) for name in self.given()]


def _flag(name: str) -> str:
    return "--no_ema" if name == "ema" else f"--{name}"


# ---------------------------------------------------------------------- OpenAI's released models


@dataclass(frozen=True)
class _Released:
    """One released model: whose it is, the flags that its README gives, and the network that they make."""

    format: str
    options: Mapping[str, Any]
    network: Mapping[str, Any]


def _openai_network(
    size: int, channels: int, layers: int, attention: tuple[int, ...], classes: int | None = None, dropout: float = 0.0
) -> dict[str, Any]:
    """`create_model` in `script_util.py`: widths by image size, attention at the given resolutions, learned sigmas."""
    multiples = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}[size]
    return {
        "sample_size": size,
        "block_out_channels": tuple(int(channels * m) for m in multiples),
        "layers_per_block": layers,
        "attention": tuple(size >> level in attention for level in range(len(multiples))),
        "out_channels": 6,
        "num_class_embeds": classes,
        "resnet_time_scale_shift": "scale_shift",
        "dropout": dropout,
    }


def _released() -> dict[str, _Released]:
    # README of improved-diffusion, "Models and Hyperparameters"; defaults: model_and_diffusion_defaults.
    flags: dict[str, Any] = {
        "num_heads": 4,
        "diffusion_steps": 4000,
        "noise_schedule": "cosine",
        "rescale_timesteps": True,
    }
    cifar10 = _openai_network(32, 128, 3, (16, 8), dropout=0.3)
    imagenet = _openai_network(64, 128, 3, (16, 8))
    conditional = _openai_network(64, 192, 3, (16, 8), classes=1000)
    bedroom = _openai_network(256, 128, 2, (16,)) | {"resnet_time_scale_shift": "default"}
    one_head = {"num_heads": 1, "diffusion_steps": 1000, "noise_schedule": "linear", "rescale_timesteps": False}
    improved = {
        "cifar10_uncond_50M_500K": (flags, cifar10),
        "cifar10_uncond_vlb_50M_500K": (flags, cifar10),
        "imagenet64_uncond_100M_1500K": (flags, imagenet),
        "imagenet64_uncond_vlb_100M_1500K": (flags, imagenet),
        "imagenet64_cond_270M_250K": (flags | {"rescale_timesteps": False}, conditional),
        "lsun_uncond_100M_1200K_bs128": (one_head, bedroom),
        "lsun_uncond_100M_2400K_bs64": (one_head, bedroom),
    }
    # README of guided-diffusion, "Sampling from pre-trained models"; defaults: diffusion_defaults.
    linear: dict[str, Any] = {"num_head_channels": 64, "use_new_attention_order": False, "diffusion_steps": 1000}
    linear |= {"noise_schedule": "linear", "rescale_timesteps": False}
    cosine = linear | {"noise_schedule": "cosine", "use_new_attention_order": True}
    at = (32, 16, 8)
    guided = {
        "64x64_diffusion": (cosine, _openai_network(64, 192, 3, at, classes=1000, dropout=0.1)),
        "256x256_diffusion": (linear, _openai_network(256, 256, 2, at, classes=1000)),
        "256x256_diffusion_uncond": (linear, _openai_network(256, 256, 2, at)),
        "512x512_diffusion": (linear, _openai_network(512, 256, 2, at, classes=1000)),
        **{f"lsun_{name}": (linear, _openai_network(256, 256, 2, at, dropout=0.1)) for name in _LSUN},
        "lsun_horse_nodropout": (linear, _openai_network(256, 256, 2, at)),
    }
    common = {"prediction_type": "epsilon", "learn_sigma": True}
    return {
        f"{family}_{name}": _Released(family, options | common, network)
        for family, models in (("improved_diffusion", improved), ("guided_diffusion", guided))
        for name, (options, network) in models.items()
    }


_LSUN = ("bedroom", "cat", "horse")
RELEASED = _released()

# ---------------------------------------------------------------------- reading files


def _read_pytorch(path: Path) -> Any:
    """What a PyTorch or safetensors file holds, without executing anything in it."""
    try:
        return read_weights(path)
    except UserError as error:
        raise ConversionError(str(error)) from None


@dataclass
class _Source:
    """What a checkpoint holds.

    Attributes:
        tensors: By canonical names.
        weights: Which ones were taken, and how that is known.
        diffusion_steps, sample_size: Where the file says them.
        remark: What else is to be said about it.
    """

    tensors: Tensors
    weights: str
    diffusion_steps: int | None = None
    sample_size: int | tuple[int, int] | None = None
    remark: str | None = None


def _tensors_in(path: Path, content: Any) -> Tensors:
    """A state dict, without the prefixes of DataParallel (`module.`) and torch.compile (`_orig_mod.`)."""
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConversionError(f"{str(path)!r} holds no state dict of named tensors{_what_instead(content)}")
    tensors: Tensors = {}
    for full, value in content.items():
        name = str(full).replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in tensors:
            raise ConversionError(f"{str(path)!r} holds {name} twice, under different prefixes")
        tensors[name] = value
    return tensors


def _what_instead(content: Any) -> str:
    """What a file that is no state dict seems to be, for a message."""
    if not isinstance(content, dict):
        return f", but a {type(content).__name__}"
    if content.keys() == {"state", "param_groups"}:
        return ", but an optimizer's state; the weights are in another file beside it"
    inner = [str(key) for key, value in content.items() if isinstance(value, dict) and value]
    if not inner:
        return ""
    return (
        f", but {', '.join(map(repr, inner))}; save the one with the weights alone, as in "
        f"torch.save(torch.load(FILE)[{inner[0]!r}], 'weights.pt')"
    )


def _only_kind(path: Path, ema: bool, averaged: bool | None, why: str) -> str:
    """Which weights a file with one kind of them holds.

    Args:
        path: The file.
        ema: Averaged ones are wanted.
        averaged: What is known.
        why: How it is known.

    Raises:
        ConversionError: It is known to hold the other kind.
    """
    if averaged is None:
        if ema:
            return "taken for EMA weights, as nothing in the file says it (if they are raw: --no_ema)"
        return "taken for raw weights, as --no_ema says"
    if averaged == ema:
        return f"{'averaged' if averaged else 'raw'} weights ({why})"
    if ema:
        raise ConversionError(
            f"{path.name} holds the raw weights ({why}), which make far worse images; take the averaged ones, or "
            "--no_ema if that is what you want"
        )
    raise ConversionError(f"{path.name} holds EMA weights only ({why}); leave out --no_ema, or take another file")


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError:
        raise ConversionError(
            "TensorFlow checkpoints need TensorFlow; install it with pip install 'ddpm-hf[convert]'"
        ) from None
    return tensorflow


def _read_official_tf(path: Path, ema: bool) -> _Source:
    """The official variables, by their canonical names and in PyTorch's layout."""
    nothing = ConversionError(
        f"there is no TensorFlow checkpoint at {str(path)!r}; give the path without ending, as in model.ckpt-790000, "
        "beside which lie .index and .data files"
    )
    prefix: str | None = str(path).removesuffix(".index")
    if not (any(path.glob("*.index")) if path.is_dir() else Path(f"{prefix}.index").is_file()):
        raise nothing  # said before TensorFlow is imported, which takes seconds, or is not there
    tf = _tensorflow()
    if path.is_dir():
        prefix = tf.train.latest_checkpoint(str(path))
        if prefix is None or not Path(f"{prefix}.index").is_file():
            raise nothing
    try:
        reader = tf.train.load_checkpoint(prefix)
        names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
        averaged = {name for name in names if name.endswith(EMA_SUFFIX)}
        if ema and not averaged:
            raise ConversionError(
                f"{prefix!r} has no EMA weights (.../ExponentialMovingAverage); the raw ones make far worse "
                "images, take them with --no_ema if that is what you want"
            )
        wanted = averaged if ema else {name for name in names if name not in averaged and "Adam" not in name}
        if averaged and not wanted:
            raise ConversionError(f"{prefix!r} holds EMA weights only; leave out --no_ema")
        if not wanted:
            raise ConversionError(f"{prefix!r} has no variables called model/...; is it a DDPM checkpoint?")
        arrays = {name.removesuffix(EMA_SUFFIX): reader.get_tensor(name) for name in sorted(wanted)}
    except ConversionError:
        raise
    except Exception as error:  # TensorFlow has errors of its own for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ConversionError(f"{prefix!r} is not a TensorFlow checkpoint, or is damaged ({reason})") from None
    tensors = {canonical_from_tf(name): layout_from_tf(array) for name, array in arrays.items()}
    return _Source(tensors, f"{'averaged' if ema else 'raw'} weights")


# MD5 of pesser's released files with raw weights (ckpt_util.py, MD5_MAP); averaged ones have the same file names.
_PESSER_RAW = {
    "82ed3067fd1002f5cf4c339fb80c4669": "cifar10",
    "f70280ac0e08b8e696f42cb8e948ff1c": "lsun_bedroom",
    "bbee0e7c3d7abfb6e2539eaf2fb9987b": "lsun_cat",
    "eb619b8a5ab95ef80f94ce8a5488dae3": "lsun_church",
}


def _read_pesser(path: Path, ema: bool) -> _Source:
    content = _read_pytorch(path)
    remark = None
    if isinstance(content, (list, tuple)):  # ermongroup/ddim: [model, optimizer, epoch, step, ema]
        if not content or (ema and len(content) < 5):
            raise ConversionError(f"{str(path)!r} holds no EMA weights; take the raw ones with --no_ema")
        content = content[4 if ema else 0]
        weights = f"{'averaged' if ema else 'raw'} weights of a training checkpoint"
        remark = "x_0 is clipped as in its DDPM sampler; its DDIM sampler does not clip (--clip_sample false)"
    else:
        # Their names are ema_diffusion_cifar10_model/model-790000.ckpt and diffusion_cifar10_model/model-790000.ckpt.
        names = (path.name, path.resolve().parent.name)
        name = next((n for n in names if re.match(r"(ema_)?diffusion_\w+_model|ema_", n)), None)
        averaged, why = None if name is None else name.startswith("ema_"), f"by the name {name}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if raw := _PESSER_RAW.get(digest):
            averaged, why = False, f"it is pesser's released {raw}"
        weights = _only_kind(path, ema, averaged, why)
    tensors = _tensors_in(path, content)
    logvar = tensors.pop("logvar", None)  # ermongroup/ddim's unused parameter, one number per timestep
    return _Source(tensors, weights, None if logvar is None else logvar.numel(), remark=remark)


def _read_pytorch_ddpm(path: Path, ema: bool) -> _Source:
    content = _read_pytorch(path)
    size = None
    if isinstance(content, dict) and ("ema_model" in content or "net_model" in content):
        key = "ema_model" if ema else "net_model"
        if key not in content:
            way_out = "take the raw weights with --no_ema" if ema else "leave out --no_ema"
            raise ConversionError(f"{str(path)!r} has no {key}; {way_out}")
        noise = content.get("x_T")  # of its sample grids, [N, 3, H, W]
        if isinstance(noise, Tensor) and noise.ndim == 4:
            height, width = noise.shape[2:]
            size = height if height == width else (height, width)
        content = content[key]
        weights = f"{'averaged' if ema else 'raw'} weights ({key})"
    else:
        weights = _only_kind(path, ema, None, "")
    tensors = _tensors_in(path, content)
    table = tensors.get(PYTORCH_DDPM_TABLE)
    steps = None if table is None else len(table)
    return _Source(canonical_from_pytorch_ddpm(tensors), weights, steps, size)


def _read_openai(path: Path, ema: bool) -> _Source:
    kind = re.match(r"(ema)_|(model)\d+", path.name)  # their training scripts: ema_0.9999_500000.pt, model500000.pt
    averaged = None if kind is None else kind[1] is not None
    weights = _only_kind(path, ema, averaged, "by its name")
    return _Source(canonical_from_improved_diffusion(_tensors_in(path, _read_pytorch(path))), weights)


_READERS: dict[str, Callable[[Path, bool], _Source]] = {
    "official_tf": _read_official_tf,
    "pesser": _read_pesser,
    "pytorch_ddpm": _read_pytorch_ddpm,
    "improved_diffusion": _read_openai,
    "guided_diffusion": _read_openai,
}


def _load_weights(
    unet: UNet2DModel, tensors: Tensors, key_of: Callable[[str], str | None], file: Path, network: str
) -> None:
    """Give a network its weights; every tensor must find its place and every place its tensor.

    Args:
        unet: Gets them.
        tensors: By the names in `file`.
        key_of: Such a name to the network's key.
        file: Where they come from, for messages.
        network: Which network it is, for messages.

    Raises:
        ConversionError: Tensors without a place, of another shape or not finite, or a place without a tensor; names
            them.
    """
    wanted = unet.state_dict()
    state: Tensors = {}
    lost = []
    for name, value in tensors.items():
        key = key_of(name)
        if key is None or key not in wanted:
            lost.append(name)
            continue
        target = wanted[key].shape
        if [n for n in value.shape if n != 1] == [n for n in target if n != 1]:
            value = value.reshape(target)  # 1x1 convolutions and matrices are the same numbers
        if value.shape != target:
            raise ConversionError(
                f"{str(file)!r}: {name} has shape {tuple(value.shape)}, and {network} asks for {tuple(target)} ({key})"
            )
        if not value.is_floating_point():
            raise ConversionError(f"{str(file)!r}: {name} holds {value.dtype}, which no weights are")
        if not value.isfinite().all():
            raise ConversionError(f"{str(file)!r}: {name} holds NaN or infinity; take an intact copy")
        state[key] = value.to(wanted[key].dtype)
    if lost:
        raise ConversionError(f"{str(file)!r}: no place for {listed(lost)} in {network}")
    if missing := sorted(wanted.keys() - state.keys()):
        raise ConversionError(f"{str(file)!r}: nothing found for {listed(missing, 1)}")
    unet.load_state_dict(state)


# ---------------------------------------------------------------------- whole conversions


def _resolve(from_format: str, path: Path, options: ForeignOptions) -> ForeignOptions:
    """The options with the preset's in them, in our names.

    Raises:
        UserError: The format does not take one of them, a value is out of range, or the preset says something else.
    """
    given = options.given()
    if refused := [_flag(name) for name in given if name not in _TAKES[from_format]]:
        reason = "the repository says it" if from_format == "diffusers" else "its code has no such setting"
        if any("head" in flag for flag in refused) and from_format not in _OPENAI:
            reason = "its attention has one head" if from_format != "diffusers" else reason
        raise UserError(f"--from {from_format} takes no {', '.join(refused)}: {reason}; leave it out")
    for name in ("sample_size", "num_heads", "num_heads_upsample", "num_head_channels", "diffusion_steps"):
        if name in given and np.min(given[name]) < 1:
            raise UserError(f"{name} must be at least 1, got {given[name]}")
    schedules = _SCHEDULES.get(from_format, ("linear",))
    if given.get("noise_schedule", "linear") not in schedules:
        raise UserError(
            f"--noise_schedule of {from_format} must be one of {', '.join(schedules)}, got {given['noise_schedule']!r}"
        )
    if "num_heads" in given and "num_head_channels" in given:
        raise UserError("give --num_heads or --num_head_channels: with the second, the original ignores the first")
    if "predict_xstart" in given:
        given["prediction_type"] = "sample" if given.pop("predict_xstart") else "epsilon"
    if given.pop("sigma_small", False):
        given.setdefault("variance_type", "fixed_small")
    if "variance_type" in given:  # the others' spelling is fixedlarge
        given["variance_type"] = re.sub("^fixed(?=small|large)", "fixed_", given["variance_type"])
    from_preset = _preset_options(from_format, path, given)
    predicts = given.get("prediction_type", from_preset.get("prediction_type", "epsilon"))
    if predicts not in _PREDICTS.get(from_format, ("epsilon",)):
        raise UserError(f"the code of {from_format} trains no network that predicts {predicts!r} (flag or preset)")
    for name, value in from_preset.items():
        if name == "variance_type":  # whatever the training, sampling may use another
            given.setdefault(name, value)
        elif given.setdefault(name, value) != value:
            raise UserError(f"--preset {options.preset} says {name}={value}, and the flags say {given[name]}")
    return ForeignOptions(**given)


def _preset_options(from_format: str, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset says, of ours or of a released model; nothing without one."""
    preset = given.get("preset")
    if preset is None:
        name = f"{from_format}_{path.stem}"
        if name in RELEASED and not {"noise_schedule", "diffusion_steps"} <= given.keys():
            raise UserError(
                f"{path.name} is the name of a released model: give --preset {name}, or --noise_schedule and "
                "--diffusion_steps if it is another"
            )
        return {}
    if (released := RELEASED.get(preset)) is not None:
        if released.format != from_format:
            raise UserError(f"--preset {preset} goes with --from {released.format}, not {from_format}")
        return {"sample_size": released.network["sample_size"], **released.options}
    if preset.startswith(_OPENAI):
        known = [name for name in RELEASED if name.startswith(from_format)]
        raise UserError(f"unknown preset {preset!r}{nearest(preset, known)}; see docs/convert.md")
    recipe = get_preset(preset)
    ours = {"noise_schedule": "beta_schedule", "diffusion_steps": "num_train_timesteps"}
    names = {**ours, "beta_start": "beta_start", "beta_end": "beta_end", "prediction_type": "prediction_type"}
    options = {name: recipe.scheduler[key] for name, key in names.items() if key in recipe.scheduler}
    return {
        "sample_size": recipe.unet["sample_size"],
        **options,
        **({"variance_type": recipe.scheduler["variance_type"]} if "variance_type" in recipe.scheduler else {}),
    }


class _Assumed(list[str]):
    """What was assumed because neither the file nor a flag says it."""

    def pick(self, options: ForeignOptions, name: str, default: Any) -> Any:
        """The option, or the default, which is noted."""
        value = getattr(options, name)
        if value is not None:
            return value
        self.append(f"{_flag(name)} {str(default).lower() if isinstance(default, bool) else default}")
        return default


def _process(
    from_format: str, options: ForeignOptions, source: _Source, learned: bool, assumed: _Assumed
) -> dict[str, Any]:
    """`DDPMScheduler` arguments: the process that the network was trained for, sampled as the original does.

    Args:
        from_format, options, source: What was asked for, and what was read.
        learned: The network has channels for the variance.
        assumed: Gets what neither says.

    Raises:
        UserError: File and options contradict each other, or no stock scheduler hands the network what it saw.
    """
    T = source.diffusion_steps
    if T is None:
        T = assumed.pick(options, "diffusion_steps", PAPER_PROCESS["num_train_timesteps"])
    elif options.diffusion_steps not in (None, T):
        raise ConversionError(
            f"the network was trained with {T} timesteps, as the file's tensors say, and not with "
            f"{options.diffusion_steps} (--diffusion_steps or --preset)"
        )
    schedule = assumed.pick(options, "noise_schedule", "linear") if from_format in _SCHEDULES else "linear"
    process: dict[str, Any] = {"num_train_timesteps": T, "beta_schedule": schedule}
    process["prediction_type"] = options.prediction_type or "epsilon"
    if options.prediction_type is None and from_format in (*_OPENAI, "official_tf"):
        assumed.append("--prediction_type epsilon" if from_format == "official_tf" else "--predict_xstart false")
    if from_format in _OPENAI:
        process |= _openai_betas(from_format, options, T, schedule, assumed)
    else:
        ends = {"jsd": (), "const": ("beta_end",)}.get(schedule, _BETAS)
        if unused := [name for name in _BETAS if name not in ends and getattr(options, name) is not None]:
            raise UserError(f"--noise_schedule {schedule} has no {' and no '.join(unused)}; leave it out")
        process |= {name: assumed.pick(options, name, PAPER_PROCESS[name]) for name in ends}
    process["variance_type"] = _variance(from_format, options, learned, assumed)
    process["clip_sample"] = from_format != "pytorch_ddpm" if options.clip_sample is None else options.clip_sample
    return process


def _variance(from_format: str, options: ForeignOptions, learned: bool, assumed: _Assumed) -> str:
    """The scheduler's `variance_type`, which agrees with what the network's channels say."""
    asked = options.variance_type
    if (asked is not None and learned != (asked in LEARNED_VARIANCES)) or options.learn_sigma not in (None, learned):
        channels = "has" if learned else "has no"
        told = f"variance_type={asked}" if asked is not None else f"learn_sigma={options.learn_sigma}"
        raise ConversionError(f"the network {channels} channels for a learned variance, and the flags say {told}")
    if learned:
        return asked or ("learned_range" if from_format in _OPENAI else "learned")
    # The paper's scripts and ddim's configurations for 256 x 256 sample with the small one; other defaults are large.
    small = from_format in ("official_tf", "pesser") and np.min(np.asarray(options.sample_size)) >= 256
    return str(assumed.pick(options, "variance_type", "fixed_small" if small else "fixed_large"))


def _openai_betas(
    from_format: str, options: ForeignOptions, T: int, schedule: str, assumed: _Assumed
) -> dict[str, Any]:
    """The betas of `get_named_beta_schedule`, or of the chain whose timesteps the network saw as whole numbers."""
    if schedule == "cosine":
        process: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    else:
        process = {"beta_start": 1e-4 * 1000 / T, "beta_end": 0.02 * 1000 / T}
    # With rescale_timesteps the network sees t * 1000 / T.
    if T == 1000 or not assumed.pick(options, "rescale_timesteps", from_format == "improved_diffusion"):
        return process
    if T % 1000:
        raise ConversionError(
            f"with rescale_timesteps the network saw t * 1000 / {T}, and stock schedulers hand it t = 0, 1, 2, ...: "
            "only a multiple of 1000 timesteps can be converted (if it was trained without: --rescale_timesteps false)"
        )
    ends = process.get("beta_start", 0), process.get("beta_end", 0)
    betas = make_betas(process.get("beta_schedule", schedule), T, *ends)
    # Every (T/1000)th timestep: their --timestep_respacing ddim1000.
    alpha_bar = np.cumprod(1 - betas)[:: T // 1000]
    betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return {"beta_schedule": "linear", "num_train_timesteps": 1000, "trained_betas": betas.tolist()}


def _cut_heads(
    from_format: str, tensors: Tensors, options: ForeignOptions, assumed: _Assumed
) -> tuple[Tensors, int | None]:
    """The weights with q, k and v apart, and the channels per attention head.

    Raises:
        UserError: How attention is cut was not said, does not fit, or is nothing that UNet2DModel has.
    """
    widths = {value.shape[1] for name, value in tensors.items() if name.endswith(".qkv.weight")}
    if not widths:
        return tensors, None
    heads, by_channels = options.num_heads, options.num_head_channels
    if heads is None and by_channels is None:
        or_channels = " or --num_head_channels" if from_format == "guided_diffusion" else ""
        raise UserError(
            f"--num_heads{or_channels} is needed: a file of {from_format} does not say how its attention is cut into "
            "heads (--num_heads 4 is the default of its training script)"
        )
    size = head_channels(widths, heads, by_channels)
    if options.num_heads_upsample not in (None, heads):
        why = "has no effect beside --num_head_channels" if heads is None else f"differs from --num_heads {heads}"
        raise UserError(
            f"--num_heads_upsample {options.num_heads_upsample} {why}; UNet2DModel has one head size for all"
        )
    if heads is not None and options.num_heads_upsample is None and options.preset not in RELEASED:
        assumed.append(f"--num_heads_upsample {heads}")
    if size is not None and from_format == "guided_diffusion" and options.use_new_attention_order is None:
        raise UserError(
            "--use_new_attention_order is needed, true or false as in training (false is the default of its script): "
            "a file of guided_diffusion does not say it"
        )
    return split_qkv(tensors, size, bool(options.use_new_attention_order)), size


def _check_network(path: Path, from_format: str, unet: Mapping[str, Any], preset: str | None) -> None:
    """The network is one that makes images out of noise alone, and the preset's if there is one.

    Raises:
        ConversionError: It is not.
    """
    channels, outputs = unet["in_channels"], unet["out_channels"]
    if outputs not in (channels, 2 * channels) or (from_format in _OPENAI and channels == 6):
        raise ConversionError(
            f"{str(path)!r} holds a network from {channels} channels to {outputs}, as for super-resolution; a DDPM "
            "gives as many channels as it takes, or twice as many with a learned variance"
        )
    if from_format == "improved_diffusion" and "downsample_type" in unet:
        raise ConversionError(
            f"{str(path)!r} holds a network of guided-diffusion (resblock_updown); give --from guided_diffusion"
        )
    if preset is None:
        return
    released = RELEASED.get(preset)
    expected: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
    }
    expected |= released.network if released else get_preset(preset).unet
    found = {"num_class_embeds": None, "resnet_time_scale_shift": "default", **unet}
    if released:
        found["attention"] = tuple(name.startswith("Attn") for name in unet["down_block_types"])
    names = "block_out_channels layers_per_block in_channels out_channels num_class_embeds resnet_time_scale_shift"
    for name in (*names.split(), "attention" if released else "down_block_types"):
        if tuple(np.atleast_1d(expected[name])) != tuple(np.atleast_1d(found[name])):
            raise ConversionError(
                f"{str(path)!r} has {name}={found[name]}, and the preset {preset!r} has {expected[name]}"
            )


def _size(options: ForeignOptions, source: _Source) -> int | tuple[int, int]:
    """Height and width of the images, by the file or the options.

    Raises:
        UserError: Neither says it, or they say different things.
    """
    if source.sample_size is None:
        if options.sample_size is None:
            raise UserError(
                "--sample_size is needed: the file does not say how large its images are (or give --preset)"
            )
        return options.sample_size
    if options.sample_size not in (None, source.sample_size):
        raise ConversionError(
            f"the file's noise for sample grids (x_T) is {source.sample_size} pixels high and wide, and not "
            f"{options.sample_size} (--sample_size or --preset)"
        )
    return source.sample_size


def load_foreign(from_format: str, checkpoint: str | Path, **options: Any) -> DDPMPipeline:
    """A pipeline from somebody else's checkpoint.

    The architecture is inferred from the names and shapes of the tensors; a `diffusers` repository says it, and
    everything else, itself, so that only the first two arguments are for it.

    Args:
        from_format: One of `FORMATS`.
        checkpoint: The file (for TensorFlow the path without ending; for `diffusers` the folder).
        options: What the file does not say: see `ForeignOptions`, of which each format takes some.

    Raises:
        ConversionError: The file is missing, damaged, of another format, or does not fit.
        ValueError: Unknown format or preset, something needed is not said, or what the format does not take.
    """
    return _load(from_format, Path(checkpoint), ForeignOptions(**options))[0]


def _load(from_format: str, path: Path, options: ForeignOptions) -> tuple[DDPMPipeline, dict[str, str]]:
    """The pipeline, and what is to be told of the conversion."""
    if from_format not in FORMATS:
        raise UserError(f"unknown format {from_format!r}; it must be one of {', '.join(FORMATS)}")
    options = _resolve(from_format, path, options)
    if from_format == "diffusers":
        return _load_diffusers(path)
    source, assumed = _READERS[from_format](path, options.ema), _Assumed()
    tensors, head_dim = _cut_heads(from_format, source.tensors, options, assumed)
    options = replace(options, sample_size=_size(options, source))
    unet_options = {**infer_architecture(tensors, _TRAITS[from_format]), "attention_head_dim": head_dim}
    _check_network(path, from_format, unet_options, options.preset)
    if options.preset is not None:
        network = RELEASED[options.preset].network if options.preset in RELEASED else get_preset(options.preset).unet
        unet_options["dropout"] = network.get("dropout", 0.0)
    learned = unet_options["out_channels"] == 2 * unet_options["in_channels"]
    process = _process(from_format, options, source, learned, assumed)
    unet = UNet2DModel(**unet_options, sample_size=options.sample_size)
    check_size(unet, *np.broadcast_to(unet.config.sample_size, 2).tolist())
    levels = len(unet_options["block_out_channels"])
    network_name = "the network that its other tensors describe"
    _load_weights(unet, tensors, lambda name: our_key(name, levels), path, network_name)
    told = {"converted from": f"{path.name} ({from_format})", "weights": source.weights}
    if kinds := {str(v.dtype).removeprefix("torch.") for v in tensors.values()} - {"float32"}:
        told["precision"] = f"{', '.join(sorted(kinds))} in the file, float32 here"
    if "trained_betas" in process:
        T = options.diffusion_steps or len(process["trained_betas"])
        told["timesteps"] = f"1000, every {T // 1000}th of {T}: those that the network saw as 0, 1, 2, ..."
    if assumed:
        told["assumed, as nothing says otherwise"] = ", ".join(assumed)
    if source.remark and options.clip_sample is None:
        told["clipping"] = source.remark
    return DDPMPipeline(unet.eval(), DDPMScheduler(**process)), told


_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _current_key(name: str) -> str:
    """A key as diffusers writes it now, of one that may be its legacy attention's."""
    parts = name.split(".")
    return ".".join(_LEGACY_ATTENTION.get(part, part) for part in parts) if "attentions" in parts else name


def _read_config(file: Path) -> dict[str, Any]:
    """A component's configuration.

    Raises:
        ConversionError: It is not readable.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConversionError(f"{str(file)!r} is not readable as JSON") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{str(file)!r} holds no configuration")
    return config


def _load_diffusers(folder: Path) -> tuple[DDPMPipeline, dict[str, str]]:
    """A stock repository: components in subfolders or all in one, current or legacy keys, safetensors or `.bin`."""
    if not folder.is_dir():
        raise ConversionError(f"there is no folder {str(folder)!r}")
    index = folder / "model_index.json"
    parts = _read_config(index) if index.is_file() else {}
    if others := [
        n for n, part in parts.items() if n not in ("unet", "scheduler") and isinstance(part, list) and part[0]
    ]:
        raise ConversionError(f"{str(folder)!r} has more than a network and a scheduler: {', '.join(others)}")
    unet_dir = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_dir = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config_file = unet_dir / "config.json"
    if not config_file.is_file():
        raise ConversionError(f"{str(folder)!r} holds no diffusers network: there is no {config_file}")
    config = _read_config(config_file)
    if config.get("_class_name") not in (None, "UNet2DModel"):
        raise ConversionError(f"{str(folder)!r} holds a {config['_class_name']}, which is no DDPM network")
    stem = unet_dir / "diffusion_pytorch_model"
    file = next((f for f in (stem.with_suffix(s) for s in (".safetensors", ".bin")) if f.is_file()), None)
    if file is None:
        raise ConversionError(f"{str(unet_dir)!r} has neither {stem.name}.safetensors nor {stem.name}.bin")
    unet = UNet2DModel.from_config(config)
    tensors = _tensors_in(file, _read_pytorch(file))
    _load_weights(unet, tensors, _current_key, file, f"the network of {config_file.name}")
    scheduler_file = scheduler_dir / "scheduler_config.json"
    if not scheduler_file.is_file():
        raise ConversionError(f"{str(scheduler_dir)!r} has no scheduler_config.json")
    told = {"converted from": f"{folder.name} (diffusers)"}
    kind = _read_config(scheduler_file).get("_class_name", "DDPMScheduler")
    if kind not in DDPMScheduler._compatibles:
        raise ConversionError(f"{str(scheduler_file)!r} is of a {kind}, whose process is no DDPM's")
    if kind != "DDPMScheduler":
        told["scheduler"] = f"its {kind} as a DDPMScheduler over the same betas"
    scheduler = DDPMScheduler.from_pretrained(scheduler_dir)
    learned = scheduler.config.variance_type in LEARNED_VARIANCES
    if unet.config.out_channels != unet.config.in_channels * (2 if learned else 1):
        raise ConversionError(
            f"{str(folder)!r} holds a network from {unet.config.in_channels} channels to {unet.config.out_channels} "
            f"with variance_type={scheduler.config.variance_type!r}, which no DDPM samples with"
        )
    return DDPMPipeline(unet.eval(), scheduler), told


def convert(
    from_format: str,
    checkpoint: str | Path,
    output: str | Path,
    tell: Callable[[str], Any] = lambda line: None,
    **options: Any,
) -> DDPMPipeline:
    """Write a stock-readable repository from somebody else's checkpoint; `output` appears complete or not at all.

    Args:
        from_format, checkpoint, options: See `load_foreign`.
        output: The folder to make; it must not exist, or be empty.
        tell: Gets what was read, assumed and written, line by line. The folder's card says it too.

    Raises:
        ValueError: See `load_foreign`, or `output` is in use.
    """
    output = _free_place(output)
    pipe, told = _load(from_format, Path(checkpoint), ForeignOptions(**options))

    def fill(folder: Path) -> None:
        pipe.save_pretrained(folder)
        if from_format != "diffusers":
            write_text(folder / "README.md", make_card(ModelFacts.read(folder), CardFacts(output.name, recipe=told)))

    write_directory(output, fill)
    for name, text in told.items():
        tell(f"{name}: {text}")
    unet, process = pipe.unet.config, pipe.scheduler.config
    height, width = np.broadcast_to(unet.sample_size, 2)
    tell(
        f"wrote {output}: {parameter_count(pipe.unet):,} parameters, {unet.in_channels} x {height} x {width} pixels, "
        f"T = {process.num_train_timesteps}, prediction {process.prediction_type}, variance {process.variance_type}, "
        f"x_0 {'clipped' if process.clip_sample else 'not clipped'}"
    )
    return pipe


def _free_place(output: str | Path) -> Path:
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output {str(output)!r} exists already; name another folder, or remove it first")
    return output


def to_official(unet: UNet2DModel, state: Tensors | None = None) -> dict[str, np.ndarray]:
    """The weights under the official TensorFlow names and in its layout.

    Args:
        unet: Gives the architecture, which must be the official one.
        state: Weights by our keys; the network's own by default.

    Raises:
        ConversionError: The official network cannot have this configuration.
    """
    config = unet.config
    official = {**OFFICIAL_NETWORK, "resnet_time_scale_shift": "default", "class_embed_type": None}
    official |= {"num_class_embeds": None, "add_attention": True, "act_fn": "silu", "center_input_sample": False}
    official |= {"time_embedding_type": "positional", "downsample_type": "conv", "upsample_type": "conv"}
    official.pop("layers_per_block")
    for name, value in official.items():
        if config[name] != value:
            raise ConversionError(f"the official network has {name}={value!r}, and this one {config[name]!r}")
    levels = len(config.block_out_channels)
    arrays: dict[str, np.ndarray] = {}
    for key, value in (state or unet.state_dict()).items():
        name = tf_from_canonical(canonical_from_ours(key, levels))
        value = value.detach().float().cpu()
        if not value.isfinite().all():
            raise ConversionError(f"the weights {key} hold NaN or infinity; take an intact copy of the model")
        if name.endswith("nin_shortcut/W"):
            value = value.flatten(1)
        if value.ndim == 4:
            value = value.permute(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        arrays[name] = value.contiguous().numpy()
    return arrays


def convert_to_official(model: str | Path, output: str | Path, global_step: int = 0) -> Path:
    """Write a TensorFlow checkpoint that the official code can load, with raw and EMA weights.

    Args:
        model: A pipeline's folder (its weights serve as both), or a training checkpoint (`checkpoint-N` in a run's
            folder), which has both.
        output: A folder to make; the checkpoint in it is called `model.ckpt-<global_step>`.
        global_step: The update to record, for a pipeline's folder.

    Returns:
        The checkpoint's path without ending.

    Raises:
        ValueError: The model cannot be read or is not the official network, or `output` is in use.
    """
    output, model = _free_place(output), Path(model)
    if not model.is_dir():
        raise ConversionError(f"there is no folder {str(model)!r}")
    if any((model / name).is_file() for name in (MANIFEST_FILE, "ema.safetensors")):
        config = model.parent / "unet" / "config.json"
        if not config.is_file():
            raise ConversionError(f"{str(model)!r} belongs to an unfinished run: there is no {config}")
        unet = UNet2DModel.from_config(_read_config(config))
        tensors, state = load_checkpoint(model)
        if not {"model", "ema"} <= tensors.keys():
            raise ConversionError(f"{str(model)!r} is no training checkpoint: it has no raw and EMA weights")
        raw, ema = (to_official(unet, tensors[name]) for name in ("model", "ema"))
        global_step = state["step"]
    else:
        raw = ema = to_official(DDPMPipeline.from_pretrained(model).unet)
    tf = _tensorflow()  # now that everything else is right: it takes seconds
    variables: dict[str, Any] = {**raw, **{f"{name}{EMA_SUFFIX}": value for name, value in ema.items()}}
    variables["global_step"] = np.int64(global_step)
    name = f"model.ckpt-{global_step}"

    def fill(folder: Path) -> None:
        names = sorted(variables)
        tf.raw_ops.SaveV2(
            prefix=str(folder / name),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.constant(variables[n]) for n in names],
        )
        listed = f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
        (folder / "checkpoint").write_text(listed, encoding="utf-8")

    write_directory(output, fill)
    return output / name
