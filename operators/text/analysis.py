"""One analysis of each text of a batch, shared by all operators of a chain: words, lines, characters and scripts.

Everything is an offset into the Arrow buffer of the texts, computed by compiled kernels the first time it is asked for.
Results depend on each text alone, never on the batch it came in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import pyarrow as pa

from operators.text import characters, words
from operators.text.characters import HAN, HANGUL, KANA, UNSPACED
from operators.text.words import class_of


@dataclass(frozen=True)
class Words:
    """The words of all texts; those of text i are `first[i]:last[i]`."""

    first: np.ndarray  # int64[texts]
    last: np.ndarray  # int64[texts]
    start: np.ndarray  # int64[words], byte position in Analysis.data
    length: np.ndarray  # int32[words], bytes
    characters: np.ndarray  # int32[words]
    flags: np.ndarray  # uint8[words], of words.HAS_ALPHA and words.NOT_SYMBOL
    hash: np.ndarray  # uint64[words], words.hash_bytes of the word


@dataclass(frozen=True)
class Lines:
    """The pieces of all texts between line feeds, empty ones included, as `text.split("\\n")` gives them."""

    first: np.ndarray  # int64[texts]
    last: np.ndarray  # int64[texts]
    start: np.ndarray  # int64[lines], byte position in Analysis.data
    length: np.ndarray  # int64[lines], bytes
    characters: np.ndarray  # int64[lines]
    hash: np.ndarray  # uint64[lines]


class Analysis:
    """Build with `Analysis.of(column)`. Text i is the UTF-8 `data[starts[i]:ends[i]]`; a null is empty."""

    def __init__(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.data = data  # uint8[bytes]
        self.starts = starts  # int64[texts]
        self.ends = ends  # int64[texts]

    @classmethod
    def of(cls, texts: pa.Array | pa.ChunkedArray) -> Analysis:
        """Raises TypeError for a column that is no string."""
        data, offsets = text_buffers(texts)
        return cls(data, offsets[:-1], offsets[1:])

    def __len__(self) -> int:
        return len(self.starts)

    def filter(self, keep: np.ndarray) -> Analysis:
        """The analysis of the rows where `keep` (bool[texts]) holds; what was computed is not computed again."""
        kept = Analysis(self.data, self.starts[keep], self.ends[keep])
        for name in ("characters", "scripts"):
            if name in self.__dict__:
                kept.__dict__[name] = self.__dict__[name][keep]
        for name in ("words", "lines"):
            if name in self.__dict__:
                found = self.__dict__[name]
                kept.__dict__[name] = dataclasses.replace(found, first=found.first[keep], last=found.last[keep])
        return kept

    @cached_property
    def characters(self) -> np.ndarray:
        """int64[texts], code points."""
        return _count_characters(self.data, self.starts, self.ends)

    @cached_property
    def words(self) -> Words:
        offsets, *columns = words.split(self.data, self.starts, self.ends)
        return Words(offsets[:-1], offsets[1:], *columns)

    @cached_property
    def lines(self) -> Lines:
        offsets = _count_lines(self.data, self.starts, self.ends)
        columns = tuple(np.empty(offsets[-1], kind) for kind in (np.int64, np.int64, np.int64, np.uint64))
        _find_lines(self.data, self.starts, self.ends, offsets, *columns)
        return Lines(offsets[:-1], offsets[1:], *columns)

    @cached_property
    def scripts(self) -> np.ndarray:
        """int64[texts, 5]: characters of Han, kana, Hangul, other unspaced scripts, and of no such kind."""
        return _count_scripts(self.data, self.starts, self.ends, characters.table())

    @property
    def language_guess(self) -> pa.Array:
        """string[texts], for thresholds where no language was detected: zh, ja, ko or th by script, else en.

        A text is Chinese if Han characters are a tenth of its characters and it has little kana: in mixed technical text a
        tenth already makes word counts and lengths those of Chinese.
        """
        han, kana, hangul, unspaced = self.scripts.T[:4]
        total = np.maximum(self.scripts.sum(axis=1), 1)
        cjk = han + kana
        guess = np.full(len(self), "en", object)
        guess[unspaced * 10 >= total] = "th"
        guess[hangul * 10 >= total] = "ko"
        guess[(cjk * 10 >= total) & (cjk >= hangul)] = "zh"
        guess[(cjk * 10 >= total) & (cjk >= hangul) & (kana * 10 >= han)] = "ja"
        return pa.array(guess, pa.string())


def text_buffers(texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes uint8, offsets int64[n + 1]) of a string column without copying where it is one large_string chunk.

    Raises TypeError for a column that is no string.
    """
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) or pa.types.is_string_view(texts.type)):
        raise TypeError(f"a text column must hold strings, not {texts.type}")
    array = texts.cast(pa.large_string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    if isinstance(array, pa.ChunkedArray):  # of no chunk at all
        array = pa.array([], pa.large_string())
    if array.null_count:
        array = array.fill_null("")
    if not len(array):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    if data is None or not data.size:
        return np.zeros(0, np.uint8), np.zeros(len(array) + 1, np.int64)
    return np.frombuffer(data, np.uint8), bounds


@numba.njit(cache=True, nogil=True)
def _count_characters(data, starts, ends):  # type: ignore[no-untyped-def]
    out = np.empty(len(starts), np.int64)
    for row in range(len(starts)):
        count = 0
        for i in range(starts[row], ends[row]):
            count += (data[i] & 0xC0) != 0x80
        out[row] = count
    return out


@numba.njit(cache=True, nogil=True)
def _count_lines(data, starts, ends):  # type: ignore[no-untyped-def]
    """Prefix sums of the lines of each text."""
    out = np.zeros(len(starts) + 1, np.int64)
    for row in range(len(starts)):
        count = 1
        for i in range(starts[row], ends[row]):
            count += data[i] == 10
        out[row + 1] = out[row] + count
    return out


@numba.njit(cache=True, nogil=True)
def _find_lines(data, starts, ends, line_offsets, start, length, size, hashes):  # type: ignore[no-untyped-def]
    for row in range(len(starts)):
        line, begin = line_offsets[row], starts[row]
        count, value = 0, np.uint64(0)
        for i in range(starts[row], ends[row] + 1):
            if i == ends[row] or data[i] == 10:
                start[line], length[line], size[line], hashes[line] = begin, i - begin, count, value
                line, begin, count, value = line + 1, i + 1, 0, np.uint64(0)
            else:
                count += (data[i] & 0xC0) != 0x80
                value = value * np.uint64(0x9E3779B97F4A7C15) + (np.uint64(data[i]) + np.uint64(1))


@numba.njit(cache=True, nogil=True)
def _count_scripts(data, starts, ends, table):  # type: ignore[no-untyped-def]
    out = np.zeros((len(starts), 5), np.int64)
    for row in range(len(starts)):
        i, end = starts[row], ends[row]
        while i < end:
            first = np.int32(data[i])
            if first < 0x80:
                out[row, 4] += first > 32
                i += 1
                continue
            if first < 0xE0:
                out[row, 4] += 1
                i += 2
                continue
            if first < 0xF0:
                point = ((first & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F)
                i += 3
            else:
                point = (
                    ((first & 0x07) << 18)
                    | ((np.int32(data[i + 1]) & 0x3F) << 12)
                    | ((np.int32(data[i + 2]) & 0x3F) << 6)
                    | (np.int32(data[i + 3]) & 0x3F)
                )
                i += 4
            bits = class_of(table, point)
            if bits & HAN:
                out[row, 0] += 1
            elif bits & KANA:
                out[row, 1] += 1
            elif bits & HANGUL:
                out[row, 2] += 1
            elif bits & UNSPACED:
                out[row, 3] += 1
            else:
                out[row, 4] += 1
    return out
