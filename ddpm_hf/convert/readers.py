"""Read other implementations' checkpoints: their weights, and what else the files say. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import UserError
from ..utils.weight_files import read_weights
from .names import Tensors
from .tensorflow_checkpoint import newest_checkpoint, read_index, read_variables

_EMA_SUFFIX = "/ExponentialMovingAverage"
_TF_TAILS = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}
_PYTORCH_DDPM_TABLE = "time_embedding.timembedding.0.weight"  # sines and cosines of t, [T, C]
# MD5 of pesser's released files with raw weights (ckpt_util.py, MD5_MAP); those of EMA weights have the same names.
_PESSER_RAW = {
    "82ed3067fd1002f5cf4c339fb80c4669": "cifar10",
    "f70280ac0e08b8e696f42cb8e948ff1c": "lsun_bedroom",
    "bbee0e7c3d7abfb6e2539eaf2fb9987b": "lsun_cat",
    "eb619b8a5ab95ef80f94ce8a5488dae3": "lsun_church",
}


@dataclass
class Checkpoint:
    """What a file says."""

    tensors: Tensors  # the weights by the implementation's names, in PyTorch's layout
    weights: str  # which ones they are (raw or EMA), and how that is known
    diffusion_steps: int | None = None  # T, where the file says it
    sample_size: int | None = None  # height and width of the images, where the file says them
    remark: str | None = None  # what else a person should know


def _which_weights(path: Path, ema: bool, holds_ema: Collection[bool], why: str = "") -> str:
    """Return which weights are taken (EMA ones if `ema`), and how that is known; refuse a file without them.

    `holds_ema`: of those that the file is known to hold, `True` for EMA and `False` for raw weights.
    """
    kinds = {True: "EMA weights", False: "raw weights"}
    if not holds_ema:
        return f"taken for {kinds[ema]}, as nothing in the file says which they are (--no_ema: raw weights)"
    if ema not in holds_ema:
        otherwise = "--no_ema for these, which make far worse images" if ema else "leave out --no_ema"
        raise UserError(f"{path.name} holds {kinds[not ema]} only ({why}); take another file, or {otherwise}")
    return f"{kinds[ema]} ({why})"


def state_dict(path: Path, content: Any) -> Tensors:
    """Return a file's tensors without the prefixes of DataParallel (`module.`) and torch.compile (`_orig_mod.`).

    Raises a UserError if the file holds something else, which it names.
    """
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        entries = f"entries {', '.join(map(repr, content))}"[:120] if isinstance(content, dict) else ""
        holds = f"holds no state dict of named tensors, but {entries or f'a {type(content).__name__}'}"
        raise UserError(f"{str(path)!r} {holds}; if the weights are one of its entries, save them alone by torch.save")
    tensors: Tensors = {}
    for full, value in content.items():
        name = re.sub(r"^(module\.)+", "", str(full).replace("_orig_mod.", ""))
        if name in tensors:
            raise UserError(f"{str(path)!r} holds {name} twice, under different prefixes")
        tensors[name] = value
    return tensors


def official_name(variable: str) -> str:
    """Return `down.0.block.1.conv1.weight`, as the PyTorch ports call it, for `model/down_0/block_1/conv1/W`."""
    *layers, tail = variable.removesuffix(_EMA_SUFFIX).split("/")[1:]
    layer = re.sub(r"(?<!mid\.)\b(down|up|block|attn|dense)_?(\d+)", r"\1.\2", ".".join(layers))
    return f"{layer}.{_TF_TAILS.get(tail, tail)}"


def read_official_tf(path: Path, ema: bool) -> Checkpoint:
    """Read a TensorFlow checkpoint of hojonathanho/diffusion, given without its ending, or a folder's last one."""
    path = Path(str(path).removesuffix(".index"))
    prefix = newest_checkpoint(path) if path.is_dir() else path
    if prefix is None or not Path(f"{prefix}.index").is_file():
        where = f"{str(path)!r}, as there is no .index file; give the path without ending, as in model.ckpt-790000"
        raise UserError(f"there is no TensorFlow checkpoint at {where}")
    try:
        index = read_index(prefix)
        is_ema = {n: n.endswith(_EMA_SUFFIX) for n in index[1] if n.startswith("model/") and "Adam" not in n}
        arrays = read_variables(prefix, index, [name for name in is_ema if is_ema[name] == ema])
    except (OSError, ValueError) as error:
        raise UserError(f"{str(prefix)!r} is no TensorFlow checkpoint, or damaged ({error})") from None
    weights = _which_weights(path, ema, is_ema.values(), "by the names of the variables")
    # Convolutions are [H, W, in, out] and become [out, in, H, W], matrices [in, out] and become [out, in].
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,), 0: ()}
    variables = {official_name(name): torch.from_numpy(a.transpose(axes[a.ndim])) for name, a in arrays.items()}
    return Checkpoint({name: value.contiguous() for name, value in variables.items()}, weights)


