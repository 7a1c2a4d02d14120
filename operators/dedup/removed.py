"""The account of removed rows: what each one matched and who stayed in its place.

A removed row and its match lie in different parts. The ids travel by request: the parts that hold matches write *cards*
(ordinal, id, sketch), one record batch for each part that asked, which reads just its own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.dedup.bands import estimate_similarity
from operators.dedup.components import EXACT, Removals

REASONS = {1: "exact:duplicate", 2: "minhash:near_duplicate"}

SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.uint64(), nullable=False),  # the row's number among the rows of all inputs
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("match_ordinal", pa.uint64(), nullable=False),  # the row it shares its text or a bucket with
        pa.field("match_id", pa.string(), nullable=False),
        pa.field("kept_ordinal", pa.uint64(), nullable=False),  # the row that stays for the whole cluster
        pa.field("kept_id", pa.string(), nullable=False),
        # of (id, match_id): verified if the stage verifies, else an estimate; 1 for exact duplicates; null if not asked for
        pa.field("similarity", pa.float32()),
        # where match and kept are, and count their ordinals: null = the inputs, else a reference stage or a generation of the index
        pa.field("match_from", pa.string()),
        pa.field("kept_from", pa.string()),
    ]
)

_KEPT = [("kept_id", pa.string()), ("kept_ordinal", pa.uint64()), ("kept_from", pa.string())]


@dataclass(frozen=True)
class Numbering:
    """How ordinals are told outside. `firsts` uint64[sources + 1] of the sources; of each its label (null: the inputs) and what
    is taken from its ordinals, int64[sources]."""

    firsts: np.ndarray
    labels: list[str | None]
    origins: np.ndarray

    def told(self, ordinals: np.ndarray) -> tuple[np.ndarray, pa.Array]:
        """(numbers uint64[n], labels) of ordinals uint64[n]."""
        source = part_of(ordinals, self.firsts)
        labels = pa.array(self.labels, pa.string()).take(pa.array(source))
        return (ordinals.astype(np.int64) - self.origins[source]).astype(np.uint64), labels


def part_of(ordinals: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """int64[n]: the number of the part that holds each ordinal. `firsts` uint64[parts + 1]; empty parts hold none."""
    return np.searchsorted(firsts, ordinals, side="right").astype(np.int64) - 1


def requests(found: Removals, firsts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint64[requests, 2] of (asking part, ordinal asked for) sorted by the part asked, its start for each part asked)."""
    asking = np.tile(part_of(found.ordinals, firsts), 2)
    wanted = np.concatenate([found.match, found.kept])
    unique = np.unique(np.column_stack([part_of(wanted, firsts).astype(np.uint64), asking.astype(np.uint64), wanted]), axis=0)
    return unique[:, 1:], np.searchsorted(unique[:, 0], np.arange(len(firsts), dtype=np.uint64)).astype(np.int64)


def sources(gone: np.ndarray, firsts: np.ndarray) -> list[int]:
    """The parts whose cards the removed rows (ordinal, kept, match, kind) of one part need."""
    return np.unique(part_of(gone[:, 1:3].ravel(), firsts)).tolist()


def cards_schema(permutations: int) -> pa.Schema:
    return pa.schema([("ordinal", pa.uint64()), ("id", pa.string()), ("sketch", pa.binary(permutations)), *_KEPT])


def cards_table(ordinals: np.ndarray, ids: pa.Array, sketches: np.ndarray | None, kept: pa.Table | None = None) -> pa.Table:
    """Cards of the given rows: ordinals uint64[n], ids, sketches uint8[n, permutations] if there are any.

    `kept` (kept_id, kept_ordinal, kept_from) names the row that stayed where an earlier stage removed this one; null elsewhere.
    """
    schema = cards_schema(sketches.shape[1] if sketches is not None else 1)
    packed = pa.nulls(len(ordinals), schema.field("sketch").type)
    if sketches is not None:
        data = pa.py_buffer(np.ascontiguousarray(sketches).tobytes())
        packed = pa.FixedSizeBinaryArray.from_buffers(schema.field("sketch").type, len(ordinals), [None, data])
    stayed = [pa.nulls(len(ordinals), kind) for _, kind in _KEPT] if kept is None else [kept[name] for name, _ in _KEPT]
    return pa.table([pa.array(ordinals.copy()), ids.cast(pa.string()), packed, *stayed], schema=schema)


