"""WARC: pages as a crawler stored them. FastWARC reads the records; here damage is stepped over and accounted for."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import brotli
import zstandard
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from cluster import storage
from operators.sources.batches import CONTENT_SCHEMA, TEXT_SCHEMA, BadRow, BatchBuilder, RowRange, SourceBatch, excerpt
from operators.sources.units import ReadSettings, Unit, default_source
from operators.tables import stable_id

_PAGES = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
_SEARCH_BYTES = 1 << 20
_HEADER_OVERHEAD_BYTES = 1 << 20
_START = re.compile(rb"WARC/1\.[01]\r?\n|\x1f\x8b\x08[\x00-\x1f]|\x28\xb5\x2f\xfd")  # a record, a gzip member, a zstd frame
_FRAME_MARK, _DICTIONARY_MARK = b"\x28\xb5\x2f\xfd", b"\x5d\x2a\x4d\x18"
_MEMBER_BYTES = 256 << 10  # zstd gives nothing out before the end of a block, which holds up to 128 KiB
_MOST_DICTIONARY_BYTES = 16 << 20


@dataclass(frozen=True)
class _Damage:
    """A stretch of the file in which no record can be read."""

    start: int
    stop: int  # where reading goes on; the file's size if nowhere
    problem: str


@dataclass(frozen=True)
class _Page:
    record: WarcRecord
    offset: int


def read_warc(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """Response, resource and conversion records of a file, as bytes (format warc) or, from WET files, as text.

    Other records are no rows. A damaged stretch is one bad row; reading goes on at the next record after it.
    """
    text = unit.format == "wet"
    builder = BatchBuilder(TEXT_SCHEMA if text else CONTENT_SCHEMA, batch_rows, batch_bytes)
    for row, item in enumerate(_records(unit, WarcRecordType.conversion if text else _PAGES)):
        if rows.past(row):
            break
        if rows.wants(row):
            if isinstance(item, _Damage):
                place = f"{unit.relative}: bytes {item.start} to {item.stop}"
                id_ = stable_id(unit.relative, "damage", item.start)
                builder.add_bad(BadRow(row, id_, place, "broken_record", item.problem))
            else:
                _add(builder, row, item, unit, read, text)
        if builder.full:
            yield builder.take()
    if not builder.empty:
        yield builder.take()


def _add(builder: BatchBuilder, row: int, page: _Page, unit: Unit, read: ReadSettings, text: bool) -> None:
    record = page.record
    id_ = _identifier(record.record_id) or stable_id(unit.relative, page.offset, row)
    where = f"{unit.relative}: record at byte {page.offset}"
    source = read.source or default_source(unit.relative)
    url = _clean(record.headers.get("WARC-Target-URI"))
    raw = b""
    try:
        raw = _block(record, read.max_text_bytes)
        kind, charset, body = _decode(record, raw, read.max_text_bytes)
        if text:
            builder.add(row, (id_, body.decode("utf-8"), source, url), len(body))
        else:
            builder.add(row, (id_, body, kind, charset, source, url), len(body))
    except _Problem as problem:
        builder.add_bad(BadRow(row, id_, where, problem.reason, str(problem), excerpt(raw)))
    except UnicodeDecodeError as error:
        detail = f"byte 0x{raw[error.start]:02x} at offset {error.start} of the text"
        builder.add_bad(BadRow(row, id_, where, "invalid_utf8", detail, excerpt(raw)))


class _Problem(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _identifier(record_id: str | None) -> str | None:
    """`<urn:uuid:X>` -> `X`."""
    found = _clean(record_id)
    return re.sub(r"^<?(?:urn:uuid:)?|>$", "", found) if found else None


def _clean(value: str | None) -> str | None:
    return value.strip().encode("utf-8", "replace").decode() or None if value else None


def _block(record: WarcRecord, limit: int) -> bytes:
    """The record's block. Raises _Problem when the file does not hold as many bytes as the header promises."""
    length = _declared_bytes(record) or 0
    if length > limit + _HEADER_OVERHEAD_BYTES:
        raise _Problem("too_long", f"the record has {length} bytes; raise read.max_text_bytes ({limit}) to keep it")
    try:
        block = record.reader.read(length) if length else b""
    except OSError as error:
        raise _Problem("broken_record", str(error)) from None
    if len(block) < length:
        raise _Problem("truncated", f"the record promises {length} bytes, the file ends after {len(block)} of them")
    return bytes(block)


