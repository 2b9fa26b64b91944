"""Translate other implementations' names of weights to those of `UNet2DModel`, and infer the architecture from them.

`_LAYERS` says how each implementation calls a layer; a function per implementation says where its blocks are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..utils.errors import UserError

Tensors = dict[str, Tensor]

# Layers outside of blocks by their full names, others by their names within a residual block, an attention block or a
# step between two resolutions. `official` is TensorFlow's naming with dots, which the PyTorch ports of it kept.
_LAYERS = """
UNet2DModel              official      pytorch_ddpm                  openai
conv_in                  conv_in       head                          input_blocks.0.0
time_embedding.linear_1  temb.dense.0  time_embedding.timembedding.1 time_embed.0
time_embedding.linear_2  temb.dense.1  time_embedding.timembedding.3 time_embed.2
class_embedding          -             -                             label_emb
conv_norm_out            norm_out      tail.0                        out.0
conv_out                 conv_out      tail.2                        out.2
norm1                    norm1         block1.0                      in_layers.0
conv1                    conv1         block1.2                      in_layers.2
time_emb_proj            temb_proj     temb_proj.1                   emb_layers.1
norm2                    norm2         block2.0                      out_layers.0
conv2                    conv2         block2.3                      out_layers.3
conv_shortcut            nin_shortcut  shortcut                      skip_connection
group_norm               norm          group_norm                    norm
to_q                     q             proj_q                        -
to_k                     k             proj_k                        -
to_v                     v             proj_v                        -
to_qkv                   -             -                             qkv
to_out.0                 proj_out      proj                          proj_out
conv                     conv          main                          op
conv                     -             -                             conv
"""


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """Sorted values of the pattern's first group in the names that begin with it."""
    return sorted({int(m[1]) for name in names if (m := re.match(pattern, name))})


def _official_blocks(names: Collection[str]) -> dict[str, str]:
    """`down.0.block.1`, `down.0.attn.1`, `down.0.downsample`, `mid.block_1`; `up.0` is the finest level."""
    levels = 1 + max(_numbers(names, r"down\.(\d+)\."), default=0)
    blocks = {f"mid.block_{i + 1}": f"mid_block.resnets.{i}" for i in (0, 1)}
    blocks["mid.attn_1"] = "mid_block.attentions.0"
    for name in names:
        if m := re.match(r"(down|up)\.(\d+)\.(?:(block|attn)\.(\d+)|\1sample)\.", name):
            side, level = m[1], int(m[2])
            kind = {"block": f"resnets.{m[4]}", "attn": f"attentions.{m[4]}", None: f"{side}samplers.0"}[m[3]]
            blocks[m[0][:-1]] = f"{side}_blocks.{level if side == 'down' else levels - 1 - level}.{kind}"
    return blocks


def _pytorch_ddpm_blocks(names: Collection[str]) -> dict[str, str]:
    """`downblocks.3`, `middleblocks.0`, `upblocks.3`: numbered through all levels, steps between them too."""
    blocks = {f"middleblocks.{i}": f"mid_block.resnets.{i}" for i in (0, 1)}
    blocks["middleblocks.0.attn"] = "mid_block.attentions.0"
    for side in ("down", "up"):
        all_blocks = _numbers(names, rf"{side}blocks\.(\d+)\.")
        per_level = min(_numbers(names, rf"{side}blocks\.(\d+)\.main\."), default=len(all_blocks))
        for n in all_blocks:
            level, i = divmod(n, per_level + 1)
            kind = f"resnets.{i}" if i < per_level else f"{side}samplers.0"
            blocks[f"{side}blocks.{n}"] = f"{side}_blocks.{level}.{kind}"
            blocks[f"{side}blocks.{n}.attn"] = f"{side}_blocks.{level}.attentions.{i}"
    return blocks


