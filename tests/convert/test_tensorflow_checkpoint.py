"""TensorFlow itself wrote the checkpoints that are read here without it; CRC-32C has the values of RFC 3720."""

import numpy as np
import pytest
from official_writer import write_checkpoint

from ddpm_hf.convert import readers
from ddpm_hf.convert.tensorflow_checkpoint import Damaged, crc32c, read_index, read_variables
from ddpm_hf.utils.errors import UserError


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_has_the_published_values(data, expected):
    assert crc32c(np.frombuffer(data, np.uint8)) == expected


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    # Long common beginnings of names, more names than a block of the index holds, every type, empty and single values.
    many = {f"model/up_1/block_{i}/conv/W": rng.normal(size=(3, i % 4, 5)).astype(np.float32) for i in range(700)}
    types = {f"types/{t}": rng.integers(0, 100, (2, 3)).astype(t) for t in ("f4", "f8", "f2", "i4", "i8")}
    return {**many, **types, "global_step": np.int64(7), "large": rng.normal(size=(513, 1027)).astype(np.float32)}


def test_variables_are_those_that_tensorflow_wrote(tmp_path, variables):
    prefix = write_checkpoint(tmp_path / "model.ckpt-7", variables)
    index = read_index(prefix)
    assert set(index[1]) == set(variables)
    for name, array in read_variables(prefix, index, list(variables)).items():
        assert array.dtype == variables[name].dtype
        np.testing.assert_array_equal(array, variables[name])


def test_every_changed_byte_is_found(tmp_path):
    prefix = write_checkpoint(tmp_path / "x", {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 2), np.float32)})

    def read():
        index = read_index(prefix)
        return read_variables(prefix, index, list(index[1]))

    whole = read()
    found_out = 0
    for file in (tmp_path / "x.index", tmp_path / "x.data-00000-of-00001"):
        content = file.read_bytes()
        for position in range(len(content)):
            file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            try:
                found = read()
            except (Damaged, OSError):
                found_out += 1
                continue
            assert file.suffix == ".index"  # where a table of metadata, which holds nothing, and padding are not read
            assert all(np.array_equal(found[name], whole[name]) for name in whole)
        file.write_bytes(content)
    assert found_out > 100


def test_what_is_no_number_is_named(tmp_path):
    write_checkpoint(tmp_path / "x", {"model/conv_in/b/ExponentialMovingAverage": np.array([b"text"])})
    with pytest.raises(UserError, match=r"model/conv_in/b/.* is of type 7, which is no number"):
        readers.read_official_tf(tmp_path / "x", ema=True)
