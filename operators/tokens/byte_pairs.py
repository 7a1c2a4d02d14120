"""Byte-pair encoding straight from Arrow's UTF-8 to ids: for byte-level tokenizers whose rules are known letter for letter.

The same merges in the same order as the tokenizers library (Sennrich et al. 2016, section 3.2: the pair of lowest rank
first, the leftmost of equals), so the same ids; what makes it faster is that no string, offset or token object exists in between,
and that words met before are looked up. Short words are merged by scanning, long ones by a heap, so a text without spaces costs
n log n. The lookup table has a fixed size and is emptied when full. Texts that need what is not done here are named by the
result and left to the library: see `BytePairs.encode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from operators.tokens.splitting import Rules, classes, first_of, next_word, rules_of

_SLOTS = 1 << 18
_CACHED_BYTES = 48  # a longer word is seldom met again
_ARENA_BYTES, _ARENA_IDS = 4 << 20, 2 << 20
_SCANNED = 48  # symbols up to which scanning beats the heap

_STABLE = [
    (0x0, 0x300), (0x2010, 0x2028), (0x2030, 0x205F), (0x2500, 0x2600), (0x3001, 0x302A), (0x3041, 0x3097), (0x30A1, 0x30FB),
    (0x4E00, 0xA000), (0xFF01, 0xFF9E),
]  # fmt: skip
"""Code points that NFC leaves alone next to one another, by Unicode's stability policy (UAX #15): no marks, no jamo."""


