"""Parquet: runs of row groups, read in batches whose size follows from the file alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators.config import SettingsError
from operators.sources.batches import TEXT_SCHEMA, BadRow, RowRange, SourceBatch, excerpt
from operators.tables import stable_id

if TYPE_CHECKING:
    from operators.sources.units import ReadSettings, Unit

_READ_BYTES = 8 << 20


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    )


def check_columns(schema: pa.Schema, read: ReadSettings, path: str) -> None:
    """Raises SettingsError when the file lacks a column that the settings name, or has it in an unusable type."""

    def refuse(option: str, name: str, problem: str) -> None:
        raise SettingsError(f"{path}: {problem} {name!r} (read.{option}); its columns: {', '.join(map(str, schema.names))}")

    if read.text_column not in schema.names:
        refuse("text_column", read.text_column, "there is no column")
    if not _is_text(schema.field(read.text_column).type):
        refuse("text_column", read.text_column, f"text is wanted, not {schema.field(read.text_column).type}, in column")
    fields = type(read).model_fields
    for option in ("id_column", "url_column", "source_column"):
        name = getattr(read, option)
        if name and name != fields[option].default and name not in schema.names:
            refuse(option, name, "there is no column")
    for name, kind in read.carried():
        if name not in schema.names and kind is None:
            refuse("columns", name, "there is no column")


def read_parquet(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """The unit's row groups. A group that cannot be read to its end is one bad row after the rows before the damage."""
    row = 0
    for item in _pieces(unit, read):
        if rows.past(row):
            return
        if isinstance(item, BadRow):
            if rows.wants(row):
                yield SourceBatch(_empty(read, None), np.empty(0, np.int64), [_at(item, row)])
            row += 1
            continue
        first, table = item
        wanted = rows.mask(row, table.num_rows)
        if wanted.any():
            numbers = np.flatnonzero(wanted)
            if not wanted.all():
                table = table.take(pa.array(numbers))
            yield from _batches(unit, read, table, numbers + row, numbers + first, batch_rows, batch_bytes)
        row += len(wanted)


def _at(bad: BadRow, row: int) -> BadRow:
    return BadRow(row, bad.id, bad.where, bad.reason, bad.detail, bad.raw)


