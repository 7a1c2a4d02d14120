"""The tokens that ROUGE-L compares, in any language, and texts as arrays of token numbers.

Lowercased runs of [a-z0-9] are tokens, as in the `rouge_score` package, so that for text in Latin script every score and
every decision is the same as there, to the last bit. Beyond that package, each character of a script written without
spaces (Han, Kana, Bopomofo, Thai, Lao, Khmer, Burmese) is a token, and so is each run of letters or digits of any other
script. Mixed text yields its tokens in their order.

`tokenize` is the definition; `Vocabulary.encode` finds the same tokens in the bytes of many texts and numbers them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numba import njit

from operators.text.words import decode_one, hash_bytes, mix

_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff"  # Kana, Bopomofo, ideographic marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_LATIN = (  # letters that rouge_score treats as separators, and symbols that Unicode counts as alphanumeric
    "\u0080-\u036f\u1d00-\u1dbf\u1e00-\u1eff\u2000-\u2bff\u2c60-\u2c7f\u3000-\u3004\u3200-\u33ff\ua720-\ua7ff\uab30-\uab6f"
    "\ufb00-\ufb06\uff00-\uff65\U0001d400-\U0001d7ff\U0001f100-\U0001f1ff"
)
_OTHER = rf"[^\W_a-z0-9{_LATIN}{_SINGLE}]+"
PATTERN = rf"[a-z0-9]+|[{_SINGLE}]|{_OTHER}"  # of a token, in lowercased text
_TOKEN = re.compile(PATTERN)

_SEPARATOR, _ASCII, _ALONE, _LETTER = range(4)
_CLASSES = 0x40000  # no code point above is a letter or a digit
_BATCH_BYTES = 1 << 24


def tokenize(text: str) -> list[str]:
    """The tokens that ROUGE-L compares (see the module's docstring)."""
    return _TOKEN.findall(text.lower())


@functools.cache
def _classes() -> np.ndarray:
    """uint8[_CLASSES]: to which kind of token each code point of a lowercased text belongs. From the definition's own pattern."""
    points = "".join(map(chr, range(_CLASSES)))
    found = np.zeros(_CLASSES, np.uint8)
    for kind, pattern in ((_ASCII, "[a-z0-9]+"), (_ALONE, f"[{_SINGLE}]+"), (_LETTER, _OTHER)):
        for match in re.finditer(pattern, points):
            found[match.start() : match.end()] = kind
    return found


class Vocabulary:
    """Numbers the distinct tokens of texts in the order in which they come; grows with what it is asked to add.

    Tokens are found by hash and compared by their bytes, so that no two are ever taken for each other. Memory: the bytes
    of each distinct token, and 20 to 40 bytes more.
    """

    def __init__(self) -> None:
        self._slots = np.full(64, -1, np.int32)  # open addressing: number of a token, -1 where free
        self._hashes = np.zeros(32, np.uint64)  # of each token
        self._ends = np.zeros(33, np.int64)  # token i is bytes[ends[i] : ends[i + 1]]
        self._bytes = np.zeros(256, np.uint8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._slots.nbytes + self._hashes.nbytes + self._ends.nbytes + self._bytes.nbytes

    def encode(self, texts: Sequence[str], *, add: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(numbers int32 of the tokens of all texts, offsets int64[texts + 1] of each text in them).

        With `add` off, a token that was never added has the number -1.
        """
        found: list[np.ndarray] = []
        offsets = np.zeros(len(texts) + 1, np.int64)
        begin = 0
        while begin < len(texts):  # batches bound the memory for the copies of the texts
            end, size = begin + 1, 4 * len(texts[begin])
            while end < len(texts) and size + 4 * len(texts[end]) <= _BATCH_BYTES:
                size += 4 * len(texts[end])
                end += 1
            data, bounds = _lowered(texts[begin:end])
            starts, ends, counts = _split(data, bounds, _classes())
            found.append(self._number(data, starts, ends, add))
            offsets[begin + 1 : end + 1] = counts
            begin = end
        np.cumsum(offsets, out=offsets)
        return (found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int32), *found])), offsets

    def _number(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, add: bool) -> np.ndarray:
        numbers = np.empty(len(starts), np.int32)
        done = 0
        while True:
            done, self._count = _intern(
                data, starts, ends, done, numbers, self._slots, self._hashes, self._ends, self._bytes, self._count, add
            )
            if done == len(starts):
                return numbers
            self._grow(int(ends[done] - starts[done]))

    def _grow(self, room: int) -> None:
        """Make place for at least one more token of `room` bytes."""
        if self._count == len(self._hashes):
            self._hashes = doubled(self._hashes, 2 * self._count)
            self._ends = doubled(self._ends, 2 * self._count + 1)
        if self._ends[self._count] + room > len(self._bytes):
            self._bytes = doubled(self._bytes, int(self._ends[self._count]) + room)
        if 2 * (self._count + 1) > len(self._slots):
            self._slots = _rehash(self._hashes, self._count, 4 * len(self._slots))


def doubled(array: np.ndarray, least: int) -> np.ndarray:
    """A copy with zeros behind, of at least `least` rows and twice as long as needed so far."""
    out = np.zeros((max(least, 2 * len(array)), *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out


def _lowered(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(UTF-8 of the lowercased texts, offsets int64[texts + 1]). Surrogates, which separate tokens, become question marks."""
    lowered = [text.lower() for text in texts]
    try:
        array = pa.array(lowered, pa.large_string())
    except UnicodeEncodeError:
        array = pa.array([text.encode("utf-8", "replace") for text in lowered], pa.large_binary())
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int64, len(texts) + 1)
    return (np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)), bounds


@njit(cache=True, nogil=True)
def _count_tokens(data: np.ndarray, begin: int, end: int, classes: np.ndarray) -> int:
    count, last, i = 0, _SEPARATOR, begin
    while i < end:
        if data[i] < 0x80:
            kind, size = classes[data[i]], 1
        else:
            point, size = decode_one(data, i)
            kind = classes[point] if point < _CLASSES else np.uint8(_SEPARATOR)
        if kind != _SEPARATOR and (kind != last or kind == _ALONE):
            count += 1
        last = kind
        i += size
    return count


@njit(cache=True, nogil=True)
def _split(data: np.ndarray, bounds: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts int64, ends int64 of all tokens in the bytes, their number in each text)."""
    texts = len(bounds) - 1
    counts = np.empty(texts, np.int64)
    total = 0
    for text in range(texts):
        counts[text] = _count_tokens(data, bounds[text], bounds[text + 1], classes)
        total += counts[text]
    starts, ends = np.empty(total, np.int64), np.empty(total, np.int64)
    at = 0
    for text in range(texts):
        last, i, end = _SEPARATOR, bounds[text], bounds[text + 1]
        while i < end:
            if data[i] < 0x80:
                kind, size = classes[data[i]], 1
            else:
                point, size = decode_one(data, i)
                kind = classes[point] if point < _CLASSES else np.uint8(_SEPARATOR)
            if kind != _SEPARATOR:
                if kind != last or kind == _ALONE:
                    starts[at] = i
                    at += 1
                ends[at - 1] = i + size
            last = kind
            i += size
    return starts, ends, counts


@njit(cache=True, nogil=True)
def _intern(
    data: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    done: int,
    numbers: np.ndarray,
    slots: np.ndarray,
    hashes: np.ndarray,
    borders: np.ndarray,
    arena: np.ndarray,
    count: int,
    add: bool,
) -> tuple[int, int]:
    """Number tokens from `done` on, until all have a number or a table is full; (tokens done, distinct tokens)."""
    last = len(slots) - 1
    for at in range(done, len(starts)):
        begin, size = starts[at], ends[at] - starts[at]
        key = mix(hash_bytes(data, begin, ends[at]))
        slot = np.int64(key & np.uint64(last))
        number = np.int64(slots[slot])
        while number >= 0:
            if hashes[number] == key and borders[number + 1] - borders[number] == size:
                place, same = borders[number], True
                for k in range(size):
                    if arena[place + k] != data[begin + k]:
                        same = False
                        break
                if same:
                    break
            slot = (slot + 1) & last
            number = np.int64(slots[slot])
        if number < 0 and add:
            if count == len(hashes) or borders[count] + size > len(arena) or 2 * (count + 1) > len(slots):
                return at, count
            number = np.int64(count)
            slots[slot] = number
            hashes[number] = key
            for k in range(size):
                arena[borders[number] + k] = data[begin + k]
            borders[number + 1] = borders[number] + size
            count += 1
        numbers[at] = number
    return len(starts), count


@njit(cache=True, nogil=True)
def _rehash(hashes: np.ndarray, count: int, size: int) -> np.ndarray:
    slots = np.full(size, -1, np.int32)
    for number in range(count):
        slot = np.int64(hashes[number] & np.uint64(size - 1))
        while slots[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        slots[slot] = number
    return slots
