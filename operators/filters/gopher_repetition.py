"""Gopher's repetition rules (Rae et al. 2021, arXiv:2112.11446, table A1), as datatrove 0.10 decides them.

English has Gopher's limits, Chinese those of FineWeb-2 for `cmn_Hani` (words by jieba). Elements are compared by 64-bit
hashes of their bytes; fractions are quotients of integers, equal on every machine.
"""

from __future__ import annotations

from typing import ClassVar

import numba
import numpy as np
import pyarrow as pa
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import Rule, analysis_of, as_numpy, first_failing, languages, limits_by_row
from operators.operator import Filter
from operators.text import characters
from operators.text.analysis import Analysis
from operators.text.characters import SPACE
from operators.text.words import class_of, mix

_TOP = (2, 3, 4)
_DUPLICATE = (5, 6, 7, 8, 9, 10)


class GopherRepetitionLimits(Settings):
    """Limits of one language; null disables a rule. Fractions of characters are of all characters of the text."""

    max_duplicate_paragraphs: float | None = Field(default=0.3, description="share of paragraphs that repeat an earlier one")
    max_duplicate_paragraph_characters: float | None = Field(default=0.2, description="share of characters in such paragraphs")
    max_duplicate_lines: float | None = Field(default=0.3, description="share of lines that repeat an earlier one")
    max_duplicate_line_characters: float | None = Field(default=0.2, description="share of characters in such lines")
    max_top_2_gram: float | None = Field(default=0.2, description="share of characters in the most frequent 2-gram of words")
    max_top_3_gram: float | None = Field(default=0.18, description="the same for 3-grams")
    max_top_4_gram: float | None = Field(default=0.16, description="the same for 4-grams")
    max_duplicate_5_grams: float | None = Field(default=0.15, description="share of characters in 5-grams that repeat")
    max_duplicate_6_grams: float | None = Field(default=0.14, description="the same for 6-grams")
    max_duplicate_7_grams: float | None = Field(default=0.13, description="the same for 7-grams")
    max_duplicate_8_grams: float | None = Field(default=0.12, description="the same for 8-grams")
    max_duplicate_9_grams: float | None = Field(default=0.11, description="the same for 9-grams")
    max_duplicate_10_grams: float | None = Field(default=0.1, description="the same for 10-grams")


_CHINESE = GopherRepetitionLimits(
    max_duplicate_paragraphs=None, max_duplicate_paragraph_characters=None,
    max_duplicate_lines=0.287, max_duplicate_line_characters=None,
    max_top_2_gram=0.256, max_top_3_gram=0.201, max_top_4_gram=0.171,
    max_duplicate_5_grams=0.198, max_duplicate_6_grams=0.182, max_duplicate_7_grams=0.167,
    max_duplicate_8_grams=0.154, max_duplicate_9_grams=0.14, max_duplicate_10_grams=0.127,
)  # fmt: skip
DEFAULTS: dict[str, GopherRepetitionLimits] = {"en": GopherRepetitionLimits(), "zh": _CHINESE, "*": GopherRepetitionLimits()}
# one character is one word there, so n-grams are as short as in Chinese or shorter
for _code in ("ja", "ko", "th", "lo", "km", "my", "bo"):
    DEFAULTS[_code] = _CHINESE

_FRACTIONS = ("duplicate_paragraphs", "duplicate_paragraph_characters", "duplicate_lines", "duplicate_line_characters")
_MEASURES = (*_FRACTIONS, *(f"top_{n}_gram" for n in _TOP), *(f"duplicate_{n}_grams" for n in _DUPLICATE))
_RULES = (Rule("empty", "empty", "max_empty", True), *(Rule(name, name, f"max_{name}", True) for name in _MEASURES))


class _Limits(GopherRepetitionLimits):
    max_empty: float = 0


class GopherRepetitionSettings(Settings):
    """Gopher's repetition rules. The first rule that fails, in Gopher's order, is the reason; an empty text is `empty`."""

    thresholds: dict[str, GopherRepetitionLimits] = Field(
        default={}, description="limits by language code; what a language sets replaces its defaults, `*` is for all languages"
    )


