"""Word boundaries of a batch of texts, as offsets into its bytes. No Python object per word.

Spaced scripts are split as spaCy's blank English pipeline does (whitespace, then prefixes, suffixes, exceptions and
infixes; spacy/tokenizer.pyx and spacy/lang/punctuation.py, MIT), which is what Gopher's rules count in datatrove.
Chinese is segmented by jieba, as for datatrove's `cmn_Hani`; where a tenth of a text is Han, its other words are jieba's
too (letters and digits, marks). A text with much kana is Japanese: each of its Han and kana
characters is a word, and so is each base character (with its marks) of Thai, Lao, Khmer, Burmese and Tibetan.
"""

from __future__ import annotations

import functools
from importlib import resources

import numba
import numpy as np
import rjieba

from operators.text import characters
from operators.text.characters import (
    AFFIX,
    ALPHA,
    CURRENCY,
    DIGIT,
    HAN,
    ICON,
    KANA,
    LOWER,
    MARK,
    PREFIX,
    PUNCT_BEFORE_DOT,
    QUOTE,
    SPACE,
    SYMBOL,
    TABLE_SIZE,
    UNSPACED,
    UPPER,
)

HAS_ALPHA = 1  # a word with a letter
NOT_SYMBOL = 2  # a word with something other than punctuation

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the polynomial hash of a concatenation composes mod 2**64
_ONE = np.uint64(1)
_EXCEPTION_BYTES = 24
_UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb MB"
    " kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч кПа Па мбар Кб КБ кб"
    " Мб МБ мб Гб ГБ гб Тб ТБ тб"
)


@numba.njit(cache=True, nogil=True, inline="always")
def mix(value):  # type: ignore[no-untyped-def]
    """Spread a 64-bit hash over all bits (the finaliser of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def hash_bytes(data, start, end):  # type: ignore[no-untyped-def]
    """Polynomial hash of bytes, mod 2**64."""
    value = np.uint64(0)
    for i in range(start, end):
        value = value * _BASE + (np.uint64(data[i]) + _ONE)
    return value


def hash_text(text: str) -> int:
    """`hash_bytes` of a string, for tables of words to look up."""
    value = 0
    for byte in text.encode():
        value = (value * int(_BASE) + byte + 1) & 0xFFFFFFFFFFFFFFFF
    return value


@functools.cache
def _exceptions() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(hashes uint64[slots] at their place in an open-addressing table, 0 where free; lengths in characters of up to four
    pieces uint8[slots, 4]; of the exceptions that begin with each byte, and that end with it, the lengths in bytes as bits
    uint32[256])."""
    found: dict[int, list[int]] = {}
    lines = resources.files(__package__).joinpath("english_exceptions.txt").read_text("utf-8").split("\n")
    begin, end = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    for line in lines:
        if line and not line.startswith("# "):
            pieces = line.split("\t")
            whole = "".join(pieces).encode()
            if len(whole) <= _EXCEPTION_BYTES:
                found[hash_text("".join(pieces))] = [len(piece) for piece in pieces]
                begin[whole[0]] |= np.uint32(1 << len(whole))
                end[whole[-1]] |= np.uint32(1 << len(whole))
    hashes, lengths = np.zeros(8192, np.uint64), np.zeros((8192, 4), np.uint8)
    for key in sorted(found):
        slot = key & 8191
        while hashes[slot]:
            slot = (slot + 1) & 8191
        hashes[slot] = key
        lengths[slot, : len(found[key])] = found[key]
    return hashes, lengths, begin, end


@functools.cache
def _units() -> np.ndarray:
    """Sorted hashes of the measuring units that are split off a number."""
    return np.array(sorted({hash_text(unit) for unit in _UNITS.split()}), np.uint64)


@numba.njit(cache=True, nogil=True)
def find_sorted(table, key):  # type: ignore[no-untyped-def]
    """Index of `key` in a sorted array, or -1."""
    low, high = 0, len(table)
    while low < high:
        middle = (low + high) >> 1
        if table[middle] < key:
            low = middle + 1
        else:
            high = middle
    if low < len(table) and table[low] == key:
        return low
    return -1


