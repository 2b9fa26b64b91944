"""3 x 3 convolutions with four times fewer multiplications: Winograd's F(4x4, 3x3).

Lavin & Gray 2016 (arXiv 1509.09308). Where a processor runs plain convolutions at its peak already, only fewer
multiplications are faster. Every 4 x 4 tile of the output comes from 36 products per pair of channels instead of 144,
so the work is 36 matrix products, and two transforms around them that are matrix products themselves. In float32 the
result differs from a plain convolution by about 1e-5 of its largest value. Half precisions would lose six times more
than in a plain one, and are not served.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

# Lavin & Gray 2016, Section 4.1 (interpolation at 0, 1, -1, 2, -2 and infinity): Y = A' [(G g G') * (B' d B)] A
_B = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0]]
_B += [[0, 4, 0, -5, 0, 1]]
_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
_G += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
_A = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

# Tiles at a time: enough for the matrix products to be worth their weights, and few enough to stay in the cache.
_MOST_TILES = 256


class WinogradConv2d(nn.Module):
    """A 3 x 3 convolution with stride 1 and padding 1, for inference in float32.

    Sizes that are no multiples of 4, and other dtypes, go to the plain convolution.

    Args:
        conv: The plain convolution; its weights are shared, and a transformed copy four times their size is kept.

    Raises:
        ValueError: A convolution of another kind.
    """

    weight: Tensor
    bias: Tensor
    to_tiles: Tensor
    from_tiles: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        if not self.fits(conv):
            raise ValueError(
                "Winograd's convolution is for at least 32 channels and 3 x 3 kernels with stride 1 and padding 1, "
                f"got {conv}"
            )
        self.conv = conv
        A, B, G = (torch.tensor(m, dtype=torch.float64, device=conv.weight.device) for m in (_A, _B, _G))
        transformed = torch.einsum("ia,ocab,jb->ijco", G, conv.weight.detach().double(), G)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        for name, value in {
            "weight": transformed.reshape(36, conv.in_channels, conv.out_channels),
            "bias": bias,
            "to_tiles": torch.kron(B, B),  # both sides of B' d B at once, for a tile as a column of 36
            "from_tiles": torch.kron(A, A),
        }.items():
            self.register_buffer(name, value.to(conv.weight).contiguous(), persistent=False)

    @staticmethod
    def fits(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether it is a convolution of the kind that this one replaces, and wide enough to gain from it."""
        return (
            isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1))
            and (module.padding, module.padding_mode, module.groups) == ((1, 1), "zeros", 1)
            and min(module.in_channels, module.out_channels) >= 32
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, O, H, W]`, as the plain convolution but for rounding."""
        b, channels, height, width = x.shape
        if height % 4 or width % 4 or x.dtype != torch.float32:
            return self.conv(x)
        h, w, out_channels = height // 4, width // 4, len(self.bias)
        at_a_time = max(1, min(_MOST_TILES, max(channels, out_channels)) // (h * w))
        made = x.new_empty(b, height, width, out_channels)
        padded = x.new_zeros(min(at_a_time, b), height + 2, width + 2, channels)
        image, row, column, one = padded.stride()
        for start in range(0, b, at_a_time):
            part = x[start : start + at_a_time].permute(0, 2, 3, 1)
            n = len(part)
            padded[:n, 1:-1, 1:-1] = part
            # overlapping tiles of 6 x 6, a tile's places first
            tiles = padded.as_strided((6, 6, n, h, w, channels), (row, column, image, 4 * row, 4 * column, one))
            tiles = self.to_tiles @ tiles.reshape(36, -1)
            products = torch.bmm(tiles.view(36, -1, channels), self.weight)
            outputs = (self.from_tiles @ products.view(36, -1)).view(4, 4, n, h, w, out_channels)
            place = made[start : start + n].view(n, h, 4, w, 4, out_channels).permute(2, 4, 0, 1, 3, 5)
            torch.add(outputs, self.bias, out=place)
        return made.permute(0, 3, 1, 2)
