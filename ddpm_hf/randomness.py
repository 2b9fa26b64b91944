"""Randomness as a function of (seed, what is being drawn), so that nothing depends on what was drawn before.

A run that is resumed, split over processes or sampled in other batches draws the same numbers.
"""

from __future__ import annotations

import hashlib
import operator

import torch


def derive_seed(seed: int, *what: int | str) -> int:
    """A 63-bit seed for one purpose: the same for the same arguments on every machine, unrelated for any others.

    Args:
        seed: The run's seed.
        what: The purpose and its indices, for example `("noise", update)`.

    Raises:
        TypeError: An index that is no whole number.
    """
    key = (int(seed), *(part if isinstance(part, str) else operator.index(part) for part in what))
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derived_generator(seed: int, *what: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded by `derive_seed(seed, *what)`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *what))
