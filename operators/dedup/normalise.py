"""What two near-duplicates are compared by: a text as normalised code points, cut into tokens.

Normalisation is a map of single code points, so that a kernel can do it while it decodes UTF-8: lower case; canonical
decomposition without nonspacing marks (é -> e); a run of decimal digits becomes one `0` (unless digits are kept);
punctuation, symbols, separators and control characters become one space; other format characters (soft hyphen, joiner) vanish. This
is the order of the FineWeb MinHash definition (datatrove, `simplify_text`), with final sigma folded and symbols
counted as punctuation. Code points that compose from several letters (Hangul, two-part Indic vowels) stay composed, and
a row with their loose pieces is brought to NFC first.

A token is a run of letters, marks and digits, or a single character of a script that is written without spaces (Han,
kana, bopomofo, Thai, Lao, Tibetan, Myanmar, Khmer). A text counts as *unspaced* when it has more such characters than
other tokens; then every character is a token and its shingles are runs of characters.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from typing import Any

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

UNSPACED = np.uint32(1 << 31)
DIGIT = np.uint32(1 << 30)
NEEDS_NFC = np.uint32(1 << 29)
CODE = np.uint32((1 << 21) - 1)
SEPARATOR = np.uint32(32)
DROPPED = np.uint32(0)

WORDS, CHARACTERS, AUTO = 0, 1, 2
"""Units of a shingle; AUTO decides for each text by its scripts."""

_UNSPACED_RANGES = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0x3005, 0x3007), (0x3021, 0x3029),
    (0x3031, 0x3035), (0x3038, 0x303C), (0x3040, 0x30FF), (0x3100, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9D),
    (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
_SAME = (
    (0x3400, 0x4DC0),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),
    (0xD800, 0xF900),
    (0x20000, 0x2F800),
    (0x2FA20, 0xE0000),
    (0xE0200, 0x110000),
)


@functools.cache
def code_table() -> np.ndarray:
    """uint32[0x110000]: for each code point its normalised code (0 = dropped, 32 = separator) and the flag bits.

    Depends on the Unicode version of the running Python (14 for Python 3.11).
    """
    table = np.arange(0x110000, dtype=np.uint32)
    same = np.zeros(0x110000, bool)
    for start, end in _SAME:
        same[start:end] = True
    tails = set()
    for point in np.flatnonzero(~same).tolist():
        character = chr(point)
        table[point] = _normalised_code(character)
        pieces = unicodedata.decomposition(character).split()
        if len(pieces) == 2 and not pieces[0].startswith("<"):
            tails.add(int(pieces[1], 16))
    for start, end in _UNSPACED_RANGES:
        word = (table[start : end + 1] != SEPARATOR) & (table[start : end + 1] != DROPPED)
        table[start : end + 1][word] |= UNSPACED
    loose = [tail for tail in tails if unicodedata.category(chr(tail)) != "Mn"]
    table[[*loose, *range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]] |= NEEDS_NFC
    return table


def _normalised_code(character: str) -> int:
    category = unicodedata.category(character)
    if category == "Nd":
        return ord(str(unicodedata.digit(character))) | int(DIGIT)
    if category == "Cf":
        return int(SEPARATOR) if character == "\u200b" else int(DROPPED)
    if category == "Mn":
        return int(DROPPED)
    if category[0] in "PSZ" or category == "Cc":
        return int(SEPARATOR)
    if character in "ςΣ":
        return ord("σ")
    base = [c for c in unicodedata.normalize("NFD", character.lower()) if unicodedata.category(c) != "Mn"]
    if not base:
        return int(DROPPED)
    return ord(base[0]) if len(base) == 1 else ord(character)


@nb.njit(inline="always")
def decode(data: np.ndarray, position: int) -> tuple[int, int]:
    """(code point, bytes) of valid UTF-8 at `position`."""
    byte = data[position]
    if byte < 0x80:
        return int(byte), 1
    if byte < 0xE0:
        return (int(byte) & 0x1F) << 6 | (int(data[position + 1]) & 0x3F), 2
    if byte < 0xF0:
        return (((int(byte) & 0x0F) << 12) | ((int(data[position + 1]) & 0x3F) << 6) | (int(data[position + 2]) & 0x3F)), 3
    return (
        ((int(byte) & 0x07) << 18)
        | ((int(data[position + 1]) & 0x3F) << 12)
        | ((int(data[position + 2]) & 0x3F) << 6)
        | (int(data[position + 3]) & 0x3F)
    ), 4


@nb.njit(inline="always")
def _is_ascii_word(byte: np.uint8) -> Any:
    return (np.uint8((byte | np.uint8(0x20)) - np.uint8(97)) < 26) | (np.uint8(byte - np.uint8(48)) < 10)


@nb.njit(cache=True, nogil=True)
def _likely_unspaced(data: np.ndarray, start: int, end: int) -> int:
    """1 or -1 where counts of bytes alone decide `is_unspaced`, 0 where they do not.

    Leads E5 to E9 are ideographs, each a character; a word begins at an ASCII letter or digit behind another byte, or at a
    lead of another kind. Characters of unspaced scripts have leads of three and four bytes, but not E2.
    """
    totals = np.zeros(5, np.int64)  # ideographs, leads of possible characters, leads, words for sure, words perhaps
    if start < end:  # the first byte has none before it
        first = data[start]
        totals[0], totals[1] = (first >= 0xE5) & (first <= 0xE9), (first >= 0xE0) & (first != 0xE2)
        totals[2], totals[4] = first >= 0xC0, _is_ascii_word(first)
    for position in range(start, end - 1, 255):  # so that counts fit one byte, which is what makes many of them one step
        last = min(end - 1, position + 255)
        before, here = data[position:last], data[position + 1 : last + 1]
        a = b = c = d = e = np.uint8(0)
        for i in range(len(here)):
            byte = here[i]
            word = _is_ascii_word(byte) & (not _is_ascii_word(before[i]))
            a = np.uint8(a + np.uint8((byte >= 0xE5) & (byte <= 0xE9)))
            b = np.uint8(b + np.uint8((byte >= 0xE0) & (byte != 0xE2)))
            c = np.uint8(c + np.uint8(byte >= 0xC0))
            d = np.uint8(d + np.uint8(word & (before[i] < 0x80)))
            e = np.uint8(e + np.uint8(word))
        totals[0] += a
        totals[1] += b
        totals[2] += c
        totals[3] += d
        totals[4] += e
    if totals[3] >= totals[1]:
        return -1
    return 1 if totals[0] > totals[4] + totals[2] - totals[0] else 0


@nb.njit(cache=True, nogil=True)
def is_unspaced(data: np.ndarray, start: int, end: int, table: np.ndarray) -> bool:
    """True when the text has more characters of unspaced scripts than other tokens."""
    likely = _likely_unspaced(data, start, end)
    if likely != 0:
        return likely > 0
    characters, words, inside = 0, 0, False
    position = start
    while position < end:
        # what is left can bring a word for two bytes, or a character for three
        if 2 * (characters - words) > end - position + 1:
            return True
        if 3 * (words - characters) >= end - position:
            return False
        point, width = decode(data, position)
        position += width
        entry = table[point]
        if entry & UNSPACED:
            characters += 1
            inside = False
        elif entry == SEPARATOR:
            inside = False
        elif entry != DROPPED and not inside:
            words += 1
            inside = True
    return characters > words


@nb.njit(cache=True, nogil=True)
def _needs_nfc(data: np.ndarray, offsets: np.ndarray, table: np.ndarray) -> np.ndarray:
    """bool[rows]: the row holds a loose piece of a code point that stays composed."""
    found = np.zeros(len(offsets) - 1, np.bool_)
    for row in range(len(found)):
        position, end = offsets[row], offsets[row + 1]
        seen = np.uint8(0)
        for at in range(position, end):  # such pieces start at U+0800
            byte = data[at]
            seen |= np.uint8((byte == 0xE0) | (byte == 0xE1) | (byte == 0xEA) | (byte >= 0xF0))
        if seen == 0:
            continue
        while position < end:
            point, width = decode(data, position)
            position += width
            if table[point] & NEEDS_NFC:
                found[row] = True
                break
    return found


@nb.njit(cache=True, nogil=True)
def normalise_row(
    data: np.ndarray, start: int, end: int, table: np.ndarray, unit: int, keep_digits: bool, codes: np.ndarray, tokens: np.ndarray
) -> tuple[int, int]:
    """Write the normalised codes of a text (uint32, no separators) and the start of each token; returns both counts.

    `codes` and `tokens` hold at least end - start entries.
    """
    characters = unit == CHARACTERS or (unit == AUTO and is_unspaced(data, start, end, table))
    n_codes = n_tokens = 0
    inside = after_digit = False
    position = start
    while position < end:
        point, width = decode(data, position)
        position += width
        entry = table[point]
        if entry == DROPPED:
            continue
        if entry == SEPARATOR:
            inside = after_digit = False
            continue
        code = entry & CODE
        if entry & DIGIT and not keep_digits:
            if after_digit:
                continue
            code, after_digit = np.uint32(48), True
        else:
            after_digit = False
        alone = characters or entry & UNSPACED != 0
        if alone or not inside:
            tokens[n_tokens] = n_codes
            n_tokens += 1
        inside = not alone
        codes[n_codes] = code
        n_codes += 1
    return n_codes, n_tokens


def text_buffers(texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes uint8, offsets int64[rows + 1]) of a string column, without a copy of its bytes where it is one chunk.

    Nulls read as empty. Raises TypeError for a column that is no string.
    """
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise TypeError(f"dedup needs a string column, got {texts.type}")
    if texts.null_count:
        texts = pc.fill_null(texts, "")
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.cast(pa.large_string()).combine_chunks() if texts.num_chunks != 1 else texts.chunk(0)
    if isinstance(texts, pa.ChunkedArray):  # combine_chunks of no chunks at all
        texts = pa.array([], pa.large_string())
    width = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, offset_buffer, data_buffer = texts.buffers()
    if len(texts) == 0 or offset_buffer is None:
        return np.zeros(1, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(offset_buffer, width, count=len(texts) + 1, offset=texts.offset * np.dtype(width).itemsize)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None and data_buffer.size else np.zeros(1, np.uint8)
    return data, offsets.astype(np.int64)


def compose(texts: pa.Array | pa.ChunkedArray, table: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`text_buffers` with NFC applied to the rows that need it (few: loose jamo, Indic vowels in pieces)."""
    data, offsets = text_buffers(texts)
    loose = _needs_nfc(data, offsets, code_table() if table is None else table)
    if not loose.any():
        return data, offsets
    mask = pa.array(loose)
    filled = pc.fill_null(texts, "").cast(pa.large_string())
    if isinstance(filled, pa.ChunkedArray):
        filled = filled.combine_chunks()
    return text_buffers(pc.replace_with_mask(filled, mask, pc.utf8_normalize(filled.filter(mask), "NFC")))


def normalised_tokens(text: str, unit: int = AUTO, keep_digits: bool = False, table: np.ndarray | None = None) -> list[str]:
    """The tokens of one text as strings, for tests and explanations."""
    table = code_table() if table is None else table
    data, offsets = compose(pa.array([text], pa.large_string()), table)
    codes, tokens = np.zeros(int(offsets[1]), np.uint32), np.zeros(int(offsets[1]), np.int64)
    n_codes, n_tokens = normalise_row(data, 0, int(offsets[1]), table, unit, keep_digits, codes, tokens)
    edges = [*tokens[:n_tokens].tolist(), n_codes]
    return ["".join(map(chr, codes[a:b].tolist())) for a, b in itertools.pairwise(edges)]
