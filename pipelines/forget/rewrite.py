"""Files without some of their rows, and the records that name them. Nothing that is in force is touched here.

New files lie where they will be used, under the name of their content, or in the staging folder where the name is fixed; records
are staged. `redo` puts them in force.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards, tombstones
from operators.ledger import Ledger
from operators.measures import KEPT
from pipelines.forget.search import FileHits, StageDirectory

_BY_CONTENT = re.compile(r"^(.*)-[0-9a-f]{12}\.(parquet|bits)$")
_LEAVING = ("parts", "rejects", "measures", "removed", "cut")  # folders whose lists drop a file that has no row left

Entry = dict[str, Any]  # name, rows, bytes, sha256, as records list files


@dataclass
class Staging:
    """What a takedown has written so far. Paths are relative to the run's directory."""

    run: str
    folder: str
    swaps: list[tuple[str, str]] = field(default_factory=list)  # (staged file, the file that it replaces)
    deletes: list[str] = field(default_factory=list)
    made: set[str] = field(default_factory=set)  # new files that lie in place already
    bytes_written: int = 0

    def place(self) -> str:
        """A fresh staged path, relative."""
        return f"{self.folder}/{len(self.swaps):08d}"

    def replace(self, target: str, data: bytes) -> None:
        """Stage new content of a file."""
        staged = self.place()
        storage.write_bytes(storage.join(self.run, staged), data)
        self.swaps.append((staged, target))

    def replace_by(self, target: str, local: str) -> None:
        """Stage a local file that was written."""
        staged = self.place()
        storage.publish(local, storage.join(self.run, staged))
        self.swaps.append((staged, target))


def filtered(path: str, change: Callable[[pa.Table, int], pa.Table]) -> Iterator[pa.Table]:
    """The row groups of a file as `change(table, its first row)` leaves them."""
    with storage.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        start = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            yield change(table, start)
            start += table.num_rows


def without(gone: np.ndarray) -> Callable[[pa.Table, int], pa.Table]:
    """Drops rows by their numbers in the file (int64, ascending)."""

    def change(table: pa.Table, start: int) -> pa.Table:
        low, high = np.searchsorted(gone, [start, start + table.num_rows])
        if low == high:
            return table
        keep = np.ones(table.num_rows, bool)
        keep[gone[low:high] - start] = False
        return table.filter(pa.array(keep))

    return change


def unnamed(ids: set[str]) -> Callable[[pa.Table, int], pa.Table]:
    """Puts the hash where a row names one that is gone (the row that it was a copy of), and blanks what was quoted of it."""
    wanted = pa.array(sorted(ids), pa.string())

    def change(table: pa.Table, _start: int) -> pa.Table:
        hit = np.zeros(table.num_rows, bool)
        for name in ("match_id", "kept_id"):
            if name not in table.column_names:
                continue
            own = np.asarray(
                pc.fill_null(pc.is_in(table[name], value_set=wanted), False).combine_chunks().to_numpy(zero_copy_only=False)
            )
            if own.any():
                hit |= own
                values = [
                    tombstones.MARK + tombstones.hashed(v) if gone else v
                    for v, gone in zip(table[name].to_pylist(), own, strict=True)
                ]
                place = table.column_names.index(name)
                table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        if "text" in table.column_names and hit.any():
            place, item = table.column_names.index("text"), table.schema.field("text")
            blank = pc.if_else(pa.array(hit), pa.scalar("", item.type), table["text"].combine_chunks())
            table = table.set_column(place, item, blank)
        return table

    return change


def remeasured(kept: np.ndarray, rejected: np.ndarray) -> Callable[[pa.Table, int], pa.Table]:
    """Drops what was measured of rows that are gone, by their numbers among the unit's kept rows and its rejects."""

    def change(table: pa.Table, _start: int) -> pa.Table:
        position, step = table["position"].to_numpy(), table["step"].to_numpy()
        of_kept = step == KEPT
        gone = np.where(of_kept, np.isin(position, kept), np.isin(position, rejected))
        moved = position - np.where(of_kept, np.searchsorted(kept, position), np.searchsorted(rejected, position))
        return table.set_column(0, "position", pa.array(moved)).filter(pa.array(~gone))

    return change


def write(staging: Staging, stage: StageDirectory, relative: str, tables: Iterator[pa.Table]) -> Entry:
    """Write a file anew; its entry, with `rows` 0 and no name where a file that is named by content has no row left.

    Memory is bounded by a row group.
    """
    scratch = storage.scratch_file(stage.path)
    writer: pq.ParquetWriter | None = None
    rows = 0
    folder = relative.partition("/")[0]
    try:
        schema = None
        for table in tables:
            schema = table.schema
            if not table.num_rows:
                continue
            if writer is None:
                writer = _writer(scratch, schema, folder)
            writer.write_table(table, row_group_size=table.num_rows)
            rows += table.num_rows
        match = _BY_CONTENT.match(relative)
        old = f"{stage.relative}/{relative}"
        if not rows and match and folder in _LEAVING:
            staging.deletes.append(old)
            return {"name": None, "rows": 0}
        if writer is None:
            writer = _writer(scratch, schema if schema is not None else _schema(stage, relative), folder)
    finally:
        if writer is not None:
            writer.close()
    digest, size = storage.sha256_of(scratch), os.path.getsize(scratch)
    staging.bytes_written += size
    if match is None:
        staging.replace_by(old, scratch)
        return {"name": relative, "rows": rows, "bytes": size, "sha256": digest}
    name = f"{match[1]}-{digest[:12]}.parquet"
    storage.publish(scratch, storage.join(stage.path, name))
    if name != relative:
        staging.deletes.append(old)
    return {"name": name, "rows": rows, "bytes": size, "sha256": digest}


