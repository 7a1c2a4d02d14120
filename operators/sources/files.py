"""Whole files as documents: HTML pages and plain texts."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from operators.sources.batches import CONTENT_SCHEMA, TEXT_SCHEMA, BadRow, BatchBuilder, RowRange, SourceBatch, excerpt
from operators.sources.charset import encoding_of_mark
from operators.sources.streams import BrokenStream, read_bounded
from operators.sources.units import ReadSettings, Unit, default_source
from operators.tables import stable_id
from operators.text.encoding import decode


def read_html_files(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """Saved pages, a document a file; compressed ones are decompressed."""

    def parse(relative: str, source: str, data: bytes) -> tuple[Any, ...]:
        kind = "application/xhtml+xml" if ".xhtml" in relative.lower() else "text/html"
        return stable_id(relative), data, kind, None, source, None

    yield from _read(unit, read, rows, BatchBuilder(CONTENT_SCHEMA, batch_rows, batch_bytes), parse)


def read_text_files(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """Plain texts and Markdown, a document a file, in the encoding given or found (see read.encoding)."""

    def parse(relative: str, source: str, data: bytes) -> tuple[Any, ...]:
        return stable_id(relative), _text(data, read), source, None

    yield from _read(unit, read, rows, BatchBuilder(TEXT_SCHEMA, batch_rows, batch_bytes), parse)


def _text(data: bytes, read: ReadSettings) -> str:
    """The file's text. Raises UnicodeDecodeError where no encoding fits, or the given one does not."""
    if read.encoding != "auto":
        name = codecs.lookup(read.encoding).name
        return data.decode("gb18030" if name in ("gbk", "gb2312") else name).removeprefix("\ufeff")
    marked = encoding_of_mark(data)
    if marked:
        return data.decode(marked).removeprefix("\ufeff")
    found = decode(data, html=False)
    # Bytes with zeros among them that are no UTF-8 are some binary file: every byte has a character in a code page.
    if found.broken or (b"\0" in data and not found.encoding.startswith("utf")):
        return data.decode("utf-8")
    return found.text


def _read(unit: Unit, read: ReadSettings, rows: RowRange, builder: BatchBuilder, parse: Any) -> Iterator[SourceBatch]:
    for row, (path, relative) in enumerate(unit.files):
        if rows.past(row):
            break
        if not rows.wants(row):
            continue
        problem, data = ("", ""), b""
        try:
            content = read_bounded(path, read.max_text_bytes)
            if content is None:
                problem = ("too_long", f"more than read.max_text_bytes {read.max_text_bytes}")
            else:
                data = content
                builder.add(row, parse(relative, read.source or default_source(relative), data), len(data))
        except BrokenStream as broken:
            problem = (broken.reason, str(broken))
        except UnicodeDecodeError as error:
            reason = "invalid_utf8" if error.encoding == "utf-8" else "invalid_encoding"
            problem = (reason, f"byte 0x{data[error.start]:02x} at offset {error.start} of the file is no {error.encoding}")
        if problem[0]:
            builder.add_bad(BadRow(row, stable_id(relative), relative, *problem, raw=excerpt(data)))
        if builder.full:
            yield builder.take()
    if not builder.empty:
        yield builder.take()
