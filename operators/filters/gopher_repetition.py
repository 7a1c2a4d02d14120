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
from operators.text.ngrams import measure_grams, room, seen
from operators.text.words import class_of, hash_bytes, mix

_NEXT_LINE = np.uint64(0xA0761D6478BD642F)

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
    max_empty: ClassVar[float] = 0  # a rule without a choice


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
        _duplicate_paragraphs(
            found.data, found.starts, found.ends, lines.first, lines.last, lines.start, lines.length, lines.characters,
            lines.hash, sizes, characters.table(), out,
        )  # fmt: skip
        _duplicate_lines(lines.first, lines.last, lines.characters, lines.hash, sizes, out)
        measure_grams(words.first, words.last, words.length, words.characters, words.hash, sizes, out[len(_FRACTIONS) :])
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
def _duplicate_paragraphs(  # type: ignore[no-untyped-def]
    data, starts, ends, first, last, line_start, line_length, line_size, hashes, sizes, table, out
):
    """Paragraphs: the stripped text split at two line feeds or more, so sequences of lines that are not empty."""
    most = 1
    for row in range(len(starts)):
        most = max(most, last[row] - first[row])
    keys, stamps = np.empty(room(most), np.uint64), np.zeros(room(most), np.int64)
    for row in range(len(starts)):
        low, high = _stripped(data, starts[row], ends[row], table)
        mask = room(last[row] - first[row]) - 1
        pieces = duplicates = characters_of = 0
        key, count, open_ = np.uint64(0), 0, False
        for line in range(first[row], last[row] + 1):
            if line < last[row]:
                begin, end = line_start[line], line_start[line] + line_length[line]
                if end < low or begin > high:
                    continue
                value, size = hashes[line], line_size[line]
                if begin < low or end > high:  # the first or the last line, stripped
                    begin, end = max(begin, low), min(end, high)
                    value, size = hash_bytes(data, begin, end), 0
                    for i in range(begin, end):
                        size += (data[i] & 0xC0) != 0x80
                if begin < end:
                    key = mix(key + _NEXT_LINE) + value
                    count += size + open_
                    open_ = True
                    continue
            if open_ or (low == high and line == last[row]):
                pieces += 1
                if seen(keys, stamps, row + 1, mask, key):
                    duplicates += 1
                    characters_of += count
                key, count, open_ = np.uint64(0), 0, False
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