def _openai_blocks(names: Collection[str]) -> dict[str, str]:
    """`input_blocks.3.0`, `middle_block.1`, `output_blocks.3.1`: numbered through all levels, attention after `.0`.

    The step to the next resolution (a convolution, or with `resblock_updown` a residual block) has a number of its own
    on the way down, and is the last part of a level's last block on the way up.
    """
    inputs, outputs = (_numbers(names, rf"{side}_blocks\.(\d+)\.") for side in ("input", "output"))
    if inputs != list(range(len(inputs))):
        raise UserError("the network was trained with conv_resample=False (pooling), which UNet2DModel does not have")
    blocks = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    blocks["middle_block.1"] = "mid_block.attentions.0"
    steps = [m for name in names if (m := re.match(r"output_blocks\.(\d+)\.[12](?=\.(conv|in_layers\.2)\.)", name))]
    # Residual blocks per level on the way down; there is one more on the way up.
    per_level = min((int(m[1]) for m in steps), default=max(0, len(outputs) - 1))
    for n in inputs[1:]:  # 0 is the first convolution
        level, i = divmod(n - 1, per_level + 1)
        kind = f"resnets.{i}" if i < per_level else "downsamplers.0"
        blocks[f"input_blocks.{n}.0"] = f"down_blocks.{level}.{kind}"
        blocks[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
    for n in outputs:
        level, i = divmod(n, per_level + 1)
        blocks[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{i}"
        blocks[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{i}"
    return blocks | {m[0]: f"up_blocks.{int(m[1]) // (per_level + 1)}.upsamplers.0" for m in steps}


_BLOCKS = {"official": _official_blocks, "pytorch_ddpm": _pytorch_ddpm_blocks, "openai": _openai_blocks}


def translate(names: Collection[str], naming: str) -> dict[str, str]:
    """Return `{key of UNet2DModel: name}` for the names of a state dict; `naming` is a column of `_LAYERS`.

    Raises a UserError for names that this implementation does not have.
    """
    head, *rows = (line.split() for line in _LAYERS.splitlines() if line)
    layers = {row[head.index(naming)]: row[0] for row in rows}
    blocks = _BLOCKS[naming](names).items()
    keys = layers | {f"{block}.{layer}": f"{ours}.{layers[layer]}" for block, ours in blocks for layer in layers}
    split = {name: name.rpartition(".") for name in names}
    if unknown := [name for name, (layer, _, _) in split.items() if layer not in keys]:
        raise UserError(f"no place for {shortened(unknown)} in a network of this format; is the format right?")
    return {f"{keys[layer]}.{tail}": name for name, (layer, _, tail) in split.items()}


def shortened(names: list[str]) -> str:
    """Return the first three of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def infer_architecture(tensors: Tensors, family: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `UNet2DModel` (all but `sample_size`): those of its `family`, and what its weights say.

    Raises a UserError if a tensor is missing whose name and shape are needed for that.
    """
    outputs = {key.removesuffix(".weight"): value.shape[0] for key, value in tensors.items() if value.ndim}
    levels = range(1 + max(_numbers(tensors, r"down_blocks\.(\d+)\."), default=0))
    attends = [f"down_blocks.{level}.attentions.0.group_norm" in outputs for level in levels]
    resnets = any(".downsamplers.0.conv1." in key for key in tensors)  # resblock_updown
    kind = "Resnet{}sampleBlock2D" if resnets else "{}Block2D"
    try:
        arguments = {
            **family,
            "in_channels": tensors["conv_in.weight"].shape[1],
            "out_channels": outputs["conv_out"],
            "block_out_channels": tuple(outputs[f"down_blocks.{level}.resnets.0.conv1"] for level in levels),
            "layers_per_block": len(_numbers(tensors, r"down_blocks\.0\.resnets\.(\d+)\.")),
            "down_block_types": tuple("AttnDownBlock2D" if a else kind.format("Down") for a in attends),
            "up_block_types": tuple("AttnUpBlock2D" if a else kind.format("Up") for a in reversed(attends)),
            "add_attention": "mid_block.attentions.0.group_norm" in outputs,
            "num_class_embeds": outputs.get("class_embedding"),
        }
        if outputs["mid_block.resnets.0.time_emb_proj"] == 2 * arguments["block_out_channels"][-1]:
            arguments |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": family["norm_num_groups"]}
    except KeyError as error:
        raise UserError(f"nothing found for {error.args[0]}; is the format right?") from None
    return arguments | ({"downsample_type": "resnet", "upsample_type": "resnet"} if resnets else {})


def split_attention(tensors: Tensors, head_channels: int | None, new_order: bool) -> Tensors:
    """Return the weights with OpenAI's joint `to_qkv` as `to_q`, `to_k` and `to_v`; `None` is one head over all.

    In the new order, its rows are q of all heads, then k, then v; in the other one q, k and v of the first head, ...
    """
    out = {key: value for key, value in tensors.items() if ".to_qkv." not in key}
    for key in tensors.keys() - out.keys():
        value = tensors[key]  # [3 C, C, 1], or [3 C]
        width, rest = value.shape[0] // 3, value.shape[1:]
        if not new_order:
            size = head_channels or width
            value = value.reshape(width // size, 3, size, *rest).transpose(0, 1)
        for letter, part in zip("qkv", value.reshape(3, width, *rest), strict=True):
            out[key.replace("to_qkv", f"to_{letter}")] = part
    return out