@dataclass
class BytePairs:
    """A compiled tokenizer and the words it has met. One thread at a time."""

    rules: Rules
    table: np.ndarray  # uint8[0x110000], with 128 set where the normaliser might change a text
    byte_ids: np.ndarray  # int32[256], -1 where the vocabulary lacks a byte, which the library drops
    pair_keys: np.ndarray  # uint64[slots], left << 32 | right, all ones where empty
    pair_ranks: np.ndarray  # int32[slots]
    pair_ids: np.ndarray  # int32[slots]
    normalised: bool
    others: tuple[str, ...]  # tokens that the library cuts out of a text before anything else

    def __post_init__(self) -> None:
        self._slots = np.full((_SLOTS, 3), -1, np.int64)  # first byte and first id in the arenas, bytes << 32 | ids
        self._bytes, self._ids = np.empty(_ARENA_BYTES, np.uint8), np.empty(_ARENA_IDS, np.uint32)
        self._used = np.zeros(3, np.int64)  # slots, bytes, ids

    def encode(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint32 ids of all texts one after the other, int64[texts] counts) of UTF-8 bytes and int64[texts + 1] offsets.

        A count of -1 marks a text without ids here that the library must encode.
        """
        ids = np.empty(int(offsets[-1] - offsets[0]), np.uint32)
        counts = np.empty(len(offsets) - 1, np.int64)
        used = _encode(
            data, offsets, self.table, self.normalised, self.rules.digits, self.rules.gpt2, self.byte_ids, self.pair_keys,
            self.pair_ranks, self.pair_ids, self._slots, self._bytes, self._ids, self._used, ids, counts,
        )  # fmt: skip
        return ids[:used], counts


def compiled(tokenizer: dict[str, Any]) -> BytePairs | None:
    """The kernel of a parsed tokenizer.json; None where anything in it is not known to be reproduced exactly."""
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    rules = rules_of(tokenizer.get("pre_tokenizer"))
    plain = not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    )
    if rules is None or model.get("type") != "BPE" or not plain or normalizer not in (None, {"type": "NFC"}):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(merge) if not isinstance(merge, str) else tuple(merge.split(" ")) for merge in model["merges"]]
    table = classes(rules).copy()
    if normalizer is not None:
        table |= np.uint8(128)
        for first, stop in _STABLE:
            table[first:stop] &= 127
    byte_ids = np.array([vocabulary.get(character, -1) for character in byte_characters()], np.int32)
    left, right = (np.array([vocabulary[merge[side]] for merge in merges], np.uint64) for side in (0, 1))
    made = np.array([vocabulary["".join(merge)] for merge in merges], np.int32)
    keys, ranks, ids = _pairs(left << np.uint64(32) | right, made)
    others = tuple(token["content"] for token in tokenizer.get("added_tokens", []) if not token["special"])
    return BytePairs(rules, table, byte_ids, keys, ranks, ids, normalizer is not None, others)


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


@numba.njit(cache=True, nogil=True)
def _pairs(pairs: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    slots = 1024
    while slots < 3 * len(pairs):
        slots *= 2
    keys = np.full(slots, np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64)
    ranks, ids = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    for rank in range(len(pairs)):
        slot = _spread(pairs[rank]) & np.uint64(slots - 1)
        # A pair that is listed twice has the later rank, as in the library's map.
        while keys[slot] != np.uint64(0xFFFFFFFFFFFFFFFF) and keys[slot] != pairs[rank]:
            slot = (slot + np.uint64(1)) & np.uint64(slots - 1)
        keys[slot], ranks[slot], ids[slot] = pairs[rank], rank, made[rank]
    return keys, ranks, ids


@numba.njit(inline="always")
def _spread(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return value ^ (value >> np.uint64(29))


@numba.njit(cache=True, nogil=True)
def _find(left, right, keys):  # type: ignore[no-untyped-def]
    """The slot of a pair, -1 for none."""
    key = np.uint64(left) << np.uint64(32) | np.uint64(right)
    mask = np.uint64(len(keys) - 1)
    slot = _spread(key) & mask
    while True:
        if keys[slot] == key:
            return np.int64(slot)
        if keys[slot] == np.uint64(0xFFFFFFFFFFFFFFFF):
            return -1
        slot = (slot + np.uint64(1)) & mask


_NONE = np.int64(1) << 40


@numba.njit(cache=True, nogil=True)
def _scan(symbols, count, ranks, made, keys, pair_ranks, pair_ids):  # type: ignore[no-untyped-def]
    """Merge a short word in place; returns the symbols left. `ranks`, `made`: scratch of at least `count`."""
    for place in range(count - 1):
        slot = _find(symbols[place], symbols[place + 1], keys)
        ranks[place] = pair_ranks[slot] if slot >= 0 else _NONE
        made[place] = pair_ids[slot] if slot >= 0 else 0
    while count > 1:
        best, lowest = -1, _NONE
        for place in range(count - 1):
            if ranks[place] < lowest:
                best, lowest = place, ranks[place]
        if best < 0:
            break
        symbols[best] = made[best]
        count -= 1
        for place in range(best + 1, count):
            symbols[place], ranks[place - 1], made[place - 1] = symbols[place + 1], ranks[place], made[place]
        for place in (best - 1, best):
            if 0 <= place < count - 1:
                slot = _find(symbols[place], symbols[place + 1], keys)
                ranks[place] = pair_ranks[slot] if slot >= 0 else _NONE
                made[place] = pair_ids[slot] if slot >= 0 else 0
    return count


@numba.njit(cache=True, nogil=True)
def _push(heap, size, key, new):  # type: ignore[no-untyped-def]
    at = size
    while at > 0:
        above = (at - 1) >> 1
        if heap[above, 0] <= key:
            break
        heap[at, 0], heap[at, 1] = heap[above, 0], heap[above, 1]
        at = above
    heap[at, 0], heap[at, 1] = key, new


@numba.njit(cache=True, nogil=True)
def _pop(heap, size):  # type: ignore[no-untyped-def]
    """Take the root out of a heap of `size`; what is left has one less."""
    key, new = heap[size - 1, 0], heap[size - 1, 1]
    size -= 1
    at = 0
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and heap[below + 1, 0] < heap[below, 0]:
            below += 1
        if heap[below, 0] >= key:
            break
        heap[at, 0], heap[at, 1] = heap[below, 0], heap[below, 1]
        at = below
    heap[at, 0], heap[at, 1] = key, new


@numba.njit(cache=True, nogil=True)
def _heaped(symbols, count, keys, pair_ranks, pair_ids):  # type: ignore[no-untyped-def]
    """Merge a long word in place; returns the symbols left."""
    before, after = np.arange(-1, count - 1), np.arange(1, count + 1)
    alive = np.ones(count, np.bool_)
    heap, size = np.empty((3 * count + 4, 2), np.int64), 0  # (rank << 32 | place, pair that was there)
    for place in range(count - 1):
        slot = _find(symbols[place], symbols[place + 1], keys)
        if slot >= 0:
            _push(heap, size, np.int64(pair_ranks[slot]) << 32 | place, slot)
            size += 1
    while size:
        key, slot = heap[0, 0], heap[0, 1]
        _pop(heap, size)
        size -= 1
        place = key & 0xFFFFFFFF
        following = after[place]
        if not alive[place] or following >= count:
            continue
        if np.uint64(symbols[place]) << np.uint64(32) | np.uint64(symbols[following]) != keys[slot]:
            continue
        symbols[place] = pair_ids[slot]
        alive[following] = False
        after[place] = after[following]
        if after[place] < count:
            before[after[place]] = place
        for first in (before[place], place):
            if first >= 0 and after[first] < count:
                found = _find(symbols[first], symbols[after[first]], keys)
                if found >= 0:
                    _push(heap, size, np.int64(pair_ranks[found]) << 32 | first, found)
                    size += 1
    left = 0
    for place in range(count):
        if alive[place]:
            symbols[left] = symbols[place]
            left += 1
    return left


@numba.njit(cache=True, nogil=True)
def _hash(data: np.ndarray, start: int, stop: int) -> np.uint64:
    value = np.uint64(stop - start)
    for at in range(start, stop):
        value = (value ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
    return _spread(value)


@numba.njit(cache=True, nogil=True)
def _encode(  # type: ignore[no-untyped-def]
    data, offsets, table, normalised, digits, gpt2, byte_ids, keys, pair_ranks, pair_ids, slots, words, word_ids, used, ids, counts
):
    symbols, ranks, made = np.empty(_SCANNED, np.int64), np.empty(_SCANNED, np.int64), np.empty(_SCANNED, np.int64)
    mask = np.uint64(len(slots) - 1)
    written = 0
    for row in range(len(counts)):
        begin, at, stop = written, offsets[row], offsets[row + 1]
        refused = normalised and first_of(data, at, stop, table, np.uint8(128)) < stop
        if refused:
            at = stop
        while at < stop:
            end = next_word(data, at, stop, table, digits, gpt2)
            if end < 0:
                refused = True
                break
            size = end - at
            slot = np.int64(-1)
            if size <= _CACHED_BYTES:
                slot = np.int64(_hash(data, at, end) & mask)
                hit = False
                while slots[slot, 0] >= 0:
                    if slots[slot, 2] >> 32 == size:
                        first = slots[slot, 0]
                        hit = True
                        for index in range(size):
                            if words[first + index] != data[at + index]:
                                hit = False
                                break
                        if hit:
                            break
                    slot = np.int64((np.uint64(slot) + np.uint64(1)) & mask)
                if hit:
                    first, count = slots[slot, 1], slots[slot, 2] & 0xFFFFFFFF
                    for index in range(count):
                        ids[written + index] = word_ids[first + index]
                    written += count
                    at = end
                    continue
            long = size > _SCANNED
            merged = np.empty(size, np.int64) if long else symbols
            count = 0
            for index in range(at, end):
                if byte_ids[data[index]] >= 0:
                    merged[count] = byte_ids[data[index]]
                    count += 1
            if long:
                count = _heaped(merged, count, keys, pair_ranks, pair_ids)
            else:
                count = _scan(merged, count, ranks, made, keys, pair_ranks, pair_ids)
            for index in range(count):
                ids[written + index] = merged[index]
            if slot >= 0:
                if 2 * used[0] >= len(slots) or used[1] + size > len(words) or used[2] + count > len(word_ids):
                    slots[:, :] = -1
                    used[:] = 0
                    slot = np.int64(_hash(data, at, end) & mask)
                slots[slot, 0], slots[slot, 1], slots[slot, 2] = used[1], used[2], size << 32 | count
                words[used[1] : used[1] + size] = data[at:end]
                for index in range(count):
                    word_ids[used[2] + index] = merged[index]
                used[0] += 1
                used[1] += size
                used[2] += count
            written += count
            at = end
        if refused:
            written = begin
        counts[row] = -1 if refused else written - begin
    return written
