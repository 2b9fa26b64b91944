"""Other people's DDPM weights to ours, and ours to the official TensorFlow format.

Every format is read into one naming (`weight_names.py`), from which the architecture is inferred and the state dict
made:

| format | what it reads |
|---|---|
| `official_tf` | TensorFlow checkpoints of hojonathanho/diffusion |
| `pesser` | state dicts of pesser/pytorch_diffusion and ermongroup/ddim (also its training checkpoints) |
| `pytorch_ddpm` | `ckpt.pt` of w86763777/pytorch-ddpm |
| `improved_diffusion` | `ema_*.pt` and `model*.pt` of openai/improved-diffusion, where `UNet2DModel` has its like |
| `diffusers` | stock repositories, old ones too: flat layout, legacy attention keys, `.bin` weights |

PyTorch files are read by `weight_files.py`: nothing in them is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .checkpointing import MANIFEST_FILE, load_checkpoint, write_directory
from .errors import UserError
from .pipeline_ddpm import DDPMPipeline
from .presets import OFFICIAL_NETWORK, PAPER_PROCESS, get_preset
from .scheduling_ddpm import DDPMScheduler
from .unet_2d import UNet2DModel, check_size
from .weight_files import read_weights
from .weight_names import (
    ConversionError,
    Tensors,
    canonical_from_improved_diffusion,
    canonical_from_ours,
    canonical_from_pytorch_ddpm,
    canonical_from_tf,
    infer_architecture,
    layout_from_tf,
    our_key,
    split_qkv,
    tf_from_canonical,
)

EMA_SUFFIX = "/ExponentialMovingAverage"

# What each family of networks needs of UNet2DModel besides widths and blocks.
_TRAITS: dict[str, dict[str, Any]] = {
    "official_tf": dict(OFFICIAL_NETWORK),
    "pesser": dict(OFFICIAL_NETWORK),
    "pytorch_ddpm": {**OFFICIAL_NETWORK, "downsample_padding": 1, "freq_shift": 0, "norm_eps": 1e-5},
    "improved_diffusion": {
        **OFFICIAL_NETWORK,
        "downsample_padding": 1,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "norm_eps": 1e-5,
    },
}
FORMATS = (*_TRAITS, "diffusers")


# ---------------------------------------------------------------------- reading files


def _read_pytorch(path: Path) -> Any:
    """What a PyTorch or safetensors file holds, without executing anything in it."""
    try:
        return read_weights(path)
    except ValueError as error:
        raise ConversionError(str(error)) from None


def _tensors_in(path: Path, content: Any) -> Tensors:
    """A state dict, without DataParallel's prefix."""
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConversionError(f"{str(path)!r} holds no state dict of named tensors")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError:
        raise ConversionError(
            "TensorFlow checkpoints need TensorFlow; install it with pip install 'ddpm-hf[convert]'"
        ) from None
    return tensorflow


def _read_official_tf(path: Path, ema: bool) -> Tensors:
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
                f"{prefix!r} has no averaged weights (.../ExponentialMovingAverage); the raw ones make far worse "
                "images, take them with --no_ema if that is what you want"
            )
        wanted = averaged if ema else {name for name in names if name not in averaged and "Adam" not in name}
        if not wanted:
            raise ConversionError(f"{prefix!r} has no variables called model/...; is it a DDPM checkpoint?")
        arrays = {name.removesuffix(EMA_SUFFIX): reader.get_tensor(name) for name in sorted(wanted)}
    except ConversionError:
        raise
    except Exception as error:  # TensorFlow has errors of its own for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ConversionError(f"{prefix!r} is not a TensorFlow checkpoint, or is damaged ({reason})") from None
    return {canonical_from_tf(name): layout_from_tf(array) for name, array in arrays.items()}


def _read_pesser(path: Path, ema: bool) -> Tensors:
    content = _read_pytorch(path)
    if isinstance(content, (list, tuple)):  # ermongroup/ddim: [model, optimizer, epoch, step, ema]
        if ema and len(content) < 5:
            raise ConversionError(f"{str(path)!r} holds no averaged weights; take the raw ones with --no_ema")
        content = content[4 if ema else 0]
    return _tensors_in(path, content)


