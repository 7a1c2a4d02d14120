"""Confirm candidate pairs by the exact Jaccard similarity of their shingle sets.

Documents of equal shingle sets (told by a fingerprint) are joined to the smallest of them and not compared, so that a
bucket of a hundred thousand copies costs a hundred thousand pairs, not their square. The others are listed pair by pair; a
pair that meets in several buckets, or in several partitions of the key space, is compared once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba as nb
import numpy as np

from operators.dedup.exact import murmur3_128

LoadSets = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Sorted unique ordinals uint64[n] -> their sorted shingle sets (hashes uint64, offsets int64[n + 1])."""

_CHUNK_PAIRS = 1 << 20
_CHUNK_MEMBERS = 1 << 15  # at 3 kB of text a document their sets take about 150 MB


@dataclass(frozen=True)
class Candidates:
    """`pairs` uint64[n, 2] of (larger, smaller) with different shingle sets, distinct and sorted; `same` uint64[m, 2] with equal
    ones; `unchecked`: pairs of buckets that the cap left out (one that meets in several buckets counts in each)."""

    pairs: np.ndarray
    same: np.ndarray
    unchecked: int


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """The distinct rows of uint64[n, 2], sorted."""
    ordered = pairs[np.lexsort([pairs[:, 1], pairs[:, 0]])]
    first = np.ones(len(ordered), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return ordered[first]


def candidate_pairs(members: np.ndarray, starts: np.ndarray, prints: np.ndarray, cap: int, base: int = 0) -> Candidates:
    """List what must be compared in buckets (see components.buckets). `prints` uint64: fingerprint of each member's shingle set.

    Of each bucket the pairs with its smallest member come first, and of those none is left out; all others up to `cap`.
    Two ordinals below `base` (rows that are only compared with) make no pair.
    """
    bucket = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order = np.lexsort([members, prints, bucket])
    bucket, prints, ordinals = bucket[order], prints[order], members[order]
    first = np.ones(len(order), bool)
    first[1:] = (bucket[1:] != bucket[:-1]) | (prints[1:] != prints[:-1])
    leaders = ordinals[np.flatnonzero(first)][np.cumsum(first) - 1] if len(order) else ordinals
    copies = ~first & (ordinals >= np.uint64(base))
    same = unique_pairs(np.column_stack([ordinals[copies], leaders[copies]]))

    bucket, leaders = bucket[first], ordinals[first]
    order = np.lexsort([leaders, bucket])
    bucket, leaders = bucket[order], leaders[order]
    sizes = np.bincount(bucket, minlength=len(starts) - 1)
    known = np.bincount(bucket[leaders < np.uint64(base)], minlength=len(starts) - 1)
    total = sizes * (sizes - 1) // 2 - known * (known - 1) // 2
    taken = np.minimum(total, np.maximum(cap, sizes - 1))
    ends = np.append(0, np.cumsum(sizes))
    found, at = [np.empty((0, 2), np.uint64)], 0
    while at < len(sizes):
        stop = at + max(1, int(np.searchsorted(np.cumsum(taken[at : at + _CHUNK_PAIRS]), _CHUNK_PAIRS, side="right")))
        inside = leaders[ends[at] : ends[stop]]
        found.append(unique_pairs(_list_pairs(inside, ends[at : stop + 1] - ends[at], known[at:stop], taken[at:stop])))
        at = stop
    return Candidates(unique_pairs(np.concatenate(found)), same, int((total - taken).sum()))


@nb.njit(cache=True, nogil=True)
def _list_pairs(members: np.ndarray, starts: np.ndarray, known: np.ndarray, taken: np.ndarray) -> np.ndarray:
    pairs = np.empty((taken.sum(), 2), np.uint64)
    at = 0
    for bucket in range(len(taken)):
        begin, end, left = starts[bucket], starts[bucket + 1], taken[bucket]
        for i in range(begin, end):
            for j in range(max(i + 1, begin + known[bucket]), end):
                if left == 0:
                    break
                pairs[at, 0], pairs[at, 1] = members[j], members[i]
                at += 1
                left -= 1
            if left == 0:
                break
    return pairs


def confirm(pairs: np.ndarray, threshold: float, load: LoadSets) -> tuple[np.ndarray, np.ndarray]:
    """(the pairs at or above the threshold, their similarity float64). `pairs` uint64[n, 2].

    Similarities are rounded to 6 decimals before the comparison. Works in chunks, so that few sets are in memory at once.
    """
    kept, similar, at = [np.empty((0, 2), np.uint64)], [np.empty(0)], 0
    while at < len(pairs):
        piece = pairs[at : at + _CHUNK_PAIRS]
        ordinals = np.unique(piece)
        while len(ordinals) > _CHUNK_MEMBERS and len(piece) > 1:
            piece = piece[: len(piece) // 2]
            ordinals = np.unique(piece)
        hashes, offsets = load(ordinals)
        jaccard = _jaccard(hashes, offsets, np.searchsorted(ordinals, piece[:, 1]), np.searchsorted(ordinals, piece[:, 0]))
        alike = np.round(jaccard, 6) >= threshold
        kept.append(piece[alike])
        similar.append(jaccard[alike])
        at += len(piece)
    return np.concatenate(kept), np.concatenate(similar)


@nb.njit(cache=True, nogil=True)
def _jaccard(hashes: np.ndarray, offsets: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64[pairs]: similarity of sets left[i] and right[i], merged in order; 0 for two empty sets."""
    out = np.zeros(len(left), np.float64)
    for pair in range(len(left)):
        i, i_end = offsets[left[pair]], offsets[left[pair] + 1]
        j, j_end = offsets[right[pair]], offsets[right[pair] + 1]
        either, shared = (i_end - i) + (j_end - j), 0
        while i < i_end and j < j_end:
            x, y = hashes[i], hashes[j]
            shared += x == y
            i += x <= y
            j += y <= x
        if either > 0:
            out[pair] = shared / (either - shared)
    return out


def fingerprints(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64[sets]: a hash of each sorted shingle set. Compared only within a bucket, so 64 bits are plenty."""
    data = np.ascontiguousarray(hashes).view(np.uint8) if len(hashes) else np.zeros(1, np.uint8)
    return _fingerprints(data, offsets)


@nb.njit(cache=True, nogil=True)
def _fingerprints(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    out = np.empty(len(offsets) - 1, np.uint64)
    for row in range(len(out)):
        out[row], _ = murmur3_128(data, 8 * offsets[row], 8 * offsets[row + 1])
    return out
