"""The plain back end: the same signatures made by datasketch, one document at a time. Slow; a reference and a choice.

Also the way out to datasketch and back: signatures as LeanMinHash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from operators.dedup.normalise import AUTO, CHARACTERS, WORDS, code_table, compose, is_unspaced, normalised_tokens
from operators.dedup.signatures import Signatures, units_of

if TYPE_CHECKING:
    import datasketch

_MASK = (1 << 64) - 1
_SCHEME = "affine32"  # datasketch's default permutations since version 2


def token_hash(token: bytes) -> int:
    """The 64-bit hash of a token's UTF-8 (see `tokens`)."""
    h = 0x9E3779B97F4A7C15
    padded = token + b"\0" * (16 - len(token) % 16)
    for at in range(0, len(padded), 16):
        x, y = (int.from_bytes(padded[i : i + 8], "little") for i in (at, at + 8))
        h = ((h ^ x) * 0x2127599BF4325C37) & _MASK
        h = ((h ^ (h >> 32) ^ y) * 0x880355F21E6D1965) & _MASK
        h ^= h >> 32
    h = (h * 0xFF51AFD7ED558CCD) & _MASK
    return h ^ (h >> 29)


def shingle_hash32(shingle: bytes) -> int:
    """The `hashfunc` with which datasketch makes `fast` signatures. `shingle`: token bytes, each ended by a 0xFF byte."""
    combined = None
    for token in shingle.split(b"\xff")[:-1]:
        h = token_hash(token)
        combined = h if combined is None else (combined * 0xD6E8FEB86659FD93 + h) & _MASK
    if combined is None:
        raise ValueError("a shingle has at least one token ended by 0xFF")
    combined = ((combined ^ (combined >> 32)) * 0xFF51AFD7ED558CCD) & _MASK
    return (combined ^ (combined >> 32)) & 0xFFFFFFFF


def shingles(
    text: str, words: int = 5, characters: int = 5, unit: int = AUTO, keep_digits: bool = False, table: np.ndarray | None = None
) -> list[tuple[str, ...]]:
    """The shingles of a text in order, each a tuple of its tokens."""
    unit = resolve_unit(text, unit)
    tokens, n = normalised_tokens(text, unit, keep_digits, table), characters if unit == CHARACTERS else words
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def resolve_unit(text: str, unit: int = AUTO) -> int:
    """WORDS or CHARACTERS, deciding AUTO by the scripts of the text."""
    if unit != AUTO:
        return unit
    data, offsets = compose(pa.array([text], pa.large_string()))
    return CHARACTERS if is_unspaced(data, 0, int(offsets[1]), code_table()) else WORDS


def sign_with_datasketch(
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
    """What `signatures.sign` returns, computed by `datasketch.MinHash`."""
    import datasketch  # brings scipy: only for those who choose this back end

    units = units_of(langs, len(texts), unit)
    values, signed = np.full((len(texts), count), 0xFFFFFFFF, np.uint32), np.zeros(len(texts), np.bool_)
    empty = datasketch.MinHash(count, seed)
    for row, text in enumerate(texts.to_pylist()):
        resolved = resolve_unit(text or "", int(units[row]))
        found = shingles(text or "", words, characters, resolved, keep_digits, table)
        if not found:
            continue
        if hashing == "fast":
            encoded = [b"".join(token.encode() + b"\xff" for token in shingle) for shingle in found]
            minhash = datasketch.MinHash(count, seed, hashfunc=shingle_hash32, permutations=empty.permutations, scheme=empty.scheme)
        else:
            encoded = [("" if resolved == CHARACTERS else " ").join(shingle).encode() for shingle in found]
            minhash = datasketch.MinHash(count, seed, permutations=empty.permutations, scheme=empty.scheme)
        minhash.update_batch(encoded)
        values[row], signed[row] = minhash.hashvalues, True
    return Signatures(values, signed)


def to_lean(signatures: Signatures, seed: int = 1) -> list[datasketch.LeanMinHash | None]:
    """Each signature as a `datasketch.LeanMinHash`, None for a document without shingles. `seed` is the one they were made with.

    With `signature: datasketch` they equal those that `datasketch.MinHash(k, seed)` makes; with `fast` they compare with each
    other, and with MinHashes whose `hashfunc` is `shingle_hash32`.
    """
    import datasketch

    rows = zip(signatures.values, signatures.signed.tolist(), strict=True)
    return [datasketch.LeanMinHash(seed=seed, hashvalues=row, scheme=_SCHEME) if signed else None for row, signed in rows]


def from_lean(minhashes: Sequence[datasketch.MinHash | None], count: int, seed: int = 1) -> Signatures:
    """The signatures of MinHashes (lean or not) of `count` permutations; None becomes an unsigned row.

    Raises ValueError, naming the row, for another number of permutations, seed or permutation scheme.
    """
    values, signed = np.full((len(minhashes), count), 0xFFFFFFFF, np.uint32), np.zeros(len(minhashes), np.bool_)
    for row, minhash in enumerate(minhashes):
        if minhash is None:
            continue
        found = (len(minhash), minhash.seed, minhash.scheme)
        if found != (count, seed, _SCHEME):
            told = "MinHash {} has {} permutations, seed {} and scheme {!r}".format(row, *found)
            raise ValueError(f"{told}; expected {count}, {seed} and {_SCHEME!r}")
        values[row], signed[row] = minhash.hashvalues, True
    return Signatures(values, signed)
