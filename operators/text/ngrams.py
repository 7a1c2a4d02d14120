"""Repeated n-grams of words: the most frequent short ones, and the share of text in longer ones that occur again.

Most n-grams occur once, so tables see only those that may repeat. An n-gram occurs twice only if both of its parts of one
word less do; and n-grams whose joined bytes are equal begin with the same 16 bytes. Counters of a byte, shared by hash, find
what occurs once without comparing any key.
"""

from __future__ import annotations

import numba
import numpy as np

from operators.text.words import mix

_BASE = np.uint64(0x9E3779B97F4A7C15)  # of words.hash_bytes
_ODD = np.uint64(0xD6E8FEB86659FD93)
_PREFIX = 16  # bytes


@numba.njit(cache=True, nogil=True)
def room(count):  # type: ignore[no-untyped-def]
    """Slots of an open-addressing table that is at most half full."""
    slots = 16
    while slots < 2 * count:
        slots *= 2
    return slots


@numba.njit(cache=True, nogil=True, inline="always")
def seen(keys, stamps, stamp, mask, key):  # type: ignore[no-untyped-def]
    """Whether `key` is in the set of this `stamp`; puts it there otherwise."""
    slot = np.int64(mix(key) & np.uint64(mask))
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + 1) & mask
    found = stamps[slot] == stamp
    stamps[slot], keys[slot] = stamp, key
    return found


@numba.njit(cache=True, nogil=True, inline="always")
def _counter(key, shift):  # type: ignore[no-untyped-def]
    return np.int64(((key ^ (key >> np.uint64(32))) * _ODD) >> shift)


@numba.njit(cache=True, nogil=True)
def _power(exponent):  # type: ignore[no-untyped-def]
    """The base of words.hash_bytes to a power, mod 2**64."""
    result, factor = np.uint64(1), _BASE
    while exponent:
        if exponent & 1:
            result *= factor
        factor *= factor
        exponent >>= 1
    return result


@numba.njit(cache=True, nogil=True, inline="always")
def _eight(stream, at):  # type: ignore[no-untyped-def]
    """Eight bytes as a number (one load, once compiled)."""
    value = np.uint64(0)
    for k in range(8):
        value |= np.uint64(stream[at + k]) << np.uint64(8 * k)
    return value


