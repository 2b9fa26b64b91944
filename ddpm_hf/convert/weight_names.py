"""How other implementations name the weights of a DDPM network, and what their names say about its architecture.

One naming is the middle of all: the official network's, written with dots (`down.0.block.1.conv1.weight`,
`mid.attn_1.q.weight`, `up.0...` is the finest level), with tensors in PyTorch's layout. pesser/pytorch_diffusion and
ermongroup/ddim use it as it is. Nothing here reads files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import UserError

Tensors = dict[str, Tensor]


class ConversionError(UserError):
    """Weights that cannot be read or do not fit; the message names the file or tensor, and the shapes."""


# ---------------------------------------------------------------------- the official TensorFlow naming

_TF_TAILS = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}


def canonical_from_tf(name: str) -> str:
    """`model/down_0/block_1/conv1/W` to `down.0.block.1.conv1.weight`."""
    parts = name.split("/")[1:]
    parts[-1] = _TF_TAILS.get(parts[-1], parts[-1])
    joined = ".".join(parts)
    joined = re.sub(r"^(down|up)_(\d+)\.(block|attn)_(\d+)\.", r"\1.\2.\3.\4.", joined)
    joined = re.sub(r"^(down|up)_(\d+)\.", r"\1.\2.", joined)
    return re.sub(r"^temb\.dense(\d)\.", r"temb.dense.\1.", joined)


def tf_from_canonical(name: str) -> str:
    """The inverse of `canonical_from_tf`."""
    stem, tail = name.rsplit(".", 1)
    is_norm = re.search(r"(^|\.)(norm\d?|norm_out)$", stem) is not None
    tail = {"weight": "gamma" if is_norm else "W", "bias": "beta" if is_norm else "b"}[tail]
    stem = re.sub(r"^(down|up)\.(\d+)\.(block|attn)\.(\d+)", r"\1_\2/\3_\4", stem)
    stem = re.sub(r"^(down|up)\.(\d+)", r"\1_\2", stem)
    stem = re.sub(r"^temb\.dense\.(\d)", r"temb/dense\1", stem)
    return f"model/{stem.replace('.', '/')}/{tail}"


def layout_from_tf(array: np.ndarray) -> Tensor:
    """Convolutions `[H, W, in, out]` to `[out, in, H, W]`, matrices `[in, out]` to `[out, in]`."""
    value = torch.from_numpy(np.array(array))
    if value.ndim == 4:
        value = value.permute(3, 2, 0, 1)
    elif value.ndim == 2:
        value = value.T
    return value.contiguous()


# ---------------------------------------------------------------------- PyTorch namings


class _Looked(dict[str, Tensor]):
    """A state dict that knows which of its tensors were taken, by `[]`."""

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.left = dict.fromkeys(tensors)

    def __getitem__(self, name: str) -> Tensor:
        self.left.pop(name, None)
        return super().__getitem__(name)

    def check_nothing_left(self) -> None:
        """Every tensor was taken.

        Raises:
            ConversionError: Some were not; names the first of them.
        """
        if self.left:
            raise ConversionError(
                f"no place for {listed(list(self.left))} in a network of this format; is the format right?"
            )


def listed(names: list[str], shown: int = 3) -> str:
    """The first of the names, and how many more there are."""
    others = len(names) - shown
    more = f" and {others} other tensor{'s' if others > 1 else ''}" if others > 0 else ""
    return ", ".join(names[:shown]) + more


def _layers(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """`{new}.weight` for every `{old}.weight` (and bias) that there is."""
    return {
        f"{new}.{tail}": tensors[f"{old}.{tail}"]
        for old, new in names.items()
        for tail in ("weight", "bias")
        if f"{old}.{tail}" in tensors
    }


def _renamed(tensors: Tensors, source: str, target: str, parts: dict[str, str]) -> Tensors:
    """`{target}.{new}.weight` for every `{source}.{old}.weight` (and bias) that there is."""
    return _layers(tensors, {f"{source}.{old}": f"{target}.{new}" for old, new in parts.items()})


def _numbers_below(tensors: Collection[str], prefix: str) -> list[int]:
    """Sorted n for which there are tensors `{prefix}.{n}. ...`."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return sorted({int(m[1]) for name in tensors if (m := pattern.match(name))})


