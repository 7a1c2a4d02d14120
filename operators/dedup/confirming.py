"""The phases that verify pairs: candidates and their shingle sets, the distinct pairs of all buckets, their comparison.

candidates  partition -> ordinals that share a bucket
shingles    part -> shingle sets of its candidates (of all its rows, if an index is to keep them), and their fingerprints
pairs       partition -> distinct pairs of its buckets, by the part of the larger
verify      part -> the pairs of all partitions, each compared once; a forest of those at the threshold
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cluster import storage
from operators import shards
from operators.dedup import components, exchange
from operators.dedup.join import join_confirmed
from operators.dedup.keys import document_shingles
from operators.dedup.lookup import partition_records
from operators.dedup.plan import Plan
from operators.dedup.verify import candidate_pairs, fingerprints, unique_pairs

_BATCH_ROWS = 2048


def list_candidates(plan: Plan, number: int) -> None:
    """The ordinals of a partition that share a bucket, sorted, and where those of each source begin."""
    records = partition_records(plan, "bands", number)
    members, _ = components.buckets([records[:, 0]], records[:, 1], plan.base)
    _write_by_source(plan, "candidates", number, np.unique(members)[:, None])
    exchange.commit(plan.directory, "candidates", number, {})


def _write_by_source(plan: Plan, kind: str, number: int, rows: np.ndarray) -> None:
    """Rows of ordinals, sorted by their first column, and where those of each source begin."""
    exchange.write_array(plan.directory, plan.path(kind, f"{number:08d}.bin"), rows)
    starts = np.searchsorted(rows[:, 0], plan.firsts).astype(np.int64)
    exchange.write_array(plan.directory, plan.path(kind, f"{number:08d}.starts.bin"), starts)


def _read_of_source(plan: Plan, kind: str, source: int, width: int) -> np.ndarray:
    """What all partitions wrote for one source."""
    pieces = [np.empty((0, width), np.uint64)]
    for partition in range(plan.partitions):
        starts = exchange.read_rows(plan.path(kind, f"{partition:08d}.starts.bin"), source, source + 2, 1, np.int64)
        path = plan.path(kind, f"{partition:08d}.bin")
        pieces.append(exchange.read_rows(path, int(starts[0, 0]), int(starts[1, 0]), width))
    return np.concatenate(pieces)


def collect_shingles(plan: Plan, number: int) -> None:
    """Hashes, offsets, rows (numbered in the part) and fingerprints of a part's shingle sets, in four files."""
    part, everything = plan.parts[number], plan.generation is not None and number >= plan.references
    wanted = np.unique(_read_of_source(plan, "candidates", plan.source(number), 1)[:, 0])
    sets = exchange.RunFile(plan.directory, _set_path(plan, plan.source(number), "bin"))
    ends, rows, prints = [np.zeros(1, np.int64)], [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    try:
        for ordinals, batch in shards.read(part, plan.options.columns(), _BATCH_ROWS) if everything or len(wanted) else ():
            numbers = ordinals.to_numpy()
            mask = np.full(len(numbers), True) if everything else np.isin(numbers, wanted, assume_unique=True)
            if mask.any():
                hashes, offsets = document_shingles(batch.filter(pa.array(mask)), plan.options)
                sets.append(hashes)
                ends.append(offsets[1:] + ends[-1][-1])
                rows.append(numbers[mask] - np.uint64(part.first_ordinal))
                prints.append(fingerprints(hashes, offsets))
    except BaseException:
        sets.abandon()
        raise
    sets.publish()
    for ending, pieces in (("offsets", ends), ("rows", rows), ("prints", prints)):
        exchange.write_array(plan.directory, _set_path(plan, plan.source(number), ending), np.concatenate(pieces))
    exchange.commit(plan.directory, "shingles", number, {})


SET_FILES = ("bin", "offsets", "rows", "prints")


def _set_path(plan: Plan, source: int, ending: str) -> str:
    if source < len(plan.known):
        return plan.known[source].file("shingles", ending)
    return plan.path("shingles", f"{source - len(plan.known):08d}.{ending}")


def _by_source(plan: Plan, ordinals: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(source, positions of its rows among its collected sets) of sorted ordinals."""
    firsts, found = plan.firsts, []
    bounds = np.searchsorted(ordinals, firsts)
    for source in np.flatnonzero(np.diff(bounds)).tolist():
        known = np.frombuffer(storage.read_bytes(_set_path(plan, source, "rows")), np.uint64)
        wanted = ordinals[bounds[source] : bounds[source + 1]] - firsts[source]
        at = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
        if not len(known) or (known[at] != wanted).any():
            raise RuntimeError(f"{_set_path(plan, source, 'rows')} lacks the shingle sets of rows that share a bucket")
        found.append((source, at))
    return found


def _load_prints(plan: Plan, ordinals: np.ndarray) -> np.ndarray:
    pieces = [np.empty(0, np.uint64)]
    for source, at in _by_source(plan, ordinals):
        pieces.append(np.frombuffer(storage.read_bytes(_set_path(plan, source, "prints")), np.uint64)[at])
    return np.concatenate(pieces)


def _load_sets(plan: Plan, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The collected shingle sets of sorted ordinals (see verify.LoadSets)."""
    pieces, sizes = [np.empty(0, np.uint64)], [np.zeros(1, np.int64)]
    for source, at in _by_source(plan, ordinals):
        offsets = np.frombuffer(storage.read_bytes(_set_path(plan, source, "offsets")), np.int64)
        with storage.open_input(_set_path(plan, source, "bin")) as stream:
            for begin, end in zip(offsets[at].tolist(), offsets[at + 1].tolist(), strict=True):
                pieces.append(np.frombuffer(stream.read_at((end - begin) * 8, begin * 8), np.uint64))
        sizes.append((offsets[at + 1] - offsets[at]).astype(np.int64))
    return np.concatenate(pieces), np.cumsum(np.concatenate(sizes))


def list_pairs(plan: Plan, number: int) -> None:
    records = partition_records(plan, "bands", number)
    members, starts = components.buckets([records[:, 0]], records[:, 1], plan.base)
    ordinals = np.unique(members)
    prints = _load_prints(plan, ordinals)[np.searchsorted(ordinals, members)]
    found = candidate_pairs(members, starts, prints, plan.options.verify_pairs, plan.base)
    _write_by_source(plan, "pairs", number, found.pairs)
    _write_by_source(plan, "same", number, found.same)
    exchange.commit(plan.directory, "pairs", number, {"unchecked": found.unchecked})


def verify_pairs(plan: Plan, number: int) -> None:
    source = plan.source(number)
    pairs, same = (unique_pairs(_read_of_source(plan, kind, source, 2)) for kind in ("pairs", "same"))
    joined = join_confirmed(pairs, same, plan.options.threshold, lambda wanted: _load_sets(plan, wanted))
    assert joined.similarity is not None
    rows = np.column_stack([joined.larger, joined.smaller, joined.similarity.view(np.uint64)])
    exchange.write_array(plan.directory, exchange.data_path(plan.directory, "pairs-bands", number), rows)
    exchange.commit(plan.directory, "verify", number, {"checked": len(pairs), "edges": joined.edges})
