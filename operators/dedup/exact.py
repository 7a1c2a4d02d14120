"""128-bit content hashes of a text column, for exact deduplication.

MurmurHash3_x64_128 (Austin Appleby, public domain): of 1e10 documents the chance that any two different ones meet is 1e-19.
It is no cryptographic hash: who may write documents on purpose could make two meet.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import pyarrow as pa

from operators.dedup.normalise import AUTO, code_table, compose, normalise_row, text_buffers
from operators.dedup.signatures import units_of

_C1, _C2 = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)


def content_hashes(
    texts: pa.Array | pa.ChunkedArray,
    normalised: bool = False,
    unit: int = AUTO,
    langs: pa.Array | pa.ChunkedArray | None = None,
    keep_digits: bool = False,
) -> np.ndarray:
    """uint64[rows, 2]: the hash of each text's UTF-8, or of its normalised tokens (see `normalise`).

    A text of which normalisation leaves nothing (empty, or only punctuation) is hashed as it is.
    """
    if not normalised:
        data, offsets = text_buffers(texts)
        return _hash_rows(data, offsets)
    data, offsets = compose(texts)
    return _hash_normalised(data, offsets, code_table(), units_of(langs, len(offsets) - 1, unit), keep_digits)


@nb.njit(inline="always")
def _rotate(x: np.uint64, bits: int) -> np.uint64:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@nb.njit(inline="always")
def _word(data: np.ndarray, at: int, count: int) -> np.uint64:
    """Up to eight bytes as a little-endian number."""
    word = np.uint64(0)
    for i in range(count):
        word |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return word


@nb.njit(inline="always")
def _fmix64(k: np.uint64) -> np.uint64:
    k = (k ^ (k >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    k = (k ^ (k >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return k ^ (k >> np.uint64(33))


@nb.njit(cache=True, nogil=True)
def murmur3_128(data: np.ndarray, start: int, end: int) -> tuple[np.uint64, np.uint64]:
    """MurmurHash3_x64_128 with seed 0 of data[start:end]."""
    h1, h2 = np.uint64(0), np.uint64(0)
    at = start
    while at + 16 <= end:
        h1 ^= _rotate(_word(data, at, 8) * _C1, 31) * _C2
        h1 = (_rotate(h1, 27) + h2) * np.uint64(5) + np.uint64(0x52DCE729)
        h2 ^= _rotate(_word(data, at + 8, 8) * _C2, 33) * _C1
        h2 = (_rotate(h2, 31) + h1) * np.uint64(5) + np.uint64(0x38495AB5)
        at += 16
    rest = end - at
    if rest > 8:
        h2 ^= _rotate(_word(data, at + 8, rest - 8) * _C2, 33) * _C1
    if rest > 0:
        h1 ^= _rotate(_word(data, at, min(rest, 8)) * _C1, 31) * _C2
    size = np.uint64(end - start)
    h1 ^= size
    h2 ^= size
    h1 += h2
    h2 += h1
    h1, h2 = _fmix64(h1), _fmix64(h2)
    h1 += h2
    h2 += h1
    return h1, h2


@nb.njit(cache=True, nogil=True)
def _hash_rows(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    out = np.empty((len(offsets) - 1, 2), np.uint64)
    for row in range(len(out)):
        out[row, 0], out[row, 1] = murmur3_128(data, offsets[row], offsets[row + 1])
    return out


@nb.njit(cache=True, nogil=True)
def _hash_normalised(data: np.ndarray, offsets: np.ndarray, table: np.ndarray, units: np.ndarray, keep_digits: bool) -> np.ndarray:
    out = np.empty((len(offsets) - 1, 2), np.uint64)
    for row in range(len(out)):
        start, end = offsets[row], offsets[row + 1]
        codes, tokens = np.empty(end - start, np.uint32), np.empty(end - start, np.int64)
        n_codes, n_tokens = normalise_row(data, start, end, table, units[row], keep_digits, codes, tokens)
        if n_codes == 0:
            out[row, 0], out[row, 1] = murmur3_128(data, start, end)
            continue
        joined = np.zeros(4 * (n_codes + n_tokens), np.uint8)  # code points as four bytes, a zero code after each token
        written, token = 0, 1
        for i in range(n_codes):
            if token < n_tokens and i == tokens[token]:
                written += 4
                token += 1
            for byte in range(4):
                joined[written + byte] = (codes[i] >> np.uint32(8 * byte)) & np.uint32(0xFF)
            written += 4
        out[row, 0], out[row, 1] = murmur3_128(joined, 0, written)
    return out
