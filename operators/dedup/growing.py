"""What a stage adds to a kept index (see `index`), and what it reads of its rows.

grow       partition -> the keys of its rows, but not those of exact copies
publish    one unit: the record that makes the generation count
Rows and shingle sets are written by the units that remove rows.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.dedup import components, exchange, index, removed
from operators.dedup.confirming import SET_FILES
from operators.dedup.keys import KINDS
from operators.dedup.lookup import INDEXED
from operators.dedup.plan import Plan

_GROUP_ROWS = 1 << 16


def write_twins(plan: Plan, found: components.Removals) -> None:
    """One bit for each row of the inputs: set for exact copies, which the index leaves out."""
    twins = np.zeros(int(plan.firsts[-1]) - plan.base, bool)
    twins[(found.ordinals[found.kind == components.EXACT] - np.uint64(plan.base)).astype(np.int64)] = True
    exchange.write_array(plan.directory, plan.path("twins.bits"), np.packbits(twins, bitorder="little"))


def grow_partition(plan: Plan, number: int) -> None:
    assert plan.generation is not None
    twins = np.frombuffer(storage.read_bytes(plan.path("twins.bits")), np.uint8)
    for kind in INDEXED:
        records = exchange.read_partition(plan.directory, kind, number, KINDS[kind])
        records = records[records[:, -1] >= np.uint64(plan.base)]
        rows = records[:, -1] - np.uint64(plan.base)
        copy = (twins[(rows >> np.uint64(3)).astype(np.int64)] >> (rows & np.uint64(7)).astype(np.uint8)) & 1 == 1
        kept = np.column_stack([records[:, :-1], rows])[~copy]
        index.write_records(plan.generation, kind, number, plan.directory, kept)
    exchange.commit(plan.directory, "grow", number, {})


def keep_rows(plan: Plan, number: int, ids: pa.Array, sketches: np.ndarray | None, gone: np.ndarray, table: pa.Table) -> int:
    """Write what the index keeps of a part's rows, and their shingle sets if there are any; how many rows.

    `gone` and `table` are the rows that go (see removed.removed_table), in the same order.
    """
    assert plan.generation is not None
    part = plan.parts[number]
    copies = (gone[gone[:, 3] == components.EXACT, 0] - np.uint64(part.first_ordinal)).astype(np.int64)
    present = np.ones(part.rows, bool)
    if part.removed:
        present = ~shards.load_bitmap(part)
    present[copies] = False
    rows = np.flatnonzero(present)
    near = table.filter(pc.not_equal(table["reason"], removed.REASONS[components.EXACT]))
    place = pc.index_in(pa.array(rows + part.first_ordinal - plan.base, pa.uint64()), near["ordinal"].combine_chunks())
    columns = {
        "row": pa.array(rows, pa.uint64()),
        "id": ids.take(pa.array(rows)).cast(pa.string()),
        **{name: near[name].combine_chunks().take(place) for name in ("kept_id", "kept_ordinal", "kept_from")},
    }
    if sketches is not None:
        card = removed.cards_table(rows.astype(np.uint64), columns["id"], sketches[rows])
        columns["sketch"] = card["sketch"]
    scratch, name = storage.scratch_file(plan.directory), f"{number - plan.references:08d}"
    pq.write_table(pa.table(columns), scratch, compression="zstd", row_group_size=_GROUP_ROWS)
    storage.publish(scratch, storage.join(plan.generation, "rows", f"{name}.parquet"))
    if plan.verifies:
        for ending in SET_FILES:
            source = plan.path("shingles", f"{number:08d}.{ending}")
            storage.copy(source, storage.join(plan.generation, "shingles", f"{name}.{ending}"))
    return len(rows)


def known_cards(part: index.KnownPart, ordinals: np.ndarray) -> pa.Table:
    """Cards (see removed.cards_table) of rows of the index, by sorted ordinals. Holds one row group at a time."""
    wanted = pa.array(ordinals - np.uint64(part.first_ordinal))
    tables = []
    with storage.open_input(part.file("rows", "parquet")) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.metadata.num_row_groups):
            rows = file.read_row_group(group, columns=["row"])["row"]
            if pc.any(pc.is_in(rows, wanted)).as_py():
                found = file.read_row_group(group)
                tables.append(found.filter(pc.is_in(found["row"], wanted)))
    known = pa.concat_tables(tables).combine_chunks()
    if len(known) != len(ordinals):
        raise RuntimeError(f"{part.file('rows', 'parquet')} lacks rows that its keys name: the index is damaged")
    stayed = pc.if_else(pc.is_valid(known["kept_id"]), pc.coalesce(known["kept_from"], pa.scalar(part.generation)), None)
    kept = known.select(["kept_id", "kept_ordinal"]).append_column("kept_from", stayed)
    sketches = None
    if "sketch" in known.column_names and len(known):
        packed = known["sketch"].combine_chunks()
        width = packed.type.byte_width
        sketches = np.frombuffer(packed.buffers()[1], np.uint8).reshape(-1, width)[packed.offset : packed.offset + len(packed)]
    return removed.cards_table(ordinals, known["id"], sketches, kept)


def publish_generation(plan: Plan, number: int) -> None:
    """Write the record of the generation, with its size; it counts from then on."""
    assert plan.generation is not None
    inputs = range(plan.references, len(plan.parts))
    rows = sum(exchange.load_record(plan.directory, "remove", part)["indexed_rows"] for part in inputs)
    storage.delete(storage.join(plan.generation, "shingles", ".scratch"))
    sizes: dict[str, int] = {}
    for entry in storage.list_files(plan.generation):
        kind = entry.relative.split("/")[0]
        if kind != "generation.json":
            sizes[kind] = sizes.get(kind, 0) + entry.size
    record = {
        "format": index.FORMAT,
        "settings": index.settings_of(plan.options),
        "sets": plan.verifies,
        "against": plan.against,
        "partitions": plan.partitions,
        "part_rows": [plan.parts[part].rows for part in inputs],
        "rows": rows,
        "bytes": dict(sorted(sizes.items())),
    }
    path = storage.join(plan.generation, "generation.json")
    storage.create_if_absent(path, json.dumps(record, indent=1, sort_keys=True).encode())
    exchange.commit(plan.directory, "publish", number, {})