def _pieces(unit: Unit, read: ReadSettings) -> Iterator[tuple[int, pa.Table] | BadRow]:
    """(row number in the file of the first row, rows), or a bad row where rows were lost."""
    with storage.open_input(unit.path) as stream:
        try:
            file = pq.ParquetFile(stream, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            if unit.size == 0:
                detail = "the file is empty: not even a Parquet footer"
            else:
                detail = f"not readable as Parquet: {_first_line(error)}"
            yield BadRow(0, stable_id(unit.relative, "file"), unit.relative, "corrupt_file", detail)
            return
        check_columns(file.schema_arrow, read, unit.path)
        names = set(file.schema_arrow.names)
        wanted = [read.text_column, read.id_column, read.url_column, None if read.source else read.source_column]
        columns = list(dict.fromkeys(name for name in [*wanted, *(name for name, _ in read.carried())] if name in names))
        first = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        for group in range(unit.start, unit.stop):
            metadata = file.metadata.row_group(group)
            # A batch size that depends on nothing but the file: what is delivered before damage must not vary.
            size = max(1, min(2048, _READ_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))
            done = 0
            try:
                for batch in file.iter_batches(
                    batch_size=size, row_groups=[group], columns=list(dict.fromkeys(columns)), use_threads=False
                ):
                    yield first + done, pa.Table.from_batches([batch])
                    done += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                lost = f"rows {first + done} to {first + metadata.num_rows - 1} of the file ({metadata.num_rows - done} rows)"
                detail = f"row group {group} cannot be read: {_first_line(error)}; lost: {lost}"
                where = f"{unit.relative}: row group {group}"
                yield BadRow(0, stable_id(unit.relative, "group", group), where, "corrupt_row_group", detail)
            first += metadata.num_rows


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _text_array(column: pa.ChunkedArray) -> pa.Array:
    """Any string-like column as one large_binary array (Parquet does not promise that strings are UTF-8)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_binary())


def _invalid_utf8(array: pa.Array) -> dict[int, str]:
    """{row: where the text stops being UTF-8}; rows are looked at one by one only if the column fails as a whole."""
    try:
        array.cast(pa.large_string())
        return {}
    except pa.ArrowInvalid:
        found = {}
        for position, value in enumerate(array):
            data = value.as_py()
            try:
                (data or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                found[position] = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        return found


def _batches(
    unit: Unit, read: ReadSettings, table: pa.Table, numbers: np.ndarray, physical: np.ndarray, batch_rows: int, batch_bytes: int
) -> Iterator[SourceBatch]:
    names = set(table.column_names)
    text = _text_array(table[read.text_column])
    lengths = pc.fill_null(pc.binary_length(text), 0).to_numpy()
    problems: dict[int, tuple[str, str]] = {}
    for position in np.flatnonzero(lengths > read.max_text_bytes).tolist():
        problems[position] = (
            "too_long",
            f"the text has {lengths[position]} bytes, more than read.max_text_bytes {read.max_text_bytes}",
        )
    for position in np.flatnonzero(text.is_null().to_numpy(zero_copy_only=False)).tolist():
        problems[position] = ("missing_text", f"column {read.text_column!r} is null")

    def strings(name: str | None) -> pa.Array | None:
        """A column as strings; rows that are not UTF-8 become problems."""
        if not name or name not in names:
            return None
        column = table[name]
        if pa.types.is_integer(column.type):
            return column.cast(pa.string()).combine_chunks()
        if not _is_text(column.type):
            return None
        array = _text_array(column)
        invalid = _invalid_utf8(array)
        for position, detail in invalid.items():
            problems.setdefault(position, ("invalid_utf8", f"column {name!r}: {detail}"))
        if invalid:
            array = pc.if_else(pa.array(_not_in(invalid, len(array))), array, pa.scalar(None, pa.large_binary()))
        return array.cast(pa.string())

    for position, detail in _invalid_utf8(text).items():
        problems.setdefault(position, ("invalid_utf8", f"column {read.text_column!r}: {detail}"))
    ids = strings(read.id_column)
    urls = strings(read.url_column)
    sources = None if read.source else strings(read.source_column)
    count = table.num_rows
    if ids is None:
        ids = pa.nulls(count, pa.string())
    missing = pc.or_(pc.is_null(ids), pc.equal(ids, "")).fill_null(True).to_numpy(zero_copy_only=False)
    if missing.any():
        made = [stable_id(unit.relative, int(number)) if absent else None for number, absent in zip(physical, missing, strict=True)]
        ids = pc.if_else(pa.array(missing), pa.array(made, pa.string()), ids)
    from operators.sources.units import default_source

    source = pa.scalar(read.source or default_source(unit.relative))
    sources = pc.if_else(pc.equal(sources, ""), source, sources) if sources is not None else pa.nulls(count, pa.string())
    sources = pc.fill_null(sources, source)
    kept = _not_in(problems, count)
    bad = []
    for position in sorted(problems):
        raw = text[position].as_py()
        where = f"{unit.relative}: row {physical[position]}"
        head = None if raw is None else excerpt(raw)
        bad.append(BadRow(int(numbers[position]), ids[position].as_py(), where, *problems[position], raw=head))
    selected = pa.array(kept)
    columns: list[pa.Array] = [ids.filter(selected), text.filter(selected).cast(pa.large_string()), sources.filter(selected)]
    columns.append((urls if urls is not None else pa.nulls(count, pa.string())).filter(selected))
    schema = _schema(read, table.schema)
    for name, _ in read.carried():
        wanted = schema.field(name).type
        if name not in names:
            columns.append(pa.nulls(int(kept.sum()), wanted))
            continue
        try:
            columns.append(table[name].filter(selected).cast(wanted).combine_chunks())
        except pa.ArrowInvalid as error:
            raise SettingsError(
                f"{unit.path}: column {name!r} cannot be read as {wanted} (read.columns): {_first_line(error)}"
            ) from None
    good = pa.Table.from_arrays(columns, schema=schema)
    yield from _cut(good, numbers[kept], bad, lengths[kept], batch_rows, batch_bytes)


def _not_in(problems: Iterable[int], count: int) -> np.ndarray:
    kept = np.ones(count, bool)
    kept[list(problems)] = False
    return kept


def _schema(read: ReadSettings, file: pa.Schema | None) -> pa.Schema:
    schema = TEXT_SCHEMA
    for name, kind in read.carried():
        if kind is None:
            kind = file.field(name).type if file is not None else pa.string()
        schema = schema.append(pa.field(name, kind))
    return schema


def _empty(read: ReadSettings, file: pa.Schema | None) -> pa.Table:
    return _schema(read, file).empty_table()


def _cut(
    table: pa.Table, numbers: np.ndarray, bad: list[BadRow], lengths: np.ndarray, batch_rows: int, batch_bytes: int
) -> Iterator[SourceBatch]:
    """Slices of at most `batch_rows` rows and about `batch_bytes` bytes; bad rows go with the slice before which they stand."""
    start = 0
    total = np.concatenate([[0], np.cumsum(lengths)])
    while start < table.num_rows or bad:
        by_bytes = int(np.searchsorted(total, total[start] + batch_bytes, "right")) - 1
        stop = min(max(start + 1, min(start + batch_rows, by_bytes)), table.num_rows)
        limit = numbers[stop] if stop < table.num_rows else np.iinfo(np.int64).max
        here = [item for item in bad if item.row < limit]
        bad = bad[len(here) :]
        yield SourceBatch(table.slice(start, stop - start), numbers[start:stop], here)
        start = stop
