"""One partition of the key space, or one part's confirmed pairs: the few pairs that connect its duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from operators.dedup import components
from operators.dedup.verify import LoadSets, confirm


@dataclass(frozen=True)
class Joined:
    """A forest of (larger, smaller) pairs uint64, of which `edges` counts what it was made from: members minus buckets, or
    confirmed pairs. `similarity` float64 of confirmed pairs (1 exactly: equal shingle sets), None for others."""

    larger: np.ndarray
    smaller: np.ndarray
    edges: int
    similarity: np.ndarray | None = None


def join_records(records: np.ndarray, base: int = 0) -> Joined:
    """Join the buckets of records (hashes..., ordinal); `base` as in `components.buckets`."""
    keys, ordinals = [records[:, i] for i in range(records.shape[1] - 1)], records[:, -1]
    larger, smaller = components.bucket_pairs(keys, ordinals, base)
    return Joined(*components.forest(larger, smaller), len(larger))


def join_confirmed(pairs: np.ndarray, same: np.ndarray, threshold: float, load: LoadSets) -> Joined:
    """Compare distinct `pairs` (see verify.Candidates) and join those at the threshold; `same` are joined as they are."""
    found, similar = confirm(pairs, threshold, load)
    mask = components.forest_mask(found[:, 0], found[:, 1])
    both = np.concatenate([found[mask], same])
    return Joined(both[:, 0], both[:, 1], len(found) + len(same), np.concatenate([similar[mask], np.ones(len(same))]))
