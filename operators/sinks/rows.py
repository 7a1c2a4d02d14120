"""The surviving rows of a stretch of a part, in one schema for all parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.config import SettingsError, nearest

_BATCH_ROWS = 2048
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class Stretch:
    """Rows [start, stop) of a part, counted before removal."""

    path: str
    rows: int
    removed: str | None
    start: int
    stop: int

    @classmethod
    def of(cls, part: shards.Part, start: int, stop: int) -> Stretch:
        return cls(part.path, part.rows, part.removed, start, stop)


def read_stretch(stretch: Stretch, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The surviving rows in order; of `columns`, those that the file has. Memory is bounded by a row group.

    Only the row groups that the stretch touches are read.
    """
    keep = None
    if stretch.removed is not None:
        keep = ~shards.load_bitmap(shards.Part(stretch.path, stretch.rows, 0, stretch.removed))
    with storage.open_input(stretch.path) as stream:
        file = pq.ParquetFile(stream, pre_buffer=False)
        present = [name for name in columns if name in set(file.schema_arrow.names)]
        first = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            position, first = first, first + count
            if position >= stretch.stop or first <= stretch.start:
                continue
            for batch in file.iter_batches(_BATCH_ROWS, [group], present, use_threads=False):
                here, position = position, position + batch.num_rows
                low, high = max(here, stretch.start), min(position, stretch.stop)
                if low >= high:
                    continue
                batch = batch.slice(low - here, high - low)
                if keep is not None:
                    batch = batch.filter(pa.array(keep[low:high]))
                if batch.num_rows:
                    yield batch


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """The batch in `schema`: columns that it lacks are null."""
    names = set(batch.schema.names)
    columns = [
        batch.column(field.name).cast(field.type) if field.name in names else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def joint_schema(paths: Sequence[str]) -> pa.Schema:
    """One schema for all the files: every column that any of them has, in order of appearance, in a type that holds all.

    Raises SettingsError, naming file and column, when a column has types that no type holds together.
    """

    def footer(path: str) -> pa.Schema:
        with storage.open_input(path) as stream:
            return pq.read_schema(stream).remove_metadata()

    joint: pa.Schema | None = None
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        for path, schema in zip(paths, pool.map(footer, paths), strict=True):
            if joint is None or joint.equals(schema):
                joint = schema
                continue
            try:
                joint = pa.unify_schemas([joint, schema], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise SettingsError(f"{path}: its columns do not fit those of the parts before it: {error}") from None
    # Not-null is a property of single files: a column that another part lacks is null there.
    return pa.schema([pa.field(field.name, field.type) for field in joint or pa.schema([])])


def choose(schema: pa.Schema, columns: Sequence[str] | None, where: str) -> pa.Schema:
    """The schema's columns named, in the given order (all of them if None). Raises SettingsError for one it lacks."""
    if columns is None:
        return schema
    for name in columns:
        if name not in schema.names:
            raise SettingsError(f"{where}: its input has no column {name!r}{nearest(name, schema.names)}")
    return pa.schema([schema.field(name) for name in columns])


def part_bytes(parts: Sequence[shards.Part]) -> np.ndarray:
    """int64[parts]: the size of each part's file, from the manifest of the stage that wrote it."""
    known: dict[str, dict[str, int]] = {}
    sizes = []
    for part in parts:
        directory, folder, file = part.path.rsplit("/", 2)
        if directory not in known:
            known[directory] = {entry["name"]: entry["bytes"] for entry in shards.load_manifest(directory).parts}
        sizes.append(known[directory][f"{folder}/{file}"])
    return np.array(sizes, np.int64)