class GopherRepetition(Filter):
    """Drop documents that repeat themselves: paragraphs, lines, frequent n-grams and repeated n-grams of words."""

    name: ClassVar[str] = "gopher_repetition"
    settings = GopherRepetitionSettings

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """Score columns (float64, fractions), `empty` (1 for an empty text) and `language_guess`."""
        found = analysis_of(table, analysis)
        out = np.zeros((len(_MEASURES), len(found)), np.float64)
        sizes, words, lines = found.characters, found.words, found.lines
        _duplicate_pieces(found.data, found.starts, found.ends, sizes, characters.table(), out)
        _duplicate_lines(lines.first, lines.last, lines.characters, lines.hash, sizes, out)
        _repeated_grams(words.first, words.last, words.length, words.characters, words.hash, sizes, out)
        scores = {name: pa.array(out[row]) for row, name in enumerate(_MEASURES)}
        scores["empty"] = pa.array((sizes == 0).astype(np.float64))
        scores["language_guess"] = found.language_guess
        return scores

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        codes = languages(table, scores.get("language_guess"))
        index, limits = limits_by_row(DEFAULTS, self.config.thresholds, codes)
        with_empty = [_Limits(**item.model_dump()) for item in limits]
        return first_failing(_RULES, as_numpy(scores, ("empty", *_MEASURES)), index, with_empty)


@numba.njit(cache=True, nogil=True)
def room(count):  # type: ignore[no-untyped-def]
    """Slots of an open-addressing table that is at most half full."""
    slots = 16
    while slots < 2 * count:
        slots *= 2
    return slots


@numba.njit(cache=True, nogil=True)
def seen(keys, stamps, stamp, mask, key):  # type: ignore[no-untyped-def]
    """Whether `key` is in the set of this `stamp`; puts it there otherwise."""
    slot = np.int64(mix(key) & np.uint64(mask))
    while stamps[slot] == stamp:
        if keys[slot] == key:
            return True
        slot = (slot + 1) & mask
    stamps[slot] = stamp
    keys[slot] = key
    return False