def _decode(record: WarcRecord, block: bytes, limit: int) -> tuple[str | None, str | None, bytes]:
    """(media type, charset, body) with transfer and content encoding removed."""
    kind: str | None
    charset: str | None
    declared = (record.headers.get("Content-Type") or "").lower()
    if record.record_type == WarcRecordType.conversion:
        body, kind, charset = block, declared.partition(";")[0].strip() or "text/plain", "utf-8"
    elif declared.startswith("application/http"):
        head, body = _split_http(block)
        kind, charset = _media_type(head.get("content-type"))
        if "chunked" in head.get("transfer-encoding", "").lower():
            body = _unchunk(body, limit)
        for coding in reversed([name.strip() for name in head.get("content-encoding", "").lower().split(",")]):
            body = _decompress(body, coding, limit)
    else:
        body = block
        kind, charset = _media_type(declared)
    if len(body) > limit:
        raise _Problem("too_long", f"the page has more than read.max_text_bytes {limit} bytes")
    return kind, charset, body


_HEAD_END = re.compile(rb"\r?\n\r?\n")


def _split_http(block: bytes) -> tuple[dict[str, str], bytes]:
    """HTTP headers (names in lower case, the last of repeated ones) and body."""
    end = _HEAD_END.search(block)
    if end is None or not block.startswith(b"HTTP/"):
        raise _Problem("broken_record", "the record's block is no HTTP message: no status line or no end of headers")
    head = {}
    for line in block[: end.start()].split(b"\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            head[name.strip().lower().decode("latin-1")] = value.strip().decode("latin-1")
    return head, block[end.end() :]


_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s\"';,]+)", re.IGNORECASE)


def _media_type(declared: str | None) -> tuple[str | None, str | None]:
    if not declared:
        return None, None
    charset = _CHARSET.search(declared)
    return declared.partition(";")[0].strip().lower() or None, charset.group(1).lower() if charset else None


def _unchunk(body: bytes, limit: int) -> bytes:
    """Chunked transfer coding (RFC 9112, section 7.1). Crawlers often store bodies already unchunked: those pass as they are."""
    pieces: list[bytes] = []
    position, first = 0, True
    while True:
        end = body.find(b"\n", position)
        size_text = body[position:end].split(b";")[0].strip() if end >= 0 else b""
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size_text):
            if first:
                return body
            raise _Problem("bad_encoding", f"chunked transfer coding breaks at byte {position} of the body")
        size, first = int(size_text, 16), False
        if not size:
            return b"".join(pieces)
        piece = body[end + 1 : end + 1 + size]
        if len(piece) < size:
            raise _Problem("bad_encoding", f"chunked transfer coding ends inside a chunk, at byte {len(body)} of the body")
        pieces.append(piece)
        position = end + 1 + size
        position += 2 if body[position : position + 2] == b"\r\n" else 1


def _decompress(body: bytes, coding: str, limit: int) -> bytes:
    """Undo one content coding, never making more than `limit` bytes."""
    if coding in ("", "identity") or not body:
        return body
    try:
        if coding in ("gzip", "x-gzip"):
            # Some crawlers keep the header but store the body decoded.
            return _inflate(body, 31, limit) if body[:2] == b"\x1f\x8b" else body
        if coding == "deflate":
            return _inflate(body, 15 if body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0 else -15, limit)
        if coding == "br":
            return _unbrotli(body, limit)
    except (zlib.error, brotli.error) as error:
        raise _Problem("bad_encoding", f"content coding {coding}: {error}") from None
    raise _Problem("bad_encoding", f"content coding {coding!r} is not known (known: gzip, deflate, br)")


def _inflate(body: bytes, wbits: int, limit: int) -> bytes:
    decoder = zlib.decompressobj(wbits)
    data = decoder.decompress(body, limit + 1)
    if len(data) > limit:
        raise _Problem("too_long", f"the page has more than read.max_text_bytes {limit} bytes when decompressed")
    if not decoder.eof:
        raise zlib.error("the compressed body is incomplete")
    return data


