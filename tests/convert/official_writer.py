"""The oracle of reading official checkpoints: our weights under the official TensorFlow names and in their layout."""

import re
from pathlib import Path

import numpy as np
import tensorflow as tf

EMA_SUFFIX = "/ExponentialMovingAverage"
_FIXED = {
    "time_embedding.linear_1": "temb/dense0",
    "time_embedding.linear_2": "temb/dense1",
    "conv_in": "conv_in",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
_PARTS = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_emb_proj": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def official_name(key: str, levels: int) -> str:
    """`up_blocks.0.resnets.1.conv1.weight` of a network with two levels as `model/up_1/block_1/conv1/W`."""
    layer, tail = key.rsplit(".", 1)
    kinds = {"resnets": "block", "attentions": "attn"}
    if layer in _FIXED:
        name = _FIXED[layer]
    elif m := re.fullmatch(r"mid_block\.(\w+)\.(\d)\.(.+)", layer):
        name = f"mid/{kinds[m[1]]}_{int(m[2]) + 1}/{_PARTS[m[3]]}"
    else:
        m = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", layer)
        assert m is not None, key
        level = int(m[2]) if m[1] == "down" else levels - 1 - int(m[2])
        inner = f"{kinds[m[3]]}_{m[4]}/{_PARTS[m[5]]}" if m[3] in kinds else f"{m[1]}sample/conv"
        name = f"{m[1]}_{level}/{inner}"
    is_norm = re.search(r"norm(\d|_out)?$", name) is not None
    return f"model/{name}/{ {'weight': 'gamma' if is_norm else 'W', 'bias': 'beta' if is_norm else 'b'}[tail] }"


def official_arrays(state: dict) -> dict[str, np.ndarray]:
    """A state dict of the official network; convolutions are `[H, W, in, out]`, matrices `[in, out]`."""
    levels = len({key.split(".")[1] for key in state if key.startswith("down_blocks.")})
    arrays = {}
    for key, value in state.items():
        name = official_name(key, levels)
        if name.endswith("nin_shortcut/W"):
            value = value.flatten(1)
        array = value.detach().numpy()
        arrays[name] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return arrays


def write_checkpoint(prefix: Path, variables: dict[str, np.ndarray]) -> Path:
    """A TensorFlow checkpoint of these variables; returns its path without ending."""
    names = sorted(variables)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(variables[name]) for name in names],
    )
    return prefix
