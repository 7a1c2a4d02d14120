"""MinHash signatures of whole Arrow columns, without Python per document.

A shingle is a run of `n` tokens (see `normalise`): words for spaced text, characters for text of unspaced scripts. A
document with fewer than `n` tokens has no shingle, hence no signature, and is never a near-duplicate (the definition of
the peers; exact dedup still sees it).

The permutations are those of datasketch 2 (`scheme="affine32"`): h -> a * fmix32(h) + b mod 2^32, a odd, drawn from
`RandomState(seed)`. Two shingle hashes are offered: `fast`, a 64-bit polynomial over hashed tokens (see `tokens`), folded to
32 bits; and `datasketch`, SHA-1 of the shingle's UTF-8 (words joined by a space), with which a signature is bit-equal to
`datasketch.MinHash(k, seed)` updated with those shingles. A `fast` signature, too, is a valid `datasketch.MinHash`: the
one whose `hashfunc` is `reference.shingle_hash32`.

Broder, On the resemblance and containment of documents, 1997.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.dedup.normalise import (
    AUTO,
    CHARACTERS,
    WORDS,
    code_table,
    compose,
    is_unspaced,
    normalise_row,
)
from operators.dedup.sha1 import sha1_prefix32
from operators.dedup.tokens import SCRATCH_BYTES, STATE, WINDOW_BYTES, WINDOW_TOKENS, ascii_bytes, hash_tokens

_BLOCK = 512  # shingle hashes gathered before the permutations run over them: 2 KiB, beside 16 KiB of a 32 KiB cache
_SHINGLE_MIX = np.uint64(0xFF51AFD7ED558CCD)
_ROLL = np.uint64(0xD6E8FEB86659FD93)
_SHIFT32 = np.uint64(32)
_LOW32 = np.uint64(0xFFFFFFFF)
_EMPTY = np.uint32(0xFFFFFFFF)

UNSPACED_LANGUAGES = ("zh", "ja", "lzh", "yue", "wuu", "cmn", "th", "lo", "my", "km", "bo")


@dataclass(frozen=True)
class Signatures:
    """`values` uint32[rows, permutations]; `signed` bool[rows], False where the document has no shingle."""

    values: np.ndarray
    signed: np.ndarray


@functools.cache
def permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) uint32[count] of datasketch's affine32 scheme: `datasketch.MinHash(count, seed).permutations`."""
    generator = np.random.RandomState(seed)
    a = generator.randint(0, 1 << 31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, generator.randint(0, 1 << 32, count, dtype=np.uint32)


def units_of(langs: pa.Array | pa.ChunkedArray | None, rows: int, unit: int) -> np.ndarray:
    """int8[rows] of WORDS/CHARACTERS/AUTO: by language tag where there is one, else `unit`."""
    if langs is None:
        return np.full(rows, unit, np.int8)
    primary = pc.utf8_lower(pc.list_element(pc.split_pattern_regex(pc.fill_null(langs.cast(pa.string()), ""), "[-_]"), 0))
    by_character = pc.is_in(primary, value_set=pa.array(UNSPACED_LANGUAGES)).to_numpy(zero_copy_only=False)
    unknown = pc.is_in(primary, value_set=pa.array(["", "und", "unknown"])).to_numpy(zero_copy_only=False)
    return np.where(unknown, unit, np.where(by_character, CHARACTERS, WORDS)).astype(np.int8)


def sign(
    texts: pa.Array | pa.ChunkedArray,
    count: int = 112,
    seed: int = 1,
    words: int = 5,
    characters: int = 5,
    unit: int = AUTO,
    langs: pa.Array | pa.ChunkedArray | None = None,
    keep_digits: bool = False,
    hashing: str = "fast",
    table: np.ndarray | None = None,
) -> Signatures:
    """Sign every text of a column. `hashing` is `fast` or `datasketch` (see the module); raises ValueError for another.

    `table` is another code table than `normalise.code_table()` (see `definitions`); units must then be decided.
    """
    if hashing not in ("fast", "datasketch"):
        raise ValueError(f"unknown shingle hash {hashing!r}: it is 'fast' or 'datasketch'")
    table = code_table() if table is None else table
    data, offsets = compose(texts, table)
    rows = len(offsets) - 1
    values = np.full((rows, count), _EMPTY, np.uint32)
    signed = np.zeros(rows, np.bool_)
    a, b = permutations(count, seed)
    kernel = _sign_fast if hashing == "fast" else _sign_sha1
    plain = ascii_bytes(table, keep_digits)
    kernel(data, offsets, table, plain, units_of(langs, rows, unit), words, characters, keep_digits, a, b, values, signed)
    return Signatures(values, signed)


@nb.njit(inline="always")
def _fmix32(h: np.uint32) -> np.uint32:
    """The finaliser of MurmurHash3, as datasketch applies it before the permutations."""
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x85EBCA6B))
    h = np.uint32(h ^ (h >> np.uint32(13)))
    h = np.uint32(h * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@nb.njit(inline="always")
def _finish_shingle(h: np.uint64) -> np.uint64:
    h = (h ^ (h >> _SHIFT32)) * _SHINGLE_MIX
    return h ^ (h >> _SHIFT32)


@nb.njit(cache=True, nogil=True)
def _permute(block: np.ndarray, filled: int, a: np.ndarray, b: np.ndarray, minima: np.ndarray) -> None:
    """minima[j] = min(minima[j], a[j] * block[i] + b[j]) over i < filled.

    Eight hashes a pass, so that a vector of minima is loaded and stored once for eight multiplications; the block is
    padded to a multiple of eight by repeating its first hash, which no minimum notices.
    """
    while filled % 8:
        block[filled] = block[0]
        filled += 1
    for i in range(0, filled, 8):
        h0, h1, h2, h3 = block[i], block[i + 1], block[i + 2], block[i + 3]
        h4, h5, h6, h7 = block[i + 4], block[i + 5], block[i + 6], block[i + 7]
        for j in range(len(a)):
            x, y, least = a[j], b[j], minima[j]
            least = min(least, np.uint32(x * h0 + y))
            least = min(least, np.uint32(x * h1 + y))
            least = min(least, np.uint32(x * h2 + y))
            least = min(least, np.uint32(x * h3 + y))
            least = min(least, np.uint32(x * h4 + y))
            least = min(least, np.uint32(x * h5 + y))
            least = min(least, np.uint32(x * h6 + y))
            least = min(least, np.uint32(x * h7 + y))
            minima[j] = least


@nb.njit(cache=True, nogil=True)
def _combine(tokens: np.ndarray, count: int, n: int, out: np.ndarray) -> None:
    """out[i] = the 64-bit hash of the shingle of `n` tokens that starts at tokens[i]: a polynomial, then an avalanche."""
    if n == 5:  # in registers
        for i in range(count):
            h = (tokens[i] * _ROLL + tokens[i + 1]) * _ROLL + tokens[i + 2]
            out[i] = _finish_shingle((h * _ROLL + tokens[i + 3]) * _ROLL + tokens[i + 4])
        return
    for i in range(count):
        out[i] = tokens[i]
    for j in range(1, n):
        for i in range(count):
            out[i] = out[i] * _ROLL + tokens[i + j]
    for i in range(count):
        out[i] = _finish_shingle(out[i])


@nb.njit(cache=True, nogil=True)
def _sign_fast(
    data: np.ndarray, offsets: np.ndarray, table: np.ndarray, plain: np.ndarray, units: np.ndarray, words: int, characters: int,
    keep_digits: bool, a: np.ndarray, b: np.ndarray, values: np.ndarray, signed: np.ndarray,
) -> None:  # fmt: skip
    room = WINDOW_TOKENS + max(words, characters)
    tokens, hashes, block = np.empty(room, np.uint64), np.empty(room, np.uint64), np.empty(room + 8, np.uint32)
    state, scratch, classes = np.zeros(STATE, np.uint64), np.empty(SCRATCH_BYTES, np.uint8), np.empty(WINDOW_BYTES + 8, np.uint8)
    for row in range(len(offsets) - 1):
        position, end = offsets[row], offsets[row + 1]
        by_character = units[row] == CHARACTERS or (units[row] == AUTO and is_unspaced(data, position, end, table))
        n = characters if by_character else words
        carried, state[:] = 0, 0
        while position < end:
            position, filled = hash_tokens(
                data, position, end, plain, table, by_character, keep_digits, state, scratch, classes, tokens, carried
            )
            count = filled - n + 1
            if count <= 0:
                carried = filled
                continue
            _combine(tokens, count, n, hashes)
            for i in range(count):
                block[i] = _fmix32(np.uint32(hashes[i] & _LOW32))
            _permute(block, count, a, b, values[row])
            signed[row] = True
            carried = n - 1
            for i in range(carried):
                tokens[i] = tokens[count + i]


@nb.njit(cache=True, nogil=True)
def _collect(
    data: np.ndarray, offsets: np.ndarray, table: np.ndarray, plain: np.ndarray, units: np.ndarray, words: int, characters: int,
    keep_digits: bool, counts: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """The shingle hashes of every row, one after another, in `out`; with an empty `out` only `counts` (int64[rows])."""
    tokens = np.empty(WINDOW_TOKENS + max(words, characters), np.uint64)
    state, scratch, classes = np.zeros(STATE, np.uint64), np.empty(SCRATCH_BYTES, np.uint8), np.empty(WINDOW_BYTES + 8, np.uint8)
    written = 0
    for row in range(len(offsets) - 1):
        position, end = offsets[row], offsets[row + 1]
        by_character = units[row] == CHARACTERS or (units[row] == AUTO and is_unspaced(data, position, end, table))
        n = characters if by_character else words
        carried, total, state[:] = 0, 0, 0
        while position < end:
            position, filled = hash_tokens(
                data, position, end, plain, table, by_character, keep_digits, state, scratch, classes, tokens, carried
            )
            count = max(filled - n + 1, 0)
            if len(out):
                _combine(tokens, count, n, out[written + total :])
            total += count
            carried = min(filled, n - 1)
            for i in range(carried):
                tokens[i] = tokens[filled - carried + i]
        counts[row] = total
        written += total


def shingle_sets(
    texts: pa.Array | pa.ChunkedArray,
    words: int = 5,
    characters: int = 5,
    unit: int = AUTO,
    langs: pa.Array | pa.ChunkedArray | None = None,
    keep_digits: bool = False,
    table: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The set of 64-bit shingle hashes of each text, sorted: (hashes uint64, offsets int64[rows + 1]). `table` as in `sign`."""
    table = code_table() if table is None else table
    data, offsets = compose(texts, table)
    rows = len(offsets) - 1
    counts, units = np.zeros(rows, np.int64), units_of(langs, rows, unit)
    plain = ascii_bytes(table, keep_digits)
    _collect(data, offsets, table, plain, units, words, characters, keep_digits, counts, np.empty(0, np.uint64))
    hashes = np.empty(int(counts.sum()), np.uint64)
    if len(hashes):
        _collect(data, offsets, table, plain, units, words, characters, keep_digits, counts, hashes)
    return _unique_rows(hashes, counts)


def repeated_share(texts: pa.Array | pa.ChunkedArray, words: int = 5, characters: int = 5) -> np.ndarray:
    """float64[rows]: the share of each text's shingles (digits kept) that occurred before in it; 0 where it has none."""
    data, offsets = compose(texts, code_table())
    rows = len(offsets) - 1
    table, counts, units = code_table(), np.zeros(rows, np.int64), units_of(None, rows, AUTO)
    _collect(data, offsets, table, ascii_bytes(table, True), units, words, characters, True, counts, np.empty(0, np.uint64))
    distinct = np.diff(shingle_sets(texts, words, characters, keep_digits=True)[1])
    return 1 - np.where(counts > 0, distinct / np.maximum(counts, 1), 1.0)


@nb.njit(cache=True, nogil=True)
def _unique_rows(hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    read = written = 0
    for row in range(len(counts)):
        ordered = np.sort(hashes[read : read + counts[row]])
        read += counts[row]
        for i in range(len(ordered)):
            if i == 0 or ordered[i] != ordered[i - 1]:
                hashes[written] = ordered[i]
                written += 1
        offsets[row + 1] = written
    return hashes[:written].copy(), offsets


@nb.njit(cache=True, nogil=True)
def _sign_sha1(
    data: np.ndarray, offsets: np.ndarray, table: np.ndarray, _plain: np.ndarray, units: np.ndarray, words: int, characters: int,
    keep_digits: bool, a: np.ndarray, b: np.ndarray, values: np.ndarray, signed: np.ndarray,
) -> None:  # fmt: skip
    """As `_sign_fast` with SHA-1 of the shingle's bytes; holds one normalised text at a time."""
    block = np.empty(_BLOCK + 8, np.uint32)
    for row in range(len(offsets) - 1):
        start, end = offsets[row], offsets[row + 1]
        by_character = units[row] == CHARACTERS or (units[row] == AUTO and is_unspaced(data, start, end, table))
        n = characters if by_character else words
        codes, starts = np.empty(end - start, np.uint32), np.empty(end - start, np.int64)
        unit = CHARACTERS if by_character else WORDS
        n_codes, n_tokens = normalise_row(data, start, end, table, unit, keep_digits, codes, starts)
        if n_tokens < n:
            continue
        text = np.empty(4 * n_codes + n_tokens, np.uint8)
        ends, written, token = np.empty(n_tokens, np.int64), 0, 0
        for i in range(n_codes):
            if token < n_tokens and i == starts[token]:
                if token:
                    ends[token - 1] = written
                    if not by_character:
                        text[written] = 32
                        written += 1
                starts[token] = written
                token += 1
            written = _encode(codes[i], text, written)
        ends[n_tokens - 1] = written
        filled = 0
        for i in range(n_tokens - n + 1):
            block[filled] = _fmix32(sha1_prefix32(text, starts[i], ends[i + n - 1]))
            filled += 1
            if filled == _BLOCK:
                _permute(block, filled, a, b, values[row])
                filled = 0
        if filled:
            _permute(block, filled, a, b, values[row])
        signed[row] = True


@nb.njit(inline="always")
def _encode(code: np.uint32, out: np.ndarray, at: int) -> int:
    """Write one code point as UTF-8; the position after it."""
    if code < 0x80:
        out[at] = code
        return at + 1
    if code < 0x800:
        out[at] = 0xC0 | (code >> 6)
        out[at + 1] = 0x80 | (code & 0x3F)
        return at + 2
    if code < 0x10000:
        out[at] = 0xE0 | (code >> 12)
        out[at + 1] = 0x80 | ((code >> 6) & 0x3F)
        out[at + 2] = 0x80 | (code & 0x3F)
        return at + 3
    out[at] = 0xF0 | (code >> 18)
    out[at + 1] = 0x80 | ((code >> 12) & 0x3F)
    out[at + 2] = 0x80 | ((code >> 6) & 0x3F)
    out[at + 3] = 0x80 | (code & 0x3F)
    return at + 4