def _levels(tensors: Collection[str], prefix: str, is_last: Callable[[str], bool]) -> list[list[str]]:
    """Consecutive blocks `{prefix}.{n}` grouped by level; `is_last` says where a level ends."""
    levels: list[list[str]] = [[]]
    for n in _numbers_below(tensors, prefix):
        block = f"{prefix}.{n}"
        levels[-1].append(block)
        if is_last(block):
            levels.append([])
    return levels


PYTORCH_DDPM_TABLE = "time_embedding.timembedding.0.weight"  # of sines and cosines, [T, ch]
_PYTORCH_DDPM_BLOCK = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "temb_proj",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "nin_shortcut",
}
_PYTORCH_DDPM_ATTENTION = {
    "attn.group_norm": "norm",
    "attn.proj_q": "q",
    "attn.proj_k": "k",
    "attn.proj_v": "v",
    "attn.proj": "proj_out",
}


def canonical_from_pytorch_ddpm(tensors: Tensors) -> Tensors:
    """The state dict of `UNet` in `model.py` of w86763777/pytorch-ddpm, by canonical names.

    Its table of sines and cosines is left out; the first layer after it is reordered to ours.

    Raises:
        ConversionError: A tensor that this network does not have, or a table of something else.
    """
    tensors = looked = _Looked(tensors)
    out: Tensors = {}
    embedding = "time_embedding.timembedding"
    out |= _renamed(tensors, embedding, "temb", {"1": "dense.0", "3": "dense.1"})
    if PYTORCH_DDPM_TABLE in tensors:
        _check_table(tensors[PYTORCH_DDPM_TABLE])
    if "temb.dense.0.weight" in out:
        # Its sines and cosines alternate; ours are all sines, then all cosines.
        first = out["temb.dense.0.weight"]
        out["temb.dense.0.weight"] = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
    out |= _layers(tensors, {"head": "conv_in", "tail.0": "norm_out", "tail.2": "conv_out"})

    def resamples(block: str) -> bool:
        return f"{block}.main.weight" in tensors

    down = _levels(tensors, "downblocks", resamples)
    up = _levels(tensors, "upblocks", resamples)
    for side, levels, resample in (("down", down, "downsample"), ("up", up[::-1], "upsample")):
        for level, blocks in enumerate(levels):
            for i, block in enumerate(b for b in blocks if not resamples(b)):
                out |= _renamed(tensors, block, f"{side}.{level}.block.{i}", _PYTORCH_DDPM_BLOCK)
                out |= _renamed(tensors, block, f"{side}.{level}.attn.{i}", _PYTORCH_DDPM_ATTENTION)
            for block in filter(resamples, blocks):
                out |= _renamed(tensors, block, f"{side}.{level}.{resample}", {"main": "conv"})
    out |= _renamed(tensors, "middleblocks.0", "mid.block_1", _PYTORCH_DDPM_BLOCK)
    out |= _renamed(tensors, "middleblocks.0", "mid.attn_1", _PYTORCH_DDPM_ATTENTION)
    out |= _renamed(tensors, "middleblocks.1", "mid.block_2", _PYTORCH_DDPM_BLOCK)
    looked.check_nothing_left()
    return out


def _check_table(table: Tensor) -> None:
    """Row t holds the sines and cosines of t that our network computes, to what half precision keeps of them."""
    T, ch = table.shape
    exponents = torch.arange(0, ch, 2, dtype=torch.float64) / ch
    angles = torch.arange(T, dtype=torch.float64)[:, None] * 10000**-exponents
    expected = torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(T, ch)
    if not (table.double() - expected).abs().max() < 0.01:
        raise ConversionError(
            f"{PYTORCH_DDPM_TABLE} does not hold the sines and cosines of t = 0..{T - 1}, which a UNet2DModel computes"
        )