@numba.njit(cache=True, nogil=True)
def _duplicate_pieces(data, starts, ends, sizes, table, out):  # type: ignore[no-untyped-def]
    """Paragraphs: the stripped text split at two line feeds or more."""
    most = 0
    for row in range(len(starts)):
        feeds = 0
        for i in range(starts[row], ends[row]):
            feeds += data[i] == 10
        most = max(most, feeds // 2 + 1)
    keys, stamps = np.empty(room(most), np.uint64), np.zeros(room(most), np.int64)
    mask = len(keys) - 1
    for row in range(len(starts)):
        low, high = _stripped(data, starts[row], ends[row], table)
        pieces = duplicates = characters_of = 0
        value, count, i = np.uint64(0), 0, low
        while i <= high:
            feeds = 0
            while i + feeds < high and data[i + feeds] == 10:
                feeds += 1
            if i == high or feeds >= 2:
                pieces += 1
                if seen(keys, stamps, row + 1, mask, value):
                    duplicates += 1
                    characters_of += count
                value, count = np.uint64(0), 0
                i += max(feeds, 1)
            else:
                value = value * np.uint64(0x9E3779B97F4A7C15) + (np.uint64(data[i]) + np.uint64(1))
                count += (data[i] & 0xC0) != 0x80
                i += 1
        out[0, row] = duplicates / pieces
        out[1, row] = characters_of / sizes[row] if sizes[row] else 0.0


@numba.njit(cache=True, nogil=True)
def _stripped(data, low, high, table):  # type: ignore[no-untyped-def]
    """Bounds of the text without white space at its ends (str.strip)."""
    while low < high:
        size = _space_at(data, low, high, table)
        if not size:
            break
        low += size
    while high > low:
        begin = high - 1
        while begin > low and (data[begin] & 0xC0) == 0x80:
            begin -= 1
        if not _space_at(data, begin, high, table):
            break
        high = begin
    return low, high


@numba.njit(cache=True, nogil=True)
def _space_at(data, i, high, table):  # type: ignore[no-untyped-def]
    """Bytes of the white space character at `i`, or 0."""
    byte = np.int32(data[i])
    if byte < 0x80:
        return 1 if class_of(table, byte) & SPACE else 0
    if byte < 0xE0 and i + 1 < high:
        return 2 if class_of(table, ((byte & 0x1F) << 6) | (np.int32(data[i + 1]) & 0x3F)) & SPACE else 0
    if byte < 0xF0 and i + 2 < high:
        point = ((byte & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F)
        return 3 if class_of(table, point) & SPACE else 0
    return 0


@numba.njit(cache=True, nogil=True)
def _duplicate_lines(first, last, size, hashes, sizes, out):  # type: ignore[no-untyped-def]
    """Lines: the text split at one line feed or more, so that only the first and the last may be empty."""
    most = 1
    for row in range(len(first)):
        most = max(most, last[row] - first[row])
    keys, stamps = np.empty(room(most), np.uint64), np.zeros(room(most), np.int64)
    mask = len(keys) - 1
    for row in range(len(first)):
        pieces = duplicates = characters_of = 0
        for i in range(first[row], last[row]):
            if size[i] == 0 and first[row] < i < last[row] - 1:
                continue
            if size[i] == 0 and i == last[row] - 1 and i > first[row] and pieces == 1 and size[first[row]] == 0:
                duplicates += 1  # a text of line feeds alone is two empty lines
                pieces += 1
                continue
            pieces += 1
            if seen(keys, stamps, row + 1, mask, hashes[i]):
                duplicates += 1
                characters_of += size[i]
        out[2, row] = duplicates / pieces if pieces else 0.0
        out[3, row] = characters_of / sizes[row] if sizes[row] else 0.0


@numba.njit(cache=True, nogil=True)
def _power(exponent):  # type: ignore[no-untyped-def]
    """The base of words.hash_bytes to a power, mod 2**64."""
    result, factor = np.uint64(1), np.uint64(0x9E3779B97F4A7C15)
    while exponent:
        if exponent & 1:
            result *= factor
        factor *= factor
        exponent >>= 1
    return result


@numba.njit(cache=True, nogil=True)
def _repeated_grams(first, last, length, size, hashes, sizes, out):  # type: ignore[no-untyped-def]
    """Top n-grams of words joined by spaces, and duplicate n-grams of words joined by nothing."""
    most = 1
    for row in range(len(first)):
        most = max(most, last[row] - first[row])
    slots_of = room(most)
    keys, stamps, counts = np.empty(slots_of, np.uint64), np.zeros(slots_of, np.int64), np.empty(slots_of, np.int32)
    power, place, slots = np.empty(most, np.uint64), np.empty(most + 1, np.int64), np.empty(most, np.int64)
    short = np.empty(64, np.uint64)
    for exponent in range(64):
        short[exponent] = _power(exponent)
    stamp = 0
    for row in range(len(first)):
        begin, words, total = first[row], last[row] - first[row], sizes[row]
        mask = room(words) - 1  # a short text stays in the cache
        place[0] = 0
        for i in range(words):
            power[i] = short[length[begin + i]] if length[begin + i] < 64 else _power(length[begin + i])
            place[i + 1] = place[i] + size[begin + i]
        for n in range(2, 5):
            if words < n:
                continue
            stamp += 1
            for i in range(words - n + 1):
                key = np.uint64(0)
                for k in range(i, i + n):
                    key = mix(key) + hashes[begin + k]
                slot = np.int64(mix(key) & np.uint64(mask))
                while stamps[slot] == stamp and keys[slot] != key:
                    slot = (slot + 1) & mask
                if stamps[slot] != stamp:
                    stamps[slot], keys[slot], counts[slot] = stamp, key, 0
                counts[slot] += 1
                slots[i] = slot
            best = characters_of = 0
            for i in range(words - n + 1):  # the most frequent; of equals the one that came first
                if counts[slots[i]] > best:
                    best = counts[slots[i]]
                    characters_of = place[i + n] - place[i] + n - 1
            out[2 + n, row] = best * characters_of / total
        for n in range(5, 11):
            stamp += 1
            repeated, i = 0, 0
            while i + n <= words:
                key = np.uint64(0)
                for k in range(i, i + n):  # the hash of the concatenated bytes
                    key = key * power[k] + hashes[begin + k]
                if seen(keys, stamps, stamp, mask, key):
                    repeated += place[i + n] - place[i]
                    i += n
                else:
                    i += 1
            out[2 + n, row] = repeated / total if total else 0.0
