"""Deduplication of any Ray Dataset: `MinHashDedup(threshold=0.8)(ds)` and `ExactDedup()(ds)` are Datasets again.

The blocks stay where they are in the object store: one task signs each block, only keys go between tasks, and one task a
block filters it. The driver sees references and a few numbers a block. Rows keep their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from operators.config import parse
from operators.dedup import components, removed
from operators.dedup.join import Joined, join_confirmed, join_records
from operators.dedup.keys import KINDS, document_keys, document_shingles, split
from operators.dedup.options import DedupOptions
from operators.dedup.plan import partitions_for
from operators.dedup.verify import candidate_pairs, fingerprints, unique_pairs

Refs = list[Any]
"""Object references; Ray's own types do not know tasks of several returns."""


class Deduplicated(NamedTuple):
    """`kept`: the input's rows in their order without duplicates. `removed`: schema `operators.dedup.removed.SCHEMA`."""

    kept: ray.data.Dataset
    removed: ray.data.Dataset


class _DatasetDedup:
    method: str

    def __init__(self, **options: Any) -> None:
        """Options are those of `operators.dedup.options.DedupOptions`, without `method`. Raises SettingsError."""
        self.options = parse(DedupOptions, {"method": self.method, **options}, type(self).__name__).with_shape()

    def __call__(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
        """The rows that stay. Runs at once (a global step), and keeps the blocks in the object store."""
        return self.split(dataset).kept

    def removed(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
        """The rows that go, each with its match, the row that stays, the reason and an estimate of similarity.

        `id` is the column `id` of the dataset if it has one, else the row's number.
        """
        return self.split(dataset).removed

    def split(self, dataset: ray.data.Dataset) -> Deduplicated:
        """Both at once. Raises KeyError when a column that the options name is missing."""
        blocks = _blocks_in_order(dataset)
        if not blocks:
            return Deduplicated(dataset, ray.data.from_arrow(removed.SCHEMA.empty_table()))
        rows = ray.get([_count_rows.remote(block, self.options.columns()) for block in blocks])
        firsts = np.concatenate([[0], np.cumsum(rows)]).astype(np.uint64)
        gone, extras, cards = _find(blocks, firsts, self.options)
        _wait(cards)
        kept: Refs = [_filter.remote(block, first, rows) for block, first, rows in zip(blocks, firsts, gone, strict=False)]
        tables: Refs = [
            _removed_rows.remote(block, number, firsts, gone[number], extras[number], cards) for number, block in enumerate(blocks)
        ]
        return Deduplicated(ray.data.from_arrow_refs(kept), ray.data.from_arrow_refs(tables))


class MinHashDedup(_DatasetDedup):
    """Removes exact duplicates and near-duplicates by MinHash-LSH.

    >>> kept = MinHashDedup(threshold=0.8, permutations=112)(ray.data.read_parquet("documents"))  # doctest: +SKIP
    """

    method = "minhash"


class ExactDedup(_DatasetDedup):
    """Removes rows whose text (or normalised text, `exact_on="normalised"`) occurred before.

    >>> kept = ExactDedup()(ray.data.read_parquet("documents"))  # doctest: +SKIP
    """

    method = "exact"


def _blocks_in_order(dataset: ray.data.Dataset) -> Refs:
    """References to the dataset's Arrow blocks in row order; executes it with order preserved if it has not run yet."""
    execution = dataset.context.execution_options
    before, execution.preserve_order = execution.preserve_order, True
    try:
        return list(dataset.materialize().to_arrow_refs())
    finally:
        execution.preserve_order = before


def _wait(references: Refs) -> None:
    """Wait until all of them are there. A task that is handed references in a list starts before they are, and stands inside
    `ray.get`, where Ray starts one more process in its place: with many blocks, many more processes than cores."""
    ray.wait(references, num_returns=len(references), fetch_local=False)


def _find(blocks: Refs, firsts: np.ndarray, options: DedupOptions) -> tuple[Refs, Refs, Refs]:
    """References, one a block each: its removed rows uint64[n, 4], its (sketch, scores), the cards others need of it."""
    partitions = partitions_for(int(firsts[-1]), options)
    pieces: list[Refs] = []
    extras: Refs = []
    for number, block in enumerate(blocks):
        returned: Any = _keys.options(num_returns=partitions + 1).remote(block, int(firsts[number]), options, partitions)
        pieces.append(returned[:-1])
        extras.append(returned[-1])
    by_partition = [[records[partition] for records in pieces] for partition in range(partitions)]
    exact: Refs = [_join.remote("exact", *records) for records in by_partition]
    near: Refs
    if options.finds_near and options.verify:
        candidates = [_candidates.remote(*records) for records in by_partition]
        _wait(candidates)
        sets = [_shingles.remote(block, int(first), options, candidates) for block, first in zip(blocks, firsts[:-1], strict=True)]
        _wait(sets)
        listed = [_pairs.remote(options, firsts, sets, *records) for records in by_partition]
        _wait(listed)
        near = [_confirm.remote(options, firsts, number, sets, listed) for number in range(len(blocks))]
    else:
        near = [_join.remote("bands", *records) for records in by_partition]
    _wait([*exact, *near])
    outcome: Any = _resolve.options(num_returns=2 * len(blocks)).remote(options, firsts, exact, near, extras)
    gone, wanted = outcome[: len(blocks)], outcome[len(blocks) :]
    cards = [_cards.remote(*each) for each in zip(blocks, firsts[:-1].tolist(), wanted, extras, strict=True)]
    return gone, extras, cards


@ray.remote
def _count_rows(block: pa.Table, columns: list[str]) -> int:
    missing = [name for name in columns if name not in block.column_names]
    if missing and block.num_rows:
        raise KeyError(f"the dataset has no column {missing}; it has {block.column_names}")
    return block.num_rows


@ray.remote
def _keys(block: pa.Table, first: int, options: DedupOptions, partitions: int) -> tuple[Any, ...]:
    """For each partition its records by kind; last (sketch, scores) of the block."""
    if not block.num_rows:
        return *({} for _ in range(partitions)), (None, np.empty(0))
    ordinals = np.arange(first, first + block.num_rows, dtype=np.uint64)
    keys = document_keys(block, ordinals, options, with_ids=False)
    cut = {kind: split(records, partitions) for kind, records in keys.records.items()}
    pieces = [{kind: records[starts[p] : starts[p + 1]] for kind, (records, starts) in cut.items()} for p in range(partitions)]
    return *pieces, (keys.sketch, keys.scores)


def _gather(kind: str, records: tuple[dict[str, np.ndarray], ...]) -> np.ndarray:
    return np.concatenate([np.empty((0, KINDS[kind]), np.uint64), *(piece[kind] for piece in records if kind in piece)])


@ray.remote
def _candidates(*records: dict[str, np.ndarray]) -> np.ndarray:
    found = _gather("bands", records)
    return np.unique(components.buckets([found[:, 0]], found[:, 1])[0])


Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""(ordinals, hashes, offsets, fingerprints) of some rows of a block."""


@ray.remote
def _shingles(block: pa.Table, first: int, options: DedupOptions, candidates: Refs) -> Sets:
    """The shingle sets of the block's candidates."""
    mask = np.zeros(block.num_rows, bool)
    for reference in candidates:
        shared: Any = ray.get(reference)
        inside = slice(*np.searchsorted(shared, np.array([first, first + block.num_rows], np.uint64)))
        mask[(shared[inside] - np.uint64(first)).astype(np.int64)] = True
    ordinals: np.ndarray = np.flatnonzero(mask).astype(np.uint64) + np.uint64(first)
    if not mask.any():
        return ordinals, np.empty(0, np.uint64), np.zeros(1, np.int64), np.empty(0, np.uint64)
    hashes, offsets = document_shingles(block.filter(pa.array(mask)), options)
    return ordinals, hashes, offsets, fingerprints(hashes, offsets)


def _sets_of(sets: Refs, firsts: np.ndarray, wanted: np.ndarray) -> list[tuple[Sets, np.ndarray]]:
    """(the sets of a block, which of them are wanted) for sorted ordinals."""
    bounds, found = np.searchsorted(wanted, firsts), []
    for number in np.flatnonzero(np.diff(bounds)).tolist():
        known: Sets = ray.get(sets[number])
        found.append((known, np.searchsorted(known[0], wanted[bounds[number] : bounds[number + 1]])))
    return found


@ray.remote
def _pairs(options: DedupOptions, firsts: np.ndarray, sets: Refs, *records: dict[str, np.ndarray]) -> Any:
    """For each block the (pairs, same) of the partition whose larger row it has."""
    found = _gather("bands", records)
    members, starts = components.buckets([found[:, 0]], found[:, 1])
    ordinals = np.unique(members)
    prints = np.concatenate([np.empty(0, np.uint64), *(known[3][rows] for known, rows in _sets_of(sets, firsts, ordinals))])
    listed = candidate_pairs(members, starts, prints[np.searchsorted(ordinals, members)], options.verify_pairs)
    cuts = [np.split(rows, np.searchsorted(rows[:, 0], firsts[1:-1])) for rows in (listed.pairs, listed.same)]
    return list(zip(*cuts, strict=True))


@ray.remote
def _confirm(options: DedupOptions, firsts: np.ndarray, number: int, sets: Refs, listed: Refs) -> Joined:
    """The pairs whose larger row is in a block, each compared once."""
    ours: list[Any] = [ray.get(reference)[number] for reference in listed]
    pairs, same = (unique_pairs(np.concatenate([np.empty((0, 2), np.uint64), *(each[i] for each in ours)])) for i in (0, 1))

    def load(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pieces, sizes = [np.empty(0, np.uint64)], [np.zeros(1, np.int64)]
        for (_, hashes, offsets, _), rows in _sets_of(sets, firsts, wanted):
            pieces += [hashes[offsets[row] : offsets[row + 1]] for row in rows.tolist()]
            sizes.append(np.diff(offsets)[rows])
        return np.concatenate(pieces), np.cumsum(np.concatenate(sizes))

    return join_confirmed(pairs, same, options.threshold, load)


@ray.remote
def _join(kind: str, *records: dict[str, np.ndarray]) -> Joined:
    return join_records(_gather(kind, records))


@ray.remote
def _resolve(options: DedupOptions, firsts: np.ndarray, exact: Refs, near: Refs, extras: Refs) -> tuple[np.ndarray, ...]:
    """For each block its removed rows uint64[n, 5]; then for each block the ordinals that removed rows refer to."""
    none = np.empty(0, np.uint64)
    found: Any = [[ray.get(reference) for reference in references] for references in (exact, near)]
    pairs = [
        (np.concatenate([none, *(e.larger for e in each)]), np.concatenate([none, *(e.smaller for e in each)])) for each in found
    ]
    similarity = np.concatenate([np.empty(0), *(e.similarity for e in found[1] if e.similarity is not None)])
    scores = None
    if options.score_columns:
        members = components.members_of(pairs[0], pairs[1])
        bounds, pieces = np.searchsorted(members, firsts), [np.empty((0, options.score_columns))]
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            local = (members[bounds[number] : bounds[number + 1]] - firsts[number]).astype(np.int64)
            pieces.append(ray.get(extras[number])[1][local])
        scores = np.concatenate(pieces)
    verified = similarity if options.finds_near and options.verify else None
    result = components.resolve(pairs[0], pairs[1], scores, similarity=verified)
    rows = np.column_stack(
        [result.ordinals, result.kept, result.match, result.kind.astype(np.uint64), result.similarity.view(np.uint64)]
    )
    wanted = np.unique(rows[:, 1:3])
    gone = np.split(rows, np.searchsorted(result.ordinals, firsts[1:-1]))
    return *gone, *np.split(wanted, np.searchsorted(wanted, firsts[1:-1]))


def _ids(block: pa.Table, first: int) -> pa.Array:
    if "id" in block.column_names:
        column = block.column("id").cast(pa.string())
    else:
        column = pa.chunked_array([np.arange(first, first + block.num_rows)]).cast(pa.string())
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


@ray.remote
def _cards(block: pa.Table, first: int, wanted: np.ndarray, extra: tuple[Any, Any]) -> pa.Table:
    local, sketch = (wanted - np.uint64(first)).astype(np.int64), extra[0]
    rows = sketch[local] if sketch is not None else None
    return removed.cards_table(wanted, _ids(block, first).take(pa.array(local)), rows)


@ray.remote
def _filter(block: pa.Table, first: np.uint64, gone: np.ndarray) -> pa.Table:
    keep = np.ones(block.num_rows, bool)
    keep[(gone[:, 0] - first).astype(np.int64)] = False
    return block.filter(pa.array(keep))


@ray.remote
def _removed_rows(
    block: pa.Table, number: int, firsts: np.ndarray, gone: np.ndarray, extra: tuple[Any, Any], cards: Refs
) -> pa.Table:
    if not len(gone):
        return removed.SCHEMA.empty_table()
    tables = [ray.get(cards[source]) for source in removed.sources(gone, firsts)]
    first = int(firsts[number])
    count = len(firsts) - 1
    numbering = removed.Numbering(firsts, [None] * count, np.zeros(count, np.int64))
    return removed.removed_table(gone, first, _ids(block, first), extra[0], removed.join_cards(tables), numbering)
