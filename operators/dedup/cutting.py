"""Parts written again without spans of their text, with an account of every span and of what is left too short.

Shared by the stages that cut text instead of dropping rows (lines, paragraphs, substrings). Each part of the input becomes
one unit of the output; rows that lose nothing pass through unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from cluster import storage
from operators import shards, tables
from operators.config import Settings
from operators.dedup import exchange
from operators.dedup.normalise import text_buffers
from operators.dedup.spans import without_ranges
from operators.ledger import Equation, Ledger, merge_stats
from operators.stage import StageContext

SHOWN_CHARACTERS = 200
BATCH_ROWS = 2048

SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.uint64(), nullable=False),  # the row's number among the rows of all inputs
        pa.field("id", pa.string(), nullable=False),
        pa.field("start_byte", pa.int64(), nullable=False),  # in the text as it came, UTF-8
        pa.field("end_byte", pa.int64(), nullable=False),
        pa.field("kept_ordinal", pa.uint64(), nullable=False),  # the row that holds the first occurrence
        pa.field("kept_id", pa.string(), nullable=False),
        pa.field("documents", pa.uint64()),  # rows that hold it, 1: repeated within this one; null where not counted
        pa.field("text", pa.large_string(), nullable=False),  # its first 200 characters
        pa.field("rejected", pa.bool_(), nullable=False),  # the row was left too short and is in the rejects, uncut
    ]
)
"""`cut/*.parquet`: one row for each span that was cut."""


class CutOptions(Settings):
    """What is cut from, and when too little is left."""

    column: str = Field("text", description="the string column that is compared and cut")
    min_characters_left: int = Field(
        1, ge=1, description="documents that lost text and are left with fewer characters are rejected"
    )
    min_share_left: float = Field(
        0, ge=0, le=1, description="documents that are cut to a smaller share of their characters are rejected"
    )
    partitions: int | None = Field(None, ge=1, le=65536, description="pieces of the key space; default: about 64 MB of keys each")


@dataclass(frozen=True)
class CutPlan:
    """What every unit of one stage knows."""

    directory: str
    kind: str
    parts: list[shards.Part]
    options: Any
    partitions: int

    @property
    def firsts(self) -> np.ndarray:
        """uint64[parts + 1]: the first ordinal of each part, and the number of all rows."""
        return np.array([*(part.first_ordinal for part in self.parts), sum(part.rows for part in self.parts)], np.uint64)

    def part_of(self, ordinals: np.ndarray) -> np.ndarray:
        """int64[n]: the number of the part that holds each ordinal."""
        return np.searchsorted(self.firsts, ordinals, side="right").astype(np.int64) - 1


@dataclass(frozen=True)
class Cuts:
    """What goes out of one batch, sorted by row and start: bytes within each text.

    `kept` uint64 holds the ordinals of the rows with the first occurrence, `documents` uint64 how many rows hold it.
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    kept: np.ndarray
    documents: np.ndarray | None


FindCuts = Callable[[np.ndarray, pa.RecordBatch], Cuts]
"""From (ordinals uint64[rows], batch) to what is cut."""


