"""Derived seeds: the same everywhere, different for different purposes."""

import hashlib
import math

import pytest
import torch

from ddpm_hf.utils.errors import UserError
from ddpm_hf.utils.randomness import SeededNoise, derive_seed, derived_generator, normal_noise, philox


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


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the vectors that the authors publish with Random123 (tests/kat_vectors, philox 4x32, 10 rounds)
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    counter, key = ([torch.tensor(int(word, 16)) for word in text.split()] for text in (counter, key))
    assert [f"{int(word):08x}" for word in philox(counter, key)] == words.split()


def test_noise_is_standard_normal():
    from scipy.stats import kstest

    noise = normal_noise(torch.arange(100), torch.arange(3)[:, None], 1000).double()
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    for other in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2)):  # draws, images, neighbouring places
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 4 / 300_000**0.5


def test_normals_are_box_and_muller_of_the_words():
    words = philox([torch.tensor(v) for v in (2, 7, 0, 0)], [torch.tensor(5), torch.tensor(1)])
    u_0, v_0, u_1, v_1 = (int(word) for word in words)
    expected = []
    for u, v in ((u_0, v_0), (u_1, v_1)):
        radius, angle = math.sqrt(-2 * math.log((u + 0.5) / 2**32)), 2 * math.pi * v / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    found = normal_noise(torch.tensor([5 + 2**32]), torch.tensor([[7]]), 12)[0, 0, 8:]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=2e-6)


def test_noise_of_an_image_does_not_depend_on_its_batch_or_on_drawing_ahead(monkeypatch):
    seeds, shape = [3, 0, 2**64 - 1, -5, 2**63 - 1], (1, 3, 5)
    whole = SeededNoise(seeds)
    drawn = [whole.normal((5, *shape)) for _ in range(4)]
    monkeypatch.setattr("ddpm_hf.utils.randomness._NUMBERS_AT_ONCE", 1)
    later = SeededNoise(seeds[:2], drawn=[3, 1])  # an image joins a batch with what it has drawn before
    assert torch.equal(later.normal((2, *shape)), torch.stack([drawn[3][0], drawn[1][1]]))
    for row, seed in enumerate(seeds):
        alone = SeededNoise([seed])
        for noise in drawn:
            assert torch.equal(alone.normal((1, *shape))[0], noise[row])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(SeededNoise([2**64 - 1]).normal((1, 9)), SeededNoise([-1]).normal((1, 9)))  # the same 64 bits


def test_seeds_of_more_than_64_bits_and_another_count_of_images_are_refused():
    with pytest.raises(UserError, match="between -2\\^63 and 2\\^64 - 1, got 18446744073709551616"):
        SeededNoise([2**64])
    with pytest.raises(UserError, match="got 2 seeds for a batch of 3"):
        SeededNoise([0, 1]).normal((3, 4))
