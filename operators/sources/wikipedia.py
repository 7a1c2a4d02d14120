"""Dumps of Wikipedia and other MediaWiki sites: `*-pages-articles*.xml`, plain or compressed.

The XML is parsed as a stream by expat, which holds one page at a time; entity declarations are refused, so nothing outside
the file is read and nothing expands. A plain dump and a multistream .bz2 are cut into units: in XML a literal `<page>`
is always the start of a page, and each bzip2 stream of a multistream dump holds whole pages.
"""

from __future__ import annotations

import bz2
import re
import xml.parsers.expat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from mwparserfromhell.parser import ParserError

from cluster import storage
from operators.sources.batches import TEXT_SCHEMA, BadRow, BatchBuilder, RowRange, SourceBatch
from operators.sources.settings import ReadSettings
from operators.sources.streams import BLOCK_BYTES, BrokenStream, expanding, members, read_blocks
from operators.sources.units import Unit, default_source, is_compressed
from operators.sources.wikitext import plain_text
from operators.tables import stable_id

_SCHEMA = TEXT_SCHEMA.append(pa.field("title", pa.string()))
_PAGE = b"<page>"
_BZIP2_START = re.compile(rb"BZh[1-9]1AY&SY")
_FILE_NAMESPACES = (-2, 6, 14)  # Media, File, Category: links into these show no words


class _EntityError(Exception):
    """The dump declares an entity."""


@dataclass
class _Site:
    """What the head of a dump says: database name, address of pages, names of the namespaces of files and categories."""

    name: str = ""
    base: str = ""
    media: list[str] = field(default_factory=list)


@dataclass
class _Page:
    title: str = ""
    id: str = ""
    namespace: str = "0"
    redirect: str | None = None
    model: str = "wikitext"
    text: str = ""
    bytes: int = 0


class _Parser:
    """Feeds on pieces of XML; `pages` gathers finished pages. Text beyond `limit` bytes of a page is counted, not held."""

    def __init__(self, limit: int) -> None:
        self.site, self.pages = _Site(), list[_Page]()
        self._limit = limit
        self._page: _Page | None = None
        self._path: list[str] = []
        self._pieces: list[str] = []
        self._size = 0
        self._key = ""
        self._parser = xml.parsers.expat.ParserCreate(encoding="UTF-8")
        self._parser.buffer_text = True
        self._parser.buffer_size = 1 << 16
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.EntityDeclHandler = self._entity

    def feed(self, data: bytes) -> None:
        """Raises ExpatError where the XML breaks, _EntityError where it declares an entity."""
        self._parser.Parse(data, False)

    @property
    def inside_page(self) -> bool:
        return self._page is not None

    def _entity(self, *declaration: Any) -> None:
        raise _EntityError(f"the file declares an entity ({declaration[0]!r}); dumps have none")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        self._pieces, self._size = [], 0
        if name == "page":
            self._page = _Page()
        elif name == "redirect" and self._page is not None:
            self._page.redirect = attributes.get("title", "")
        elif name == "namespace":
            self._key = attributes.get("key", "")

    def _text(self, data: str) -> None:
        self._size += len(data.encode("utf-8", "surrogatepass"))
        if self._size <= self._limit + (1 << 16):
            self._pieces.append(data)

    def _end(self, name: str) -> None:
        self._path.pop()
        content, page = "".join(self._pieces), self._page
        if page is None:
            if name == "dbname":
                self.site.name = content
            elif name == "base":
                self.site.base = content.rsplit("/", 1)[0] + "/"
            elif name == "namespace" and self._key.lstrip("-").isdigit() and int(self._key) in _FILE_NAMESPACES:
                self.site.media.append(content)
        elif name == "page":
            self.pages.append(page)
            self._page = None
        elif name == "title":
            page.title = content
        elif name == "ns":
            page.namespace = content
        elif name == "id" and self._path[-1] == "page":
            page.id = content
        elif name == "model":
            page.model = content
        elif name == "text":
            page.text, page.bytes = content, self._size  # of several revisions, the last
        self._pieces, self._size = [], 0