def _unbrotli(body: bytes, limit: int) -> bytes:
    decoder = brotli.Decompressor()
    data = decoder.process(body, output_buffer_limit=limit + 1)
    if len(data) > limit or not decoder.can_accept_more_data():
        raise _Problem("too_long", f"the page has more than read.max_text_bytes {limit} bytes when decompressed")
    if not decoder.is_finished():
        raise brotli.error("the compressed body is incomplete")
    return bytes(data)


def _records(unit: Unit, kinds: Any) -> Iterator[_Page | _Damage]:
    """Records in file order with the damage between them. Offsets are of the file as it lies on disk."""
    with storage.open_input(unit.path) as stream:
        start, size = 0, unit.size
        dictionary = _dictionary(stream, size)
        prefix = b""  # what a reader that starts in the middle must be given first
        damage: _Damage | None = None  # grows until a record is found
        while start < size:
            last = start
            try:
                tail = io.BufferedReader(_Tail(stream, start, prefix), 1 << 20)
                for record in ArchiveIterator(tail, WarcRecordType.any_type, parse_http=False):
                    last = start + record.stream_pos - len(prefix)
                    if _declared_bytes(record) is None:
                        raise OSError(f"its Content-Length is {record.headers.get('Content-Length')!r}")
                    if damage is not None:
                        yield damage
                        damage = None
                    if record.record_type & kinds:
                        yield _Page(record, last)
                break
            except OSError as error:
                # The iterator stops at the record after `last`, or at `last` itself if that one was never delivered.
                prefix = dictionary
                start = _next_start(stream, last + 1, size, dictionary)
                first = last if damage is None else damage.start
                problem = f"no record can be read after the start of the one at byte {first}: {error}"
                damage = _Damage(first, start, problem if damage is None else damage.problem)
        if damage is not None:
            yield damage


def _declared_bytes(record: WarcRecord) -> int | None:
    declared = (record.headers.get("Content-Length") or "").strip()
    return int(declared) if declared.isdecimal() else None


class _Tail(io.RawIOBase):
    """A stream from `start` on, with `prefix` before it, as a Python file of its own, whose positions count from there."""

    def __init__(self, stream: Any, start: int, prefix: bytes = b"") -> None:
        self._stream, self._start, self._prefix = stream, start, prefix
        self._position = 0
        stream.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._prefix[self._position : self._position + len(buffer)] or self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position


def _dictionary(stream: Any, size: int) -> bytes:
    """The frame with the compression dictionary that a .warc.zst file may begin with, empty if there is none.

    IIPC, "WARC zstd compression", version 1.0: a skippable frame 0x184D2A5D.
    """
    stream.seek(0)
    head = stream.read(8)
    length = int.from_bytes(head[4:], "little")
    if head[:4] != _DICTIONARY_MARK or length > min(size, _MOST_DICTIONARY_BYTES):
        return b""
    return bytes(head + stream.read(length))


def _next_start(stream: Any, position: int, size: int, dictionary: bytes) -> int:
    """Where the next record begins at or after `position`: a compressed member that opens with a WARC header, or such a header."""
    while position < size:
        stream.seek(position)
        data = stream.read(_SEARCH_BYTES)
        for match in _START.finditer(data):
            if match[0].startswith(b"WARC") or _opens_record(stream, position + match.start(), dictionary):
                return position + match.start()
        if len(data) < _SEARCH_BYTES:
            return size
        position += len(data) - 16  # a start may lie across two blocks
    return size


def _opens_record(stream: Any, position: int, dictionary: bytes) -> bool:
    stream.seek(position)
    data = stream.read(_MEMBER_BYTES)
    try:
        if data.startswith(b"\x1f"):
            return zlib.decompressobj(31).decompress(data, 8).startswith(b"WARC/1.")
        with zstandard.ZstdDecompressor(dict_data=_trained(dictionary)).stream_reader(io.BytesIO(data)) as reader:
            return bool(reader.read(8).startswith(b"WARC/1."))
    except (zlib.error, zstandard.ZstdError):
        return False


def _trained(frame: bytes) -> zstandard.ZstdCompressionDict | None:
    """The dictionary in its frame, where it may be compressed itself."""
    if not frame:
        return None
    content = frame[8:]
    if content.startswith(_FRAME_MARK):
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as reader:
            content = reader.read(_MOST_DICTIONARY_BYTES)
    return zstandard.ZstdCompressionDict(content)
