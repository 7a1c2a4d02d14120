"""C4's cleaning (Raffel et al. 2020, arXiv:1910.10683, section 2.2), as datatrove 0.10 does it: lines are dropped one by one,
then documents with too few sentences. The text that stays is changed.

Lines are those of `str.splitlines`, words of a line those between white space. Sentences are counted as spaCy's
sentencizer does, which datatrove asks: after an end mark a new one begins at the first token that is neither punctuation
nor an end mark. In Chinese, Japanese and other unspaced scripts two characters count as a word.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from typing import Any, ClassVar

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import UNSPACED_LANGUAGES, analysis_of, base_language, languages
from operators.operator import Operator, Verdict
from operators.text import characters
from operators.text.analysis import Analysis
from operators.text.characters import HAN, KANA, PUNCTUATION, SPACE, TERMINAL, UNSPACED
from operators.text.language import set_column
from operators.text.words import class_of, find_sorted

POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CHINESE_POLICY_PHRASES = ("隐私政策", "隱私政策", "隱私權政策", "使用条款", "使用條款", "使用cookie", "使用 cookie")

# what becomes of a line, in the order of the rules; LOREM and BRACKET condemn the document
_KEEP, _DROP, _LOREM, _JAVASCRIPT, _BRACKET, _POLICY = range(6)
_REASONS = ("lorem_ipsum", "curly_bracket", "few_sentences")


class C4QualitySettings(Settings):
    """C4's rules."""

    languages: list[str] | None = Field(
        default=None,
        description="languages that are judged, null is all; others pass unchanged (FineWeb-2 has no C4 for Chinese)",
    )
    max_word_characters: int | None = Field(default=1000, ge=1, description="lines with a longer word are dropped (not Chinese)")
    citations: bool = Field(default=True, description="remove `[1]`, `[edit]` and `[citation needed]`")
    terminal_punctuation: bool = Field(default=False, description="drop lines that do not end in a mark; C4 does, FineWeb does not")
    min_words: int | None = Field(default=3, ge=1, description="lines with fewer words are dropped")
    lorem_ipsum: bool = Field(default=True, description="drop documents with `lorem ipsum`")
    javascript: bool = Field(default=True, description="drop lines with `javascript`")
    curly_bracket: bool = Field(default=True, description="drop documents with `{`")
    policy: bool = Field(default=True, description="drop lines about cookies, privacy and terms of use (English and Chinese)")
    min_sentences: int | None = Field(default=5, ge=1, description="drop documents with fewer sentences in the lines that stay")