def read_wikipedia(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """A document a page: id `DBNAME-PAGEID`, url, title, text (see wikitext).

    Redirects, pages of other namespaces and pages that hold no wikitext are rejected; where the file breaks, what came
    before is kept and one bad row stands for the rest.
    """
    builder = BatchBuilder(_SCHEMA, batch_rows, batch_bytes)
    source = read.source or default_source(unit.relative)
    for row, item in enumerate(_pages(unit, read)):
        if rows.past(row):
            break
        if rows.wants(row):
            if isinstance(item, BrokenStream):
                id_ = stable_id(unit.relative, "break", unit.start, item.offset)
                builder.add_bad(BadRow(row, id_, unit.relative, item.reason, str(item)))
            else:
                _add(builder, row, item[0], item[1], read, rows, source, unit)
        if builder.full:
            yield builder.take()
    if not builder.empty:
        yield builder.take()


def _add(
    builder: BatchBuilder, row: int, site: _Site, page: _Page, read: ReadSettings, rows: RowRange, source: str, unit: Unit
) -> None:
    id_ = f"{site.name}-{page.id}" if site.name and page.id else stable_id(unit.relative, page.id or page.title)
    where = f"{unit.relative}: page {page.id} {page.title!r}"

    def bad(reason: str, detail: str, unwanted: bool = False) -> None:
        builder.add_bad(BadRow(row, id_, where, reason, detail, unwanted=unwanted))

    if page.redirect is not None:
        bad("redirect", f"to {page.redirect!r}", unwanted=True)
    elif page.namespace not in {str(number) for number in read.wikipedia.namespaces}:
        bad(f"namespace_{page.namespace}", "not among read.wikipedia.namespaces", unwanted=True)
    elif page.model != "wikitext":
        bad("no_wikitext", f"its content model is {page.model}", unwanted=True)
    elif page.bytes > read.max_text_bytes:
        bad("too_long", f"{page.bytes} bytes of wikitext, more than read.max_text_bytes {read.max_text_bytes}")
    elif row in rows.crashed:
        bad(f"crash: {rows.crashed[row]}", "reading the page ended the process")
    else:
        try:
            with rows.reading(row):
                text = plain_text(page.text, read.wikipedia.tables, site.media)
        except (ParserError, RecursionError) as error:
            bad("bad_wikitext", f"{type(error).__name__}: {error}")
            return
        url = site.base + quote(page.title.replace(" ", "_"), safe="/:(),;@!*'") if site.base else None
        builder.add(row, (id_, text, source, url, page.title), len(text))


def can_be_cut(path: str) -> bool:
    """Whether units may begin inside the file: plain XML, or bzip2 streams that hold whole pages."""
    if not is_compressed(path):
        return True
    if not path.lower().endswith(".bz2"):
        return False
    with storage.open_input(path) as stream:
        start = _stream_start(stream, 1, stream.size())
        if start is None:
            return False
        try:
            stream.seek(start)
            return bz2.BZ2Decompressor().decompress(stream.read(BLOCK_BYTES), 4096).lstrip().startswith(_PAGE)
        except OSError:
            return False


def _pages(unit: Unit, read: ReadSettings) -> Iterator[tuple[_Site, _Page] | BrokenStream]:
    """The pages that begin in the unit, each with its site; a break, if there is one, comes last."""
    parser = _Parser(read.max_text_bytes)
    offset = 0
    try:
        for block in expanding(_xml(unit), unit.path, read.max_expansion):
            offset += len(block)
            parser.feed(block)
            for page in parser.pages:
                yield parser.site, page
            parser.pages.clear()
        if parser.inside_page:
            yield BrokenStream("the file ends inside a page", "truncated", unit.size, offset)
    except xml.parsers.expat.ExpatError as error:
        for page in parser.pages:
            yield parser.site, page
        yield BrokenStream(f"not readable as XML ({error})", "corrupt", unit.start, offset)
    except _EntityError as error:
        yield BrokenStream(str(error), "corrupt", unit.start, offset)
    except BrokenStream as broken:
        yield broken


def _xml(unit: Unit) -> Iterator[bytes]:
    """The XML of the unit's pages. A unit inside the file is given the head of the dump first, for its site."""
    if is_compressed(unit.path):
        if not unit.start and unit.stop >= storage.size(unit.path):
            yield from read_blocks(unit.path)
            return
        yield from _streams(unit)
        return
    with storage.open_input(unit.path) as stream:
        if unit.start:
            yield from _head(iter(lambda: stream.read(1 << 16), b""))
        yield from _range(stream, unit)


def _head(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Everything before the first page."""
    tail = b""
    for block in blocks:
        data = tail + block
        place = data.find(_PAGE)
        if place >= 0:
            yield data[:place]
            return
        keep = len(_PAGE) - 1
        tail = data[-keep:]
        yield data[:-keep]
    yield tail


def _range(stream: pa.NativeFile, unit: Unit) -> Iterator[bytes]:
    """From the first page that begins at `start` or later to the end of the last one that begins before `stop`."""
    stream.seek(unit.start)
    started, position, tail = not unit.start, unit.start, b""  # position is that of `tail`
    while block := stream.read(BLOCK_BYTES):
        data = tail + block
        begin = 0
        if not started:
            begin = data.find(_PAGE)
            if begin < 0 or position + begin >= unit.stop:
                if position + len(data) >= unit.stop + len(_PAGE) or begin >= 0:
                    return
                tail = data[-(len(_PAGE) - 1) :]
                position += len(data) - len(tail)
                continue
            started = True
        end = data.find(_PAGE, max(begin, unit.stop - position)) if position + len(data) > unit.stop else -1
        if end >= 0:
            yield data[begin:end]
            return
        keep = min(len(_PAGE) - 1, len(data) - begin)  # a tag may lie across two blocks
        tail = data[len(data) - keep :] if keep else b""
        position += len(data) - len(tail)
        yield data[begin : len(data) - len(tail)]
    if started:
        yield tail


def _streams(unit: Unit) -> Iterator[bytes]:
    """The bzip2 streams that begin in the unit, decompressed."""
    with storage.open_input(unit.path) as stream:
        size = stream.size()
        start, stop = _stream_start(stream, unit.start, size), _stream_start(stream, unit.stop, size)
        if start is None or start >= unit.stop:
            return
        if unit.start:
            stream.seek(0)
            yield from _head(members(stream, "bzip2", bz2.BZ2Decompressor))
        stream.seek(start)
        yield from members(stream, "bzip2", bz2.BZ2Decompressor, stop)


def _stream_start(stream: pa.NativeFile, position: int, size: int) -> int | None:
    """Where the first bzip2 stream at or after `position` begins."""
    while position < size:
        stream.seek(position)
        data = stream.read(BLOCK_BYTES)
        found = _BZIP2_START.search(data)
        if found:
            return position + found.start()
        if len(data) < BLOCK_BYTES:
            return None
        position += len(data) - 9
    return None
