"""The account of removed rows: what each one matched and who stayed in its place.

A removed row and its match lie in different parts. The ids travel by request: the parts that hold matches write *cards*
(ordinal, id, sketch), one record batch for each part that asked, which reads just its own batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators.dedup.bands import estimate_similarity
from operators.dedup.components import EXACT, Removals

REASONS = {1: "exact:duplicate", 2: "minhash:near_duplicate"}

SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.uint64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("match_ordinal", pa.uint64(), nullable=False),  # the row it shares its text or a bucket with
        pa.field("match_id", pa.string(), nullable=False),
        pa.field("kept_ordinal", pa.uint64(), nullable=False),  # the row that stays for the whole cluster
        pa.field("kept_id", pa.string(), nullable=False),
        pa.field("similarity", pa.float32()),  # estimate for (id, match_id); 1 for exact duplicates; null if not asked for
    ]
)


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
    return pa.schema([("ordinal", pa.uint64()), ("id", pa.string()), ("sketch", pa.binary(permutations))])


def cards_table(ordinals: np.ndarray, ids: pa.Array, sketches: np.ndarray) -> pa.Table:
    """Cards of the given rows: ordinals uint64[n], ids, sketches uint8[n, permutations] (one column of zeros for none)."""
    schema = cards_schema(sketches.shape[1])
    packed = pa.FixedSizeBinaryArray.from_buffers(
        schema.field("sketch").type, len(ordinals), [None, pa.py_buffer(np.ascontiguousarray(sketches).tobytes())]
    )
    return pa.table([pa.array(ordinals.copy()), ids.cast(pa.string()), packed], schema=schema)


def write_cards(
    directory: str, path: str, asked: np.ndarray, first_ordinal: int, ids: pa.Array, sketches: np.ndarray | None
) -> None:
    """`asked` uint64[n, 2] of (asking part, ordinal), sorted; the askers are listed in the schema's metadata."""
    askers, starts = np.unique(asked[:, 0], return_index=True)
    schema = cards_schema(sketches.shape[1] if sketches is not None else 1)
    schema = schema.with_metadata({"askers": ",".join(map(str, askers.tolist()))})
    scratch = storage.scratch_file(directory)
    with pa.OSFile(scratch, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for begin, end in zip(starts, [*starts[1:], len(asked)], strict=True):
            ordinals = asked[begin:end, 1]
            local = (ordinals - np.uint64(first_ordinal)).astype(np.int64)
            rows = sketches[local] if sketches is not None else np.zeros((len(local), 1), np.uint8)
            writer.write_batch(
                cards_table(ordinals, ids.take(pa.array(local)), rows).to_batches()[0].replace_schema_metadata(schema.metadata)
            )
    storage.publish(scratch, path)


def read_cards(paths: Sequence[str], asker: int) -> pa.Table:
    """The cards for one part from several files, sorted by ordinal."""
    batches = []
    for path in paths:
        with storage.open_input(path) as stream:
            file = pa.ipc.open_file(stream)
            askers = [int(number) for number in file.schema.metadata[b"askers"].split(b",")]
            batches.append(pa.Table.from_batches([file.get_batch(askers.index(asker))]).replace_schema_metadata(None))
    return pa.concat_tables(batches).combine_chunks().sort_by("ordinal")


def removed_table(gone: np.ndarray, first_ordinal: int, ids: pa.Array, sketches: np.ndarray | None, cards: pa.Table) -> pa.Table:
    """SCHEMA rows of one part. `gone` uint64[n, 4] of (ordinal, kept, match, kind); `ids`, `sketches` are the part's own."""
    local = (gone[:, 0] - np.uint64(first_ordinal)).astype(np.int64)
    known = cards.column("ordinal").to_numpy()
    kept, match = np.searchsorted(known, gone[:, 1]), np.searchsorted(known, gone[:, 2])
    similarity, unknown = np.zeros(len(gone), np.float32), gone[:, 3] != EXACT
    if sketches is not None:
        packed = cards.column("sketch").combine_chunks()
        buffer = np.frombuffer(packed.buffers()[1], np.uint8).reshape(-1, sketches.shape[1])[packed.offset :]
        similarity = estimate_similarity(sketches[local], buffer[match]).astype(np.float32)
        unknown = np.zeros(len(gone), bool)
    similarity[gone[:, 3] == EXACT] = 1.0
    card_ids = cards.column("id")
    return pa.table(
        [
            pa.array(gone[:, 0].copy()),
            ids.take(pa.array(local)).cast(pa.string()),
            pa.array([REASONS[kind] for kind in (1, 2)]).take(pa.array(gone[:, 3].astype(np.int64) - 1)),
            pa.array(gone[:, 2].copy()),
            card_ids.take(pa.array(match)),
            pa.array(gone[:, 1].copy()),
            card_ids.take(pa.array(kept)),
            pa.array(similarity, mask=unknown),
        ],
        schema=SCHEMA,
    )


def write_table(directory: str, number: int, table: pa.Table) -> str:
    """Write the removed rows of a part; the file's name relative to the directory."""
    scratch = storage.scratch_file(directory)
    pq.write_table(table.combine_chunks(), scratch, compression="zstd")
    with open(scratch, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = f"removed/{number:08d}-{digest[:12]}.parquet"
    storage.publish(scratch, storage.join(directory, name))
    return name


def telling_rows(path: str, count: int) -> pa.Table:
    """The first `count` near-duplicates of a table of removed rows, those below .99 similarity before the others."""
    with storage.open_input(path) as stream:
        rows = pq.read_table(stream, schema=SCHEMA)
    near = rows.filter(pc.equal(rows.column("reason"), REASONS[2]))
    alike = pc.fill_null(pc.greater_equal(near.column("similarity"), 0.99), False)
    return pa.concat_tables([near.filter(pc.invert(alike)), near.filter(alike)]).slice(0, count).cast(SCHEMA)