class C4Quality(Operator):
    """Clean lines as C4 does; drop documents with `lorem_ipsum`, `curly_bracket` or `few_sentences`."""

    name: ClassVar[str] = "c4_quality"
    settings = C4QualitySettings
    uses_analysis = True
    changes_text = True

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        found = analysis_of(table, analysis)
        if self.config.languages is not None:
            codes = languages(table, None if _knows_languages(table) else found.language_guess)
            wanted = {base_language(code) for code in self.config.languages}
            judged = np.array([base_language(code) in wanted for code in codes.to_pylist()], np.bool_)
            return self._only(table, found, judged)
        return self._process(table, found)

    def _only(self, table: pa.Table, found: Analysis, judged: np.ndarray) -> Verdict:
        """Judge the rows where `judged` holds."""
        rows = pa.array(judged)
        verdict = self._process(table.filter(rows), found.filter(judged))
        assert verdict.reason is not None and verdict.value is not None
        place = np.where(judged, np.cumsum(judged) - 1, -1)
        index = pa.array(place, pa.int64(), mask=~judged)  # null: not judged
        text = pc.coalesce(verdict.table["text"].take(index), table["text"].cast(pa.large_string()))
        return Verdict(set_column(table, "text", text), verdict.reason.take(index), verdict.value.take(index))

    def _process(self, table: pa.Table, found: Analysis) -> Verdict:
        first, start, end, code, cited = self._judge(found, _unspaced(table, found))
        condemned = _condemning(first, code)  # 0, or the rule that condemns the document
        code[np.repeat(condemned > 0, np.diff(first))] = _DROP
        sentences = self._count_sentences(found, first, start, end, code, cited)
        kept = code == _KEEP
        size = int((end - start)[kept].sum() + kept.sum())
        out, offsets = np.empty(size, np.uint8), np.zeros(len(found) + 1, np.int64)
        _assemble(found.data, first, start, end, code, cited, _digits(), characters.table(), out, offsets)
        text = pa.Array.from_buffers(pa.large_string(), len(found), [None, pa.py_buffer(offsets), pa.py_buffer(out[: offsets[-1]])])

        few = sentences < self.config.min_sentences if self.config.min_sentences is not None else np.diff(offsets) == 0
        verdict = np.select([condemned == _LOREM, condemned == _BRACKET, few], [0, 1, 2], -1)
        reason = pa.array(_REASONS).take(pa.array(verdict, pa.int64(), mask=verdict < 0))
        value = pa.array(sentences.astype(np.float64), mask=verdict != 2)
        return Verdict(set_column(table, "text", text), reason, value)

    def _judge(self, found: Analysis, unspaced: np.ndarray) -> tuple[np.ndarray, ...]:
        """(first line of each text int64[texts + 1], and of each line: its stripped bytes from start to end (int64), what
        becomes of it (int8), whether a citation must be cut out (bool))."""
        config = self.config
        phrases = _phrases(config.lorem_ipsum, config.javascript, config.curly_bracket, config.policy)
        longest = sys.maxsize if config.max_word_characters is None else config.max_word_characters
        most = int((found.ends - found.starts).sum())  # a line a byte: the pages that are not written are never allocated
        first = np.zeros(len(found) + 1, np.int64)
        lines = (np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int8), np.zeros(most, np.bool_))
        _judge(
            found.data, found.starts, found.ends, unspaced, characters.table(), _digits(), *phrases,
            longest, config.min_words or 0, config.citations, config.terminal_punctuation, first, *lines,
        )  # fmt: skip
        return first, *(column[: first[-1]] for column in lines)

    def _count_sentences(self, found: Analysis, first: np.ndarray, *lines: np.ndarray) -> np.ndarray:
        """int64[texts], sentences in the lines that stay."""
        counts = np.zeros(len(found), np.int64)
        if self.config.min_sentences is None:
            return counts
        start, end, code, cited = lines
        words, table = found.words, characters.table()
        _count_sentences(
            found.data, words.first, words.last, words.start, words.length, words.characters, table, first, start, end,
            (code == _KEEP) & ~cited, counts,
        )  # fmt: skip
        rows = np.flatnonzero((code == _KEEP) & cited)
        if len(rows):  # lines without their citations have other words
            out, offsets = np.empty(int((end - start)[rows].sum()), np.uint8), np.zeros(len(rows) + 1, np.int64)
            _cut_lines(found.data, start[rows], end[rows], _digits(), out, offsets)
            cut = Analysis(out, offsets[:-1], offsets[1:])
            words, whole = cut.words, np.arange(len(rows) + 1)
            own = np.zeros(len(rows), np.int64)
            _count_sentences(
                cut.data, words.first, words.last, words.start, words.length, words.characters, table, whole, offsets[:-1],
                offsets[1:], np.ones(len(rows), np.bool_), own,
            )  # fmt: skip
            np.add.at(counts, np.searchsorted(first, rows, "right") - 1, own)
        return counts


def _unspaced(table: pa.Table, analysis: Analysis) -> np.ndarray:
    """bool[texts], whether the language is written without spaces."""
    encoded: Any = languages(table, None if _knows_languages(table) else analysis.language_guess).dictionary_encode()
    listed = np.array([base_language(code) in UNSPACED_LANGUAGES for code in encoded.dictionary.to_pylist()], np.bool_)
    return listed[encoded.indices.to_numpy()]


def _knows_languages(table: pa.Table) -> bool:
    return "lang" in table.column_names and not table["lang"].null_count


def _condemning(first: np.ndarray, code: np.ndarray) -> np.ndarray:
    """int8[texts]: the code of the first line that condemns its text, else 0."""
    out = np.zeros(len(first) - 1, np.int8)
    rows = np.flatnonzero((code == _LOREM) | (code == _BRACKET))
    texts = np.searchsorted(first, rows, "right") - 1
    out[texts[::-1]] = code[rows[::-1]]  # the first line is written last
    return out


@functools.cache
def _digits() -> np.ndarray:
    """Sorted code points (int32) of category Nd, `\\d` of Python's regular expressions."""
    return np.array([point for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point)) == "Nd"], np.int32)


_GOES_ON, _MAY_END, _MAY_CITE, _MAY_BE_PHRASE = range(4)  # kinds of bytes
_FREQUENT = b"etaoinsrhldcumfpgywbvkxjqz"  # letters of English text, the most frequent first


