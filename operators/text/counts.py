"""Plain measures of a text: its length in every unit, and the shares of kinds of characters, in one compiled pass.

Ratios are quotients of integers, equal on every machine; where there is nothing to divide by they are nan.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Collection

import numba
import numpy as np

from operators.text import characters
from operators.text.analysis import Analysis
from operators.text.characters import HAN, SPACE
from operators.text.words import NOT_SYMBOL, decode_one

_OTHER, _UPPER, _LOWER, _CASELESS, _HAN, _DIGIT, _SPACE, _PUNCTUATION, _SYMBOL = range(9)

CHARACTER_MEASURES = {
    "characters": "code points",
    "bytes": "bytes of UTF-8",
    "lines": "lines (between line feeds) that hold more than white space",
    "mean_line_length": "characters of such lines, on average",
    "longest_line": "characters of the longest such line",
    "tokens": "estimate of BPE tokens: 0.65 for a Han character, a quarter of each other byte",
    "alpha_ratio": "share of characters that are letters, Han included",
    "digit_ratio": "share of characters that are decimal digits of any script",
    "space_ratio": "share of characters that are white space, line feeds included",
    "punctuation_ratio": "share of characters that are punctuation (Unicode P)",
    "symbol_ratio": "share of characters that are symbols (Unicode S): + < = | $ and emoji",
    "han_ratio": "share of characters that are Han",
    "upper_ratio": "share of letters with case that are upper case",
}
WORD_MEASURES = {
    "words": "words that hold more than punctuation (Chinese by jieba), as Gopher counts them",
    "mean_word_length": "characters of such words, on average",
    "longest_word": "characters of the longest such word",
}
MEASURES = {**CHARACTER_MEASURES, **WORD_MEASURES}
INTEGERS = ("characters", "bytes", "lines", "longest_line", "tokens", "words", "longest_word")


def found_with(asked: Collection[str]) -> list[str]:
    """The measures asked for and those that cost nothing more beside them."""
    kinds = [kind for kind in (CHARACTER_MEASURES, WORD_MEASURES) if any(name in kind for name in asked)]
    return [name for kind in kinds for name in kind]


def count(analysis: Analysis, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The wanted measures (of MEASURES), int64 for INTEGERS, else float64. Words are found only if one asks for them."""
    found: dict[str, np.ndarray] = {}
    if any(name in CHARACTER_MEASURES for name in wanted):
        kinds, lines = np.zeros((len(analysis), 9), np.int64), np.zeros((len(analysis), 3), np.int64)
        _count_characters(analysis.data, analysis.starts, analysis.ends, _kinds(), kinds, lines)
        found |= _of_characters(kinds, lines, analysis.ends - analysis.starts)
    if any(name in WORD_MEASURES for name in wanted):
        words = analysis.words
        out = np.zeros((len(analysis), 3), np.int64)
        _count_words(words.first, words.last, words.characters, words.flags, out)
        found |= {"words": out[:, 0], "mean_word_length": _share(out[:, 1], out[:, 0]), "longest_word": out[:, 2]}
    return {name: found[name] for name in MEASURES if name in wanted}


def _of_characters(kinds: np.ndarray, lines: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
    total, han = kinds.sum(axis=1), kinds[:, _HAN]
    cased = kinds[:, _UPPER] + kinds[:, _LOWER]
    return {
        "characters": total,
        "bytes": size,
        "lines": lines[:, 0],
        "mean_line_length": _share(lines[:, 1], lines[:, 0]),
        "longest_line": lines[:, 2],
        # in integers: 0.65 a Han character and 0.25 a byte of the others (of 3 bytes a Han character, 4 beyond the BMP), rounded up
        "tokens": -(-(65 * han + 25 * np.maximum(size - 3 * han, 0)) // 100),
        "alpha_ratio": _share(cased + kinds[:, _CASELESS] + han, total),
        "digit_ratio": _share(kinds[:, _DIGIT], total),
        "space_ratio": _share(kinds[:, _SPACE], total),
        "punctuation_ratio": _share(kinds[:, _PUNCTUATION], total),
        "symbol_ratio": _share(kinds[:, _SYMBOL], total),
        "han_ratio": _share(han, total),
        "upper_ratio": _share(kinds[:, _UPPER], cased),
    }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole != 0)


@functools.cache
def _kinds() -> np.ndarray:
    """uint8[TABLE_SIZE], the kind of each code point; those above have none. Built once a process (0.1 s)."""
    flags = characters.table()
    by_category = {"Lu": _UPPER, "Lt": _UPPER, "Ll": _LOWER, "Lo": _CASELESS, "Lm": _CASELESS, "Nd": _DIGIT}
    kinds = np.zeros(len(flags), np.uint8)
    for point in range(len(flags)):
        category = unicodedata.category(chr(point))
        kinds[point] = by_category.get(category, {"P": _PUNCTUATION, "S": _SYMBOL}.get(category[0], _OTHER))
    kinds[(flags & SPACE) != 0] = _SPACE
    kinds[(flags & HAN) != 0] = _HAN
    kinds.setflags(write=False)
    return kinds


@numba.njit(cache=True, nogil=True)
def _count_characters(data, starts, ends, table, kinds, lines):  # type: ignore[no-untyped-def]
    """`kinds`: characters of each kind; `lines`: lines with more than white space, their characters, the longest one's."""
    for row in range(len(starts)):
        filled = total = longest = size = 0
        blank = True
        i, end = starts[row], ends[row]
        while i < end:
            point, step = decode_one(data, i)
            i += step
            kind = table[point] if point < len(table) else np.uint8(0)
            kinds[row, kind] += 1
            if point == 10:
                if not blank:
                    filled, total, longest = filled + 1, total + size, max(longest, size)
                size, blank = 0, True
            else:
                size += 1
                if kind != 6:
                    blank = False
        if not blank:
            filled, total, longest = filled + 1, total + size, max(longest, size)
        lines[row, 0], lines[row, 1], lines[row, 2] = filled, total, longest


@numba.njit(cache=True, nogil=True)
def _count_words(first, last, size, flags, out):  # type: ignore[no-untyped-def]
    for row in range(len(first)):
        for i in range(first[row], last[row]):
            if flags[i] & NOT_SYMBOL:
                out[row, 0] += 1
                out[row, 1] += size[i]
                out[row, 2] = max(out[row, 2], size[i])
