"""Randomness as a function of (seed, what is being drawn), so that nothing depends on what was drawn before.

A run that is resumed, split over processes or sampled in other batches draws the same numbers.
"""

import hashlib
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import UserError


def derive_seed(seed: int, *what: int | str) -> int:
    """Return a 63-bit seed for one purpose and its indices, such as `("noise", update)`: the same everywhere."""
    key = (int(seed), *(part if isinstance(part, str) else operator.index(part) for part in what))
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derived_generator(seed: int, *what: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on `device`, seeded by `derive_seed(seed, *what)`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *what))


# ------------------------------------------------------------------ noise by seed and counter

# How a seed becomes noise; recorded with samples, so that those of another way are not mixed with these.
NOISE_OF_SEEDS = "philox 4x32-10"

# Philox 4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Section 3.3; constants as in
# Random123's philox.h): the multipliers of a round, and what is added to the key after it.
_M_0, _M_1 = 0xD2511F53, 0xCD9E8D57
_W_0, _W_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10

# Small batches draw several steps' noise at once, as most of the time goes into starting the operations.
_NUMBERS_AT_ONCE = 2**15


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random 32-bit words for every counter and key: Philox 4x32-10.

    Four tensors (`counter`) and two (`key`), which broadcast, give four: int64 in [0, 2^32). Integer operations only,
    so the words are the same on every device.
    """
    c_0, c_1, c_2, c_3 = counter
    k_0, k_1 = key
    for _ in range(_ROUNDS):
        # 64-bit products; int64 wraps around, which keeps all 64 bits, and the mask makes the upper half unsigned
        p_0, p_1 = c_0 * _M_0, c_2 * _M_1
        c_0, c_1 = ((p_1 >> 32) & _LOW) ^ c_1 ^ k_0, p_1 & _LOW
        c_2, c_3 = ((p_0 >> 32) & _LOW) ^ c_3 ^ k_1, p_0 & _LOW
        k_0, k_1 = (k_0 + _W_0) & _LOW, (k_1 + _W_1) & _LOW
    return c_0, c_1, c_2, c_3


def normal_noise(seeds: Tensor, draws: Tensor, count: int) -> Tensor:
    """Return standard normal numbers as a function of (seed, draw, place), float32.

    Four numbers of one image come from one Philox block: key = seed, counter = (block, draw, 0, 0). Pairs of words
    become pairs of normals by Box & Muller (1958); at most 6.7 standard deviations.

    Takes seeds `[B]` and draws (which of the image's, from 0 on) `[D, B]` or `[D, 1]`, int64, and fewer than 2^34
    numbers; returns `[D, B, count]` on the device of `seeds`, equal on all up to the rounding of log, cos and sin.
    """
    key = seeds & _LOW, (seeds >> 32) & _LOW
    block = torch.arange((count + 3) // 4, device=seeds.device)
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    words = philox((block, draws[:, :, None], zero, zero), (key[0][:, None], key[1][:, None]))
    a, b, c, d = (word.float() for word in words)
    pairs = []
    for u, v in ((a, b), (c, d)):
        radius = torch.sqrt(-2.0 * torch.log((u + 0.5) * 2.0**-32))
        angle = v * (2.0 * math.pi * 2.0**-32)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(-2)[..., :count]


class SeededNoise:
    """Standard normal noise for a batch of images, each image's a function of its own seed, from -2^63 to 2^64 - 1.

    What image i gets depends on its seed and on how often noise was drawn before (`drawn`, for all or for each), and
    on nothing else: not on the batch, the number of processes or the device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", drawn: int | Sequence[int] = 0):
        for seed in seeds:
            if not -(2**63) <= seed < 2**64:
                raise UserError(f"a seed lies between -2^63 and 2^64 - 1, got {seed}")
        signed = [seed - 2**64 if seed >= 2**63 else operator.index(seed) for seed in seeds]
        self.seeds = torch.tensor(signed, dtype=torch.int64, device=device)
        self._before = torch.as_tensor(drawn, dtype=torch.int64, device=device).expand(len(signed))
        self._drawn = 0
        self._ahead: Tensor | None = None  # noise of the draws from `_first` on
        self._first = 0

    def __len__(self) -> int:
        return len(self.seeds)

    def generators(self) -> list[torch.Generator]:
        """Return one CPU generator per image, for stock's samplers that draw for themselves."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds.tolist()]

    def count_draw(self) -> Tensor:
        """Count a draw that is made elsewhere, and return its number for each image, `[B]`."""
        self._drawn += 1
        return self._before + (self._drawn - 1)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw `[B, ...]` float32, for the B images, and count the draw; raise UserError unless there are B seeds."""
        if shape[0] != len(self):
            raise UserError(f"got {len(self)} seeds for a batch of {shape[0]}; pass one seed per image")
        count = math.prod(shape[1:])
        ahead = self._ahead
        if ahead is None or ahead.shape[-1] != count or self._drawn - self._first >= len(ahead):
            many = max(1, _NUMBERS_AT_ONCE // max(1, len(self) * count))
            draws = torch.arange(self._drawn, self._drawn + many, device=self.seeds.device)
            ahead = self._ahead = normal_noise(self.seeds, draws[:, None] + self._before, count)
            self._first = self._drawn
        self._drawn += 1
        return ahead[self._drawn - 1 - self._first].view(*shape)


Generators = torch.Generator | list[torch.Generator] | SeededNoise | None


def standard_normal(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw standard normal noise `[B, ...]` on a device: by seeds, or in stock's order from generators."""
    if isinstance(generator, SeededNoise):
        return generator.normal(shape).to(device, dtype)
    from diffusers.utils.torch_utils import randn_tensor  # importing diffusers takes seconds, which data do without

    return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
