"""Other people's DDPM networks as plain functions over state dicts under their own names.

Written from the public naming and behaviour of those implementations (no sample file is at hand): each function makes
random weights with their names and shapes, and another computes the output from them. Nothing of the package is used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def _layer(state: State, name: str, *shape: int, norm: bool = False) -> None:
    """Random weight and bias, far from any initialisation's zeros."""
    state[f"{name}.weight"] = torch.randn(shape) * (0.3 if norm else 1 / math.sqrt(math.prod(shape[1:]) or 1)) + norm
    state[f"{name}.bias"] = 0.2 * torch.randn(shape[0])


def _conv(state: State, name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, C, N]` each; one head."""
    weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(q.shape[1]), dim=-1)
    return torch.einsum("bqk,bck->bcq", weights, v)


def _frequencies(half: int, denominator: int) -> Tensor:
    return torch.exp(-math.log(10000) * torch.arange(half) / denominator)


# ---------------------------------------------------------------------- pesser/pytorch_diffusion, ermongroup/ddim


def make_pesser(ch=32, mult=(1, 2), blocks=2, attends=(False, True), channels=3, out=3) -> State:
    state: State = {}
    temb = 4 * ch
    _layer(state, "temb.dense.0", temb, ch)
    _layer(state, "temb.dense.1", temb, temb)
    _layer(state, "conv_in", ch, channels, 3, 3)

    def block(name, n_in, n_out):
        _layer(state, f"{name}.norm1", n_in, norm=True)
        _layer(state, f"{name}.conv1", n_out, n_in, 3, 3)
        _layer(state, f"{name}.temb_proj", n_out, temb)
        _layer(state, f"{name}.norm2", n_out, norm=True)
        _layer(state, f"{name}.conv2", n_out, n_out, 3, 3)
        if n_in != n_out:
            _layer(state, f"{name}.nin_shortcut", n_out, n_in, 1, 1)

    def attention(name, n):
        _layer(state, f"{name}.norm", n, norm=True)
        for part in ("q", "k", "v", "proj_out"):
            _layer(state, f"{name}.{part}", n, n, 1, 1)

    skips, now = [ch], ch
    for level, m in enumerate(mult):
        for i in range(blocks):
            block(f"down.{level}.block.{i}", now, ch * m)
            now = ch * m
            skips.append(now)
            if attends[level]:
                attention(f"down.{level}.attn.{i}", now)
        if level < len(mult) - 1:
            _layer(state, f"down.{level}.downsample.conv", now, now, 3, 3)
            skips.append(now)
    block("mid.block_1", now, now)
    attention("mid.attn_1", now)
    block("mid.block_2", now, now)
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            block(f"up.{level}.block.{i}", now + skips.pop(), ch * m)
            now = ch * m
            if attends[level]:
                attention(f"up.{level}.attn.{i}", now)
        if level:
            _layer(state, f"up.{level}.upsample.conv", now, now, 3, 3)
    _layer(state, "norm_out", now, norm=True)
    _layer(state, "conv_out", out, now, 3, 3)
    return state


def run_pesser(state: State, x: Tensor, t: Tensor) -> Tensor:
    eps, ch = 1e-6, state["conv_in.weight"].shape[0]
    angles = t[:, None].float() * _frequencies(ch // 2, ch // 2 - 1)
    temb = _linear(state, "temb.dense.0", torch.cat([angles.sin(), angles.cos()], dim=1))
    temb = _linear(state, "temb.dense.1", F.silu(temb))

    def block(name, x):
        h = _conv(state, f"{name}.conv1", F.silu(_norm(state, f"{name}.norm1", x, eps)), padding=1)
        h = h + _linear(state, f"{name}.temb_proj", F.silu(temb))[:, :, None, None]
        h = _conv(state, f"{name}.conv2", F.silu(_norm(state, f"{name}.norm2", h, eps)), padding=1)
        return h + (_conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attention(name, x):
        if f"{name}.norm.weight" not in state:
            return x
        h = _norm(state, f"{name}.norm", x, eps)
        q, k, v = (_conv(state, f"{name}.{part}", h).flatten(2) for part in "qkv")
        return x + _conv(state, f"{name}.proj_out", _attend(q, k, v).view_as(x))

    levels = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("down."))
    blocks = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("down.0.block"))
    hs = [_conv(state, "conv_in", x, padding=1)]
    for level in range(levels):
        for i in range(blocks):
            hs.append(attention(f"down.{level}.attn.{i}", block(f"down.{level}.block.{i}", hs[-1])))
        if level < levels - 1:
            hs.append(_conv(state, f"down.{level}.downsample.conv", F.pad(hs[-1], (0, 1, 0, 1)), stride=2))
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", hs[-1])))
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            h = attention(f"up.{level}.attn.{i}", block(f"up.{level}.block.{i}", torch.cat([h, hs.pop()], dim=1)))
        if level:
            h = _conv(state, f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2), padding=1)
    return _conv(state, "conv_out", F.silu(_norm(state, "norm_out", h, eps)), padding=1)


# ---------------------------------------------------------------------- w86763777/pytorch-ddpm


def make_pytorch_ddpm(ch=32, mult=(1, 2, 2), blocks=1, attends=(False, True, False), T=1000) -> State:
    state: State = {}
    temb = 4 * ch
    angles = torch.arange(T)[:, None] * _frequencies(ch // 2, ch // 2)
    alternating = torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(T, ch)
    state["time_embedding.timembedding.0.weight"] = alternating
    _layer(state, "time_embedding.timembedding.1", temb, ch)
    _layer(state, "time_embedding.timembedding.3", temb, temb)
    _layer(state, "head", ch, 3, 3, 3)

    def block(name, n_in, n_out, attn):
        _layer(state, f"{name}.block1.0", n_in, norm=True)
        _layer(state, f"{name}.block1.2", n_out, n_in, 3, 3)
        _layer(state, f"{name}.temb_proj.1", n_out, temb)
        _layer(state, f"{name}.block2.0", n_out, norm=True)
        _layer(state, f"{name}.block2.3", n_out, n_out, 3, 3)
        if n_in != n_out:
            _layer(state, f"{name}.shortcut", n_out, n_in, 1, 1)
        if attn:
            _layer(state, f"{name}.attn.group_norm", n_out, norm=True)
            for part in ("proj_q", "proj_k", "proj_v", "proj"):
                _layer(state, f"{name}.attn.{part}", n_out, n_out, 1, 1)

    skips, now, n = [ch], ch, 0
    for level, m in enumerate(mult):
        for _ in range(blocks):
            block(f"downblocks.{n}", now, ch * m, attends[level])
            now, n = ch * m, n + 1
            skips.append(now)
        if level < len(mult) - 1:
            _layer(state, f"downblocks.{n}.main", now, now, 3, 3)
            n += 1
            skips.append(now)
    block("middleblocks.0", now, now, True)
    block("middleblocks.1", now, now, False)
    n = 0
    for level, m in reversed(list(enumerate(mult))):
        for _ in range(blocks + 1):
            block(f"upblocks.{n}", now + skips.pop(), ch * m, attends[level])
            now, n = ch * m, n + 1
        if level:
            _layer(state, f"upblocks.{n}.main", now, now, 3, 3)
            n += 1
    _layer(state, "tail.0", now, norm=True)
    _layer(state, "tail.2", 3, now, 3, 3)
    return state


def run_pytorch_ddpm(state: State, x: Tensor, t: Tensor) -> Tensor:
    eps = 1e-5
    temb = _linear(state, "time_embedding.timembedding.1", state["time_embedding.timembedding.0.weight"][t])
    temb = _linear(state, "time_embedding.timembedding.3", F.silu(temb))

    def block(name, x):
        h = _conv(state, f"{name}.block1.2", F.silu(_norm(state, f"{name}.block1.0", x, eps)), padding=1)
        h = h + _linear(state, f"{name}.temb_proj.1", F.silu(temb))[:, :, None, None]
        h = _conv(state, f"{name}.block2.3", F.silu(_norm(state, f"{name}.block2.0", h, eps)), padding=1)
        h = h + (_conv(state, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in state else x)
        if f"{name}.attn.proj.weight" not in state:
            return h
        normed = _norm(state, f"{name}.attn.group_norm", h, eps)
        q, k, v = (_conv(state, f"{name}.attn.proj_{part}", normed).flatten(2) for part in "qkv")
        return h + _conv(state, f"{name}.attn.proj", _attend(q, k, v).view_as(h))

    hs = [_conv(state, "head", x, padding=1)]
    n = 0
    while any(name.startswith(f"downblocks.{n}.") for name in state):
        name = f"downblocks.{n}"
        resample = f"{name}.main.weight" in state
        hs.append(_conv(state, f"{name}.main", hs[-1], stride=2, padding=1) if resample else block(name, hs[-1]))
        n += 1
    h = block("middleblocks.1", block("middleblocks.0", hs[-1]))
    n = 0
    while any(name.startswith(f"upblocks.{n}.") for name in state):
        name = f"upblocks.{n}"
        if f"{name}.main.weight" in state:
            h = _conv(state, f"{name}.main", F.interpolate(h, scale_factor=2), padding=1)
        else:
            h = block(name, torch.cat([h, hs.pop()], dim=1))
        n += 1
    return _conv(state, "tail.2", F.silu(_norm(state, "tail.0", h, eps)), padding=1)


# ---------------------------------------------------------------------- openai/improved-diffusion, guided-diffusion


def make_improved(
    ch=32,
    mult=(1, 2),
    blocks=1,
    attends=(False, True),
    out=3,
    scale_shift=False,
    classes=None,
    updown=False,
    channels=3,
) -> State:
    """`updown`: residual blocks change the resolution (guided-diffusion's `resblock_updown`)."""
    state: State = {}
    temb = 4 * ch
    _layer(state, "time_embed.0", temb, ch)
    _layer(state, "time_embed.2", temb, temb)
    if classes:
        state["label_emb.weight"] = torch.randn(classes, temb)
    _layer(state, "input_blocks.0.0", ch, channels, 3, 3)

    def block(name, n_in, n_out):
        _layer(state, f"{name}.in_layers.0", n_in, norm=True)
        _layer(state, f"{name}.in_layers.2", n_out, n_in, 3, 3)
        _layer(state, f"{name}.emb_layers.1", n_out * (2 if scale_shift else 1), temb)
        _layer(state, f"{name}.out_layers.0", n_out, norm=True)
        _layer(state, f"{name}.out_layers.3", n_out, n_out, 3, 3)
        if n_in != n_out:
            _layer(state, f"{name}.skip_connection", n_out, n_in, 1, 1)

    def attention(name, n):
        _layer(state, f"{name}.norm", n, norm=True)
        _layer(state, f"{name}.qkv", 3 * n, n, 1)
        _layer(state, f"{name}.proj_out", n, n, 1)

    skips, now, n = [ch], ch, 1
    for level, m in enumerate(mult):
        for _ in range(blocks):
            block(f"input_blocks.{n}.0", now, ch * m)
            now = ch * m
            if attends[level]:
                attention(f"input_blocks.{n}.1", now)
            n += 1
            skips.append(now)
        if level < len(mult) - 1:
            if updown:
                block(f"input_blocks.{n}.0", now, now)
            else:
                _layer(state, f"input_blocks.{n}.0.op", now, now, 3, 3)
            n += 1
            skips.append(now)
    block("middle_block.0", now, now)
    attention("middle_block.1", now)
    block("middle_block.2", now, now)
    n = 0
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            block(f"output_blocks.{n}.0", now + skips.pop(), ch * m)
            now = ch * m
            if attends[level]:
                attention(f"output_blocks.{n}.1", now)
            if level and i == blocks:
                name = f"output_blocks.{n}.{2 if attends[level] else 1}"
                if updown:
                    block(name, now, now)
                else:
                    _layer(state, f"{name}.conv", now, now, 3, 3)
            n += 1
    _layer(state, "out.0", now, norm=True)
    _layer(state, "out.2", out, now, 3, 3)
    return state


def run_improved(
    state: State,
    x: Tensor,
    t: Tensor,
    heads: int = 1,
    labels: Tensor | None = None,
    head_channels: int | None = None,
    new_order: bool = False,
    halving: tuple[int, ...] = (),
) -> Tensor:
    """`halving`: the input blocks that are residual and halve the resolution."""
    eps, ch = 1e-5, state["input_blocks.0.0.weight"].shape[0]
    angles = t[:, None].float() * _frequencies(ch // 2, ch // 2)
    temb = _linear(state, "time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    temb = _linear(state, "time_embed.2", F.silu(temb))
    if labels is not None:
        temb = temb + state["label_emb.weight"][labels]

    def block(name, x, resample=lambda h: h):
        h = resample(F.silu(_norm(state, f"{name}.in_layers.0", x, eps)))
        h, x = _conv(state, f"{name}.in_layers.2", h, padding=1), resample(x)
        emb = _linear(state, f"{name}.emb_layers.1", F.silu(temb))[:, :, None, None]
        if emb.shape[1] == 2 * h.shape[1]:
            scale, shift = emb.chunk(2, dim=1)
            h = _norm(state, f"{name}.out_layers.0", h, eps) * (1 + scale) + shift
        else:
            h = _norm(state, f"{name}.out_layers.0", h + emb, eps)
        h = _conv(state, f"{name}.out_layers.3", F.silu(h), padding=1)
        return h + (_conv(state, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in state else x)

    def attention(name, x):
        if f"{name}.qkv.weight" not in state:
            return x
        h = _norm(state, f"{name}.norm", x, eps).flatten(2)
        h = F.conv1d(h, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])
        b, c, size = x.shape[0], x.shape[1], h.shape[2]
        n = c // head_channels if head_channels else heads
        if new_order:
            q, k, v = (part.reshape(b * n, c // n, size) for part in h.chunk(3, dim=1))
        else:
            q, k, v = h.reshape(b * n, 3, c // n, size).unbind(1)
        h = _attend(q, k, v).reshape(b, c, size)
        h = F.conv1d(h, state[f"{name}.proj_out.weight"], state[f"{name}.proj_out.bias"])
        return x + h.view_as(x)

    hs = [_conv(state, "input_blocks.0.0", x, padding=1)]
    n = 1
    while any(name.startswith(f"input_blocks.{n}.") for name in state):
        name = f"input_blocks.{n}"
        if f"{name}.0.op.weight" in state:
            hs.append(_conv(state, f"{name}.0.op", hs[-1], stride=2, padding=1))
        elif n in halving:
            hs.append(block(f"{name}.0", hs[-1], lambda h: F.avg_pool2d(h, 2)))
        else:
            hs.append(attention(f"{name}.1", block(f"{name}.0", hs[-1])))
        n += 1
    h = block("middle_block.2", attention("middle_block.1", block("middle_block.0", hs[-1])))
    n = 0
    while any(name.startswith(f"output_blocks.{n}.") for name in state):
        name = f"output_blocks.{n}"
        h = attention(f"{name}.1", block(f"{name}.0", torch.cat([h, hs.pop()], dim=1)))
        for k in (1, 2):
            if f"{name}.{k}.conv.weight" in state:
                h = _conv(state, f"{name}.{k}.conv", F.interpolate(h, scale_factor=2), padding=1)
            if f"{name}.{k}.in_layers.2.weight" in state:
                h = block(f"{name}.{k}", h, lambda h: F.interpolate(h, scale_factor=2))
        n += 1
    return _conv(state, "out.2", F.silu(_norm(state, "out.0", h, eps)), padding=1)
