"""One partition of the key space: from its records to the few pairs that connect its duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from operators.dedup import components
from operators.dedup.options import DedupOptions
from operators.dedup.verify import LoadSets, confirm


@dataclass(frozen=True)
class Joined:
    """A forest of (larger, smaller) pairs. `edges` counts members minus buckets, or with `verify` the confirmed pairs."""

    larger: np.ndarray
    smaller: np.ndarray
    edges: int
    checked: int = 0
    unchecked: int = 0


def join_records(kind: str, records: np.ndarray, options: DedupOptions, load: LoadSets) -> Joined:
    """Join the buckets of records (hashes..., ordinal) of a kind; near-duplicates are confirmed through `load` if asked for."""
    keys, ordinals = [records[:, i] for i in range(records.shape[1] - 1)], records[:, -1]
    if kind == "bands" and options.verify:
        members, starts = components.buckets(keys, ordinals)
        found = confirm(members, starts, options.threshold, options.verify_pairs, load)
        larger, smaller = components.forest(found.larger, found.smaller)
        return Joined(larger, smaller, found.confirmed, found.checked, found.unchecked)
    larger, smaller = components.bucket_pairs(keys, ordinals)
    return Joined(*components.forest(larger, smaller), len(larger))
