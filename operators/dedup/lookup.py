"""The records of a partition: those of the inputs, and those of the index that share a key with them.

lookup  partition -> records of the index with a key of the partition, with ordinals     (only with an index)
"""

from __future__ import annotations

import numpy as np

from cluster import storage
from operators.dedup import exchange, index
from operators.dedup.keys import KINDS
from operators.dedup.plan import Plan

INDEXED = ("exact", "bands")


def look_up(plan: Plan, number: int) -> None:
    """Find the partition's keys in every generation; what has no such key is read past and forgotten."""
    found, parts = {}, {part.generation: part for part in reversed(plan.known)}  # the first part of each
    for kind in INDEXED:
        own = exchange.read_partition(plan.directory, kind, number, KINDS[kind])
        wanted = np.unique(own[:, 0])
        pieces = [np.empty((0, KINDS[kind]), np.uint64)]
        for name in plan.against:
            part = parts.get(name)
            if part is None:
                continue  # a generation without rows
            for records in index.lookup(index.load(part.directory), kind, KINDS[kind], wanted):
                records[:, -1] += np.uint64(part.first_ordinal)
                pieces.append(records)
        hits = np.concatenate(pieces)
        exchange.write_array(plan.directory, exchange.data_path(plan.directory, f"known-{kind}", number), hits)
        found[kind] = len(hits)
    exchange.commit(plan.directory, "lookup", number, found)


def partition_records(plan: Plan, kind: str, number: int) -> np.ndarray:
    """uint64[records, width] of a partition, with the index's."""
    own = exchange.read_partition(plan.directory, kind, number, KINDS[kind])
    if not plan.known or kind not in INDEXED:
        return own
    path = exchange.data_path(plan.directory, f"known-{kind}", number)
    known = np.frombuffer(storage.read_bytes(path), np.uint64).reshape(-1, KINDS[kind])
    return np.concatenate([known, own])
