"""Tokens, and windows of N tokens chosen so that copies of a span choose alike (winnowing).

A text is cut into tokens without normalising it: a run of letters, marks and digits of a spaced script; a single character
of a script written without spaces (Han, kana, Thai, ...: see `normalise`); a run of one and the same other character.
White space belongs to no token. Two spans are equal if their tokens are, byte by byte; white space between them is not
compared, so that a text wrapped at another width is still the same text.

**Every shared window is found.** Let k < N, w = N - k + 1. Of each window of N tokens, the *anchor* is its k-gram with the
smallest hash, the leftmost of equal ones (Schleimer, Wilkerson, Aiken 2003, "Winnowing", section 3). The anchor's place
inside the window depends on the window's tokens alone. So if two windows hold the same tokens, their anchors are equal
k-grams at equal places in them. Hence: windows are grouped by their anchor without loss, and a window whose anchor occurs
nowhere else as an anchor is shared with no other. On random text a share 2 / (w + 1) of all positions are anchors.
A longer shared span is a union of shared windows, so nothing of N tokens or more is missed.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from operators.dedup.normalise import SEPARATOR, UNSPACED, decode

_STEP = np.uint64(0x9E3779B97F4A7C15)
_BASE = np.uint64(0xD6E8FEB86659FD93)
_OTHER = np.uint64(0xA0761D6478BD642F)
_SEED = np.uint64(0xCBF29CE484222325)


@nb.njit(inline="always")
def _mix(h: np.uint64) -> np.uint64:
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@nb.njit(inline="always")
def _is_white(point: int) -> bool:
    """As str.isspace, and U+200B."""
    if point < 0x85:
        return point == 32 or (point >= 9 and point <= 13) or (point >= 28 and point <= 31)
    if point < 0x2000:
        return point == 0x85 or point == 0xA0 or point == 0x1680
    return point <= 0x200B or point == 0x2028 or point == 0x2029 or point == 0x202F or point == 0x205F or point == 0x3000


@nb.njit(cache=True, nogil=True)
def tokens_of(
    data: np.ndarray, start: int, end: int, table: np.ndarray, hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> int:
    """Write the hash (uint64) of each token of data[start:end], and, where `starts` and `ends` have room, its bytes.

    Returns the number of tokens; `hashes` holds at least end - start. The bytes count from `start`.
    """
    count, position, places = 0, start, len(starts) > 0
    while position < end:
        byte = data[position]
        if byte < 0x80:
            point, width = int(byte), 1
        else:
            point, width = decode(data, position)
        if _is_white(point):
            position += width
            continue
        first, entry = position, table[point]
        h = _SEED
        for i in range(width):
            h = (h ^ np.uint64(data[position + i])) * _STEP
        position += width
        if entry == SEPARATOR:
            while position + width <= end:  # a run of the same character
                same = True
                for i in range(width):
                    same = same and data[position + i] == data[first + i]
                if not same:
                    break
                for i in range(width):
                    h = (h ^ np.uint64(data[position + i])) * _STEP
                position += width
        elif (entry & UNSPACED) == 0:
            while position < end:
                byte = data[position]
                if byte < 0x80:
                    if table[byte] == SEPARATOR:
                        break
                    h = (h ^ np.uint64(byte)) * _STEP
                    position += 1
                    continue
                point, width = decode(data, position)
                entry = table[point]
                if entry == SEPARATOR or (entry & UNSPACED) != 0:
                    break
                for i in range(width):
                    h = (h ^ np.uint64(data[position + i])) * _STEP
                position += width
        hashes[count] = _mix(h)
        if places:
            starts[count], ends[count] = first - start, position - start
        count += 1
    return count


@nb.njit(cache=True, nogil=True)
def powers(base: np.uint64, count: int) -> np.ndarray:
    out = np.ones(count + 1, np.uint64)
    for i in range(count):
        out[i + 1] = out[i] * base
    return out


@nb.njit(inline="always")
def _prefix(hashes: np.ndarray, count: int, base: np.uint64, prefix: np.ndarray) -> None:
    """Polynomial hashes of hashes[:0], hashes[:1], ...: that of [a, b) is prefix[b] - prefix[a] * base ** (b - a)."""
    prefix[0] = 0
    for i in range(count):
        prefix[i + 1] = prefix[i] * base + hashes[i]


@nb.njit(inline="always")
def _choose(prefix: np.ndarray, count: int, n: int, k: int, power: np.ndarray, anchors: np.ndarray, firsts: np.ndarray) -> int:
    """The anchors (first token of the k-gram) of all windows, and the first window of each; how many there are.

    Windows firsts[i] <= s < firsts[i + 1] have anchors[i]; firsts[found] is one past the last window.
    """
    windows, w = count - n + 1, n - k + 1
    queue, keys = np.empty(w + 1, np.int64), np.empty(w + 1, np.uint64)
    head, size, found = 0, 0, 0
    for gram in range(count - k + 1):
        key = _mix(prefix[gram + k] - prefix[gram] * power[k])
        while size > 0 and keys[(head + size - 1) % (w + 1)] > key:  # equal ones stay: the leftmost wins
            size -= 1
        at = (head + size) % (w + 1)
        queue[at], keys[at] = gram, key
        size += 1
        window = gram - w + 1
        if queue[head] < window:
            head = (head + 1) % (w + 1)
            size -= 1
        if window >= 0 and (found == 0 or anchors[found - 1] != queue[head]):
            anchors[found], firsts[found] = queue[head], window
            found += 1
    firsts[found] = windows
    return found


@nb.njit(cache=True, nogil=True)
def find_anchors(
    data: np.ndarray, offsets: np.ndarray, table: np.ndarray, n: int, k: int, first_token: int, counts: np.ndarray,
    out: np.ndarray, near: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Fill `out` uint64[capacity, 3] with (k-gram, context, position) of the anchors, `near` int64[capacity, 3] with spans
    (first token, last, tokens to the source before it); how many there are of each, even beyond the capacity.

    The context is the hash of all tokens that a window with this anchor can hold, cut at the ends of the text. Positions
    count tokens from `first_token` on through all texts; `counts` int64[rows] gets the tokens of each. An anchor that has
    k-gram and context of one of the eight before it in its text becomes part of a span instead: a text that repeats
    itself closely (one letter, millions of times) would have an anchor at every token.
    """
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    hashes, prefix = np.empty(longest + 1, np.uint64), np.empty(longest + 2, np.uint64)
    anchors, firsts, none = np.empty(longest + 1, np.int64), np.empty(longest + 2, np.int64), np.empty(0, np.int64)
    grams, contexts = np.empty(8, np.uint64), np.empty(8, np.uint64)
    power = powers(_BASE, 2 * n)
    found, spans, token = 0, 0, first_token
    for row in range(len(offsets) - 1):
        count = tokens_of(data, offsets[row], offsets[row + 1], table, hashes, none, none)
        counts[row] = count
        if count >= n:
            _prefix(hashes, count, _BASE, prefix)
            chosen = _choose(prefix, count, n, k, power, anchors, firsts)
            last, distance = -1, 0  # of the span that grows
            for i in range(chosen):
                at = anchors[i]
                low, high = max(0, at + k - n), min(count, at + n)
                gram = _mix(prefix[at + k] - prefix[at] * power[k])
                context = prefix[high] - prefix[low] * power[high - low]
                context = _mix(context + np.uint64(at - low) * _OTHER + np.uint64(high - low))
                lag = 0
                for back in range(1, min(i, 8) + 1):
                    if grams[(i - back) & 7] == gram and contexts[(i - back) & 7] == context:
                        lag = at - anchors[i - back]
                        break
                grams[i & 7], contexts[i & 7] = gram, context
                if lag == 0:
                    if found < len(out):
                        out[found, 0], out[found, 1], out[found, 2] = gram, context, token + at
                    found += 1
                    continue
                if lag != distance or low >= last:
                    if spans < len(near):
                        near[spans, 0], near[spans, 2] = token + low, lag
                    spans += 1
                last, distance = high, lag
                if spans <= len(near):
                    near[spans - 1, 1] = token + high
        token += count
    return found, spans


