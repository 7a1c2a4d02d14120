"""JSONL and plain text: a document a line, read from a byte range or a decompressed stream in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from cluster import storage
from operators.sources.batches import EXCERPT_CHARACTERS, TEXT_SCHEMA, BadRow, BatchBuilder, RowRange, SourceBatch, excerpt
from operators.sources.charset import as_utf8, file_encoding, is_wide
from operators.sources.streams import BLOCK_BYTES, BrokenStream, read_blocks
from operators.sources.units import ReadSettings, Unit, default_source, is_compressed
from operators.tables import stable_id

_BOM = b"\xef\xbb\xbf"
_LINE_OVERHEAD_BYTES = 1 << 20  # keys, id and other fields beside the text


@dataclass(frozen=True)
class Line:
    """A line that is not blank: its first byte's offset, its bytes without line end (only a beginning if it is `too_long`)."""

    offset: int
    data: bytes
    size: int
    too_long: bool = False


def iter_lines(unit: Unit, max_line_bytes: int, max_expansion: int, wide: str | None = None) -> Iterator[Line]:
    """The lines whose first byte lies in the unit's range, blank ones left out, a leading byte order mark removed.

    Lines end in LF or CRLF. Of a longer line than `max_line_bytes` only the beginning is kept, never the whole in memory.
    `wide` is the encoding of files in UTF-16 or UTF-32; their lines are given in UTF-8, offsets count its bytes.
    Raises BrokenStream for compressed files, after the last whole line.
    """
    if is_compressed(unit.path) or wide is not None:
        blocks = read_blocks(unit.path, max_expansion if is_compressed(unit.path) else None)
        yield from _split(blocks if wide is None else as_utf8(blocks, wide), 0, None, max_line_bytes)
        return
    with storage.open_input(unit.path) as stream:
        # A range owns the lines that begin in it: look one byte back to see whether its first byte begins one.
        begin = max(0, unit.start - 1)
        stream.seek(begin)
        yield from _split(iter(lambda: stream.read(BLOCK_BYTES), b""), begin, unit, max_line_bytes)


def _split(blocks: Iterator[bytes], offset: int, unit: Unit | None, max_line_bytes: int) -> Iterator[Line]:
    stop = None if unit is None else unit.stop
    skipping = unit is not None and unit.start > 0  # the line before the range belongs to the range before
    pieces: list[bytes] = []  # of a line that goes on in the next block
    held = size = 0  # bytes in `pieces`; bytes of that line so far
    for block in blocks:
        for index, piece in enumerate(block.split(b"\n")):
            if index:  # the line before this piece has ended
                if not skipping and size:
                    line = _line(offset, pieces, size, max_line_bytes)
                    if line is not None:
                        yield line
                offset += size + 1
                skipping, pieces, held, size = False, [], 0, 0
                if stop is not None and offset >= stop:
                    return
            size += len(piece)
            if piece and not skipping and held <= max_line_bytes:
                pieces.append(piece)
                held += len(piece)
                if held > max_line_bytes:  # keep what an excerpt needs
                    pieces = [b"".join(pieces[:2])[: 4 * EXCERPT_CHARACTERS]]
    if not skipping and size:
        line = _line(offset, pieces, size, max_line_bytes)
        if line is not None:
            yield line


def _line(offset: int, pieces: list[bytes], size: int, max_line_bytes: int) -> Line | None:
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if size > max_line_bytes:
        return Line(offset, data, size, too_long=True)
    if data.endswith(b"\r"):
        data = data[:-1]
    if offset == 0 and data.startswith(_BOM):
        data = data[3:]
    return Line(offset, data, size) if data and not data.isspace() else None