def write_cards(directory: str, path: str, asked: np.ndarray, cards: pa.Table) -> None:
    """One record batch for each asking part. `asked` uint64[n, 2] of (asking part, ordinal), sorted; `cards` sorted by ordinal
    holds each ordinal that is asked for. The askers are listed in the schema's metadata."""
    askers, starts = np.unique(asked[:, 0], return_index=True)
    schema = cards.schema.with_metadata({"askers": ",".join(map(str, askers.tolist()))})
    known = cards["ordinal"].to_numpy()
    scratch = storage.scratch_file(directory)
    with pa.OSFile(scratch, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for begin, end in zip(starts, [*starts[1:], len(asked)], strict=True):
            some = cards.take(pa.array(np.searchsorted(known, asked[begin:end, 1]))).combine_chunks()
            writer.write_batch(some.replace_schema_metadata(schema.metadata).to_batches()[0])
    storage.publish(scratch, path)


def read_cards(paths: Sequence[str], asker: int) -> pa.Table:
    """The cards for one part from several files, sorted by ordinal."""
    tables = []
    for path in paths:
        with storage.open_input(path) as stream:
            file = pa.ipc.open_file(stream)
            askers = [int(number) for number in file.schema.metadata[b"askers"].split(b",")]
            tables.append(pa.Table.from_batches([file.get_batch(askers.index(asker))]).replace_schema_metadata(None))
    return join_cards(tables)


def join_cards(tables: Sequence[pa.Table]) -> pa.Table:
    """Cards of several sources, sorted by ordinal. Sketches are kept only if all sources have them."""
    if len({table.schema for table in tables}) > 1:
        none = pa.binary(1)
        tables = [table.set_column(2, "sketch", pa.nulls(len(table), none)) for table in tables]
    return pa.concat_tables(tables).combine_chunks().sort_by("ordinal")


def removed_table(
    gone: np.ndarray, first_ordinal: int, ids: pa.Array, sketches: np.ndarray | None, cards: pa.Table, numbering: Numbering
) -> pa.Table:
    """SCHEMA rows of one part. `gone` uint64[n, 5] of (ordinal, kept, match, kind, bits of the verified similarity or NaN);
    `ids` and `sketches` are the part's own."""
    local = (gone[:, 0] - np.uint64(first_ordinal)).astype(np.int64)
    known = cards.column("ordinal").to_numpy()
    kept, match = np.searchsorted(known, gone[:, 1]), np.searchsorted(known, gone[:, 2])
    similarity = gone[:, 4].copy().view(np.float64)
    packed = cards.column("sketch").combine_chunks()
    if sketches is not None and not packed.null_count:
        theirs = np.frombuffer(packed.buffers()[1], np.uint8).reshape(-1, sketches.shape[1])[packed.offset :]
        estimate = estimate_similarity(sketches[local], theirs[match])
        similarity = np.where(np.isnan(similarity), estimate, similarity)
    similarity = np.where(gone[:, 3] == EXACT, 1.0, similarity).astype(np.float32)
    match_numbers, match_labels = numbering.told(gone[:, 2])
    kept_numbers, kept_labels = numbering.told(gone[:, 1])
    card_ids, stayed = cards.column("id"), cards.take(pa.array(kept))
    earlier = pc.is_valid(stayed["kept_id"])
    return pa.table(
        [
            pa.array(numbering.told(gone[:, 0])[0]),
            ids.take(pa.array(local)).cast(pa.string()),
            pa.array([REASONS[kind] for kind in (1, 2)]).take(pa.array(gone[:, 3].astype(np.int64) - 1)),
            pa.array(match_numbers),
            card_ids.take(pa.array(match)),
            pc.if_else(earlier, stayed["kept_ordinal"], pa.array(kept_numbers)),
            pc.if_else(earlier, stayed["kept_id"], stayed["id"]),
            pa.array(similarity, mask=np.isnan(similarity)),
            match_labels,
            pc.if_else(earlier, stayed["kept_from"], kept_labels),
        ],
        schema=SCHEMA,
    )


def own_copies(table: pa.Table, generations: Sequence[str]) -> int:
    """How many removed rows matched one of the index with the same id: rows that an earlier stage was given already."""
    indexed = pc.is_in(table["match_from"], pa.array(generations, pa.string()))
    same = pc.and_(indexed, pc.equal(table["id"], table["match_id"]))
    return int(pc.sum(same, min_count=0).as_py())


def write_table(directory: str, number: int, table: pa.Table) -> str:
    """Write the removed rows of a part; the file's name relative to the directory."""
    scratch = storage.scratch_file(directory)
    pq.write_table(table.combine_chunks(), scratch, compression="zstd")
    return shards.publish_by_content(scratch, directory, "removed", number)


def telling_rows(path: str, count: int) -> pa.Table:
    """The first `count` near-duplicates of a table of removed rows, those below .99 similarity before the others.

    Only rows whose text can be read: a row of the index has none here.
    """
    with storage.open_input(path) as stream:
        rows = pq.read_table(stream, schema=SCHEMA)
    near = rows.filter(pc.and_(pc.equal(rows.column("reason"), REASONS[2]), pc.is_null(rows.column("kept_from"))))
    alike = pc.fill_null(pc.greater_equal(near.column("similarity"), 0.99), False)
    return pa.concat_tables([near.filter(pc.invert(alike)), near.filter(alike)]).slice(0, count).cast(SCHEMA)
