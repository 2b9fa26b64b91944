"""Winograd's convolution against the plain one in float64."""

import pytest
import torch
from torch import nn

from ddpm_hf.models.winograd import WinogradConv2d


def relative_error(made: torch.Tensor, conv: nn.Conv2d, x: torch.Tensor) -> float:
    bias = None if conv.bias is None else conv.bias.double()
    exact = nn.functional.conv2d(x.double(), conv.weight.double(), bias, padding=1)
    return ((made.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 32, 4, 4), (3, 32, 8, 12), (5, 48, 16, 16), (2, 160, 32, 32), (0, 32, 8, 8)])
@torch.no_grad()
def test_it_is_the_plain_convolution(shape, bias, channels_last):
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[1], 36, 3, padding=1, bias=bias)
    x = torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    made = WinogradConv2d(conv)(x)
    assert made.shape == (shape[0], 36, *shape[2:])
    assert torch.equal(x, before)
    if shape[0]:
        assert relative_error(made, conv, x) < 2e-5


@torch.no_grad()
def test_images_do_not_meet():
    """Tiles of one image take nothing from its neighbours, whatever is computed at a time."""
    conv = nn.Conv2d(32, 32, 3, padding=1)
    x = torch.randn(40, 32, 16, 16)
    whole = WinogradConv2d(conv)(x)
    for i in (0, 15, 16, 39):
        alone = WinogradConv2d(conv)(x[i : i + 1])
        assert (whole[i : i + 1] - alone).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize(
    ("size", "dtype"), [((6, 8), torch.float32), ((8, 7), torch.float32), ((8, 8), torch.bfloat16)]
)
@torch.no_grad()
def test_what_it_does_not_serve_goes_to_the_plain_convolution(size, dtype):
    conv = nn.Conv2d(32, 32, 3, padding=1).to(dtype)
    x = torch.randn(2, 32, *size).to(dtype)
    assert torch.equal(WinogradConv2d(conv)(x), conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=0),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 32, 3, padding=1),
    ],
)
def test_other_convolutions_are_refused(conv):
    assert not WinogradConv2d.fits(conv)
    with pytest.raises(ValueError, match="3 x 3 kernels"):
        WinogradConv2d(conv)