def read_text_lines(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """Plain text, a document a line."""
    encoding = file_encoding(unit.path, read)
    builder = BatchBuilder(TEXT_SCHEMA, batch_rows, batch_bytes)
    # In no encoding is a text more than twice as long as in UTF-8.
    longest = read.max_text_bytes if encoding == "utf-8" else 2 * read.max_text_bytes
    yield from _read(unit, read, rows, builder, longest, _TextParser(unit, read, encoding), encoding)


def read_jsonl(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """JSON objects, one a line."""
    schema = TEXT_SCHEMA
    for name, kind in read.carried():
        schema = schema.append(pa.field(name, kind or pa.string()))
    # A JSON string writes a character in up to 6 bytes where UTF-8 needs 1 to 3.
    longest = 2 * read.max_text_bytes + _LINE_OVERHEAD_BYTES
    encoding = "utf-8" if read.encoding == "auto" else file_encoding(unit.path, read)
    builder = BatchBuilder(schema, batch_rows, batch_bytes)
    yield from _read(unit, read, rows, builder, longest, _JsonParser(unit, read, encoding), encoding)


class _Problem(Exception):
    """Why a line is no document."""

    def __init__(self, reason: str, detail: str, id_: str | None = None) -> None:
        super().__init__(detail)
        self.reason, self.id = reason, id_


def _read(
    unit: Unit, read: ReadSettings, rows: RowRange, builder: BatchBuilder, longest: int, parser: Any, encoding: str
) -> Iterator[SourceBatch]:
    row = -1
    lines = iter_lines(unit, longest, read.max_expansion, encoding if is_wide(encoding) else None)
    while True:
        row += 1
        if rows.past(row):
            break
        offset, raw = 0, None
        try:
            line = next(lines, None)
            if line is None:
                break
            if not rows.wants(row):
                continue
            offset, raw = line.offset, line.data
            if line.too_long:
                raise _Problem(
                    "too_long", f"the line has {line.size} bytes, more than {longest}; raise read.max_text_bytes to keep it"
                )
            builder.add(row, parser(line), line.size)
        except _Problem as problem:
            where = f"{unit.relative}: line at byte {offset}"
            id_ = problem.id or stable_id(unit.relative, offset)
            builder.add_bad(BadRow(row, id_, where, problem.reason, str(problem), excerpt(raw or b"")))
        except BrokenStream as broken:
            if rows.wants(row):
                id_ = stable_id(unit.relative, "break", broken.offset)
                builder.add_bad(BadRow(row, id_, unit.relative, broken.reason, str(broken)))
            break
        if builder.full:
            yield builder.take()
    if not builder.empty:
        yield builder.take()


def _decode(data: bytes, offset: int, encoding: str) -> str:
    name = "utf-8" if is_wide(encoding) else encoding  # wide ones have become UTF-8
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        raise _Problem(
            "invalid_utf8" if name == "utf-8" else "invalid_encoding",
            f"byte 0x{data[error.start]:02x} at offset {error.start} of the line ({offset + error.start} of the file) is no {name}",
        ) from None


class _TextParser:
    def __init__(self, unit: Unit, read: ReadSettings, encoding: str) -> None:
        self._relative, self._source = unit.relative, read.source or default_source(unit.relative)
        self._encoding, self._limit = encoding, read.max_text_bytes

    def __call__(self, line: Line) -> tuple[Any, ...]:
        text = _decode(line.data, line.offset, self._encoding)
        if self._encoding != "utf-8" and len(text) * 4 > self._limit and len(text.encode()) > self._limit:
            raise _Problem("too_long", f"the line has {len(text.encode())} bytes in UTF-8, more than {self._limit}")
        return stable_id(self._relative, line.offset), text, self._source, None


class _JsonParser:
    def __init__(self, unit: Unit, read: ReadSettings, encoding: str) -> None:
        self._relative, self._read, self._encoding = unit.relative, read, encoding
        self._source = read.source or default_source(unit.relative)
        self._source_column = None if read.source else read.source_column
        self._carried = [(name, _JSON_TYPES[kind]) for name, kind in read.carried()]

    def __call__(self, line: Line) -> tuple[Any, ...]:
        read = self._read
        try:
            as_it_is = self._encoding == "utf-8" or is_wide(self._encoding)
            value = orjson.loads(line.data if as_it_is else _decode(line.data, line.offset, self._encoding))
        except orjson.JSONDecodeError as error:
            _decode(line.data, line.offset, self._encoding)
            raise _Problem("bad_json", f"{error} of the line") from None
        if not isinstance(value, dict):
            raise _Problem("bad_json", f"a JSON object is wanted, the line holds a {_JSON_NAMES[type(value)]}")
        given = value.get(read.id_column) if read.id_column else None
        known = isinstance(given, str | int) and not isinstance(given, bool) and given != ""
        id_ = str(given) if known else stable_id(self._relative, line.offset)
        text = value.get(read.text_column)
        if not isinstance(text, str):
            if text is None:
                raise _Problem(
                    "missing_text", f"no text under {read.text_column!r}; keys: {sorted(value)[:20]} (read.text_column)", id_
                )
            raise _Problem("not_text", f"{read.text_column!r} holds a {_JSON_NAMES[type(text)]}, not a string", id_)
        # Four bytes is the most a character takes: only texts near the limit are measured exactly.
        if len(text) * 4 > read.max_text_bytes and len(text.encode()) > read.max_text_bytes:
            raise _Problem(
                "too_long", f"the text has {len(text.encode())} bytes, more than read.max_text_bytes {read.max_text_bytes}", id_
            )
        url = value.get(read.url_column) if read.url_column else None
        source = value.get(self._source_column) if self._source_column else None
        document = (
            id_,
            text,
            source if isinstance(source, str) and source else self._source,
            url if isinstance(url, str) else None,
        )
        return (*document, *(self._column(name, kind, value.get(name), id_) for name, kind in self._carried))

    @staticmethod
    def _column(name: str, kind: tuple[type, ...], value: Any, id_: str) -> Any:
        if value is None or (isinstance(value, kind) and (bool in kind or not isinstance(value, bool))):
            return float(value) if isinstance(value, int) and float in kind else value
        if kind == (str,):
            return orjson.dumps(value).decode()
        raise _Problem("bad_column", f"{name!r} holds a {_JSON_NAMES[type(value)]}, not the declared type (read.columns)", id_)


_JSON_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_JSON_TYPES: dict[pa.DataType | None, tuple[type, ...]] = {
    None: (str,), pa.string(): (str,), pa.int64(): (int,), pa.float64(): (int, float), pa.bool_(): (bool,),
}  # fmt: skip
