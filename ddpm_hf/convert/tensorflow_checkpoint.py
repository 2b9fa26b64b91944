"""Read TensorFlow checkpoints (`.index` and `.data` files, TensorFlow's tensor_bundle) without TensorFlow.

The index is a table of LevelDB's format: sorted keys, each stored as its difference from the one before. Key "" holds
a `BundleHeaderProto`, the name of each variable a `BundleEntryProto`, which says where in the data its bytes lie.
Sums of CRC-32C guard every block and every variable.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # bytes: two handles, padding, magic number
# Of tensorflow/core/framework/types.proto.
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed


class Damaged(ValueError):
    """The files are no TensorFlow checkpoint, or are damaged."""


class Variable(NamedTuple):
    """Where a variable lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def read_index(path: Path) -> tuple[int, dict[str, Variable]]:
    """Return the number of data files and the variables of a checkpoint, given without its ending.

    Raises:
        Damaged: The index is no table of variables.
        OSError: It cannot be read.
    """
    table = Path(f"{path}.index").read_bytes()
    try:
        if len(table) < _FOOTER or struct.unpack("<Q", table[-8:])[0] != _MAGIC:
            raise Damaged("the index does not end as a table does")
        _, _, position = _handle(table, len(table) - _FOOTER)  # of the metadata
        offset, size, _ = _handle(table, position)
        blocks = [_handle(value, 0)[:2] for _, value in _entries(_block(table, offset, size))]
        entries = {key.decode(): _fields(value) for where in blocks for key, value in _entries(_block(table, *where))}
        header = entries.pop("")
        if header.get(2, [0])[0] != 0:
            raise Damaged("its numbers are big-endian")
        return header[1][0], {name: _variable(fields) for name, fields in entries.items()}
    except Damaged:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise Damaged("the index cannot be decoded") from error


def read_variables(path: Path, index: tuple[int, Mapping[str, Variable]], names: Collection[str]) -> dict[str, Any]:
    """Return these variables of a checkpoint as arrays, each checked against its sum.

    Raises:
        Damaged: A variable is of an unknown kind, is not there whole, or has other bytes than were written.
        OSError: A file cannot be read.
    """
    shards, variables = index
    used = {variables[name].shard for name in names}
    data = {k: np.fromfile(f"{path}.data-{k:05d}-of-{shards:05d}", np.uint8) for k in used}
    arrays = {}
    for name in names:
        at = variables[name]
        if at.dtype not in _DTYPES or at.sliced:
            what = "stored in slices" if at.sliced else f"of type {at.dtype}, which is no number"
            raise Damaged(f"{name} is {what}")
        content = data[at.shard][at.offset : at.offset + at.size]
        dtype = np.dtype(_DTYPES[at.dtype])
        if len(content) != at.size or at.size != dtype.itemsize * int(np.prod(at.shape)):
            raise Damaged(f"{name} is not there whole")
        if _masked(crc32c(content)) != at.crc:
            raise Damaged(f"the bytes of {name} are not those that were written")
        arrays[name] = content.view(dtype).reshape(at.shape)
    return arrays


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that a folder's file `checkpoint` names as the newest one, without its ending."""
    state = folder / "checkpoint"
    named = re.match(r'model_checkpoint_path: "(.+)"', state.read_text()) if state.is_file() else None
    return None if named is None else folder / Path(named[1])


# ---------------------------------------------------------------------- tables


def _block(table: bytes, offset: int, size: int) -> bytes:
    kind, crc = struct.unpack("<BI", table[offset + size : offset + size + 5])
    if kind != 0:
        raise Damaged("the index is compressed")
    if _masked(crc32c(np.frombuffer(table, np.uint8, size + 1, offset))) != crc:
        raise Damaged("the bytes of the index are not those that were written")
    return table[offset : offset + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a block, which ends with the positions of whole keys and their number."""
    end, position, key = len(block) - 4 * (1 + struct.unpack("<I", block[-4:])[0]), 0, b""
    while position < end:
        shared, position = _varint(block, position)
        more, position = _varint(block, position)
        size, position = _varint(block, position)
        key = key[:shared] + block[position : position + more]
        yield key, block[position + more : position + more + size]
        position += more + size


def _handle(data: bytes, position: int) -> tuple[int, int, int]:
    """Return where a block lies, its size, and the position after both."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return offset, size, position


# ---------------------------------------------------------------------- protocol buffers


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a number of 7 bits per byte, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Return a message's fields by number: whole numbers, and bytes of what has a length."""
    fields: dict[int, list[Any]] = {}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        value: Any
        if tag & 7 == 0:
            value, position = _varint(data, position)
        elif tag & 7 == 2:
            size, position = _varint(data, position)
            value, position = data[position : position + size], position + size
        elif tag & 7 == 5:
            value, position = struct.unpack("<I", data[position : position + 4])[0], position + 4
        else:
            raise Damaged(f"the index has a field of wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _variable(fields: dict[int, list[Any]]) -> Variable:
    """Return a `BundleEntryProto`: 1 dtype, 2 shape (2 dimensions, of these 1 size), 3 shard, 4 offset, 5 size, ..."""
    shape = _fields(fields.get(2, [b""])[0]).get(2, [])
    dtype, shard, offset, size, crc = (fields.get(number, [0])[0] for number in (1, 3, 4, 5, 6))
    sizes = tuple(_fields(dimension).get(1, [0])[0] for dimension in shape)
    return Variable(dtype, sizes, shard, offset, size, crc, sliced=7 in fields)


# ---------------------------------------------------------------------- CRC-32C


def _table() -> np.ndarray:
    """Return the sum's change by a byte, `[256]`."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


_TABLE = _table()
# Sums begin with 32 bits of 1, which is where these bytes lead from 0.
_START = np.frombuffer(bytes.fromhex("54641f64"), np.uint8)


def crc32c(data: np.ndarray) -> int:
    """Return the CRC-32C of bytes (RFC 3720, appendix B.4), `[N]` uint8.

    Lanes of equal length are summed side by side, as a sum is linear over bits: that of two lanes is the sum of the
    first one, continued through as many zeros as the second one has bytes, plus (xor) the sum of the second one.
    """
    whole = np.concatenate([_START, data])
    lane = 1 << whole.size.bit_length() // 2  # bytes, a power of 2 near the root of N
    lanes = -(-whole.size // lane)
    whole = np.concatenate([np.zeros(lanes * lane - whole.size, np.uint8), whole])  # a sum of 0 stays 0
    sums = np.zeros(lanes, np.uint32)
    for column in np.ascontiguousarray(whole.reshape(lanes, lane).T):
        sums = _next(sums, column)
    over = _next(1 << np.arange(32, dtype=np.uint32), np.zeros(1, np.uint8))  # [32]: each bit, after a byte of 0
    for _ in range(lane.bit_length() - 1):
        over = _through(over, over)  # twice as many zeros
    while len(sums) > 1:
        sums = np.concatenate([np.zeros(len(sums) % 2, np.uint32), sums])
        sums, over = _through(sums[0::2], over) ^ sums[1::2], _through(over, over)
    return int(sums[0]) ^ 0xFFFFFFFF


def _next(sums: np.ndarray, byte: np.ndarray) -> np.ndarray:
    return _TABLE[(sums ^ byte) & 255] ^ sums >> 8


def _through(sums: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Return sums `[N]` after the zeros that `over`, `[32]`, stands for."""
    made = np.zeros_like(sums)
    for bit in range(32):
        made ^= (sums >> bit & 1) * over[bit]
    return made


def _masked(crc: int) -> int:
    """Return a sum as it is stored: LevelDB keeps it rotated by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
