"""Derived seeds: the same everywhere, different for different purposes."""

import hashlib

import torch

from ddpm_hf.randomness import derive_seed, derived_generator


def test_seeds_are_the_same_on_every_machine():
    # blake2b of "(0, 'noise', 5)", its first 8 bytes as a little-endian number without the lowest bit
    by_hand = hashlib.blake2b(b"(0, 'noise', 5)", digest_size=8).digest()
    assert derive_seed(0, "noise", 5) == int.from_bytes(by_hand, "little") // 2


def test_seeds_differ_by_purpose():
    seeds = {derive_seed(s, what, i) for s in range(5) for what in ("t", "noise") for i in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_do_not_touch_the_global_state():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(5, generator=derived_generator(0, "x"))
    assert torch.equal(torch.rand(3), expected)
