"""From a table of a file's own columns to documents: ids, texts, sources and addresses, and the rows that have none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.config import SettingsError
from operators.sources.batches import TEXT_SCHEMA, BadRow, RowRange, SourceBatch, excerpt
from operators.sources.settings import ReadSettings
from operators.sources.units import Unit, default_source
from operators.tables import stable_id


@dataclass
class Piece:
    """Consecutive rows of a file as its own columns. `places[i]` is where row i stands in the file, which makes its id.

    `problems` are rows that are already known to be bad, as (reason, detail); `raw` what is shown of them.
    """

    places: np.ndarray  # int64[table.num_rows]
    table: pa.Table
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    raw: dict[int, bytes] = field(default_factory=dict)


def read_pieces(
    unit: Unit,
    read: ReadSettings,
    rows: RowRange,
    pieces: Iterable[Piece | BadRow],
    batch_rows: int,
    batch_bytes: int,
    place: str = "row",
) -> Iterator[SourceBatch]:
    """Documents of a unit's pieces; a BadRow among them stands for rows that were lost. `place` says what places count."""
    row = 0
    for piece in pieces:
        if rows.past(row):
            return
        if isinstance(piece, BadRow):
            if rows.wants(row):
                yield SourceBatch(empty_table(read), np.empty(0, np.int64), [dataclasses.replace(piece, row=row)])
            row += 1
            continue
        wanted = rows.mask(row, piece.table.num_rows)
        count = len(wanted)
        if wanted.any():
            numbers = np.flatnonzero(wanted)
            if not wanted.all():
                new = {int(old): position for position, old in enumerate(numbers)}
                piece = Piece(
                    piece.places[numbers],
                    piece.table.take(pa.array(numbers)),
                    {new[old]: problem for old, problem in piece.problems.items() if old in new},
                    {new[old]: raw for old, raw in piece.raw.items() if old in new},
                )
            yield from _documents(unit, read, piece, numbers + row, batch_rows, batch_bytes, place)
        row += count


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def wanted_columns(read: ReadSettings, names: Iterable[str]) -> list[str]:
    """Those of the file's columns that make documents, each once."""
    have = set(names)
    wanted = [read.text_column, read.id_column, read.url_column, None if read.source else read.source_column]
    wanted += [name for name, _ in read.carried()]
    return list(dict.fromkeys(name for name in wanted if name is not None and name in have))


def is_text(kind: pa.DataType) -> bool:
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
    if not is_text(schema.field(read.text_column).type):
        refuse("text_column", read.text_column, f"text is wanted, not {schema.field(read.text_column).type}, in column")
    fields = type(read).model_fields
    for option in ("id_column", "url_column", "source_column"):
        name = getattr(read, option)
        if not name or name == fields[option].default:
            continue  # the usual name: used where a file has it
        if name not in schema.names:
            refuse(option, name, "there is no column")
        kind = schema.field(name).type
        if not (is_text(kind) or (option == "id_column" and pa.types.is_integer(kind))):
            refuse(option, name, f"text is wanted, not {kind}, in column")
    for name, declared in read.carried():
        if name not in schema.names and declared is None:
            refuse("columns", name, "there is no column")


def _text_array(column: pa.ChunkedArray) -> pa.Array:
    """Any string-like column as one large_binary array (Parquet does not promise that strings are UTF-8)."""
    array = one_array(column)
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


