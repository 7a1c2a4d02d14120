"""Gopher's quality rules (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1), as datatrove 0.10 decides them.

English has Gopher's limits. Chinese has words by jieba, function words in place of English stop words, and those limits
that FineWeb-2 derived for `cmn_Hani` (Penedo et al. 2025) but for one: the share of words with a letter is taken of the words
that hold more than punctuation. datatrove counts each mark as a word, and at FineWeb-2's .735 that rejects a quarter of
encyclopaedia articles; `preset: fineweb2` does the same. Other languages have limits that hold for their word lengths and no
stop-word rule, so that no language is emptied by the rules of another; `thresholds` overrides any of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numba
import numpy as np
import pyarrow as pa
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import (
    PRESET,
    Rule,
    analysis_of,
    as_numpy,
    base_language,
    first_failing,
    languages,
    limits_by_row,
    merged,
)
from operators.operator import Filter
from operators.text import characters
from operators.text.analysis import Analysis
from operators.text.characters import SPACE
from operators.text.words import HAS_ALPHA, NOT_SYMBOL, class_of, find_sorted, hash_text

ENGLISH_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
CHINESE_STOP_WORDS = (
    "的", "是", "在", "和", "了", "有", "不", "与", "與", "或", "为", "為", "这", "這", "也", "就", "中", "对", "對", "可以",
    "之", "其", "而", "以", "于", "於", "者", "所", "则", "則",
)  # fmt: skip


class GopherQualityLimits(Settings):
    """Limits of one language; null disables a rule."""

    min_words: int | None = Field(default=50, description="fewest words that hold more than punctuation")
    max_words: int | None = Field(default=100_000, description="most words that hold more than punctuation")
    min_mean_word_length: float | None = Field(default=3, description="lowest mean length of such words, characters")
    max_mean_word_length: float | None = Field(default=10, description="highest mean length of such words, characters")
    max_hash_ratio: float | None = Field(default=0.1, description="most `#` per word")
    max_ellipsis_ratio: float | None = Field(default=0.1, description="most `...` and `…` per word")
    max_bullet_lines: float | None = Field(default=0.9, description="highest share of lines that begin with `•` or `-`")
    max_ellipsis_lines: float | None = Field(default=0.3, description="highest share of lines that end with an ellipsis")
    min_alpha_words: float | None = Field(default=0.8, description="lowest share of words with a letter; marks are words")
    min_letter_words: float | None = Field(default=None, description="the same among words that hold more than punctuation")
    min_stop_words: int | None = Field(default=2, description="fewest different stop words")
    stop_words: tuple[str, ...] = Field(default=ENGLISH_STOP_WORDS, max_length=64, description="the stop words, case-sensitive")


_FINEWEB2_CHINESE = GopherQualityLimits(
    min_mean_word_length=1, max_mean_word_length=5, min_alpha_words=0.735, stop_words=CHINESE_STOP_WORDS
)
DEFAULTS: dict[str, GopherQualityLimits] = {
    "en": GopherQualityLimits(),
    "zh": _FINEWEB2_CHINESE.model_copy(update={"min_alpha_words": None, "min_letter_words": 0.7}),
    "ja": GopherQualityLimits(min_mean_word_length=1, max_mean_word_length=5, min_alpha_words=0.7, min_stop_words=None),
    "ko": GopherQualityLimits(min_mean_word_length=1.5, min_alpha_words=0.735, min_stop_words=None),
    "th": GopherQualityLimits(min_mean_word_length=1, max_mean_word_length=5, min_alpha_words=0.5, min_stop_words=None),
    "*": GopherQualityLimits(min_mean_word_length=2, max_mean_word_length=14, min_alpha_words=0.7, min_stop_words=None),
}
for _code in ("lo", "km", "my", "bo"):
    DEFAULTS[_code] = DEFAULTS["th"]
PRESETS = {"danlu": DEFAULTS, "fineweb2": {**DEFAULTS, "zh": _FINEWEB2_CHINESE}}

_RULES = (
    Rule("short", "words", "min_words", False),
    Rule("long", "words", "max_words", True),
    Rule("short_words", "mean_word_length", "min_mean_word_length", False),
    Rule("long_words", "mean_word_length", "max_mean_word_length", True),
    Rule("hashes", "hash_ratio", "max_hash_ratio", True),
    Rule("ellipses", "ellipsis_ratio", "max_ellipsis_ratio", True),
    Rule("bullet_lines", "bullet_lines", "max_bullet_lines", True),
    Rule("ellipsis_lines", "ellipsis_lines", "max_ellipsis_lines", True),
    Rule("few_letters", "alpha_words", "min_alpha_words", False),
    Rule("few_letters", "letter_words", "min_letter_words", False),
    Rule("few_stop_words", "stop_words", "min_stop_words", False),
)
_ODD, _FILTER_BITS = np.uint64(0xD6E8FEB86659FD93), 12  # of the filter that most words that are no stop word fail
_MEASURES = (
    "words", "mean_word_length", "hash_ratio", "ellipsis_ratio", "bullet_lines", "ellipsis_lines", "alpha_words", "letter_words",
)  # fmt: skip


class GopherQualitySettings(Settings):
    """Gopher's quality rules. The first rule that fails, in Gopher's order, is the reason."""

    preset: Literal["danlu", "fineweb2"] = Field(default="danlu", description=PRESET)
    thresholds: dict[str, GopherQualityLimits] = Field(
        default={}, description="limits by language code; what a language sets replaces its defaults, `*` is for all languages"
    )


class GopherQuality(Filter):
    """Drop documents that are too short or long, or made of symbols, bullets, ellipses or odd words."""

    name: ClassVar[str] = "gopher_quality"
    settings = GopherQualitySettings
    decide_options = frozenset({"thresholds", "preset"})

    def measured_as(self) -> dict[str, Any]:
        return {f"stop_words of {code}": listed for code, listed in self._stop_words().items()}

    def _stop_words(self) -> dict[str, tuple[str, ...]]:
        """The lists to count: one for each language that has a list of its own."""
        found = {
            code: merged(PRESETS[self.config.preset], self.config.thresholds, code) for code in {*DEFAULTS, *self._overridden()}
        }
        return {code: limits.stop_words for code, limits in sorted(found.items()) if limits.min_stop_words is not None}

    def _overridden(self) -> set[str]:
        return {base_language(code) for code in self.config.thresholds if code != "*"}

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """Score columns (float64), the different stop words of each language (int64), and `language_guess`."""
        found = analysis_of(table, analysis)
        words = found.words
        out = np.empty((len(_MEASURES), len(found)), np.float64)
        _measure_words(words.first, words.last, words.characters, words.flags, out)
        _measure_text(found.data, found.starts, found.ends, characters.table(), _plain_bytes(), words.first, words.last, out)
        scores = {name: pa.array(out[row]) for row, name in enumerate(_MEASURES)}
        for code, listed in self._stop_words().items():
            hashes = np.array([hash_text(word) for word in listed], np.uint64)
            order = np.argsort(hashes)
            longest = max((len(word.encode()) for word in listed), default=0)
            counts, bits = np.empty(len(found), np.int64), np.zeros(1 << _FILTER_BITS, np.bool_)
            bits[(hashes * _ODD) >> np.uint64(64 - _FILTER_BITS)] = True
            _count_stop_words(words.first, words.last, words.length, words.hash, hashes[order], longest, bits, counts)
            scores[f"stop_words_{code}"] = pa.array(counts)
        scores["language_guess"] = found.language_guess
        return scores

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        codes = languages(table, scores.get("language_guess"))
        index, limits = limits_by_row(PRESETS[self.config.preset], self.config.thresholds, codes)
        numbers = as_numpy(scores, _MEASURES)
        numbers["stop_words"] = self._stop_word_counts(codes, scores)
        return first_failing(_RULES, numbers, index, limits)

    def _stop_word_counts(self, codes: pa.Array, scores: Mapping[str, pa.Array]) -> np.ndarray:
        """The count that belongs to each row's language; nan, which fails nothing, where it has no list."""
        counts = np.full(len(codes), np.nan)
        encoded = codes.dictionary_encode()
        indices = encoded.indices.to_numpy(zero_copy_only=False)
        for position, code in enumerate(encoded.dictionary.to_pylist()):
            column = scores.get(f"stop_words_{base_language(code)}", scores.get("stop_words_*"))
            if column is not None:
                rows = indices == position
                counts[rows] = column.to_numpy(zero_copy_only=False)[rows]
        return counts


