"""Confirm candidate pairs by the exact Jaccard similarity of their shingle sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba as nb
import numpy as np

LoadSets = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Sorted unique ordinals uint64[n] -> their sorted shingle sets (hashes uint64, offsets int64[n + 1])."""

_CHUNK_PAIRS = 1 << 20
_CHUNK_MEMBERS = 1 << 15  # at 3 kB of text a document their sets take about 150 MB


@dataclass(frozen=True)
class Confirmed:
    """Distinct (larger, smaller) pairs at or above the threshold, and counts over all buckets: pairs at or above it, pairs
    compared, pairs left out by the cap. A pair that meets in several buckets counts in each."""

    larger: np.ndarray
    smaller: np.ndarray
    confirmed: int
    checked: int
    unchecked: int


def confirm(members: np.ndarray, starts: np.ndarray, threshold: float, cap: int, load: LoadSets) -> Confirmed:
    """Check the pairs of each bucket (see components.buckets), those with its smallest member first, up to `cap` a bucket.

    Similarities are rounded to 6 decimals before the comparison. Works through the buckets in chunks, so that few sets
    are in memory at once.
    """
    sizes = np.diff(starts)
    total = sizes * (sizes - 1) // 2
    taken = np.minimum(total, cap)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    first = confirmed = 0
    while first < len(sizes):
        last = _chunk_end(sizes, taken, first)
        high, low = _list_pairs(members[starts[first] : starts[last]], starts[first : last + 1] - starts[first], taken[first:last])
        pairs, times = np.unique(np.column_stack([low, high]), axis=0, return_counts=True)
        ordinals = np.unique(pairs)
        hashes, offsets = load(ordinals)
        similar = _jaccard(hashes, offsets, np.searchsorted(ordinals, pairs[:, 1]), np.searchsorted(ordinals, pairs[:, 0]))
        alike = np.round(similar, 6) >= threshold
        found.append((pairs[alike, 1], pairs[alike, 0]))
        confirmed += int(times[alike].sum())
        first = last
    none = np.empty(0, np.uint64)
    return Confirmed(
        np.concatenate([none, *(high for high, _ in found)]),
        np.concatenate([none, *(low for _, low in found)]),
        confirmed,
        int(taken.sum()),
        int((total - taken).sum()),
    )


def _chunk_end(sizes: np.ndarray, pairs: np.ndarray, first: int) -> int:
    """One past the last bucket of a chunk: at least one bucket."""
    members = np.cumsum(sizes[first : first + _CHUNK_MEMBERS])
    compared = np.cumsum(pairs[first : first + _CHUNK_MEMBERS])
    fitting = int(np.sum((members <= _CHUNK_MEMBERS) & (compared <= _CHUNK_PAIRS)))
    return first + max(1, fitting)


@nb.njit(cache=True, nogil=True)
def _list_pairs(members: np.ndarray, starts: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high, low = np.empty(taken.sum(), np.uint64), np.empty(taken.sum(), np.uint64)
    at = 0
    for bucket in range(len(taken)):
        begin, end, left = starts[bucket], starts[bucket + 1], taken[bucket]
        for i in range(begin, end):
            for j in range(i + 1, end):
                if left == 0:
                    break
                high[at], low[at] = members[j], members[i]
                at += 1
                left -= 1
            if left == 0:
                break
    return high, low


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
