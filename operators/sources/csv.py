"""CSV and TSV: records found by a compiled scan, so that they stream in bounded memory, and parsed by Arrow.

The scan knows four states (at the start of a field, in a plain field, in quotes, at a quote inside quotes), as RFC 4180
has them; a quote in the middle of a plain field is a character like any other. It gives the place of every record,
which makes ids, and lets whole records be handed to Arrow's parser, which splits them into columns.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc_csv
from numba import njit

from cluster import storage
from operators.config import SettingsError
from operators.sources.batches import EXCERPT_CHARACTERS, BadRow, RowRange, SourceBatch, excerpt
from operators.sources.charset import as_utf8, decode_bytes, file_encoding, is_wide
from operators.sources.columns import Piece, check_columns, read_pieces, wanted_columns
from operators.sources.settings import ReadSettings
from operators.sources.streams import BLOCK_BYTES, BrokenStream, read_blocks
from operators.sources.units import Unit, is_compressed
from operators.tables import stable_id

_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 4 << 20  # records that are parsed together
_RECORD_OVERHEAD_BYTES = 1 << 20  # fields beside the text
_UNCLOSED_QUOTES = 100  # in one unit; each costs reading up to the longest record twice
_FIELD_START, _PLAIN, _QUOTED, _QUOTE_IN_QUOTED, _AFTER_CR = range(5)


@njit(cache=True, nogil=True)
def scan(data: np.ndarray, state: int, delimiter: int, quote: int, quoted_newlines: bool, ends: np.ndarray) -> tuple[int, int]:
    """Writes the position after each record end into `ends` (int64, at least len(data) long). Returns (count, state).

    Records end at LF, CRLF or CR outside quotes. A CR as the last byte leaves state 4: its record ends there unless LF
    comes next. `quote` is -1 where nothing is quoted; without `quoted_newlines` a line end always ends the record.
    """
    count = 0
    for position in range(len(data)):
        byte = data[position]
        if state == _AFTER_CR:
            if byte == 10:
                ends[count] = position + 1
                count += 1
                state = _FIELD_START
                continue
            ends[count] = position
            count += 1
            state = _FIELD_START
        if state == _QUOTED and (quoted_newlines or (byte != 10 and byte != 13)):
            if byte == quote:
                state = _QUOTE_IN_QUOTED
            continue
        if byte == quote and state != _PLAIN:
            state = _QUOTED  # opens a field, or is the second of two quotes
        elif byte == delimiter:
            state = _FIELD_START
        elif byte == 10:
            ends[count] = position + 1
            count += 1
            state = _FIELD_START
        elif byte == 13:
            state = _AFTER_CR
        else:
            state = _PLAIN
    return count, state


@njit(cache=True, nogil=True)
def count_fields(data: np.ndarray, starts: np.ndarray, delimiter: int, quote: int) -> np.ndarray:
    """int64[records]: the fields of each record data[starts[i]:starts[i + 1]]; 0 where a quote is not closed in it."""
    counts = np.ones(len(starts) - 1, np.int64)
    for record in range(len(starts) - 1):
        state = _FIELD_START
        for position in range(starts[record], starts[record + 1]):
            byte = data[position]
            if state == _QUOTED:
                if byte == quote:
                    state = _QUOTE_IN_QUOTED
            elif byte == quote and state != _PLAIN:
                state = _QUOTED
            elif byte == delimiter:
                counts[record] += 1
                state = _FIELD_START
            elif byte != 10 and byte != 13:
                state = _PLAIN
        if state == _QUOTED:
            counts[record] = 0
    return counts


@dataclass(frozen=True)
class _Records:
    """Whole records one after the other: record i is data[starts[i]:starts[i + 1]] and stands at `offset + starts[i]`."""

    offset: int
    data: bytes
    starts: np.ndarray  # int64[records + 1]


@dataclass(frozen=True)
class _Unreadable:
    """A stretch that is no record."""

    offset: int
    raw: bytes
    reason: str
    detail: str


class _Layout:
    """How one file is written: encoding, delimiter, quote, names of columns."""

    def __init__(self, unit: Unit, read: ReadSettings) -> None:
        self.unit, self.read = unit, read
        self.encoding = file_encoding(unit.path, read)
        self.wide = is_wide(self.encoding)
        self.delimiter = read.csv.delimiter or ("\t" if unit.format == "tsv" else ",")
        self.quote = read.csv.quote
        self.longest = 2 * read.max_text_bytes + _RECORD_OVERHEAD_BYTES  # every quote of a text may stand twice
        self.names = read.csv.column_names or []
        self.header_bytes = 0
        if not self.names:
            self._read_header()

    def _read_header(self) -> None:
        for item in self.records(None):
            if isinstance(item, _Unreadable):
                raise SettingsError(f"{self.unit.path}: its header line cannot be read: {item.detail}")
            for start, stop in itertools.pairwise(item.starts.tolist()):
                line = item.data[start:stop]
                if line.strip():
                    self.names = self._fields(line)
                    self.header_bytes = item.offset + stop
                    return
        self.header_bytes = self.unit.size

    def _fields(self, line: bytes) -> list[str]:
        options = pc_csv.ReadOptions(autogenerate_column_names=True, use_threads=False)
        table = pc_csv.read_csv(pa.py_buffer(line + b"\n"), options, self._parse(), pc_csv.ConvertOptions(check_utf8=False))
        values = [column[0].as_py() for column in table.cast(pa.schema([(n, pa.binary()) for n in table.column_names])).columns]
        try:
            names = [decode_bytes(value, "utf-8" if self.wide else self.encoding).strip() for value in values]
        except UnicodeDecodeError as error:
            raise SettingsError(f"{self.unit.path}: its header line is no {self.encoding}: {error} (read.encoding)") from None
        twice = {name for name, count in Counter(names).items() if count > 1}
        if twice & set(wanted_columns(self.read, names)):
            raise SettingsError(f"{self.unit.path}: column {sorted(twice)} stands twice in its header line (read.csv.column_names)")
        return [f"{name}\0{number}" if name in twice else name for number, name in enumerate(names)]

    def _parse(self) -> pc_csv.ParseOptions:
        return pc_csv.ParseOptions(
            delimiter=self.delimiter,
            quote_char=self.quote or False,
            double_quote=bool(self.quote),
            newlines_in_values=bool(self.quote),
        )

    def table(self, data: bytes, columns: list[str]) -> pa.Table:
        """The columns, as bytes, of records that all have as many fields as there are names."""
        return pc_csv.read_csv(
            pa.py_buffer(data),
            pc_csv.ReadOptions(column_names=self.names, use_threads=False, block_size=max(len(data) + 1, 1 << 10)),
            self._parse(),
            pc_csv.ConvertOptions(
                column_types={name: pa.large_binary() for name in columns},
                include_columns=columns,
                strings_can_be_null=False,
                check_utf8=False,
            ),
        )

    def fields(self, data: bytes, starts: np.ndarray) -> np.ndarray:
        """See count_fields."""
        quote = ord(self.quote) if self.quote else -1
        return count_fields(np.frombuffer(data, np.uint8), starts, ord(self.delimiter), quote)

    def records(self, rows_from: int | None) -> Iterator[_Records | _Unreadable]:
        """Records of the unit's range after the header; with None, from the beginning of the file."""
        unit = self.unit
        if is_compressed(unit.path) or self.wide:
            blocks = read_blocks(unit.path, self.read.max_expansion if is_compressed(unit.path) else None)
            offset, blocks = _without_mark(as_utf8(blocks, self.encoding) if self.wide else blocks)
            yield from _split(self, blocks, offset, None, False)
            return
        start = 0 if rows_from is None else max(unit.start, rows_from)
        with storage.open_input(unit.path) as stream:
            begin = max(0, start - 1) if start > (rows_from or 0) else start
            stream.seek(begin)
            blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
            if not begin:
                begin, blocks = _without_mark(blocks)
            stop = None if rows_from is None or self.read.csv.quoted_newlines else unit.stop
            yield from _split(self, blocks, begin, stop, begin < start)

    def scan(self, block: bytes, state: int) -> tuple[np.ndarray, int]:
        """(positions after record ends, state after the block)."""
        ends = np.empty(len(block) + 1, np.int64)
        quote = ord(self.quote) if self.quote else -1
        data = np.frombuffer(block, np.uint8)
        count, state = scan(data, state, ord(self.delimiter), quote, self.read.csv.quoted_newlines, ends)
        return ends[:count].copy(), state