def cut_part(
    plan: CutPlan,
    number: int,
    find: FindCuts,
    names: tuple[np.ndarray, pa.Array],
    mark: bool = False,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Write part `number` without what `find` finds, and commit it as a unit of the stage.

    `names` are the (sorted ordinals, ids) of the rows that cuts refer to. With `mark` no text is touched: a column
    `duplicate_spans` list<struct<start, end>> (bytes) tells where the spans are. `done` is called before the unit counts.
    """
    part, options = plan.parts[number], plan.options
    writer = shards.UnitWriter(plan.directory, number)
    ledger, stats, spans = Ledger(), dict[str, Any](), [SCHEMA.empty_table()]
    try:
        for ordinals, batch in shards.read(part, None, BATCH_ROWS):
            numbers = ordinals.to_numpy()
            cuts = find(numbers, batch)
            table = pa.Table.from_batches([batch])
            text = pc.fill_null(table[options.column].cast(pa.large_string()).combine_chunks(), "")
            column, left = (text, None) if mark else _cut(text, cuts)
            before = pc.utf8_length(text).to_numpy(zero_copy_only=False)
            after = before if left is None else pc.utf8_length(column).to_numpy(zero_copy_only=False)
            lost = np.zeros(len(table), bool)
            lost[cuts.rows] = True
            short = lost & ((after < options.min_characters_left) | (after < np.round(before * options.min_share_left, 6)))
            if mark:
                short[:] = False
                table = table.append_column("duplicate_spans", _marks(len(table), cuts))
            place = table.schema.get_field_index(options.column)
            table = table.set_column(place, pa.field(options.column, pa.large_string()), column)
            writer.write(table.filter(pa.array(~short)))
            if short.any():
                writer.reject(_rejects(plan.kind, table, text, after, short))
            spans.append(_spans(numbers, table, text, cuts, short, names))
            ledger.add(Ledger(len(table), 0, int((~short).sum()), Counter({f"{plan.kind}:too_little_left": int(short.sum())})))
            characters = {
                "in": int(before.sum()), "kept": int(after[~short].sum()), "rejected": int(before[short].sum()),
                "cut": int((before - after)[~short].sum()),
            }  # fmt: skip
            merge_stats(stats, {"spans": len(cuts.rows), "documents_changed": int((lost & ~short).sum()), "characters": characters})
        ledger.rejected = +ledger.rejected
        table = pa.concat_tables(spans)
        name = _write(plan.directory, number, table) if len(table) else None
        if len(table):
            stats["examples"] = _examples(table)
        writer.commit(ledger, stats)
    except BaseException:
        writer.abandon()
        raise
    done()
    exchange.commit(plan.directory, "cut", number, {"table": name})


def _cut(text: pa.Array, cuts: Cuts) -> tuple[pa.Array, bool | None]:
    """The texts without the cuts, and None if there are none."""
    if not len(cuts.rows):
        return text, None
    data, offsets = text_buffers(text)
    out = np.empty(int(offsets[-1] - offsets[0]), np.uint8)
    new = without_ranges(data, offsets, cuts.rows, cuts.starts, cuts.ends, out)
    buffers = [pa.py_buffer(new), pa.py_buffer(out[: new[-1]])]
    return pa.LargeStringArray.from_buffers(len(text), *buffers), True


def _marks(rows: int, cuts: Cuts) -> pa.Array:
    offsets = np.zeros(rows + 1, np.int32)
    np.cumsum(np.bincount(cuts.rows, minlength=rows), out=offsets[1:])
    pairs = pa.StructArray.from_arrays([pa.array(cuts.starts), pa.array(cuts.ends)], ["start", "end"])
    return pa.ListArray.from_arrays(pa.array(offsets), pairs)


def _rejects(kind: str, table: pa.Table, text: pa.Array, after: np.ndarray, short: np.ndarray) -> pa.Table:
    """Documents left too short, with the text as it came; the value is the characters left."""
    mask, count = pa.array(short), int(short.sum())
    rows = table.filter(mask)
    columns = {
        "id": rows["id"],
        "text": text.filter(mask),
        "source": rows["source"] if "source" in rows.column_names else pa.nulls(count, pa.string()),
        "operator": pa.array([kind] * count),
        "reason": pa.array(["too_little_left"] * count),
        "value": pa.array(after[short].astype(np.float64)),
        "detail": rows["url"] if "url" in rows.column_names else pa.nulls(count, pa.string()),
        "quarantined": pa.array(np.zeros(count, bool)),
    }
    return pa.table(columns).cast(tables.REJECTS)


def _spans(
    ordinals: np.ndarray, table: pa.Table, text: pa.Array, cuts: Cuts, short: np.ndarray, names: tuple[np.ndarray, pa.Array]
) -> pa.Table:
    known, ids = names
    shown = pc.utf8_slice_codeunits(_slices(text, cuts), 0, SHOWN_CHARACTERS)
    return pa.table(
        [
            pa.array(ordinals[cuts.rows]),
            table["id"].take(pa.array(cuts.rows)).combine_chunks().cast(pa.string()),
            pa.array(cuts.starts),
            pa.array(cuts.ends),
            pa.array(cuts.kept),
            ids.take(pa.array(np.searchsorted(known, cuts.kept))),
            pa.nulls(len(cuts.rows), pa.uint64()) if cuts.documents is None else pa.array(cuts.documents),
            shown,
            pa.array(short[cuts.rows]),
        ],
        schema=SCHEMA,
    )


def _slices(text: pa.Array, cuts: Cuts) -> pa.Array:
    """The cut pieces as strings (a copy of what is cut)."""
    data, offsets = text_buffers(text)
    begins = offsets[cuts.rows] + cuts.starts
    sizes = np.minimum(cuts.ends - cuts.starts, 4 * SHOWN_CHARACTERS + 4)
    pieces = [data[begin : begin + size].tobytes() for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True)]
    return pa.array([piece.decode("utf-8", "ignore") for piece in pieces], pa.large_string())


def _examples(table: pa.Table) -> list[dict[str, Any]]:
    """Three of a part's spans: the most widespread (where that is counted), then the first."""
    order = pc.sort_indices(table, [("documents", "descending"), ("ordinal", "ascending"), ("start_byte", "ascending")])
    found = table.take(order.slice(0, 3)).select(["id", "kept_id", "documents", "text"])
    return list(found.to_pylist())


def _write(directory: str, number: int, table: pa.Table) -> str:
    scratch = storage.scratch_file(directory)
    pq.write_table(table.combine_chunks(), scratch, compression="zstd")
    return shards.publish_by_content(scratch, directory, "cut", number)


def finish(context: StageContext, plan: CutPlan, stats: dict[str, Any], timings: dict[str, Any]) -> None:
    """Check that no character is lost, write the manifest and delete the keys."""
    records = shards.committed_units(plan.directory)
    totals: dict[str, Any] = {"characters": dict.fromkeys(("in", "kept", "cut", "rejected"), 0)}
    for number in sorted(records):
        merge_stats(totals, {"characters": records[number]["stats"].get("characters", {})})
    counts = totals["characters"]
    equation = Equation("characters", {"in": counts["in"]}, {name: counts[name] for name in ("kept", "cut", "rejected")})
    cut = [exchange.load_record(plan.directory, "cut", number)["table"] for number in range(len(plan.parts))]
    context.finish(
        stats={"spans": 0, "documents_changed": 0, **stats}, equations=[equation],
        files={"cut": [name for name in cut if name is not None]}, timings=timings,
    )  # fmt: skip
    storage.delete(exchange.keys_directory(plan.directory))


def partitions_for(parts: list[shards.Part], given: int | None, share: float) -> int:
    """Pieces of the key space of about 64 MB, where keys take `share` of the text; depends on the inputs alone."""
    if given is not None:
        return given
    with ThreadPoolExecutor(32) as pool:  # an object store answers in tens of milliseconds
        stored = sum(pool.map(lambda part: storage.size(part.path), parts))
    return min(4096, max(1, -(-int(stored * _EXPANSION * share) // (64 << 20))))


_EXPANSION = 4  # bytes of text in a byte of a part, about (zstd)
