"""What choosing rows needs of each: its group, a 64-bit key that orders the group, and its size. 20 bytes a row, no text.

A key is the row's rank in the order in which rows are taken: for a sample the seeded hash of its id, for the best by
score the score (highest first) with the hash breaking ties. Which rows are taken therefore depends on ids, scores and
seed, never on files, order or workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.ledger import Ledger
from operators.sampling.contents import Counted, Unit, columns_of_groups, group_values, sizes, text_columns
from operators.shards import Part, UnitWriter
from operators.tokens.encode import Encoder, single_threaded
from operators.tokens.hashing import hash_strings

Combine = Literal["mean", "geometric", "min", "max"]

INPUT = "input"  # the group column that stands for the input stage a row came from
MOST_GROUPS = 4096
KEYS = pa.schema(
    [pa.field("row", pa.uint32()), pa.field("group", pa.int32()), pa.field("key", pa.uint64()), pa.field("size", pa.int64())]
)
_SALT = 0x64_72_61_77_00_00_00_00  # "draw"
_BATCH_ROWS = 2048


@dataclass(frozen=True)
class Order:
    """How rows are grouped, ordered and measured. `scores` maps columns to weights; without any, the order is random."""

    seed: int
    unit: Unit = "documents"
    groups: tuple[str, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    combine: Combine = "mean"
    highest: bool = True
    counted: Counted = "all"


def combined(columns: Sequence[np.ndarray], weights: Sequence[float], how: Combine) -> np.ndarray:
    """float64[rows], rounded to 6 decimals; NaN where a score is missing.

    `mean` and `geometric` are weighted by `weights`; `min` and `max` are taken of score x weight. Raises ValueError for a
    negative score under `geometric`.
    """
    scores = np.column_stack(columns).astype(np.float64)
    weight = np.asarray(weights, np.float64)
    if how == "mean":
        found = scores @ (weight / weight.sum())
    elif how == "geometric":
        if np.nanmin(scores, initial=0.0) < 0:
            raise ValueError("the geometric mean needs scores of at least 0: use `mean`, `min` or `max`")
        with np.errstate(divide="ignore"):
            found = np.exp(np.log(scores) @ (weight / weight.sum()))
    else:
        found = (scores * weight).min(axis=1) if how == "min" else (scores * weight).max(axis=1)
    return np.round(found, 6)


def ranks(scores: np.ndarray, highest: bool) -> np.ndarray:
    """uint32[rows] in the order in which rows are taken, equal for equal scores; NaN comes last."""
    values = np.where(np.isnan(scores), 0, scores).astype(np.float32) + np.float32(0)  # -0.0 is 0.0
    bits = values.view(np.uint32)
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    order = ~ascending if highest else ascending
    return np.where(np.isnan(scores), np.uint32(0xFFFFFFFF), np.minimum(order, np.uint32(0xFFFFFFFE))).astype(np.uint32)


def batches(part: Part, source: str, order: Order, encoder: Encoder | None) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """(KEYS with the group as a string column `name`, float64 scores) of the surviving rows of a part, batch by batch.

    Raises KeyError naming file and column when a score or group column is missing.
    """
    with storage.open_input(part.path) as stream:
        names = pq.read_schema(stream).names
    groups = columns_of_groups([name for name in order.groups if name != INPUT], names)
    said = text_columns(names, order.counted, part.path) if order.unit != "documents" else []
    columns = ["id", *groups, *(name for name, _ in order.scores), *said]
    for ordinals, batch in shards.read(part, list(dict.fromkeys(columns)), _BATCH_ROWS):
        hashes = hash_strings(batch["id"], order.seed ^ _SALT)
        scores = np.full(batch.num_rows, np.nan)
        if order.scores:
            values = [batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name, _ in order.scores]
            scores = combined(values, [weight for _, weight in order.scores], order.combine)
            hashes = (ranks(scores, order.highest).astype(np.uint64) << np.uint64(32)) | (hashes >> np.uint64(32))
        pieces = [pa.array([source] * batch.num_rows) if name == INPUT else group_values(batch, name) for name in order.groups]
        names = pc.binary_join_element_wise(*pieces, "|") if pieces else pa.array([""] * batch.num_rows)
        local = ordinals.to_numpy() - np.uint64(part.first_ordinal)
        table = {"row": local.astype(np.uint32), "name": names, "key": hashes}
        table["size"] = sizes(batch, order.unit, order.counted, said, encoder)
        yield pa.table(table), scores


def write_keys(directory: str, unit: int, part: Part, source: str, order: Order, tokenizer: bytes | None) -> dict[str, Any]:
    """The keys of one part as a committed unit; its statistics hold documents and size of each group."""
    single_threaded()
    encoder = Encoder(tokenizer) if tokenizer is not None else None
    numbers: dict[str, int] = {}
    documents: dict[str, int] = {}
    sizes: dict[str, int] = {}
    writer, rows = UnitWriter(directory, unit), 0
    for table, _ in batches(part, source, order, encoder):
        totals = table.group_by("name").aggregate([("size", "sum"), ("size", "count")]).to_pylist()
        for entry in totals:
            numbers.setdefault(entry["name"], len(numbers))
            documents[entry["name"]] = documents.get(entry["name"], 0) + entry["size_count"]
            sizes[entry["name"]] = sizes.get(entry["name"], 0) + entry["size_sum"]
        if len(numbers) > MOST_GROUPS:
            raise ValueError(f"{part.path} has more than {MOST_GROUPS} groups by {list(order.groups)}: group by fewer columns")
        places = pc.index_in(table["name"], value_set=pa.array(list(numbers))).combine_chunks()
        columns = [table["row"].combine_chunks(), places, table["key"].combine_chunks(), table["size"].combine_chunks()]
        writer.write(pa.table(columns, schema=KEYS))
        rows += table.num_rows
    stats = {"groups": {name: {"documents": documents[name], "size": sizes[name]} for name in numbers}}
    return writer.commit(Ledger(rows_in=rows, kept=rows), stats, {"names": list(numbers)})


def read_keys(directory: str, record: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    """The KEYS of one committed unit."""
    for part in record["parts"]:
        with storage.open_input(storage.join(directory, part["name"])) as stream:
            yield from pq.ParquetFile(stream).iter_batches(1 << 20)
