"""FineWeb's quality rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6), as datatrove 0.10 decides them; for Chinese
FineWeb-2's limits for `cmn_Hani`, but for one. Lines are those between line feeds that hold more than white space.

In Chinese a line counts as prose if it ends in an end mark or holds a full stop (`。`) anywhere: an article of a few long
lines that end in a bracket, a quotation mark or a cut would else be taken for a list. A line feed every four words is
let through, for the lines of a poem. `preset: fineweb2` has the limits as published.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numba
import numpy as np
import pyarrow as pa
from pydantic import Field

from operators.config import Settings
from operators.filters.gopher_repetition import room, seen
from operators.filters.thresholds import PRESET, Rule, analysis_of, as_numpy, first_failing, languages, limits_by_row
from operators.operator import Filter
from operators.text import characters
from operators.text.analysis import Analysis
from operators.text.characters import SPACE, TERMINAL
from operators.text.words import class_of


class FineWebLimits(Settings):
    """Limits of one language; null disables a rule."""

    max_empty: ClassVar[float] = 0  # a rule without a choice: texts without a line are dropped

    min_line_punctuation: float | None = Field(default=0.12, description="lowest share of lines that end in a sentence's end mark")
    min_sentence_lines: float | None = Field(default=None, description="lowest share of lines that hold `。` or end in an end mark")
    max_short_lines: float | None = Field(default=0.67, description="highest share of lines of at most 30 characters")
    max_duplicate_characters: float | None = Field(default=0.01, description="highest share of characters in repeated lines")
    max_line_feeds: float | None = Field(default=0.3, description="most line feeds per word")


_FINEWEB2_CHINESE = FineWebLimits(
    min_line_punctuation=0.106, max_short_lines=None, max_duplicate_characters=0.1, max_line_feeds=0.178
)
DEFAULTS: dict[str, FineWebLimits] = {
    "en": FineWebLimits(),
    "zh": _FINEWEB2_CHINESE.model_copy(update={"min_line_punctuation": None, "min_sentence_lines": 0.106, "max_line_feeds": 0.25}),
    "*": FineWebLimits(max_duplicate_characters=0.1),
}
for _code in ("ja", "ko"):
    DEFAULTS[_code] = _FINEWEB2_CHINESE
for _code in ("th", "lo", "km", "my", "bo"):  # sentences end in a space there
    DEFAULTS[_code] = FineWebLimits(min_line_punctuation=None, max_short_lines=None, max_duplicate_characters=0.1)
PRESETS = {"danlu": DEFAULTS, "fineweb2": {**DEFAULTS, "zh": _FINEWEB2_CHINESE}}

_RULES = (
    Rule("empty", "empty", "max_empty", True),
    Rule("line_punctuation", "line_punctuation", "min_line_punctuation", False),
    Rule("line_punctuation", "sentence_lines", "min_sentence_lines", False),
    Rule("short_lines", "short_lines", "max_short_lines", True),
    Rule("duplicate_characters", "duplicate_characters", "max_duplicate_characters", True),
    Rule("line_feeds", "line_feeds", "max_line_feeds", True),
)
_MEASURES = tuple(rule.score for rule in _RULES)
_SHORT_CHARACTERS = 30


class FineWebQualitySettings(Settings):
    """FineWeb's quality rules. The first rule that fails is the reason."""

    preset: Literal["danlu", "fineweb2"] = Field(default="danlu", description=PRESET)
    thresholds: dict[str, FineWebLimits] = Field(
        default={}, description="limits by language code; what a language sets replaces its defaults, `*` is for all languages"
    )


class FineWebQuality(Filter):
    """Drop lists and menus: few sentence ends, many short or repeated lines, a line feed every few words."""

    name: ClassVar[str] = "fineweb_quality"
    settings = FineWebQualitySettings
    decide_options = frozenset({"thresholds", "preset"})

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """Score columns (float64), `empty` being 1 for a text without a line, and `language_guess`."""
        found = analysis_of(table, analysis)
        lines, words = found.lines, found.words
        out = np.zeros((len(_MEASURES), len(found)), np.float64)
        _measure(
            found.data, lines.first, lines.last, lines.start, lines.length, lines.characters, lines.hash,
            words.first, words.last, characters.table(), out,
        )  # fmt: skip
        scores = {name: pa.array(out[row]) for row, name in enumerate(_MEASURES)}
        return {**scores, "language_guess": found.language_guess}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        codes = languages(table, scores.get("language_guess"))
        index, limits = limits_by_row(PRESETS[self.config.preset], self.config.thresholds, codes)
        return first_failing(_RULES, as_numpy(scores, _MEASURES), index, limits)


@numba.njit(cache=True, nogil=True)
def _measure(data, first, last, start, length, size, hashes, first_word, last_word, table, out):  # type: ignore[no-untyped-def]
    most = 1
    for row in range(len(first)):
        most = max(most, last[row] - first[row])
    keys, stamps = np.empty(room(most), np.uint64), np.zeros(room(most), np.int64)
    for row in range(len(first)):
        mask = room(last[row] - first[row]) - 1
        lines = ended = prose = short = repeated = total = 0
        for line in range(first[row], last[row]):
            total += size[line]
            blank = True
            final = np.int64(0)  # position of the last character
            i, end = start[line], start[line] + length[line]
            while i < end:
                byte = np.int32(data[i])
                final = i
                if byte < 0x80:
                    point = byte
                    i += 1
                elif byte < 0xE0:
                    point = ((byte & 0x1F) << 6) | (np.int32(data[i + 1]) & 0x3F)
                    i += 2
                elif byte < 0xF0:
                    point = ((byte & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F)
                    i += 3
                else:
                    point = np.int32(0x10000)
                    i += 4
                if not class_of(table, point) & SPACE:
                    blank = False
                    break
            if blank:
                continue
            final = end - 1
            while (data[final] & 0xC0) == 0x80:
                final -= 1
            is_ended = (class_of(table, _point(data, final)) & TERMINAL) != 0
            holds = is_ended
            while i + 2 < end and not holds:
                holds = data[i] == 0xE3 and data[i + 1] == 0x80 and data[i + 2] == 0x82  # 。
                i += 1
            prose += holds
            lines += 1
            ended += is_ended
            short += size[line] <= _SHORT_CHARACTERS
            if seen(keys, stamps, row + 1, mask, hashes[line]):
                repeated += size[line]
        words = last_word[row] - first_word[row]
        out[0, row] = lines == 0
        out[1, row] = ended / lines if lines else np.nan
        out[2, row] = prose / lines if lines else np.nan
        out[3, row] = short / lines if lines else np.nan
        out[4, row] = repeated / total if total else np.nan
        out[5, row] = (last[row] - first[row] - 1) / words if words else np.nan


@numba.njit(cache=True, nogil=True)
def _point(data, i):  # type: ignore[no-untyped-def]
    """The code point that begins at byte `i`."""
    byte = np.int32(data[i])
    if byte < 0x80:
        return byte
    if byte < 0xE0:
        return ((byte & 0x1F) << 6) | (np.int32(data[i + 1]) & 0x3F)
    if byte < 0xF0:
        return ((byte & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F)
    return (
        ((byte & 0x07) << 18)
        | ((np.int32(data[i + 1]) & 0x3F) << 12)
        | ((np.int32(data[i + 2]) & 0x3F) << 6)
        | (np.int32(data[i + 3]) & 0x3F)
    )