@functools.cache
def _phrases(lorem: bool, javascript: bool, bracket: bool, policy: bool) -> tuple[np.ndarray, ...]:
    """(kind of each byte, bytes of all phrases, their offsets, the code of each, the position of its anchor, for each byte
    the phrase that it anchors or -1, and the next one).

    A phrase is looked for where its anchor is, its rarest byte. Phrases are lower case; a letter anchors in either case.
    """
    wanted = [(b"lorem ipsum", _LOREM)] * lorem + [(b"javascript", _JAVASCRIPT)] * javascript + [(b"{", _BRACKET)] * bracket
    if policy:
        wanted += [(phrase.encode(), _POLICY) for phrase in (*POLICY_PHRASES, *CHINESE_POLICY_PHRASES)]
    data = np.frombuffer(b"".join(phrase for phrase, _ in wanted), np.uint8)
    offsets = np.cumsum([0, *(len(phrase) for phrase, _ in wanted)]).astype(np.int64)
    codes = np.array([code for _, code in wanted], np.int8)
    anchors = np.array([max(range(len(phrase)), key=lambda k: _rarity(phrase[k])) for phrase, _ in wanted], np.int64)
    by_byte, following = np.full(256, -1, np.int64), np.full(len(wanted), -1, np.int64)
    for number in range(len(wanted) - 1, -1, -1):
        anchor = wanted[number][0][anchors[number] : anchors[number] + 1]
        following[number] = by_byte[anchor[0]]
        by_byte[anchor[0]] = by_byte[anchor.upper()[0]] = number
    kinds = np.where(by_byte >= 0, _MAY_BE_PHRASE, _GOES_ON).astype(np.uint8)
    kinds[[*range(10, 14), *range(28, 31), 0xC2, 0xE2]] = _MAY_END
    kinds[ord("[")] = _MAY_CITE
    return kinds, data, offsets, codes, anchors, by_byte, following


def _rarity(byte: int) -> int:
    if byte >= 0x80:  # the first byte of a wide character says little, those after it are one in 64
        return 100 if byte < 0xC0 else 0
    return _FREQUENT.find(byte) if chr(byte).isalpha() else 50 if byte != 32 else -1