@functools.cache
def _plain_bytes() -> np.ndarray:
    """uint8[256]: 2 for ASCII characters that are no white space, line end, full stop or `#`, 1 for a space, else 0."""
    plain = [not (chr(byte).isspace() or chr(byte) in ".#\0") and byte < 0x80 for byte in range(256)]
    return np.array([2 * is_plain + (byte == 32) for byte, is_plain in enumerate(plain)], np.uint8)


@numba.njit(cache=True, nogil=True)
def _measure_words(first, last, size, flags, out):  # type: ignore[no-untyped-def]
    for row in range(len(first)):
        counted = total = alpha = 0
        for i in range(first[row], last[row]):
            if flags[i] & NOT_SYMBOL:
                counted += 1
                total += size[i]
            alpha += (flags[i] & HAS_ALPHA) != 0
        words = last[row] - first[row]
        out[0, row] = counted
        out[1, row] = total / counted if counted else np.nan
        out[6, row] = alpha / words if words else np.nan
        out[7, row] = alpha / counted if counted else np.nan


@numba.njit(cache=True, nogil=True)
def _count_stop_words(first, last, length, hashes, listed, longest, bits, out):  # type: ignore[no-untyped-def]
    for row in range(len(first)):
        seen = np.uint64(0)
        count = 0
        for i in range(first[row], last[row]):
            if length[i] <= longest and bits[(hashes[i] * _ODD) >> np.uint64(64 - _FILTER_BITS)]:
                found = find_sorted(listed, hashes[i])
                if found >= 0:
                    bit = np.uint64(1) << np.uint64(found)
                    if not seen & bit:
                        seen |= bit
                        count += 1
        out[row] = count