def read_pesser(path: Path, ema: bool) -> Checkpoint:
    """Read a state dict of pesser/pytorch_diffusion, or a training checkpoint of ermongroup/ddim."""
    content, remark = read_weights(path), None
    if isinstance(content, (list, tuple)) and content:  # ermongroup/ddim: [model, optimizer, epoch, step, ema]
        weights = _which_weights(path, ema, (False, True)[: 1 + (len(content) > 4)], "of a training checkpoint")
        content = content[4 if ema else 0]
        remark = "x_0 is clipped as in its DDPM sampler; its DDIM sampler does not clip (--clip_sample false)"
    else:
        # pesser's are ema_diffusion_cifar10_model/model-790000.ckpt and diffusion_cifar10_model/model-790000.ckpt.
        names = (path.name, path.resolve().parent.name)
        name = next((n for n in names if re.match(r"(ema_)?diffusion_\w+_model|ema_", n)), None)
        holds_ema, why = [] if name is None else [name.startswith("ema_")], f"by the name {name}"
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if digest in _PESSER_RAW:
            holds_ema, why = [False], f"it is pesser's released {_PESSER_RAW[digest]}"
        weights = _which_weights(path, ema, holds_ema, why)
    tensors = state_dict(path, content)
    logvar = tensors.pop("logvar", None)  # ermongroup/ddim's unused parameter, one number per timestep
    return Checkpoint(tensors, weights, None if logvar is None else logvar.numel(), remark=remark)


def read_pytorch_ddpm(path: Path, ema: bool) -> Checkpoint:
    """Read `ckpt.pt` of w86763777/pytorch-ddpm, or one of the state dicts in it."""
    content, size, steps = read_weights(path), None, None
    models = {True: "ema_model", False: "net_model"}
    found = [kind for kind, key in models.items() if isinstance(content, dict) and key in content]
    weights = _which_weights(path, ema, found, "by its name in the file")
    if found:
        noise = content.get("x_T")  # of its sample grids, [N, 3, size, size]
        size = noise.shape[-1] if isinstance(noise, Tensor) and noise.ndim == 4 else None
        content = content[models[ema]]
    tensors = state_dict(path, content)
    if (table := tensors.pop(_PYTORCH_DDPM_TABLE, None)) is not None:
        steps, channels = table.shape
        frequencies = 10000 ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles = torch.arange(steps, dtype=torch.float64)[:, None] * frequencies
        expected = torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(steps, channels)
        if not (table.double() - expected).abs().max() < 0.01:  # half precision keeps no more
            table_name = f"{_PYTORCH_DDPM_TABLE}, which a UNet2DModel computes,"
            raise UserError(f"{table_name} does not hold the sines and cosines of t = 0..{steps - 1}")
    first = "time_embedding.timembedding.1.weight"
    if first in tensors:  # its sines and cosines alternate; ours are all sines, then all cosines
        tensors[first] = torch.cat([tensors[first][:, 0::2], tensors[first][:, 1::2]], dim=1)
    return Checkpoint(tensors, weights, steps, size)


def read_openai(path: Path, ema: bool) -> Checkpoint:
    """Read a state dict of openai/improved-diffusion or openai/guided-diffusion."""
    kind = re.match(r"(ema)_|model\d+", path.name)  # their training scripts: ema_0.9999_500000.pt, model500000.pt
    weights = _which_weights(path, ema, [] if kind is None else [kind[1] is not None], "by its name")
    return Checkpoint(state_dict(path, read_weights(path)), weights)