@numba.njit(cache=True, nogil=True)
def measure_grams(data, first, last, start, length, size, hashes, sizes, out):  # type: ignore[no-untyped-def]
    """Fractions of the characters `sizes` of each text, into `out` (float64[9, texts]).

    Rows 0 to 2: the most frequent 2-, 3- and 4-gram of words joined by spaces, times its count; of equally frequent ones the
    first. Rows 3 to 8: 5- to 10-grams joined by nothing that occurred before, in a scan that goes on behind each one found.
    The words of text i are `first[i]:last[i]` of `start`, `length` (bytes), `size` (characters) and `hashes`.
    """
    most, most_bytes = 1, 0
    for row in range(len(first)):
        most = max(most, last[row] - first[row])
        joined = 0
        for i in range(first[row], last[row]):
            joined += length[i]
        most_bytes = max(most_bytes, joined)
    stream = np.empty(most_bytes, np.uint8)  # the words of a text joined
    spot, place = np.empty(most + 1, np.int64), np.empty(most + 1, np.int64)  # bytes, characters before a word
    keys, stamps = np.empty(room(most), np.uint64), np.zeros(room(most), np.int64)
    counts, ids = np.empty(room(most), np.int64), np.empty(most, np.int64)
    few = np.empty(8 * room(most), np.uint8)
    candidates, gram_keys = np.empty(most, np.int64), np.empty(most, np.uint64)
    short = np.empty(64, np.uint64)
    for exponent in range(64):
        short[exponent] = _power(exponent)
    stamp = np.int64(0)
    for row in range(len(first)):
        begin, words, total = first[row], last[row] - first[row], sizes[row]
        for n in range(9):
            out[n, row] = 0.0
        if words < 2:
            continue
        used, before = 0, 0
        for i in range(words):
            spot[i], place[i] = used, before
            source = start[begin + i]
            for k in range(length[begin + i]):
                stream[used + k] = data[source + k]
            used += length[begin + i]
            before += size[begin + i]
        spot[words], place[words] = used, before
        slots, shift = 64, np.uint64(58)
        while slots < 8 * words:
            slots *= 2
            shift -= np.uint64(1)

        # 2-grams: of those that share no counter nothing is kept
        few[:slots] = 0
        for i in range(words - 1):
            key = mix(hashes[begin + i]) + hashes[begin + i + 1]
            gram_keys[i] = key
            counter = _counter(key, shift)
            few[counter] += few[counter] < 2
        mask = room(words) - 1
        stamp += 1
        for i in range(words - 1):
            key = gram_keys[i]
            ids[i] = -1
            if few[_counter(key, shift)] == 2:
                ids[i] = _count(keys, stamps, counts, stamp, mask, key)
        out[0, row] = _top(ids, counts, place, words, 2) / total
        for n in range(3, 5):
            if words < n:
                break
            stamp += 1
            for i in range(words - n + 1):  # the parts of an n-gram are known by their slots
                if ids[i] >= 0 and ids[i + 1] >= 0:
                    key = (np.uint64(ids[i]) << np.uint64(32)) | np.uint64(ids[i + 1])
                    ids[i] = _count(keys, stamps, counts, stamp, mask, key)
                else:
                    ids[i] = -1
            out[n - 2, row] = _top(ids, counts, place, words, n) / total

        # 5-grams and longer
        if words < 6:  # one 5-gram has nothing to repeat
            continue
        few[:slots] = 0
        for i in range(words - 4):
            ids[i] = -1
            if spot[i] + _PREFIX <= used and spot[i + 5] - spot[i] >= _PREFIX:
                ids[i] = _counter(_eight(stream, spot[i]) * _BASE + _eight(stream, spot[i] + 8), shift)
                few[ids[i]] += few[ids[i]] < 2
            elif spot[i] + _PREFIX <= used:  # longer n-grams from here may still have that beginning
                counter = _counter(_eight(stream, spot[i]) * _BASE + _eight(stream, spot[i] + 8), shift)
                few[counter] += few[counter] < 2
        found = 0
        for i in range(words - 4):
            if ids[i] < 0 or few[ids[i]] == 2:
                candidates[found] = i
                found += 1
        for k in range(found):
            key = np.uint64(0)
            for i in range(candidates[k], candidates[k] + 4):
                key = key * (short[length[begin + i]] if length[begin + i] < 64 else _power(length[begin + i])) + hashes[begin + i]
            gram_keys[k] = key
        mask = room(found) - 1
        for n in range(5, 11):
            stamp += 1
            repeated, following = 0, 0
            for k in range(found):
                i = candidates[k]
                if i + n > words:
                    break
                size_of = length[begin + i + n - 1]
                # the hash of the joined bytes
                gram_keys[k] = gram_keys[k] * (short[size_of] if size_of < 64 else _power(size_of)) + hashes[begin + i + n - 1]
                if i >= following and seen(keys, stamps, stamp, mask, gram_keys[k]):
                    repeated += place[i + n] - place[i]
                    following = i + n
            out[n - 2, row] = repeated / total


@numba.njit(cache=True, nogil=True, inline="always")
def _count(keys, stamps, counts, stamp, mask, key):  # type: ignore[no-untyped-def]
    """Count a key in the table of this stamp; returns its slot."""
    slot = np.int64(mix(key) & np.uint64(mask))
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + 1) & mask
    if stamps[slot] != stamp:
        stamps[slot], keys[slot], counts[slot] = stamp, key, 0
    counts[slot] += 1
    return slot


@numba.njit(cache=True, nogil=True)
def _top(ids, counts, place, words, n):  # type: ignore[no-untyped-def]
    """Characters in all occurrences of the most frequent n-gram, the first of equals; forgets the ids that occur once."""
    best, at = 1, 0
    for i in range(words - n + 1):
        if ids[i] >= 0:
            if counts[ids[i]] < 2:
                ids[i] = -1
            elif counts[ids[i]] > best:
                best, at = counts[ids[i]], i
    return best * (place[at + n] - place[at] + n - 1)
