"""Logical windows over the kept rows of many parts: the same documents together, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.shards import Part

_BATCH_ROWS = 512
_MOST_UNITS = 4096


@dataclass(frozen=True)
class Span:
    """`rows` kept rows that begin `skip` kept rows into the first of `parts`."""

    parts: tuple[Part, ...]
    skip: int
    rows: int


def spans(parts: Sequence[Part], window_rows: int, windows: int | None = None) -> list[Span]:
    """All kept rows cut into runs of `windows` windows (the last may be shorter).

    Left out, `windows` is 1, or as many as keep the list at about 4,096 runs: a function of the rows, not of the machine.
    """
    kept = np.array([part.kept_rows for part in parts], np.int64)
    ends = np.cumsum(kept)
    total = int(ends[-1]) if len(ends) else 0
    step = window_rows * (windows or max(1, -(-total // (window_rows * _MOST_UNITS))))
    found = []
    for first in range(0, total, step):
        last = min(first + step, total)
        low = int(np.searchsorted(ends, first, side="right"))
        high = int(np.searchsorted(ends, last, side="left"))
        found.append(Span(tuple(parts[low : high + 1]), first - int(ends[low] - kept[low]), last - first))
    return found


def read_span(span: Span, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """The span's rows in order, in batches of at most 512 rows; only the row groups that hold them are read.

    Columns of `optional` that a file lacks come as null. Raises KeyError for another column that is missing.
    """
    skip, left = span.skip, span.rows
    for part in span.parts:
        rows = np.flatnonzero(~shards.load_bitmap(part))[skip : skip + left]
        skip, left = 0, left - len(rows)
        if len(rows):
            yield from _read_rows(part, rows, columns, optional)
    if left:
        raise RuntimeError(f"{left} rows fewer than their manifests say in {[part.path for part in span.parts]}")


def _read_rows(part: Part, rows: np.ndarray, columns: Sequence[str], optional: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with storage.open_input(part.path) as stream:
        file = pq.ParquetFile(stream)
        present = file.schema_arrow.names
        missing = [name for name in columns if name not in present]
        if missing:
            raise KeyError(f"{part.path} has no column {missing}; it has {present}")
        wanted = [*columns, *(name for name in optional if name in present)]
        group_ends = np.cumsum([file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)])
        groups = np.unique(np.searchsorted(group_ends, rows, side="right"))
        for group in groups:
            position = int(group_ends[group]) - file.metadata.row_group(int(group)).num_rows
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[int(group)], columns=wanted):
                low, high = np.searchsorted(rows, [position, position + batch.num_rows])
                chosen = rows[low:high] - position
                position += batch.num_rows
                if len(chosen) == batch.num_rows:
                    yield _with_nulls(batch, optional)
                elif len(chosen):
                    yield _with_nulls(batch.take(pa.array(chosen)), optional)


def _with_nulls(batch: pa.RecordBatch, optional: Sequence[str]) -> pa.RecordBatch:
    for name in optional:
        if name not in batch.schema.names:
            batch = batch.append_column(name, pa.nulls(batch.num_rows, pa.string()))
    return batch