def _without_mark(blocks: Iterator[bytes]) -> tuple[int, Iterator[bytes]]:
    """(bytes of a leading byte order mark of UTF-8, the stream without it)."""
    first = next(blocks, b"")
    offset = len(_BOM) if first.startswith(_BOM) else 0
    return offset, itertools.chain([first[offset:]] if len(first) > offset else [], blocks)


def read_csv(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """Records as documents; fields that nobody asked for are not kept.

    A record with another number of fields than the header, one whose quotes never close, and one longer than twice
    `max_text_bytes` are bad rows; after an unclosed quote reading goes on at the next line. Raises SettingsError when the
    header lacks a column that the settings name.
    """
    yield from read_pieces(unit, read, rows, _pieces(unit, read), batch_rows, batch_bytes, "record at byte")


def check_header(unit: Unit, read: ReadSettings) -> None:
    """Raises SettingsError when the file's header lacks a column that the settings name. A broken file is for the reader."""
    with contextlib.suppress(BrokenStream):
        _header(unit, read)


def _header(unit: Unit, read: ReadSettings) -> _Layout:
    layout = _Layout(unit, read)
    if layout.names:
        check_columns(pa.schema([(name, pa.large_binary()) for name in layout.names]), read, unit.path)
    return layout


def _pieces(unit: Unit, read: ReadSettings) -> Iterator[Piece | BadRow]:
    broken: BrokenStream | None = None
    try:
        layout = _header(unit, read)
        if layout.names:
            columns = wanted_columns(read, layout.names)
            for item in layout.records(layout.header_bytes):
                if isinstance(item, _Unreadable):
                    id_, where = stable_id(unit.relative, item.offset), f"{unit.relative}: record at byte {item.offset}"
                    yield BadRow(0, id_, where, item.reason, item.detail, excerpt(item.raw))
                elif (piece := _parse(layout, item, columns)) is not None:
                    yield piece
    except BrokenStream as error:
        broken = error
    if broken is not None:
        yield BadRow(0, stable_id(unit.relative, "break", broken.offset), unit.relative, broken.reason, str(broken))


def _parse(layout: _Layout, records: _Records, columns: list[str]) -> Piece | None:
    """The records after the header that are not blank."""
    starts = records.starts
    lengths = np.diff(starts)
    wanted = np.ones(len(lengths), bool)
    for row in np.flatnonzero(lengths <= 2):  # blank lines, which Arrow leaves out too
        wanted[row] = bool(records.data[starts[row] : starts[row + 1]].strip(b"\r\n"))
    if is_compressed(layout.unit.path) or layout.wide:
        wanted &= records.offset + starts[:-1] >= layout.header_bytes
    if not wanted.any():
        return None
    places = (records.offset + starts[:-1])[wanted]
    spans = np.stack([starts[:-1], starts[1:]], 1)[wanted]
    fields = layout.fields(records.data, starts)[wanted]
    good = fields == len(layout.names)
    wrong = np.flatnonzero(~good).tolist()
    first = int(spans[0, 0])  # a header stands before all records
    data = records.data[first:] if not wrong else b"".join(records.data[start:stop] for start, stop in spans[good].tolist())
    table = layout.table(data, columns) if good.any() else _no_rows(columns)
    if table.num_rows != good.sum():
        raise RuntimeError(
            f"{layout.unit.path}: Arrow finds {table.num_rows} records after byte {places[0]}, the scan {good.sum()}; "
            "please report this file"
        )
    problems = {
        row: ("bad_csv", f"{fields[row]} fields, the header has {len(layout.names)}")
        if fields[row]
        else ("bad_quotes", "a quote is not closed in its record")
        for row in wrong
    }
    raw = {row: records.data[spans[row, 0] : spans[row, 1]][: 4 * EXCERPT_CHARACTERS] for row in wrong}
    if wrong:
        table = table.take(pa.array(np.where(good, np.cumsum(good) - 1, 0), mask=~good))
    if layout.encoding != "utf-8" and not layout.wide:
        table = _decoded(layout, table, problems)
    return Piece(places, table, problems, raw)


def _no_rows(columns: list[str]) -> pa.Table:
    return pa.schema([(name, pa.large_binary()) for name in columns]).empty_table()


def _decoded(layout: _Layout, table: pa.Table, problems: dict[int, tuple[str, str]]) -> pa.Table:
    """Columns of another encoding as text; a value that is none in it makes its row a bad one."""
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        values: list[str | None] = []
        for row, value in enumerate(column.to_pylist()):
            try:
                values.append(None if value is None else decode_bytes(value, layout.encoding))
            except UnicodeDecodeError as error:
                values.append(None)
                detail = f"column {name!r}: byte 0x{value[error.start]:02x} at offset {error.start} is no {layout.encoding}"
                problems.setdefault(row, ("invalid_encoding", detail))
        columns.append(pa.array(values, pa.large_string()))
    return pa.table(columns, names=table.column_names)


def _split(
    layout: _Layout, blocks: Iterator[bytes], offset: int, stop: int | None, skipping: bool
) -> Iterator[_Records | _Unreadable]:
    """Whole records in chunks of about 4 MiB; those that begin at `stop` or later belong to the next range.

    `skipping`: the stream begins inside the record before the range. A break of the stream is raised after the last
    whole record.
    """
    pending: list[bytes] = []  # bytes of the records that are not given out yet
    ends: list[np.ndarray] = []  # where records end, from the first pending byte on
    size = last = 0  # bytes pending; the end of the last whole record among them
    state, tries = _FIELD_START, _UNCLOSED_QUOTES
    broken: BrokenStream | None = None
    while True:
        try:
            block = next(blocks, b"")
        except BrokenStream as error:
            block, broken = b"", error
        if block:
            found, state = layout.scan(block, state)
            if len(found):
                ends.append(found + size)
                last = int(ends[-1][-1])
            pending.append(block)
            size += len(block)
            if last < _CHUNK_BYTES and size - last <= layout.longest:
                continue
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        unclosed = state == _QUOTED
        if not block and not broken and last < size and not unclosed:
            ends.append(np.array([size]))  # the last record has no line end
            last = size
        past = False
        if last:
            starts = np.concatenate([[0], *ends])
            first = 1 if skipping else 0
            keep = len(starts) if stop is None else int(np.searchsorted(starts[:-1], stop - offset)) + 1
            past = keep < len(starts)
            if keep > first + 1:
                yield _Records(offset, data[: starts[keep - 1]], starts[first:keep])
            skipping = False
        data, offset = data[last:], offset + last
        if past or (stop is not None and offset >= stop):
            return
        pending, ends, size, last = [data] if data else [], [], len(data), 0
        at_end = not block
        if size > layout.longest or (at_end and unclosed and size and broken is None):
            line = data.find(b"\n") + 1
            if unclosed and not line and not at_end:
                state = _PLAIN  # not even the first line ends: skip it alone
            elif unclosed and tries:
                # Give up the first line only: what follows may be whole records.
                tries -= 1
                line = line or size
                detail = f"a quote that opens in this line is not closed within {min(size, layout.longest)} bytes"
                yield _Unreadable(offset, data[:line], "bad_quotes", detail)
                offset, pending, size = offset + line, [], 0
                blocks, state = _again(data[line:], blocks), _FIELD_START
                continue
            yield from _skip(layout, data, offset, blocks, state, stop, skipping)
            return
        if broken is not None:
            raise broken
        if at_end:
            return


def _again(data: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Bytes that are read once more, in blocks, before the rest of a stream."""
    yield from (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
    yield from blocks


def _skip(
    layout: _Layout, data: bytes, offset: int, blocks: Iterator[bytes], state: int, stop: int | None, skipping: bool
) -> Iterator[_Records | _Unreadable]:
    """Past a record that is too long to hold; its rest is read and dropped, then `_split` goes on."""
    raw, size = data[: 4 * EXCERPT_CHARACTERS], len(data)
    for block in blocks:
        found, state = layout.scan(block, state)
        if len(found):
            first = int(found[0])
            if not skipping:
                yield _too_long(layout, offset, raw, size + first)
            if stop is None or offset + size + first < stop:
                yield from _split(layout, _again(block[first:], blocks), offset + size + first, stop, False)
            return
        size += len(block)
    if skipping:
        return
    if state == _QUOTED:
        detail = f"more than {_UNCLOSED_QUOTES} quotes are not closed; what follows cannot be read (read.csv.quote)"
        yield _Unreadable(offset, raw, "bad_quotes", detail)
    else:
        yield _too_long(layout, offset, raw, size)


def _too_long(layout: _Layout, offset: int, raw: bytes, size: int) -> _Unreadable:
    detail = f"the record has {size} bytes, more than {layout.longest}; raise read.max_text_bytes to keep it"
    return _Unreadable(offset, raw, "too_long", detail)