def _read_pytorch_ddpm(path: Path, ema: bool) -> Tensors:
    content = _read_pytorch(path)
    if isinstance(content, dict) and ("ema_model" in content or "net_model" in content):
        key = "ema_model" if ema else "net_model"
        if key not in content:
            way_out = "; take the raw weights with --no_ema" if ema else ""
            raise ConversionError(f"{str(path)!r} has no {key}{way_out}")
        content = content[key]
    return canonical_from_pytorch_ddpm(_tensors_in(path, content))


def _read_improved_diffusion(path: Path, ema: bool) -> Tensors:
    if ema and re.match(r"model\d+", path.name):
        raise ConversionError(
            f"{path.name} are the raw weights; take the averaged ones (ema_*.pt, in the same folder), or --no_ema"
        )
    return canonical_from_improved_diffusion(_tensors_in(path, _read_pytorch(path)))


_READERS: dict[str, Callable[[Path, bool], Tensors]] = {
    "official_tf": _read_official_tf,
    "pesser": _read_pesser,
    "pytorch_ddpm": _read_pytorch_ddpm,
    "improved_diffusion": _read_improved_diffusion,
}


def _load_weights(unet: UNet2DModel, tensors: Tensors, key_of: Callable[[str], str], file: Path, network: str) -> None:
    """Give a network its weights; every tensor must find its place and every place its tensor.

    Args:
        unet: Gets them.
        tensors: By the names in `file`.
        key_of: Such a name to the network's key.
        file: Where they come from, for messages.
        network: Which network it is, for messages.

    Raises:
        ConversionError: A tensor without a place or of another shape, or a place without a tensor; names it.
    """
    wanted = unet.state_dict()
    state: Tensors = {}
    for name, value in tensors.items():
        key = key_of(name)
        if key not in wanted:
            raise ConversionError(f"{str(file)!r}: {name} has no place in {network}")
        target = wanted[key].shape
        if [n for n in value.shape if n != 1] == [n for n in target if n != 1]:
            value = value.reshape(target)  # 1x1 convolutions and matrices are the same numbers
        if value.shape != target:
            raise ConversionError(
                f"{str(file)!r}: {name} has shape {tuple(value.shape)}, and {network} asks for {tuple(target)} ({key})"
            )
        state[key] = value.to(wanted[key].dtype)
    if missing := sorted(wanted.keys() - state.keys()):
        others = len(missing) - 1
        more = f" and {others} other tensor{'s' if others > 1 else ''}" if others else ""
        raise ConversionError(f"{str(file)!r}: nothing found for {missing[0]}{more}")
    unet.load_state_dict(state)


# ---------------------------------------------------------------------- whole conversions


def options_given(
    sample_size: int | None = None,
    preset: str | None = None,
    ema: bool = True,
    num_heads: int = 1,
    variance_type: str | None = None,
) -> list[str]:
    """The flags of those options of `load_foreign` that are not left as they are."""
    flags = {
        "--sample_size": sample_size is not None,
        "--preset": preset is not None,
        "--no_ema": not ema,
        "--num_heads": num_heads != 1,
        "--variance_type": variance_type is not None,
    }
    return [flag for flag, given in flags.items() if given]


