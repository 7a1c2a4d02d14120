"""What counts as a shingle: `folded` (see `normalise`, the default) or `plain`, the textbook definition.

Plain: lower case; for words, the runs of letters, digits and underscores that Python's `\\w+` finds; for characters,
everything but whitespace. Punctuation therefore counts between characters, accents and digits are kept. It is the
definition of the labelled pairs that the S-curve is checked with, and of most published implementations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numba as nb
import numpy as np
import pyarrow as pa

from operators.dedup.normalise import AUTO, CHARACTERS, DIGIT, SEPARATOR, WORDS, code_table, is_unspaced, text_buffers
from operators.dedup.signatures import units_of

_NUL = 0x10FFFF  # stands for U+0000, whose own code would mean that the character is dropped


@functools.cache
def plain_table(unit: int) -> np.ndarray:
    """uint32[0x110000] in the form of `normalise.code_table`, for WORDS or CHARACTERS. Lower case by single code points."""
    table = np.empty(0x110000, np.uint32)
    for point in range(0x110000):
        character = chr(point)
        lowered = character.lower()
        code = ord(lowered) if len(lowered) == 1 else point
        outside = character.isspace() if unit == CHARACTERS else not (character.isalnum() or character == "_")
        if outside:
            code = int(SEPARATOR)
        table[point] = (code or _NUL) | (int(DIGIT) if character.isdecimal() else 0)
    return table


def resolve_units(texts: pa.Array | pa.ChunkedArray, langs: pa.Array | pa.ChunkedArray | None, unit: int) -> np.ndarray:
    """int8[rows] of WORDS or CHARACTERS, AUTO decided by the scripts of each text."""
    units = units_of(langs, len(texts), unit)
    if (units == AUTO).any():
        data, offsets = text_buffers(texts)
        units = np.where(units == AUTO, _by_script(data, offsets, code_table()), units).astype(np.int8)
    return units


@nb.njit(cache=True, nogil=True)
def _by_script(data: np.ndarray, offsets: np.ndarray, table: np.ndarray) -> np.ndarray:
    units = np.empty(len(offsets) - 1, np.int8)
    for row in range(len(units)):
        units[row] = CHARACTERS if is_unspaced(data, offsets[row], offsets[row + 1], table) else WORDS
    return units


def by_unit(
    texts: pa.Array | pa.ChunkedArray, langs: pa.Array | pa.ChunkedArray | None, unit: int
) -> Iterator[tuple[int, np.ndarray, pa.Array | pa.ChunkedArray]]:
    """(unit, its rows int64, their texts) for the units that occur."""
    units = resolve_units(texts, langs, unit)
    for each in (WORDS, CHARACTERS):
        rows = np.flatnonzero(units == each)
        if len(rows):
            yield each, rows, texts if len(rows) == len(units) else texts.take(pa.array(rows))