_IMPROVED_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "temb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "nin_shortcut",
}


def canonical_from_improved_diffusion(tensors: Tensors) -> Tensors:
    """The state dict of `UNetModel` of openai/improved-diffusion or openai/guided-diffusion, by canonical names.

    Attention keeps its joint `qkv`; `split_qkv` cuts it.

    Raises:
        ConversionError: It was trained with `conv_resample=False`, which our network does not have, or a tensor is
            none of this network's.
    """
    tensors = looked = _Looked(tensors)
    out: Tensors = {}
    out |= _renamed(tensors, "time_embed", "temb", {"0": "dense.0", "2": "dense.1"})
    names = {"input_blocks.0.0": "conv_in", "out.0": "norm_out", "out.2": "conv_out", "label_emb": "label_emb"}
    out |= _layers(tensors, names)
    inputs = _numbers_below(tensors, "input_blocks")
    if inputs != list(range(len(inputs))):
        raise ConversionError(
            "this network was trained with conv_resample=False (pooling between resolutions), which a UNet2DModel of "
            "this family does not have"
        )

    def upsampler(block: str) -> str | None:
        ends = ("conv.weight", "in_layers.2.weight")  # a convolution, or a residual block (resblock_updown)
        return next((f"{block}.{k}" for k in (1, 2) if any(f"{block}.{k}.{end}" in tensors for end in ends)), None)

    up = [level for level in _levels(tensors, "output_blocks", lambda block: upsampler(block) is not None) if level]
    # A residual block that halves the image looks like any other; but as many as on the way up belong to a level.
    resblock_updown = any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in tensors)
    halves = {n for n in inputs if f"input_blocks.{n}.0.op.weight" in tensors}
    if resblock_updown:
        halves = set(range(len(up[0]), inputs[-1], len(up[0])))

    def down_ends(block: str) -> bool:
        return int(block.rsplit(".", 1)[1]) in halves

    down = _levels([name for name in tensors if not name.startswith("input_blocks.0.")], "input_blocks", down_ends)
    resampler = {"op": "conv", "conv": "conv", **_IMPROVED_BLOCK}
    for side, levels in (("down", down), ("up", up[::-1])):
        for level, blocks in enumerate(levels):
            for i, block in enumerate(b for b in blocks if side == "up" or not down_ends(b)):
                out |= _renamed(tensors, f"{block}.0", f"{side}.{level}.block.{i}", _IMPROVED_BLOCK)
                out |= _improved_attention(tensors, f"{block}.1", f"{side}.{level}.attn.{i}")
            samplers = [f"{b}.0" for b in blocks if down_ends(b)] if side == "down" else map(upsampler, blocks)
            for block in filter(None, samplers):
                out |= _renamed(tensors, block, f"{side}.{level}.{side}sample", resampler)
    out |= _renamed(tensors, "middle_block.0", "mid.block_1", _IMPROVED_BLOCK)
    out |= _improved_attention(tensors, "middle_block.1", "mid.attn_1")
    out |= _renamed(tensors, "middle_block.2", "mid.block_2", _IMPROVED_BLOCK)
    looked.check_nothing_left()
    return out


def _improved_attention(tensors: Tensors, source: str, target: str) -> Tensors:
    """One attention block, its joint qkv left as it is: how to cut it depends on the number of heads."""
    return _renamed(tensors, source, target, {"norm": "norm", "qkv": "qkv", "proj_out": "proj_out"})