class Columns:
    """One table's columns as documents need them; rows that cannot be read gather in `problems` as (reason, detail)."""

    def __init__(self, unit: Unit, read: ReadSettings, table: pa.Table) -> None:
        self.unit, self.read, self.table = unit, read, table
        self.problems: dict[int, tuple[str, str]] = {}

    def text(self) -> pa.Array:
        """large_binary; UTF-8 wherever there is no problem."""
        limit, name = self.read.max_text_bytes, self.read.text_column
        array = _text_array(self.table[name])
        lengths = pc.fill_null(pc.binary_length(array), 0).to_numpy()
        for row in np.flatnonzero(lengths > limit).tolist():
            self.problems[row] = ("too_long", f"the text has {lengths[row]} bytes, more than read.max_text_bytes {limit}")
        for row in np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).tolist():
            self.problems.setdefault(row, ("missing_text", f"column {name!r} is null"))
        self._check_utf8(name, array)
        return array

    def _check_utf8(self, name: str, array: pa.Array) -> dict[int, str]:
        invalid = _invalid_utf8(array)
        for row, detail in invalid.items():
            self.problems.setdefault(row, ("invalid_utf8", f"column {name!r}: {detail}"))
        return invalid

    def strings(self, name: str | None, kind: pa.DataType | None = None) -> pa.Array:
        """A column as strings (numbers spelled out), null where there is none."""
        kind = kind or pa.string()
        if not name or name not in self.table.column_names:
            return pa.nulls(self.table.num_rows, kind)
        column = self.table[name]
        if not is_text(column.type):
            return one_array(column.cast(kind)) if pa.types.is_integer(column.type) else pa.nulls(len(column), kind)
        array = _text_array(column)
        return _without(array, self._check_utf8(name, array)).cast(kind)

    def carried(self, field: pa.Field) -> pa.Array:
        """A column of `read.columns` in its wanted type. Raises SettingsError when it has no such values."""
        if field.name not in self.table.column_names:
            return pa.nulls(self.table.num_rows, field.type)
        column = self.table[field.name]
        if is_text(column.type) and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
            return self.strings(field.name, field.type)
        if self.unit.format in ("csv", "tsv"):
            return self._parsed(field, self.strings(field.name))
        try:
            return one_array(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            problem = f"column {field.name!r} cannot be read as {field.type} (read.columns): {first_line(error)}"
            raise SettingsError(f"{self.unit.path}: {problem}") from None

    def _parsed(self, field: pa.Field, spelled: pa.Array) -> pa.Array:
        """Spelled-out values in the wanted type; an empty one is null, one that is no such value a bad row."""
        spelled = pc.if_else(pc.equal(spelled, ""), pa.scalar(None, spelled.type), spelled)
        try:
            return spelled.cast(field.type)
        except pa.ArrowInvalid:
            values = []
            for row, value in enumerate(spelled):
                try:
                    values.append(value.cast(field.type).as_py())
                except pa.ArrowInvalid:
                    values.append(None)
                    detail = f"{field.name!r} holds {value.as_py()[:80]!r}, not the declared type {field.type} (read.columns)"
                    self.problems.setdefault(row, ("bad_column", detail))
            return pa.array(values, field.type)


def _documents(
    unit: Unit, read: ReadSettings, piece: Piece, numbers: np.ndarray, batch_rows: int, batch_bytes: int, place: str
) -> Iterator[SourceBatch]:
    """Documents of one piece; `numbers` are its rows' numbers in the unit."""
    table, places = piece.table, piece.places
    columns = Columns(unit, read, table)
    columns.problems.update(piece.problems)
    text = columns.text()
    ids = columns.strings(read.id_column)
    missing = pc.fill_null(pc.equal(ids, ""), True).to_numpy(zero_copy_only=False)
    if missing.any():
        made = [stable_id(unit.relative, int(number)) if absent else None for number, absent in zip(places, missing, strict=True)]
        ids = pc.if_else(pa.array(missing), pa.array(made, pa.string()), ids)
    source = columns.strings(None if read.source else read.source_column)
    named = pc.fill_null(pc.not_equal(source, ""), False)
    source = pc.if_else(named, source, pa.scalar(read.source or default_source(unit.relative)))
    url = columns.strings(read.url_column)
    schema = documents_schema(read, None if unit.format in ("csv", "tsv") else table.schema)  # CSV has text only
    carried = [columns.carried(schema.field(name)) for name, _ in read.carried()]
    bad = []
    for row, (reason, detail) in sorted(columns.problems.items()):
        raw = piece.raw.get(row, text[row].as_py())
        where = f"{unit.relative}: {place} {places[row]}"
        bad.append(BadRow(int(numbers[row]), ids[row].as_py(), where, reason, detail, None if raw is None else excerpt(raw)))
    kept = _not_in(columns.problems, table.num_rows)
    good = [column.filter(pa.array(kept)) for column in (ids, text, source, url, *carried)]
    good[1] = good[1].cast(pa.large_string())
    lengths = pc.binary_length(good[1]).to_numpy()
    yield from _cut(pa.Table.from_arrays(good, schema=schema), numbers[kept], bad, lengths, batch_rows, batch_bytes)


def _without(array: pa.Array, rows: Iterable[int]) -> pa.Array:
    """The array with some rows made null."""
    rows = list(rows)
    return pc.if_else(pa.array(_not_in(rows, len(array))), array, pa.scalar(None, array.type)) if rows else array


def one_array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array


def _not_in(problems: Iterable[int], count: int) -> np.ndarray:
    kept = np.ones(count, bool)
    kept[list(problems)] = False
    return kept


def documents_schema(read: ReadSettings, file: pa.Schema | None) -> pa.Schema:
    schema = TEXT_SCHEMA
    for name, kind in read.carried():
        if kind is None:
            kind = file.field(name).type if file is not None else pa.string()
        schema = schema.append(pa.field(name, kind))
    return schema


def empty_table(read: ReadSettings, file: pa.Schema | None = None) -> pa.Table:
    return documents_schema(read, file).empty_table()


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