@numba.njit(cache=True, nogil=True, inline="always")
def decode_one(data, i):  # type: ignore[no-untyped-def]
    """(code point that begins at byte `i` of valid UTF-8, its bytes)."""
    first = np.int32(data[i])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return ((first & 0x1F) << 6) | (np.int32(data[i + 1]) & 0x3F), 2
    if first < 0xF0:
        return ((first & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F), 3
    return (
        ((first & 0x07) << 18)
        | ((np.int32(data[i + 1]) & 0x3F) << 12)
        | ((np.int32(data[i + 2]) & 0x3F) << 6)
        | (np.int32(data[i + 3]) & 0x3F)
    ), 4


@numba.njit(cache=True, nogil=True, inline="always")
def class_of(flags, point):  # type: ignore[no-untyped-def]
    return flags[point] if point < TABLE_SIZE else np.uint32(0)


@numba.njit(cache=True, nogil=True, inline="always")
def _may_be_exception(first, last, size, begin, end):  # type: ignore[no-untyped-def]
    """Whether an exception of that many bytes begins and one ends with these bytes."""
    return size <= _EXCEPTION_BYTES and (begin[first] & end[last]) >> np.uint32(size) & np.uint32(1) != 0


@numba.njit(cache=True, nogil=True, inline="always")
def _find_exception(hashes, key):  # type: ignore[no-untyped-def]
    """Slot of the exception with that hash, or -1."""
    slot = np.int64(key & np.uint64(8191))
    while hashes[slot] != 0:
        if hashes[slot] == key:
            return slot
        slot = (slot + 1) & 8191
    return -1


@numba.njit(cache=True, nogil=True)
def _exception_at(data, where, low, high, hashes, begin, end):  # type: ignore[no-untyped-def]
    size = where[high] - where[low]
    if not _may_be_exception(data[where[low]], data[where[high] - 1], size, begin, end):
        return -1
    return _find_exception(hashes, hash_bytes(data, where[low], where[high]))


@numba.njit(cache=True, nogil=True)
def _prefix(points, bits, low, high):  # type: ignore[no-untyped-def]
    """Length in characters of the prefix that is split off, or 0."""
    c = points[low]
    if c == 46 and low + 1 < high and points[low + 1] == 46:  # two dots or more
        length = 2
        while low + length < high and points[low + length] == 46:
            length += 1
        return length
    if c == 43:  # a plus that is no sign
        return 0 if low + 1 < high and bits[low + 1] & DIGIT else 1
    if bits[low] & (AFFIX | PREFIX):
        return 1
    if c == 85 and low + 2 < high and points[low + 1] == 83 and points[low + 2] == 36:  # US$
        return 3
    if (c == 67 or c == 65) and low + 1 < high and points[low + 1] == 36:  # C$, A$
        return 2
    return 0


@numba.njit(cache=True, nogil=True)
def _suffix(data, where, points, bits, low, high, digits, units):  # type: ignore[no-untyped-def]
    """Length in characters of the longest suffix that is split off, or 0."""
    last = points[high - 1]
    flags = bits[high - 1]
    if last == 46:
        length = 1
        while high - length > low and points[high - length - 1] == 46:
            length += 1
        if length >= 2:
            return length
        if high - 2 < low:
            return 0
        before = bits[high - 2]
        if before & (DIGIT | LOWER | PUNCT_BEFORE_DOT):
            return 1
        if high - 3 >= low and before & UPPER and bits[high - 3] & UPPER:
            return 1
        if high - 3 >= low and points[high - 3] == 0xB0 and points[high - 2] in (67, 70, 75, 99, 102, 107):
            return 1
        return 0
    if (last == 115 or last == 83) and high - 2 >= low and (points[high - 2] == 39 or points[high - 2] == 0x2019):
        return 2
    if last == 0x2026 and high - 2 >= low and points[high - 2] == 0x2026:
        return 2
    # a unit or a currency after a digit
    for length in range(4 if digits else 0, 0, -1):
        if high - length - 1 >= low and bits[high - length - 1] & DIGIT:
            if length == 1 and flags & CURRENCY:
                return 1
            if length == 3 and last == 36 and points[high - 2] == 83 and points[high - 3] == 85:
                return 3
            if length == 2 and last == 36 and (points[high - 2] == 67 or points[high - 2] == 65):
                return 2
            if length == 1 and last == 43:
                return 1
            if find_sorted(units, hash_bytes(data, where[high - length], where[high])) >= 0:
                return length
    return 1 if flags & AFFIX else 0


@numba.njit(cache=True, nogil=True)
def _infix(points, bits, low, i, high):  # type: ignore[no-untyped-def]
    """Length in characters of the infix at position `i`, or 0."""
    c = points[i]
    if c == 46 and i + 1 < high and points[i + 1] == 46:
        length = 2
        while i + length < high and points[i + length] == 46:
            length += 1
        return length
    if c == 0x2026 or bits[i] & ICON:
        return 1
    if i == low or i + 1 >= high:
        return 0
    before, after = bits[i - 1], bits[i + 1]
    if c in (43, 45, 42, 94) and before & DIGIT and (after & DIGIT or points[i + 1] == 45):
        return 1
    if c == 46:
        return 1 if before & (LOWER | QUOTE) and after & (UPPER | QUOTE) else 0
    if c == 44:
        return 1 if before & ALPHA and after & ALPHA else 0
    if not before & (ALPHA | DIGIT):
        return 0
    if c in (45, 0x2013, 0x2014, 126):
        if after & ALPHA:
            return 1
        if c == 45 and points[i + 1] == 45:
            if i + 2 < high and bits[i + 2] & ALPHA:
                return 2
            if i + 3 < high and points[i + 2] == 45 and bits[i + 3] & ALPHA:
                return 3
        if c == 0x2014 and points[i + 1] == 0x2014 and i + 2 < high and bits[i + 2] & ALPHA:
            return 2
        return 0
    if c in (58, 60, 62, 61, 47) and after & ALPHA:
        return 1
    return 0


@numba.njit(cache=True, nogil=True)
def _host_end(points, bits, start, high):  # type: ignore[no-untyped-def]
    """Whether a host name with a top-level domain, an optional port and path fill [start, high)."""
    i, label, dots = start, start, 0
    while i < high:
        c = points[i]
        wide = 0xA1 <= c <= 0xFFFF
        letter = (65 <= c <= 90) or (97 <= c <= 122) or (48 <= c <= 57) or wide
        if letter or c == 45 or c == 95:
            i += 1
        elif c == 46:
            if i == label or i - label > 64 or points[i - 1] in (45, 95) or points[label] in (45, 95):
                return False
            dots += 1
            i += 1
            label = i
        else:
            break
    if dots == 0 or i - label < 2 or i - label > 63:
        return False
    for j in range(label, i):
        if not bits[j] & LOWER:
            return False
    if i < high and points[i] == 58:
        j = i + 1
        while j < high and bits[j] & DIGIT:
            j += 1
        if not 2 <= j - i - 1 <= 5:
            return False
        i = j
    return i == high or points[i] in (47, 63, 35)


@numba.njit(cache=True, nogil=True)
def _is_url(points, bits, low, high):  # type: ignore[no-untyped-def]
    start, dot = low, False
    for i in range(low, high):
        dot |= points[i] == 46
        if points[i] == 58 and i + 2 < high and points[i + 1] == 47 and points[i + 2] == 47 and start == low and i - low >= 2:
            start = i + 3
    if not dot:
        return False
    for i in range(low, start - 3):
        if not (bits[i] & (ALPHA | DIGIT) or points[i] in (43, 45, 46, 95)):
            start = low
            break
    if _host_end(points, bits, start, high):
        return True
    for i in range(high - 2, start, -1):  # noqa: SIM110 (compiled: no generators)
        if points[i] == 64 and _host_end(points, bits, i + 1, high):
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _spaced(  # type: ignore[no-untyped-def]
    data, where, points, bits, low, high, ends, words, hashes, pieces, first_bytes, last_bytes, units, suffixes
):
    """Split one run of non-space characters as spaCy's English tokenizer does: append where each word ends to `ends`."""
    plain, digits, dots = True, False, False
    for i in range(low, high):
        plain &= (bits[i] & ALPHA) != 0
        digits |= (bits[i] & DIGIT) != 0
        dots |= points[i] == 46
    if plain and high - low > 12:  # no exception is that long, no rule splits letters
        ends[words] = high
        return words + 1
    found, stripped = -1, 0
    while low < high:
        found = _exception_at(data, where, low, high, hashes, first_bytes, last_bytes)
        if found >= 0 or plain:
            break
        before = high - low
        prefix = _prefix(points, bits, low, high)
        if prefix:
            if low + prefix < high:
                found = _exception_at(data, where, low + prefix, high, hashes, first_bytes, last_bytes)
            if found >= 0:
                low += prefix
                ends[words] = low
                words += 1
                break
        suffix = _suffix(data, where, points, bits, low + prefix, high, digits, units) if low + prefix < high else 0
        if suffix and low < high - suffix:
            found = _exception_at(data, where, low, high - suffix, hashes, first_bytes, last_bytes)
            if found >= 0:
                suffixes[stripped] = suffix
                stripped += 1
                high -= suffix
                break
        if prefix:
            low += prefix
            ends[words] = low
            words += 1
        if suffix and low < high:
            suffixes[stripped] = suffix
            stripped += 1
            high -= suffix
        if high - low == before:
            break
    if low < high:
        if found >= 0:
            for k in range(4):
                if pieces[found, k]:
                    low += pieces[found, k]
                    ends[words] = low
                    words += 1
        elif plain or (dots and _is_url(points, bits, low, high)):
            ends[words] = high
            words += 1
        else:
            begin, i = low, low
            while i < high:
                if bits[i] & (ALPHA | DIGIT) or points[i] == 95:  # most characters of most words: no infix
                    i += 1
                    continue
                infix = _infix(points, bits, low, i, high)
                if infix and i > begin:
                    ends[words], ends[words + 1] = i, i + infix
                    words += 2
                    begin = i + infix
                i += max(infix, 1)
            if begin < high:
                ends[words] = high
                words += 1
    for k in range(stripped - 1, -1, -1):
        high += suffixes[k]
        ends[words] = high
        words += 1
    return words


@numba.njit(cache=True, nogil=True)
def _jieba_end(points, begin, count):  # type: ignore[no-untyped-def]
    r"""Where a word of other than Han characters ends: `[a-zA-Z0-9]+(\.[0-9]+)?%?`, `[+#&._%-]+` or any one character."""
    i = begin
    while i < count and (48 <= points[i] <= 57 or 65 <= points[i] <= 90 or 97 <= points[i] <= 122):
        i += 1
    if i > begin:
        if i + 1 < count and points[i] == 46 and 48 <= points[i + 1] <= 57:
            i += 2
            while i < count and 48 <= points[i] <= 57:
                i += 1
        return i + 1 if i < count and points[i] == 37 else i
    while i < count and (points[i] in (35, 37, 38, 43, 45, 46, 95)):
        i += 1
    return max(i, begin + 1)


@numba.njit(cache=True, nogil=True)
def _kind(data, start, end, table):  # type: ignore[no-untyped-def]
    """(whether the text is Chinese: Han characters, and less than a tenth as much kana; whether so much of it that jieba's
    rules fit the rest better than those of spaced text: a tenth of what is no space)."""
    wide = False
    for i in range(start, end):  # no branch: many bytes a cycle
        wide |= data[i] >= 0xE3
    if not wide:
        return False, False
    han = kana = total = 0
    i = start
    while i < end:
        if data[i] < 0x80:
            total += data[i] > 32 or not class_of(table, data[i]) & SPACE
            i += 1
            continue
        point, step = decode_one(data, i)
        bits = class_of(table, point)
        total += (bits & SPACE) == 0
        if point >= 0x3005:
            han += (bits & HAN) != 0
            kana += (bits & KANA) != 0
        i += step
    chinese = han > 0 and kana * 10 < han
    return chinese, chinese and han * 10 >= total


@numba.njit(cache=True, nogil=True)
def _han_runs(data, starts, ends, flags, out):  # type: ignore[no-untyped-def]
    """The runs of Han characters of the Chinese texts, each followed by a line feed, into `out`. Returns the bytes used."""
    used = 0
    for row in range(len(starts)):
        chinese, _ = _kind(data, starts[row], ends[row], flags)
        if not chinese:
            continue
        inside = False
        i, end = starts[row], ends[row]
        while i < end:
            if data[i] < 0x80:
                step, han = 1, False
            else:
                point, step = decode_one(data, i)
                han = class_of(flags, point) & HAN != 0
            if han:
                for j in range(i, i + step):
                    out[used] = data[j]
                    used += 1
            elif inside:
                out[used] = 10
                used += 1
            inside = han
            i += step
        if inside:
            out[used] = 10
            used += 1
    return used


_A_SPACE, _A_LETTER, _A_MARK, _WIDE = 0, 1, 2, 3  # classes of a byte


@functools.cache
def _byte_classes() -> np.ndarray:
    """uint8[256]: space, letter, any other ASCII character, part of a wider character."""
    table = characters.table()[:128]
    return np.concatenate([np.select([table & SPACE != 0, table & ALPHA != 0], [0, 1], 2), np.full(128, 3)]).astype(np.uint8)


@numba.njit(cache=True, nogil=True)
def _split(  # type: ignore[no-untyped-def]
    data, starts, ends, table, classes, cuts, hashes, pieces, first_bytes, last_bytes, units,
    points, where, bits, word_ends, suffixes, start_of, length_of, size_of, flags_of, hash_of, word_offsets,
):  # fmt: skip
    """Words of every text; `cuts` are the lengths of the Chinese words, in order. Returns their number, or -1 where a run
    is longer than the buffers of one (`points` to `suffixes`).

    Runs of ASCII letters, with a mark after them or not, are most of what English text is: they are split from the bytes.
    Every other run between white space is decoded and goes by the rules. (No array is assigned and no tuple of arrays
    passed in here: each would be counted as a reference, atomically, for every word.)
    """
    unspaced = HAN | KANA | UNSPACED
    words, cut = 0, 0
    for row in range(len(starts)):
        word_offsets[row] = words
        chinese, jieba = _kind(data, starts[row], ends[row], table)
        i, end = starts[row], ends[row]
        while i < end:
            kind = classes[data[i]]
            if kind == _A_SPACE:
                i += 1
                continue
            begin = i
            if kind == _A_LETTER:
                key = np.uint64(0)
                while i < end and classes[data[i]] == _A_LETTER:
                    key = key * _BASE + (np.uint64(data[i]) + _ONE)
                    i += 1
                after = i
                if i < end and classes[data[i]] == _A_MARK and (i + 1 == end or classes[data[i + 1]] == _A_SPACE) and not jieba:
                    after += _splits_off(data, begin, i, key, hashes, first_bytes, last_bytes)
                if after == end or classes[data[after]] == _A_SPACE:
                    slot = -1
                    if not jieba and _may_be_exception(data[begin], data[i - 1], i - begin, first_bytes, last_bytes):
                        slot = _find_exception(hashes, key)
                    if slot >= 0:
                        low = begin
                        for k in range(4):
                            size = np.int64(pieces[slot, k])
                            if size:
                                start_of[words], length_of[words], size_of[words] = low, size, size
                                flags_of[words], hash_of[words] = HAS_ALPHA | NOT_SYMBOL, hash_bytes(data, low, low + size)
                                low += size
                                words += 1
                    else:
                        start_of[words], length_of[words], size_of[words] = begin, i - begin, i - begin
                        flags_of[words], hash_of[words] = HAS_ALPHA | NOT_SYMBOL, key
                        words += 1
                    if after > i:
                        start_of[words], length_of[words], size_of[words] = i, 1, 1
                        flags_of[words], hash_of[words] = 0, np.uint64(data[i]) + _ONE
                        words += 1
                    i = after
                    continue
                i = begin
            elif kind == _A_MARK and not jieba and (i + 1 == end or classes[data[i + 1]] == _A_SPACE):
                start_of[words], length_of[words], size_of[words] = i, 1, 1
                flags_of[words] = 0 if table[data[i]] & SYMBOL else NOT_SYMBOL
                hash_of[words] = np.uint64(data[i]) + _ONE
                words += 1
                i += 1
                continue
            # the run up to the next white space, decoded
            count = 0
            while i < end:
                if data[i] < 0x80:
                    point, step = np.int32(data[i]), 1
                else:
                    point, step = decode_one(data, i)
                flags = class_of(table, point)
                if flags & SPACE:
                    break
                if count + 1 == len(points):
                    return -1
                points[count], where[count], bits[count] = point, i, flags
                count += 1
                i += step
            where[count] = i
            if not count:
                _, step = decode_one(data, i)  # a wide space
                i += step
                continue
            k = found = 0
            while k < count:
                low = k
                if chinese and bits[k] & HAN:
                    k += cuts[cut]
                    cut += 1
                elif jieba:
                    k = _jieba_end(points, low, count)
                elif bits[k] & unspaced:
                    k += 1
                    while k < count and bits[k] & MARK:
                        k += 1
                else:
                    k += 1
                    while k < count and not bits[k] & unspaced:
                        k += 1
                    found = _spaced(
                        data,
                        where,
                        points,
                        bits,
                        low,
                        k,
                        word_ends,
                        found,
                        hashes,
                        pieces,
                        first_bytes,
                        last_bytes,
                        units,
                        suffixes,
                    )
                    continue
                word_ends[found] = k
                found += 1
            low = 0
            for k in range(found):
                high = word_ends[k]
                flags = np.uint8(0)
                for place in range(low, high):
                    if bits[place] & ALPHA:
                        flags |= np.uint8(HAS_ALPHA)
                    if not bits[place] & SYMBOL:
                        flags |= np.uint8(NOT_SYMBOL)
                first, last = where[low], where[high]
                start_of[words], length_of[words], size_of[words] = first, last - first, high - low
                flags_of[words], hash_of[words] = flags, hash_bytes(data, first, last)
                words += 1
                low = high
    word_offsets[len(starts)] = words
    return words


@numba.njit(cache=True, nogil=True, inline="always")
def _splits_off(data, begin, i, key, hashes, first_bytes, last_bytes):  # type: ignore[no-untyped-def]
    """Whether the mark at byte `i`, the last of its run and after letters alone, is split off (0 or 1). 0 may mean unknown."""
    byte = data[i]
    may_be = _may_be_exception(data[begin], byte, i + 1 - begin, first_bytes, last_bytes)
    if byte == 46:  # after a small letter, or after two letters of which the first is a capital
        if not (97 <= data[i - 1] <= 122 or (i - 1 > begin and 65 <= data[i - 2] <= 90)):
            return 0
        return 0 if may_be and _find_exception(hashes, key * _BASE + np.uint64(47)) >= 0 else 1
    if byte == 44 or byte == 59 or byte == 58 or byte == 33 or byte == 63 or byte == 41 or byte == 93 or byte == 34:
        return 0 if may_be else 1
    return 0


_JIEBA_BYTES = 1 << 20  # one call of the segmenter; bounds the Python strings that exist at once


def _cut_han(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Lengths in characters of the words of all Han runs, in order. A run's cut depends on the run alone."""
    out = np.empty(2 * int((ends - starts).sum()) + 1, np.uint8)
    used = _han_runs(data, starts, ends, characters.table(), out)
    runs = out[:used].tobytes()
    lengths: list[np.ndarray] = []
    start = 0
    while start < used:
        end = used if used - start <= _JIEBA_BYTES else runs.find(b"\n", start + _JIEBA_BYTES) + 1 or used
        words = rjieba.cut(runs[start:end].decode())
        piece = np.fromiter(map(len, words), np.int64, len(words))
        feeds = np.fromiter((word == "\n" for word in words), bool, len(words))
        lengths.append(piece[~feeds])
        start = end
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)


def split(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, ...]:
    """Words of texts `data[starts[i]:ends[i]]` (uint8 UTF-8, int64, int64).

    Returns (word_offsets int64[texts + 1], start int64, length_bytes int32, characters int32, flags uint8, hash uint64),
    the latter five one value a word.
    """
    total = int((ends - starts).sum()) + 1
    # room for a word a byte: the pages that are not written are never allocated
    out = (np.empty(total, np.int64), np.empty(total, np.int32), np.empty(total, np.int32), np.empty(total, np.uint8),
           np.empty(total, np.uint64))  # fmt: skip
    word_offsets = np.empty(len(starts) + 1, np.int64)
    cuts = _cut_han(data, starts, ends)
    words, room = -1, 1 << 14  # characters of the longest run between white space
    while words < 0:
        buffers = [np.empty(room, kind) for kind in (np.int32, np.int64, np.uint32, np.int64, np.int32)]
        words = _split(
            data, starts, ends, characters.table(), _byte_classes(), cuts, *_exceptions(), _units(), *buffers, *out, word_offsets
        )
        room *= 16
    return (word_offsets, *(array[:words] for array in out))
