"""Where each reply of the cache lies: an open-addressing table of 12 bytes a slot, 16-24 bytes a reply.

A slot holds 32 bits of the key's hash and a place (file number and byte offset in 64 bits); the key itself is read with
the reply, which is compared with what was asked for. Two keys of five million share their 32 bits with probability
5e6 / 2^32: one look-up in 860 reads a line in vain. Linear probing (Knuth, TAOCP 3, 6.4, algorithm L), nothing is removed.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_FULL = 0.75  # load at which the table grows by half
_OFFSET_BITS = 48  # files of up to 256 TiB

HEAD = b'{"key":"'  # every line begins so, 32 hex digits and a quote follow
_LONGEST_HEAD = len(HEAD) + 33


class ReplyIndex:
    """Places of replies by the hash of their key. Not thread-safe."""

    def __init__(self) -> None:
        self._tags: NDArray[np.uint32] = np.zeros(1 << 10, np.uint32)
        self._places: NDArray[np.uint64] = np.zeros(1 << 10, np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return int(self._tags.nbytes + self._places.nbytes)

    def add(self, tags: NDArray[np.uint32], file: int, offsets: NDArray[np.int64]) -> None:
        """Enter replies of one file: the tags of their keys and the byte offsets of their lines."""
        wanted = self._count + len(tags)
        if wanted > _FULL * len(self._tags):
            size = len(self._tags)
            while wanted > _FULL * size:
                size += size // 2
            grown = np.zeros(size, np.uint32), np.zeros(size, np.uint64)
            used = self._places != 0
            _insert(*grown, self._tags[used], self._places[used])
            self._tags, self._places = grown
        places = offsets.astype(np.uint64) | np.uint64((file + 1) << _OFFSET_BITS)
        _insert(self._tags, self._places, tags, places)
        self._count = wanted

    def find(self, tag: int) -> list[tuple[int, int]]:
        """(file, offset) of every reply whose key has this tag, the earliest first."""
        places = sorted(int(place) for place in _lookup(self._tags, self._places, np.uint32(tag)))
        return [((place >> _OFFSET_BITS) - 1, place & ((1 << _OFFSET_BITS) - 1)) for place in places]


def tag_of(key: str) -> int:
    """The 32 bits by which a key of 32 hex digits is looked up."""
    return int(_mix(np.uint64(int(key[:16], 16)), np.uint64(int(key[16:], 16))))


def scan(block: NDArray[np.uint8], last: bool) -> tuple[NDArray[np.uint32], NDArray[np.int64], int, int]:
    """The lines of a block of a cache file: (tags, offsets of the lines that are replies, lines that are none, bytes used).

    What follows the last line end is left for the next block, unless this one is the `last`.
    """
    lines = int(np.count_nonzero(block == 10)) + 1
    tags, offsets = np.empty(lines, np.uint32), np.empty(lines, np.int64)
    found, bad, used = _scan(block, last, tags, offsets)
    return tags[:found], offsets[:found], bad, used


@njit(cache=True, nogil=True, inline="always")
def _mix(high: np.uint64, low: np.uint64) -> np.uint32:
    value = high * np.uint64(0x9E3779B97F4A7C15) ^ low
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xFF51AFD7ED558CCD)
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xC4CEB9FE1A85EC53)
    return np.uint32((value ^ value >> np.uint64(33)) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _insert(
    tags: NDArray[np.uint32], places: NDArray[np.uint64], new_tags: NDArray[np.uint32], new_places: NDArray[np.uint64]
) -> None:
    size = np.uint64(len(tags))
    for number in range(len(new_tags)):
        slot = np.int64(np.uint64(new_tags[number]) * size >> np.uint64(32))  # tags are uniform: their share of the table
        while places[slot]:
            slot = slot + np.int64(1)
            if slot == len(tags):
                slot = np.int64(0)
        tags[slot], places[slot] = new_tags[number], new_places[number]


@njit(cache=True, nogil=True)
def _lookup(tags: NDArray[np.uint32], places: NDArray[np.uint64], tag: np.uint32) -> NDArray[np.uint64]:
    size = np.uint64(len(tags))
    begin = np.int64(np.uint64(tag) * size >> np.uint64(32))
    count = 0
    for fill in range(2):
        if fill:
            found = np.empty(count, np.uint64)
            count = 0
        slot = begin
        while places[slot]:
            if tags[slot] == tag:
                if fill:
                    found[count] = places[slot]
                count += 1
            slot = slot + np.int64(1)
            if slot == len(tags):
                slot = np.int64(0)
    return found


@njit(cache=True, nogil=True)
def _scan(block: NDArray[np.uint8], last: bool, tags: NDArray[np.uint32], offsets: NDArray[np.int64]) -> tuple[int, int, int]:
    found = bad = begin = 0
    for position in range(len(block) + 1):
        if position < len(block):
            if block[position] != 10:
                continue
        elif not last:
            break
        if position > begin:
            tag, sound = _head(block[begin:position])
            if sound:
                tags[found], offsets[found] = tag, begin
                found += 1
            else:
                bad += 1
        begin = position + 1
    return found, bad, min(begin, len(block))


@njit(cache=True, nogil=True)
def _head(line: NDArray[np.uint8]) -> tuple[np.uint32, bool]:
    """The tag of a line's key, and whether it begins and ends as a reply does."""
    if len(line) <= _LONGEST_HEAD or line[-1] != 125 or line[_LONGEST_HEAD - 1] != 34:
        return np.uint32(0), False
    for place in range(len(HEAD)):
        if line[place] != HEAD[place]:
            return np.uint32(0), False
    halves = np.zeros(2, np.uint64)
    for place in range(32):
        digit = np.int64(line[len(HEAD) + place])
        if 48 <= digit <= 57:
            digit -= 48
        elif 97 <= digit <= 102:
            digit -= 87
        else:
            return np.uint32(0), False
        halves[place // 16] = halves[place // 16] << np.uint64(4) | np.uint64(digit)
    return _mix(halves[0], halves[1]), True
