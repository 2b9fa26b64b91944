"""3 x 3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3).

Lavin & Gray 2016 (arXiv 1509.09308). Where a processor runs plain convolutions at its peak already, only fewer
multiplications are faster. Every 4 x 4 tile of the output comes from 36 products per pair of channels instead of 144,
so the work is 36 matrix products, and two transforms around them that are matrix products themselves. In float32 the
result differs from a plain convolution by about 1e-5 of its largest value. Half precisions would lose six times more
than in a plain one, and are not served.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..utils.errors import UserError

# Lavin & Gray 2016, Section 4.1 (interpolation at 0, 1, -1, 2, -2 and infinity): Y = A' [(G g G') * (B' d B)] A
_B = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0]]
_B += [[0, 4, 0, -5, 0, 1]]
_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
_G += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
_A = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

# Enough for the matrix products to be worth their weights, which is about as many as the layer is wide, and few enough
# to stay in the cache.
_TILES_AT_A_TIME = 256

# Below it little is saved, and the widest layers of a network, which work there, would need the most memory.
_SMALLEST_SIDE = 8


class Workspace:
    """Memory that the layers of a network use in turn.

    Memory of this size goes back to the system whenever it is freed, and to be given it again, page by page, can take
    as long as a third of the convolution.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor with anything in it, until the same name is asked for again."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or (held.device, held.dtype) != (like.device, like.dtype):
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)


class WinogradConv2d(nn.Module):
    """A 3 x 3 convolution with stride 1 and padding 1, for inference in float32, in one thread at a time.

    Sizes below 8 or no multiples of 4, and other dtypes, go to the plain convolution.

    Args:
        conv: The plain convolution; its weights are shared, and from the first use on a transformed copy, four times
            their size, is kept: they must not change after it.
        workspace: Shared with other layers that are not computed at the same time; its own by default.

    Raises:
        ValueError: A convolution of another kind.
    """

    bias: Tensor
    filter_transform: Tensor
    input_transform: Tensor
    output_transform: Tensor

    def __init__(self, conv: nn.Conv2d, workspace: Workspace | None = None):
        super().__init__()
        if not self.fits(conv):
            raise UserError(
                "Winograd's convolution is for at least 32 channels and 3 x 3 kernels with stride 1 and padding 1, "
                f"got {conv}"
            )
        self.conv = conv
        self.workspace = workspace or Workspace()
        self._transformed: Tensor | None = None
        A, B, G = (torch.tensor(m, dtype=torch.float64) for m in (_A, _B, _G))
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        for name, value in {
            "bias": bias,
            "filter_transform": torch.kron(G, G),  # both sides of G g G' at once, for a kernel as a column of 9
            "input_transform": torch.kron(B, B),  # the same of B' d B, for a tile as a column of 36
            "output_transform": torch.kron(A, A),
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

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, O, H, W]`, as the plain convolution but for rounding."""
        b, channels, height, width = x.shape
        if height % 4 or width % 4 or min(height, width) < _SMALLEST_SIDE or x.dtype != torch.float32:
            return self.conv(x)
        if self._transformed is None:
            self._transformed = self._transformed_weight()
        h, w, out_channels = height // 4, width // 4, len(self.bias)
        at_a_time = max(1, min(b, min(_TILES_AT_A_TIME, max(channels, out_channels)) // (h * w)))
        made = x.new_empty(b, height, width, out_channels)
        take = self.workspace.take
        for start in range(0, b, at_a_time):
            part = x[start : start + at_a_time].permute(0, 2, 3, 1)
            n = len(part)
            padded = take("padded", x, n, height + 2, width + 2, channels).zero_()
            padded[:, 1:-1, 1:-1] = part
            image, row, column, one = padded.stride()
            # overlapping tiles of 6 x 6, a tile's places first
            tiles = padded.as_strided((6, 6, n, h, w, channels), (row, column, image, 4 * row, 4 * column, one))
            columns = take("a", x, *tiles.shape).copy_(tiles).view(36, -1)
            transformed = torch.mm(self.input_transform, columns, out=take("b", x, *columns.shape))
            products = take("a", x, 36, n * h * w, out_channels)
            torch.bmm(transformed.view(36, -1, channels), self._transformed, out=products)
            outputs = take("b", x, 16, n * h * w * out_channels)
            torch.mm(self.output_transform, products.view(36, -1), out=outputs)
            place = made[start : start + n].view(n, h, 4, w, 4, out_channels).permute(2, 4, 0, 1, 3, 5)
            torch.add(outputs.view(place.shape), self.bias, out=place)
        return made.permute(0, 3, 1, 2)

    def _transformed_weight(self) -> Tensor:
        """`[36, C, O]`. In place of temporaries, which would stay with the process as holes in its memory."""
        taps = self.conv.weight.detach().permute(2, 3, 1, 0).reshape(9, -1)
        made = taps.new_empty(36, self.conv.in_channels, self.conv.out_channels)
        torch.mm(self.filter_transform, taps, out=made.view(36, -1))
        return made