@numba.njit(cache=True, nogil=True)
def _measure_text(data, starts, ends, table, plain, first, last, out):  # type: ignore[no-untyped-def]
    """Hashes and ellipses a word, and the shares of lines (as str.splitlines) that begin with a bullet or end in dots."""
    for row in range(len(starts)):
        hashes = ellipses = lines = bullets = trailing = 0
        opening = np.int32(0)  # the line's first character that is no space
        ends_in_dots = False  # whether the line's last characters that are no space are an ellipsis
        dots = 0  # full stops in a row, up to here
        counted_dots = 0  # ... since the last three that were counted
        started = False  # whether the line has any character
        i, end = starts[row], ends[row]
        while i < end:
            byte = np.int32(data[i])
            if plain[byte] == 2:  # a run of characters that decide nothing but how the line begins, and spaces among them
                started = True
                if not opening:
                    opening = byte
                counted_dots = dots = 0
                ends_in_dots = False
                i += 1
                while i < end and plain[data[i]]:
                    i += 1
                continue
            if byte == 32:
                started = True
                counted_dots = dots = 0
                i += 1
                continue
            if byte < 0x80:
                point, step = byte, 1
            elif byte < 0xE0:
                point, step = ((byte & 0x1F) << 6) | (np.int32(data[i + 1]) & 0x3F), 2
            elif byte < 0xF0:
                point = ((byte & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F)
                step = 3
            else:
                point, step = np.int32(0x10000), 4  # a letter, symbol or sign; never a space
            i += step
            if point == 46:
                dots += 1
                counted_dots += 1
                if counted_dots == 3:
                    ellipses += 1
                    counted_dots = 0
            else:
                if point == 35:
                    hashes += 1
                elif point == 0x2026:
                    ellipses += 1
                counted_dots = 0
            feed = 10 <= point <= 13 or 28 <= point <= 30 or point in (0x85, 0x2028, 0x2029)
            if feed:
                if point == 13 and i < end and data[i] == 10:
                    i += 1
                lines += 1
                bullets += opening == 0x2022 or opening == 45
                trailing += ends_in_dots
                opening, ends_in_dots, started, dots = np.int32(0), False, False, 0
                continue
            started = True
            if class_of(table, point) & SPACE:
                dots = 0
                continue
            if not opening:
                opening = point if point else np.int32(1)
            if point != 46:
                dots = 0
            ends_in_dots = dots >= 3 or point == 0x2026
        if started:
            lines += 1
            bullets += opening == 0x2022 or opening == 45
            trailing += ends_in_dots
        words = last[row] - first[row]
        out[2, row] = hashes / words if words else np.nan
        out[3, row] = ellipses / words if words else np.nan
        out[4, row] = bullets / lines if lines else np.nan
        out[5, row] = trailing / lines if lines else np.nan
