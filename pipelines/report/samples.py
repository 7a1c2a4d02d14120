"""A few rows of a stage for a reader's eyes: beginnings of some files, never a whole corpus."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from pipelines.report.view import StageView

MAX_FILES = 8
MAX_ROWS = 2048  # of one file
MAX_TEXT_BYTES = 96 << 20  # of a row group's text; a larger one is read without it
TEXT_CHARACTERS = 2000


def spread(names: Sequence[Any], count: int = MAX_FILES) -> list[Any]:
    """At most `count` members, evenly spaced, the first one among them."""
    if len(names) <= count:
        return list(names)
    return [names[index * len(names) // count] for index in range(count)]


def rejected_rows(stage: StageView, each: int = 3, limit: int = 400) -> dict[str, list[dict[str, Any]]]:
    """Up to `each` rejected rows per `operator:reason`, in order of the files.

    Reads the first row group of at most `MAX_FILES` files. `text` is a beginning, `characters` the whole length (null
    when the text was too large to read).
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if stage.manifest is None:
        return found
    total = 0
    for entry in spread(stage.manifest.rejects):
        for row in _first_rows(storage.join(stage.directory, entry["name"])):
            key = f"{row['operator']}:{row['reason']}"
            if len(found[key]) < each and total < limit:
                found[key].append(row)
                total += 1
    return found


def _first_rows(path: str) -> list[dict[str, Any]]:
    with storage.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        if file.metadata.num_row_groups == 0:
            return []
        names = file.schema_arrow.names
        wanted = [name for name in ("id", "text", "source", "operator", "reason", "value", "detail") if name in names]
        group = file.metadata.row_group(0)
        if group.total_byte_size > MAX_TEXT_BYTES:
            wanted.remove("text")
        table = file.read_row_group(0, columns=wanted).slice(0, MAX_ROWS)
    return clip(table, ["text"]).to_pylist()


def clip(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Text columns cut to `TEXT_CHARACTERS`; the length of the first becomes the column `characters`."""
    for name in columns:
        if name not in table.column_names:
            continue
        column = table[name]
        if "characters" not in table.column_names:
            table = table.append_column("characters", pc.utf8_length(column))
        index = table.column_names.index(name)
        table = table.set_column(index, name, pc.utf8_slice_codeunits(column, 0, TEXT_CHARACTERS))
    return table


def first_rows(stage: StageView, columns: Sequence[str], limit: int = 256) -> list[dict[str, Any]]:
    """The first rows of some of a stage's parts, at most `limit` in all; absent columns are left out."""
    if stage.manifest is None:
        return []
    rows: list[dict[str, Any]] = []
    for part in spread(shards.parts([stage.directory])):
        with storage.open_input(part.path) as stream:
            names = pq.ParquetFile(stream).schema_arrow.names
        for _, batch in shards.read(part, [name for name in columns if name in names], batch_rows=64):
            rows += batch.to_pylist()
            break
        if len(rows) >= limit:
            break
    return rows[:limit]


def varied(rows: Sequence[dict[str, Any]], key: Any, count: int) -> list[dict[str, Any]]:
    """`count` rows taken in turn from the groups that `key(row)` makes, so that rare groups are seen too."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    taken: list[dict[str, Any]] = []
    for turn in range(count):
        for group in groups.values():
            if turn < len(group) and len(taken) < count:
                taken.append(group[turn])
    return taken