@nb.njit(cache=True, nogil=True)
def find_windows(
    data: np.ndarray, offsets: np.ndarray, table: np.ndarray, n: int, k: int, firsts_of: np.ndarray, wanted: np.ndarray,
    out: np.ndarray,
) -> int:  # fmt: skip
    """Fill `out` uint64[capacity, 3] with (hash, hash, position) of the windows whose anchor is at a position in `wanted`.

    `wanted` uint64, sorted; `firsts_of` int64[rows] is the position of each text's first token. Returns how many there are.
    """
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    hashes, prefix = np.empty(longest + 1, np.uint64), np.empty(longest + 2, np.uint64)
    other = np.empty(longest + 2, np.uint64)
    anchors, firsts, none = np.empty(longest + 1, np.int64), np.empty(longest + 2, np.int64), np.empty(0, np.int64)
    power, other_power = powers(_BASE, n), powers(_OTHER, n)
    found = 0
    for row in range(len(offsets) - 1):
        count = tokens_of(data, offsets[row], offsets[row + 1], table, hashes, none, none)
        if count < n:
            continue
        _prefix(hashes, count, _BASE, prefix)
        _prefix(hashes, count, _OTHER, other)
        chosen = _choose(prefix, count, n, k, power, anchors, firsts)
        for i in range(chosen):
            place = np.uint64(firsts_of[row] + anchors[i])
            at = np.searchsorted(wanted, place)
            if at == len(wanted) or wanted[at] != place:
                continue
            for window in range(firsts[i], firsts[i + 1]):
                if found < len(out):
                    out[found, 0] = _mix(prefix[window + n] - prefix[window] * power[n])
                    out[found, 1] = _mix(other[window + n] - other[window] * other_power[n])
                    out[found, 2] = firsts_of[row] + window
                found += 1
    return found


@nb.njit(cache=True, nogil=True)
def plain_tokens(data: np.ndarray, begin: int, starts: np.ndarray, ends: np.ndarray, first: int, last: int) -> np.ndarray:
    """The bytes of tokens first..last of the text at `begin`, one space between two: what a digest is taken of."""
    size = last - first - 1
    for token in range(first, last):
        size += ends[token] - starts[token]
    out = np.empty(size, np.uint8)
    written = 0
    for token in range(first, last):
        if token > first:
            out[written] = 32
            written += 1
        for i in range(begin + starts[token], begin + ends[token]):
            out[written] = data[i]
            written += 1
    return out
