"""Repeated n-grams of words: the most frequent short ones, and the share of text in longer ones that occur again.

Most n-grams occur once. Counters without keys, shared by hash, tell which may occur more often; only those meet a table that
compares them. Of the most frequent one that leaves a handful: no n-gram occurs more often than its counter says.
"""

from __future__ import annotations

import numba
import numpy as np

from operators.text.words import mix

_BASE = np.uint64(0x9E3779B97F4A7C15)  # of words.hash_bytes
_ODD = np.uint64(0xD6E8FEB86659FD93)


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


@numba.njit(cache=True, nogil=True)
def measure_grams(first, last, length, size, hashes, sizes, out):  # type: ignore[no-untyped-def]
    """Fractions of the characters `sizes` of each text, into `out` (float64[9, texts]).

    Rows 0 to 2: the most frequent 2-, 3- and 4-gram of words joined by spaces, times its count; of equally frequent ones the
    first. Rows 3 to 8: 5- to 10-grams joined by nothing that occurred before, in a scan that goes on behind each one found.
    The words of text i are `first[i]:last[i]` of `length` (bytes), `size` (characters) and `hashes` (words.hash_bytes).
    """
    most = 1
    for row in range(len(first)):
        most = max(most, last[row] - first[row])
    keys, stamps, counts = np.empty(room(most), np.uint64), np.zeros(room(most), np.int64), np.empty(room(most), np.int64)
    shared = np.empty(max(64, 2 * room(most)), np.int32)  # the counters: at least as many as `slots` begins with
    grams, place, power = np.empty(most, np.uint64), np.empty(most + 1, np.int64), np.empty(most, np.uint64)
    own, chosen = np.empty(most, np.int32), np.empty(most, np.int64)
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
        before = 0
        for i in range(words):
            place[i] = before
            before += size[begin + i]
        place[words] = before
        slots, shift = 64, np.uint64(58)
        while slots < 4 * words:
            slots *= 2
            shift -= np.uint64(1)
        for i in range(words):
            grams[i] = hashes[begin + i]
        for n in range(2, min(words, 4) + 1):
            for i in range(words - n + 1):
                grams[i] = mix(grams[i]) + hashes[begin + i + n - 1]
            _share(grams, words - n + 1, slots, shift, shared, own)
            highest = np.int32(0)
            for i in range(words - n + 1):
                highest = max(highest, shared[own[i]])
            best, at = 1, 0
            while highest > 1:  # twice at most
                found = _pick(own, shared, words - n + 1, highest, chosen)
                stamp += 1
                best, at = _most_frequent(grams, chosen, found, keys, stamps, counts, stamp)
                if best >= highest or highest == 2:
                    break
                highest = np.int32(max(best, 2))  # a shared counter was higher: all that may be as frequent
            if best == 1:
                at = 0
            out[n - 2, row] = best * (place[at + n] - place[at] + n - 1) / total
        if words < 6:  # one 5-gram has nothing to repeat
            continue
        for i in range(words):
            power[i] = short[length[begin + i]] if length[begin + i] < 64 else _power(length[begin + i])
            grams[i] = hashes[begin + i]
        for n in range(2, min(words, 10) + 1):
            for i in range(words - n + 1):  # the hash of the joined bytes
                grams[i] = grams[i] * power[i + n - 1] + hashes[begin + i + n - 1]
            if n < 5:
                continue
            _share(grams, words - n + 1, slots, shift, shared, own)
            found = _pick(own, shared, words - n + 1, 2, chosen)
            mask = room(found) - 1
            stamp += 1
            repeated, following = 0, 0
            for k in range(found):
                i = chosen[k]
                if i >= following and seen(keys, stamps, stamp, mask, grams[i]):
                    repeated += place[i + n] - place[i]
                    following = i + n
            out[n - 2, row] = repeated / total


@numba.njit(cache=True, nogil=True)
def _share(grams, count, slots, shift, shared, own):  # type: ignore[no-untyped-def]
    """Count each n-gram in the counter of its hash; `own` says which that is."""
    for slot in range(slots):
        shared[slot] = 0
    for i in range(count):
        own[i] = ((grams[i] ^ (grams[i] >> np.uint64(32))) * _ODD) >> shift
    for i in range(count):
        shared[own[i]] += np.int32(1)


@numba.njit(cache=True, nogil=True)
def _pick(own, shared, count, least, chosen):  # type: ignore[no-untyped-def]
    """Positions whose counter is at least `least`, in order, into `chosen`; returns their number. Without a branch."""
    found = 0
    for i in range(count):
        chosen[found] = i
        found += shared[own[i]] >= least
    return found


@numba.njit(cache=True, nogil=True)
def _most_frequent(grams, chosen, found, keys, stamps, counts, stamp):  # type: ignore[no-untyped-def]
    """(count, first position) of the most frequent n-gram at the chosen positions; of equals the one that came first."""
    mask = room(found) - 1
    best = 0
    for k in range(found):
        slot = _count(keys, stamps, counts, stamp, mask, grams[chosen[k]])
        best = max(best, counts[slot])
    for k in range(found):
        slot = np.int64(mix(grams[chosen[k]]) & np.uint64(mask))
        while keys[slot] != grams[chosen[k]]:
            slot = (slot + 1) & mask
        if counts[slot] == best:
            return best, chosen[k]
    return best, np.int64(0)


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