@numba.njit(cache=True, nogil=True, inline="always")
def _point(data, i):  # type: ignore[no-untyped-def]
    """(code point that begins at byte `i`, its bytes)."""
    byte = np.int32(data[i])
    if byte < 0x80:
        return byte, 1
    if byte < 0xE0:
        return ((byte & 0x1F) << 6) | (np.int32(data[i + 1]) & 0x3F), 2
    if byte < 0xF0:
        return ((byte & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F), 3
    return (
        ((byte & 0x07) << 18)
        | ((np.int32(data[i + 1]) & 0x3F) << 12)
        | ((np.int32(data[i + 2]) & 0x3F) << 6)
        | (np.int32(data[i + 3]) & 0x3F)
    ), 4


@numba.njit(cache=True, nogil=True, inline="always")
def _ends_line(point):  # type: ignore[no-untyped-def]
    """Whether `str.splitlines` splits there."""
    return 10 <= point <= 13 or 28 <= point <= 30 or point == 0x85 or point == 0x2028 or point == 0x2029


@numba.njit(cache=True, nogil=True)
def _citation(data, i, end, digits):  # type: ignore[no-untyped-def]
    r"""Bytes of `\[\d*\]|\[edit\]|\[citation needed\]` at byte `i` (a `[`), or 0."""
    j = i + 1
    if end - j >= 5 and data[j] == 101 and data[j + 1] == 100 and data[j + 2] == 105 and data[j + 3] == 116 and data[j + 4] == 93:
        return 6
    if end - j >= 16 and data[j] == 99:
        wanted = b"citation needed]"
        for k in range(16):
            if data[j + k] != wanted[k]:
                return 0
        return 17
    while j < end:
        if data[j] == 93:
            return j + 1 - i
        if 48 <= data[j] <= 57:
            j += 1
        elif data[j] >= 0x80:
            point, step = _point(data, j)
            if find_sorted(digits, point) < 0:
                return 0
            j += step
        else:
            return 0
    return 0


@numba.njit(cache=True, nogil=True)
def _cut(data, start, end, digits, out, used):  # type: ignore[no-untyped-def]
    """Copy the bytes without citations to `out[used:]`. Returns where they end."""
    i = start
    while i < end:
        if data[i] == 91:
            size = _citation(data, i, end, digits)
            if size:
                i += size
                continue
        out[used] = data[i]
        used += 1
        i += 1
    return used


@numba.njit(cache=True, nogil=True)
def _cut_lines(data, start, end, digits, out, offsets):  # type: ignore[no-untyped-def]
    used = 0
    for line in range(len(start)):
        used = _cut(data, start[line], end[line], digits, out, used)
        offsets[line + 1] = used


@numba.njit(cache=True, nogil=True)
def _phrase_at(data, i, start, end, worst, phrases, offsets, codes, anchors, by_byte, following):  # type: ignore[no-untyped-def]
    """The lowest of `worst`, if it is not 0, and the codes of the phrases between start and end that byte `i` anchors."""
    number = by_byte[data[i]]
    while number >= 0:
        begin, size = i - anchors[number], offsets[number + 1] - offsets[number]
        if begin >= start and begin + size <= end and (not worst or codes[number] < worst):
            k = 0
            while k < size:
                byte = data[begin + k]
                if 65 <= byte <= 90:
                    byte |= 32
                if byte != phrases[offsets[number] + k]:
                    break
                k += 1
            if k == size:
                worst = np.int64(codes[number])
        number = following[number]
    return worst


@numba.njit(cache=True, nogil=True)
def _has_terminal(data, start, end, unspaced):  # type: ignore[no-untyped-def]
    """Whether the bytes end in `. ? ! " '` and no `...`; in unspaced scripts in one of those or of `。！？…”’」』；：)）`."""
    if start == end:
        return False
    last = end - 1
    while (data[last] & 0xC0) == 0x80:
        last -= 1
    point, _ = _point(data, last)
    plain = point == 46 or point == 63 or point == 33 or point == 34 or point == 39
    if unspaced:
        return plain or (
            point == 0x3002 or point == 0xFF01 or point == 0xFF1F or point == 0x2026 or point == 0x201D or point == 0x2019
            or point == 0x300D or point == 0x300F or point == 0xFF1B or point == 0xFF1A or point == 41 or point == 0xFF09
        )  # fmt: skip
    return plain and not (end - start >= 3 and data[end - 1] == 46 and data[end - 2] == 46 and data[end - 3] == 46)


@numba.njit(cache=True, nogil=True)
def _has_long_word(data, start, end, longest, table):  # type: ignore[no-untyped-def]
    """Whether more than `longest` characters follow each other without white space."""
    last = start - 1  # a space; where one is in every `longest` bytes, nothing else need be read
    while last + longest < end:
        i = last + longest
        while i > last and data[i] != 32:
            i -= 1
        if i == last:
            break
        last = i
    if last + longest >= end:
        return False
    run, i = 0, start
    while i < end:
        point, step = _point(data, i)
        run = 0 if class_of(table, point) & SPACE else run + 1
        if run > longest:
            return True
        i += step
    return False


@numba.njit(cache=True, nogil=True)
def _count_words(data, start, end, most, table):  # type: ignore[no-untyped-def]
    """Words between white space, up to `most`."""
    words, inside, i = 0, False, start
    while i < end and words < most:
        step, is_space = 1, False
        if not 32 < data[i] < 0x80:
            point, step = _point(data, i)
            is_space = class_of(table, point) & SPACE != 0
        words += not (is_space or inside)
        inside = not is_space
        i += step
    return words


@numba.njit(cache=True, nogil=True)
def _judge_cut(  # type: ignore[no-untyped-def]
    data, start, end, unspaced, digits, terminal, phrases, offsets, codes, anchors, by_byte, following
):
    """(Whether the line has citations, whether it ends without them as it must, the code of its worst phrase without them.)"""
    out = np.empty(end - start, np.uint8)
    size = _cut(data, start, end, digits, out, 0)
    if size == end - start:
        return False, False, 0
    worst = 0
    for i in range(size):
        if by_byte[out[i]] >= 0:
            worst = _phrase_at(out, i, 0, size, worst, phrases, offsets, codes, anchors, by_byte, following)
    return True, not terminal or _has_terminal(out, 0, size, unspaced), worst


@numba.njit(cache=True, nogil=True)
def _judge(  # type: ignore[no-untyped-def]
    data, starts, ends, unspaced, table, digits, kinds, phrases, offsets, codes, anchors, by_byte, following,
    longest, min_words, citations, terminal, first, start, end, code, cited,
):  # fmt: skip
    """Every byte is read once, for the end of the line, citations and phrases; what else decides is read where it may."""
    line = 0
    for row in range(len(starts)):
        i, stop = starts[row], ends[row]
        while i < stop:
            begin, finish = i, stop
            worst, has_bracket = 0, False
            while i < stop:
                kind = kinds[data[i]]
                if kind == _GOES_ON:
                    i += 1
                elif kind == _MAY_BE_PHRASE:  # no phrase holds the end of a line
                    worst = _phrase_at(data, i, begin, stop, worst, phrases, offsets, codes, anchors, by_byte, following)
                    i += 1
                elif kind == _MAY_CITE:
                    has_bracket = True
                    i += 1
                else:
                    point, step = _point(data, i)
                    if _ends_line(point):
                        finish = i
                        i += step
                        if point == 13 and i < stop and data[i] == 10:
                            i += 1
                        break
                    i += step
            while begin < finish:  # without white space at its ends
                point, step = _point(data, begin)
                if not class_of(table, point) & SPACE:
                    break
                begin += step
            while begin < finish:
                last = finish - 1
                while (data[last] & 0xC0) == 0x80:
                    last -= 1
                point, _ = _point(data, last)
                if not class_of(table, point) & SPACE:
                    break
                finish = last
            here = line
            line += 1
            start[here], end[here] = begin, finish
            code[here] = _DROP
            if finish - begin > longest and not unspaced[row] and _has_long_word(data, begin, finish, longest, table):
                continue
            cut = False
            if has_bracket and citations:
                cut, fits, found = _judge_cut(
                    data, begin, finish, unspaced[row], digits, terminal, phrases, offsets, codes, anchors, by_byte, following
                )
                if cut:
                    cited[here] = True
                    worst = found
                    if not fits:
                        continue
            if terminal and not cut and not _has_terminal(data, begin, finish, unspaced[row]):
                continue
            words = _count_words(data, begin, finish, min_words, table)
            if words < min_words and unspaced[row]:
                wide = 0
                k = begin
                while k < finish:
                    point, step = _point(data, k)
                    wide += (class_of(table, point) & (HAN | KANA | UNSPACED)) != 0
                    k += step
                words += wide // 2
            if words >= min_words:
                code[here] = worst
        first[row + 1] = line


@numba.njit(cache=True, nogil=True)
def _count_sentences(  # type: ignore[no-untyped-def]
    data, first_word, last_word, word, length, size, table, first, start, end, kept, out
):
    """Add the sentences of the kept lines of each text to `out`; a line has one at least."""
    for row in range(len(first_word)):
        w = first_word[row]
        for line in range(first[row], first[row + 1]):
            while w < last_word[row] and word[w] < start[line]:
                w += 1
            if not kept[line]:
                continue
            sentences, ended, previous = 1, False, np.int64(-1)
            while w < last_word[row] and word[w] < end[line]:
                is_end = False
                if size[w] == 1:
                    point, _ = _point(data, word[w])
                    is_end = (class_of(table, point) & TERMINAL) != 0
                if ended:
                    gap = word[w] - previous
                    # all white space but a single space is a token to spaCy, and no punctuation
                    if (gap > 1 or (gap == 1 and data[previous] != 32)) or not (
                        is_end or _is_punctuation(data, word[w], word[w] + length[w], table)
                    ):
                        sentences += 1
                        ended = False
                ended |= is_end
                previous = word[w] + length[w]
                w += 1
            out[row] += sentences


@numba.njit(cache=True, nogil=True)
def _is_punctuation(data, start, end, table):  # type: ignore[no-untyped-def]
    i = start
    while i < end:
        point, step = _point(data, i)
        if not class_of(table, point) & PUNCTUATION:
            return False
        i += step
    return True


@numba.njit(cache=True, nogil=True)
def _assemble(data, first, start, end, code, cited, digits, table, out, offsets):  # type: ignore[no-untyped-def]
    """The kept lines of each text joined by line feeds, without white space at either end."""
    used = 0
    for row in range(len(first) - 1):
        begin, lines = used, 0
        for line in range(first[row], first[row + 1]):
            if code[line] != _KEEP:
                continue
            if lines:
                out[used] = 10
                used += 1
            lines += 1
            if cited[line]:
                used = _cut(data, start[line], end[line], digits, out, used)
            else:
                size = end[line] - start[line]
                out[used : used + size] = data[start[line] : end[line]]
                used += size
        low = begin
        while low < used:
            point, step = _point(out, low)
            if not class_of(table, point) & SPACE:
                break
            low += step
        while used > low:
            last = used - 1
            while (out[last] & 0xC0) == 0x80:
                last -= 1
            point, _ = _point(out, last)
            if not class_of(table, point) & SPACE:
                break
            used = last
        if low > begin:
            for k in range(used - low):
                out[begin + k] = out[low + k]
            used -= low - begin
        offsets[row + 1] = used
