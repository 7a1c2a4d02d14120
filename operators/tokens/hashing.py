"""xxHash64 of whole Arrow string columns: the seeded draws by document id (hold-out, samples) without a loop over rows.

Source: Y. Collet, "XXH64 algorithm description", xxHash specification, section "XXH64". Equal to `xxhash.xxh64_intdigest`.
"""

from __future__ import annotations

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(value)
    for value in (
        11400714785074694791,
        14029467366897019727,
        1609587929392839161,
        9650029242287828579,
        2870177450012600261,
    )
)


def hash_strings(values: pa.Array | pa.ChunkedArray, seed: int = 0) -> np.ndarray:
    """uint64[rows]: xxHash64 of each string's UTF-8 bytes. `seed` is taken modulo 2**64; a null hashes as the empty string."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    column = pc.fill_null(values.cast(pa.large_string()), "")
    _, offset_buffer, data_buffer = column.buffers()
    rows = len(column)
    if rows == 0:
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64, rows + 1, column.offset * 8)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None and data_buffer.size else np.zeros(1, np.uint8)
    return _hash_rows(data, offsets, np.uint64(seed % 2**64))


@numba.njit(cache=True, nogil=True)
def _hash_rows(data: np.ndarray, offsets: np.ndarray, seed: np.uint64) -> np.ndarray:
    result = np.empty(len(offsets) - 1, np.uint64)
    for row in range(len(result)):
        result[row] = _xxh64(data, offsets[row], offsets[row + 1], seed)
    return result


@numba.njit(cache=True, nogil=True, inline="always")
def _rotate(value: np.uint64, bits: int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True, nogil=True, inline="always")
def _word(data: np.ndarray, position: int, width: int) -> np.uint64:
    """`width` bytes, little endian."""
    value = np.uint64(0)
    for index in range(width):
        value |= np.uint64(data[position + index]) << np.uint64(8 * index)
    return value


@numba.njit(cache=True, nogil=True, inline="always")
def _round(accumulator: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotate(accumulator + lane * _P2, 31) * _P1


@numba.njit(cache=True, nogil=True)
def _xxh64(data: np.ndarray, start: int, stop: int, seed: np.uint64) -> np.uint64:
    position = start
    if stop - start >= 32:
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while position + 32 <= stop:
            a = _round(a, _word(data, position, 8))
            b = _round(b, _word(data, position + 8, 8))
            c = _round(c, _word(data, position + 16, 8))
            d = _round(d, _word(data, position + 24, 8))
            position += 32
        value = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        for lane in (a, b, c, d):
            value = (value ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        value = seed + _P5
    value += np.uint64(stop - start)
    while position + 8 <= stop:
        value = _rotate(value ^ _round(np.uint64(0), _word(data, position, 8)), 27) * _P1 + _P4
        position += 8
    if position + 4 <= stop:
        value = _rotate(value ^ (_word(data, position, 4) * _P1), 23) * _P2 + _P3
        position += 4
    while position < stop:
        value = _rotate(value ^ (np.uint64(data[position]) * _P5), 11) * _P1
        position += 1
    value = (value ^ (value >> np.uint64(33))) * _P2
    value = (value ^ (value >> np.uint64(29))) * _P3
    return value ^ (value >> np.uint64(32))