def head_channels(widths: set[int], num_heads: int | None = None, num_head_channels: int | None = None) -> int | None:
    """Channels per attention head, the same wherever there is attention; `None` for one head over all channels.

    Args:
        widths: Channels of all attention blocks.
        num_heads, num_head_channels: One of them, as in the training script.

    Raises:
        ConversionError: They do not divide the channels, or differ by level, which UNet2DModel cannot.
    """
    parts = num_heads or num_head_channels or 1
    if odd := sorted(width for width in widths if width % parts):
        name = "num_heads" if num_heads else "num_head_channels"
        raise ConversionError(f"{name}={parts} does not divide the {odd[0]} channels of an attention block")
    if num_heads == 1 or widths == {num_head_channels}:
        return None
    if num_heads is not None and len(widths) > 1:
        raise ConversionError(
            f"{num_heads} heads over attention widths {sorted(widths)} need a head size per level, and "
            "UNet2DModel has one for all, so this network cannot be converted"
        )
    return num_head_channels or max(widths) // parts


def split_qkv(tensors: Tensors, head_channels: int | None, by_letter: bool = False) -> Tensors:
    """The joint `qkv` of OpenAI's attention as three matrices of all heads, which ours has.

    Args:
        tensors: By canonical names.
        head_channels: Channels per head; `None` for one head.
        by_letter: The rows are q of all heads, then k, then v (`use_new_attention_order`); else q, k and v of the
            first head, then those of the second.
    """
    out: Tensors = {}
    for name, value in tensors.items():
        if ".qkv." not in name:
            out[name] = value
            continue
        width, rest = value.shape[0] // 3, value.shape[1:]
        size = head_channels or width
        if by_letter:
            letters = value.reshape(3, width, *rest)
        else:
            letters = value.reshape(width // size, 3, size, *rest).transpose(0, 1).reshape(3, width, *rest)
        for letter, part in zip("qkv", letters, strict=True):
            out[name.replace(".qkv.", f".{letter}.")] = part
    return out


# ---------------------------------------------------------------------- canonical names to ours


def infer_architecture(tensors: Tensors, traits: dict[str, Any]) -> dict[str, Any]:
    """`UNet2DModel` arguments (all but `sample_size`) from canonical names and shapes, added to the family's `traits`.

    Raises:
        ConversionError: Something is missing, or no `UNet2DModel` of this family has it.
    """
    levels = _numbers_below(tensors, "down")
    ends = ("conv_in", "conv_out", "temb.dense.0", "mid.block_1.conv1", "mid.block_1.temb_proj")
    for needed in (*ends, *(f"down.{level}.block.0.conv1" for level in levels or [0])):
        if f"{needed}.weight" not in tensors:
            raise ConversionError(f"{needed}.weight (in the official naming) is missing; is the format right?")
    for name in tensors:
        if ".conv_shortcut." in name:
            raise ConversionError(f"{name}: 3x3 shortcuts (conv_shortcut=True) have no counterpart in UNet2DModel")
    resnets = any(".downsample.conv1." in name for name in tensors)  # resblock_updown
    widths, attends, depth = [], [], set()
    for level in levels:
        blocks = _numbers_below(tensors, f"down.{level}.block")
        depth.add(len(blocks))
        widths.append(tensors[f"down.{level}.block.0.conv1.weight"].shape[0])
        attends.append(bool(_numbers_below(tensors, f"down.{level}.attn")))
        sampler = f"down.{level}.downsample.{'conv1' if resnets else 'conv'}.weight"
        if level < levels[-1] and sampler not in tensors:
            raise ConversionError(
                f"down.{level} has no convolution between resolutions (resamp_with_conv=False), which UNet2DModel "
                "needs here"
            )
    if len(depth) != 1:
        raise ConversionError(f"levels with different numbers of residual blocks ({sorted(depth)}) do not fit")
    block_in = tensors["conv_in.weight"].shape[0]
    if widths[0] != block_in:
        raise ConversionError(
            f"the first level has {widths[0]} channels after a first convolution to {block_in}; UNet2DModel has the "
            "same number in both"
        )
    if (embedded := tensors["temb.dense.0.weight"].shape[-1]) != block_in:
        raise ConversionError(
            f"t is embedded in {embedded} sines and cosines, and the first convolution goes to {block_in} channels; "
            "UNet2DModel has the same number in both"
        )
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnets else ("DownBlock2D", "UpBlock2D")
    arguments = {
        **traits,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": tensors["conv_out.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": depth.pop(),
        "down_block_types": tuple("AttnDownBlock2D" if a else plain[0] for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else plain[1] for a in reversed(attends)),
        "add_attention": "mid.attn_1.norm.weight" in tensors,
    }
    if tensors["mid.block_1.temb_proj.weight"].shape[0] == 2 * widths[-1]:
        arguments |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": arguments["norm_num_groups"]}
    if "label_emb.weight" in tensors:
        arguments["num_class_embeds"] = tensors["label_emb.weight"].shape[0]
    if resnets:
        arguments |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    return arguments


_OUR_PARTS = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_OUR_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def our_key(name: str, levels: int) -> str | None:
    """The state-dict key of a canonical name; official `up.0` is the finest level, ours the coarsest.

    Returns:
        The key, or `None` for a name that is none of the official network's.
    """
    fixed = {
        "temb.dense.0": "time_embedding.linear_1",
        "temb.dense.1": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "label_emb": "class_embedding",
    }
    stem, _, tail = name.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{tail}"
    if m := re.fullmatch(r"mid\.(block|attn)_(\d)\.(\w+)", stem):
        kind, parts = ("resnets", _OUR_PARTS) if m[1] == "block" else ("attentions", _OUR_ATTENTION)
        if m[3] in parts:
            return f"mid_block.{kind}.{int(m[2]) - 1}.{parts[m[3]]}.{tail}"
    if m := re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)", stem):
        level = int(m[2]) if m[1] == "down" else levels - 1 - int(m[2])
        kind, parts = ("resnets", _OUR_PARTS) if m[3] == "block" else ("attentions", _OUR_ATTENTION)
        if m[5] in parts:
            return f"{m[1]}_blocks.{level}.{kind}.{m[4]}.{parts[m[5]]}.{tail}"
    if m := re.fullmatch(r"(down|up)\.(\d+)\.(down|up)sample\.(\w+)", stem):
        level = int(m[2]) if m[1] == "down" else levels - 1 - int(m[2])
        parts = {"conv": "conv", **_OUR_PARTS}
        if m[4] in parts:
            return f"{m[1]}_blocks.{level}.{m[3]}samplers.0.{parts[m[4]]}.{tail}"
    return None


def canonical_from_ours(key: str, levels: int) -> str:
    """The inverse of `our_key`."""
    stem, tail = key.rsplit(".", 1)
    fixed = {
        "time_embedding.linear_1": "temb.dense.0",
        "time_embedding.linear_2": "temb.dense.1",
        "conv_in": "conv_in",
        "conv_norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    if stem in fixed:
        return f"{fixed[stem]}.{tail}"
    parts = {ours: official for official, ours in (_OUR_PARTS | _OUR_ATTENTION).items()}
    if m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", stem):
        kind = "block" if m[1] == "resnets" else "attn"
        return f"mid.{kind}_{int(m[2]) + 1}.{parts[m[3]]}.{tail}"
    m = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(.+)", stem)
    assert m is not None, key
    level = int(m[2]) if m[1] == "down" else levels - 1 - int(m[2])
    if inner := re.fullmatch(r"(resnets|attentions)\.(\d+)\.(.+)", m[3]):
        kind = "block" if inner[1] == "resnets" else "attn"
        return f"{m[1]}.{level}.{kind}.{inner[2]}.{parts[inner[3]]}.{tail}"
    return f"{m[1]}.{level}.{m[1]}sample.conv.{tail}"
