"""Which rows go into which output file: cut by estimated bytes, from counts in manifests and one measured ratio.

The plan follows from the data alone, so any number of workers writes the same files; their concatenation is the input
in its order whatever the target size.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.sinks.formats import Sink
from operators.sinks.rows import Stretch, conform, read_stretch

_SAMPLED_PARTS = 8


def plan_files(parts: Sequence[shards.Part], bytes_each: np.ndarray, target_bytes: int) -> list[list[Stretch]]:
    """The stretches of each output file, in order.

    `bytes_each` (float64[parts]) is what the surviving rows of each part are expected to take in the output. There are as
    many files as bring their mean closest to `target_bytes`; rows of one part are taken to be equally large. No rows, no file.
    """
    kept = np.array([part.kept_rows for part in parts], np.int64)
    if not kept.sum():
        return []
    # A file must not be left without rows: no more files than rows, and a part without bytes still has its rows.
    weights = np.where(kept > 0, np.maximum(bytes_each, 1.0), 0.0)
    files = int(min(max(1, np.floor(weights.sum() / target_bytes + 0.5)), kept.sum()))
    ends = np.concatenate([[0.0], np.cumsum(weights)])
    plan: list[list[Stretch]] = [[] for _ in range(files)]
    edges = ends[-1] * np.arange(1, files) / files
    for index, part in enumerate(parts):
        if not kept[index]:
            continue
        low, high = ends[index], ends[index + 1]
        first = int(np.searchsorted(edges, low, "right"))
        inside = edges[first : np.searchsorted(edges, high, "left")]
        cuts = [0, *np.floor((inside - low) / (high - low) * part.rows).astype(np.int64).tolist(), part.rows]
        for offset, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if start < stop:
                plan[first + offset].append(Stretch.of(part, int(start), int(stop)))
    return [stretches for stretches in plan if stretches]


def measured_ratio(
    parts: Sequence[shards.Part], schema: pa.Schema, make_sink: Callable[[str, pa.Schema], Sink], directory: str
) -> float:
    """Bytes in the output format for each byte of the parts, measured on the middle row group of a few parts."""
    wanted = np.unique(np.linspace(0, len(parts) - 1, min(_SAMPLED_PARTS, len(parts))).astype(int))
    local = storage.scratch_file(directory)
    sink = make_sink(local, schema)
    read = 0.0
    try:
        for index in wanted:
            part = parts[index]
            if not part.kept_rows:
                continue
            start, stop, compressed = _middle_group(part.path)
            kept = 0
            for batch in read_stretch(Stretch.of(part, start, stop), schema.names):
                sink.write(conform(batch, schema))
                kept += batch.num_rows
            read += compressed * kept / max(1, stop - start)
        sink.close()
        return os.path.getsize(local) / read if read else 1.0
    finally:
        sink.abandon()
        os.unlink(local)


def _middle_group(path: str) -> tuple[int, int, int]:
    """(first row, row after the last, compressed bytes) of the row group in the middle of a part."""
    with storage.open_input(path) as stream:
        metadata = pq.ParquetFile(stream, pre_buffer=False).metadata
    middle = metadata.num_row_groups // 2
    start = sum(metadata.row_group(group).num_rows for group in range(middle))
    group = metadata.row_group(middle)
    compressed = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
    return start, start + group.num_rows, compressed