def _writer(path: str, schema: pa.Schema, folder: str) -> pq.ParquetWriter:
    encoded: Any = True
    if folder == "measures":  # as operators.shards writes them
        encoded = [item.name for item in schema if not pa.types.is_floating(item.type)]
    return pq.ParquetWriter(path, schema, compression="zstd", store_schema=True, use_dictionary=encoded)


def _schema(stage: StageDirectory, relative: str) -> pa.Schema:
    with storage.open_input(storage.join(stage.path, relative)) as stream:
        return pq.read_schema(stream)


@dataclass
class Changes:
    """What became of one stage directory's files, for the records that name them."""

    entries: dict[str, Entry]  # old name -> new entry
    hits: dict[str, FileHits]
    bitmaps: dict[str, tuple[str | None, int]]  # old view path and bitmap, joined -> (new bitmap, its removed rows)


def bitmap(staging: Staging, stage: StageDirectory, entry: Entry, gone: np.ndarray) -> tuple[str | None, int]:
    """(name, removed rows) of a view's bitmap without the rows that are gone, written under the name of its content."""
    if entry["removed"] is None:
        return None, 0
    part = shards.Part("", entry["rows"], 0, storage.join(stage.path, entry["removed"]), entry["removed_rows"])
    left = np.delete(shards.load_bitmap(part), gone)
    if not left.any():
        staging.deletes.append(f"{stage.relative}/{entry['removed']}")
        return None, 0
    name = shards.save_bitmap(stage.path, int(entry["removed"].rsplit("/", 1)[1][:8]), left)
    if name != entry["removed"]:
        staging.deletes.append(f"{stage.relative}/{entry['removed']}")
    return name, int(left.sum())


def account(ledger: Ledger, kept: int, fates: Counter[str]) -> int:
    """Move rows from the accounts they were in to `forgotten`; how many there were."""
    ledger.kept -= kept
    moved = kept
    for fate, count in fates.items():
        if fate == "quarantined":
            count = min(count, ledger.quarantined)
            ledger.quarantined -= count
        else:
            count = min(count, ledger.rejected.get(fate, 0))
            ledger.rejected[fate] -= count
            ledger.rejected = +ledger.rejected
        moved += count
    ledger.forgotten += moved
    return moved


def funnel(stats: dict[str, Any], kept: int, fates: Counter[str]) -> None:
    """Take forgotten rows out of the funnel of a corpus stage: out of every step up to the one that decided on them."""
    steps = [stats.get("funnel", {})[key] for key in sorted(stats.get("funnel", {}))]
    names = [key.partition(":")[2] for key in sorted(stats.get("funnel", {}))]
    for step in steps:
        step["in"] -= kept
        step["kept"] -= kept
    for fate, count in fates.items():
        operator, _, reason = fate.partition(":")
        last = next((n for n, name in enumerate(names) if name == operator and steps[n]["rejected"].get(reason, 0) >= count), None)
        if last is None:
            continue  # rejected by the reader, before the first step
        for step in steps[: last + 1]:
            step["in"] -= count
        for step in steps[:last]:
            step["kept"] -= count
        steps[last]["rejected"][reason] -= count
        if not steps[last]["rejected"][reason]:
            del steps[last]["rejected"][reason]


def renamed(value: Any, entries: dict[str, Entry]) -> Any:
    """A record with the new names and sizes of its files; lists lose the files that have no row left."""
    if isinstance(value, dict):
        entry = entries.get(value.get("name", "")) if isinstance(value.get("name"), str) else None
        if entry is not None:
            return {key: entry[key] if key in ("name", "rows", "bytes", "sha256") else item for key, item in value.items()}
        return {key: renamed(item, entries) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, entries) for item in value if not _left(item, entries)]
    if isinstance(value, str) and value in entries:
        return entries[value]["name"]
    return value


def _left(item: Any, entries: dict[str, Entry]) -> bool:
    name = item.get("name") if isinstance(item, dict) else item
    return isinstance(name, str) and name in entries and entries[name]["name"] is None


def scrubbed(stats: Any, ids: set[str]) -> Any:
    """Statistics without examples, which quote rows, and without anything that names a row that is gone."""
    if isinstance(stats, dict):
        return {key: [] if key == "examples" and isinstance(value, list) else scrubbed(value, ids) for key, value in stats.items()}
    if isinstance(stats, list):
        return [scrubbed(item, ids) for item in stats if not _names(item, ids)]
    return tombstones.MARK + tombstones.hashed(stats) if isinstance(stats, str) and stats in ids else stats


def _names(item: Any, ids: set[str]) -> bool:
    if isinstance(item, dict):
        return any(_names(value, ids) for value in item.values())
    return isinstance(item, str) and item in ids


def dumped(record: Any) -> bytes:
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