def load_foreign(
    from_format: str,
    checkpoint: str | Path,
    *,
    sample_size: int | None = None,
    preset: str | None = None,
    ema: bool = True,
    num_heads: int = 1,
    variance_type: str | None = None,
) -> DDPMPipeline:
    """A pipeline from somebody else's checkpoint.

    The architecture is inferred from the names and shapes of the tensors; a `diffusers` repository says it, and
    everything else, itself, so that only the first two arguments are for it.

    Args:
        from_format: One of `FORMATS`.
        checkpoint: The file (for TensorFlow the path without ending; for `diffusers` the folder).
        sample_size: Height and width of the images, which no checkpoint holds.
        preset: Gives the sample size and the diffusion process; the network must agree with it.
        ema: Take the averaged weights; `False` takes the raw ones.
        num_heads: Attention heads, for `improved_diffusion` (`--num_heads` of its training script), which its files
            do not say.
        variance_type: Of the scheduler; by default the preset's, `fixed_large` for small images and `fixed_small` for
            256 x 256 as in the official scripts, and a learned one where the network has the channels for it.

    Raises:
        ConversionError: The file is missing, damaged, of another format, or does not fit.
        ValueError: Unknown format or preset, no sample size, or what the format does not take.
    """
    if from_format not in FORMATS:
        raise UserError(f"unknown format {from_format!r}; it must be one of {', '.join(FORMATS)}")
    path = Path(checkpoint)
    if from_format == "diffusers":
        if given := options_given(sample_size, preset, ema, num_heads, variance_type):
            raise UserError(f"--from diffusers takes no {', '.join(given)}: the repository says it; leave it out")
        return _load_diffusers(path)
    process = dict(get_preset(preset).scheduler) if preset else dict(PAPER_PROCESS)
    if preset and sample_size is None:
        sample_size = get_preset(preset).unet["sample_size"]
    if num_heads < 1:
        raise UserError(f"num_heads must be at least 1, got {num_heads}")
    if sample_size is None:
        raise UserError("--sample_size is needed: no checkpoint says how large its images are (or give --preset)")

    tensors = _READERS[from_format](path, ema)
    if any(".qkv." in name for name in tensors):
        tensors = split_qkv(tensors, num_heads)
    tensors.pop("logvar", None)  # ermongroup/ddim's unused parameter
    arguments = infer_architecture(tensors, _TRAITS[from_format], num_heads)
    if preset:
        expected = get_preset(preset).unet
        for name in ("block_out_channels", "layers_per_block", "down_block_types", "in_channels"):
            if name in expected and tuple(np.atleast_1d(expected[name])) != tuple(np.atleast_1d(arguments[name])):
                raise ConversionError(
                    f"{str(path)!r} has {name}={arguments[name]}, and the preset {preset!r} has {expected[name]}"
                )
    learned = arguments["out_channels"] == 2 * arguments["in_channels"]
    if variance_type is None and learned:
        variance_type = "learned_range" if from_format == "improved_diffusion" else "learned"
    if variance_type is None:
        variance_type = process.get("variance_type") or ("fixed_small" if sample_size >= 256 else "fixed_large")
    unet = UNet2DModel(**arguments, sample_size=sample_size)
    check_size(unet, sample_size, sample_size)
    levels = len(arguments["block_out_channels"])
    network = "the network that its other tensors describe"
    _load_weights(unet, tensors, lambda name: our_key(name, levels), path, network)
    return DDPMPipeline(unet.eval(), DDPMScheduler(**{**process, "variance_type": variance_type}))


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


def _load_diffusers(folder: Path) -> DDPMPipeline:
    """A stock repository: components in subfolders or all in one, current or legacy keys, safetensors or `.bin`."""
    if not folder.is_dir():
        raise ConversionError(f"there is no folder {str(folder)!r}")
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
    if not (scheduler_dir / "scheduler_config.json").is_file():
        raise ConversionError(f"{str(scheduler_dir)!r} has no scheduler_config.json")
    return DDPMPipeline(unet.eval(), DDPMScheduler.from_pretrained(scheduler_dir))


def convert(from_format: str, checkpoint: str | Path, output: str | Path, **options: Any) -> DDPMPipeline:
    """Write a stock-readable repository from somebody else's checkpoint; `output` appears complete or not at all.

    Args:
        from_format, checkpoint, options: See `load_foreign`.
        output: The folder to make; it must not exist, or be empty.

    Raises:
        ValueError: See `load_foreign`, or `output` is in use.
    """
    output = _free_place(output)
    pipe = load_foreign(from_format, checkpoint, **options)
    write_directory(output, pipe.save_pretrained)
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
        if name.endswith("nin_shortcut/W"):
            value = value.flatten(1)
        if value.ndim == 4:
            value = value.permute(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        arrays[name] = value.contiguous().numpy()
    return arrays


def convert_to_official(model: str | Path, output: str | Path, global_step: int = 0) -> Path:
    """Write a TensorFlow checkpoint that the official code can load, with raw and averaged weights.

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
            raise ConversionError(f"{str(model)!r} is no training checkpoint: it has no raw and averaged weights")
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
