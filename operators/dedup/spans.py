"""Lines and paragraphs of a text, and 128-bit hashes of what they say.

A line ends at a line feed. A paragraph is a run of lines that are not blank; the blank lines after it belong to it. What a
piece says is compared as CCNet does (Wenzek et al. 2020, arXiv:1911.00359, section 3.1): lower case, no accents and
punctuation, numbers as 0 (see `normalise`), with one space between words and none beside characters of unspaced
scripts; or byte by byte without the white space at its ends. The hash is no cryptographic one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba as nb
import numpy as np
import pyarrow as pa

from operators.dedup.exact import murmur3_128
from operators.dedup.normalise import CODE, DIGIT, DROPPED, SEPARATOR, UNSPACED, code_table, decode, text_buffers

LINE, PARAGRAPH = 0, 1
_SPACE = np.uint32(32)
_A, _B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a batch that are long enough, in order. Bytes count from the start of their text."""

    rows: np.ndarray  # int64
    starts: np.ndarray  # int64, first byte that is cut with the piece
    ends: np.ndarray  # int64, after its separator
    hashes: np.ndarray  # uint64[pieces, 2]


def find_pieces(
    texts: pa.Array | pa.ChunkedArray, unit: int, min_characters: int, folded: bool = True, keep_digits: bool = False
) -> Pieces:
    """The lines or paragraphs with at least `min_characters` normalised characters; one of an unspaced script counts as two.

    Memory: 40 bytes a piece, and a piece has at least `min_characters` bytes.
    """
    data, offsets = text_buffers(texts)
    capacity = _count_lines(data, offsets)
    if min_characters > 1:
        capacity = min(capacity, int(offsets[-1] - offsets[0]) // min_characters + 1)
    places, hashes = np.empty((3, capacity), np.int64), np.empty((capacity, 2), np.uint64)
    found = _find(data, offsets, code_table(), unit, min_characters, folded, keep_digits, places, hashes)
    return Pieces(places[0, :found], places[1, :found], places[2, :found], hashes[:found])


@nb.njit(cache=True, nogil=True)
def _count_lines(data: np.ndarray, offsets: np.ndarray) -> int:
    count = len(offsets) - 1
    for position in range(offsets[0], offsets[-1]):
        count += data[position] == 10
    return count


@nb.njit(inline="always")
def _turn(h: np.uint64, bits: int) -> np.uint64:
    return (h << np.uint64(bits)) | (h >> np.uint64(64 - bits))


@nb.njit(inline="always")
def _mix(h: np.uint64) -> np.uint64:
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@nb.njit(cache=True, nogil=True)
def _says(data: np.ndarray, start: int, end: int, table: np.ndarray, keep_digits: bool) -> tuple[np.uint64, np.uint64, int]:
    """Two 64-bit hashes of the normalised text of data[start:end], and its weight in characters."""
    first, second, weight = _A, _B, 0
    after_digit, space, spaced = False, False, False
    position = start
    while position < end:
        byte = data[position]
        if byte < 0x80:
            entry = table[byte]
            position += 1
        else:
            point, width = decode(data, position)
            entry = table[point]
            position += width
        if entry == DROPPED:
            continue
        if entry == SEPARATOR:
            space, after_digit = True, False
            continue
        code = entry & CODE
        if (entry & DIGIT) != 0 and not keep_digits:
            if after_digit and not space:
                continue
            code, after_digit = np.uint32(48), True
        else:
            after_digit = False
        alone = (entry & UNSPACED) != 0
        if space and spaced and not alone:
            first = _turn((first ^ np.uint64(_SPACE)) * _A, 29)
            second = _turn((second + np.uint64(_SPACE)) * _B, 31)
        first = _turn((first ^ np.uint64(code)) * _A, 29)
        second = _turn((second + np.uint64(code)) * _B, 31)
        weight += 2 if alone else 1
        space, spaced = False, not alone
    return _mix(first), _mix(second), weight


@nb.njit(inline="always")
def _is_white(byte: int) -> bool:
    return byte == 32 or (byte >= 9 and byte <= 13)


@nb.njit(cache=True, nogil=True)
def _find(
    data: np.ndarray, offsets: np.ndarray, table: np.ndarray, unit: int, min_characters: int, folded: bool, keep_digits: bool,
    places: np.ndarray, hashes: np.ndarray,
) -> int:  # fmt: skip
    found = 0
    for row in range(len(offsets) - 1):
        begin, end = offsets[row], offsets[row + 1]
        start = begin
        while start < end:
            stop = start  # the end of the line
            while stop < end and data[stop] != 10:
                stop += 1
            after = min(stop + 1, end)
            if unit == PARAGRAPH:
                blank_from = -1
                line = start
                while line < end:  # line by line up to the first line after a blank one
                    blank, close = True, line
                    while close < end and data[close] != 10:
                        blank = blank and _is_white(data[close])
                        close += 1
                    if blank and blank_from < 0:
                        blank_from = line
                    if not blank and blank_from >= 0:
                        break
                    line = close + 1
                after = min(line, end)
                stop = blank_from if blank_from >= 0 else end
            left, right = start, stop
            while left < right and _is_white(data[left]):
                left += 1
            while left < right and _is_white(data[right - 1]):
                right -= 1
            if right - left >= min_characters and right > left:
                first, second, weight = _says(data, left, right, table, keep_digits)
                if weight >= min_characters and weight > 0:
                    if not folded:
                        first, second = murmur3_128(data, left, right)
                    cut = start
                    if after == end and (end == begin or data[end - 1] != 10):  # the last piece takes the separator before it
                        while cut > begin and (data[cut - 1] == 10 or (unit == PARAGRAPH and _is_white(data[cut - 1]))):
                            cut -= 1
                            if unit == LINE:
                                break
                    places[0, found], places[1, found], places[2, found] = row, cut - begin, after - begin
                    hashes[found, 0], hashes[found, 1] = first, second
                    found += 1
            start = after
    return found


@nb.njit(cache=True, nogil=True)
def without_ranges(
    data: np.ndarray, offsets: np.ndarray, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Copy the texts into `out` without ranges (bytes, sorted by row and start; they may overlap); new offsets int64."""
    new = np.zeros(len(offsets), np.int64)
    written, span = 0, 0
    for row in range(len(offsets) - 1):
        begin, position = offsets[row], offsets[row]
        while span < len(rows) and rows[span] == row:
            keep = begin + starts[span] - position
            if keep > 0:
                out[written : written + keep] = data[position : position + keep]
                written += keep
            position = max(position, begin + ends[span])
            span += 1
        keep = offsets[row + 1] - position
        out[written : written + keep] = data[position : position + keep]
        written += keep
        new[row + 1] = written
    return new
