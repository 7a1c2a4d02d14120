"""Which encoding a plain-text or CSV file is in, found from samples of it, and streams of wide encodings as UTF-8.

Encodings that keep ASCII bytes for ASCII characters (UTF-8, GB18030, Big5, Windows code pages) are cut into lines and
fields as bytes and decoded piece by piece, so that a broken piece costs itself only. In these no byte of a longer
character is a line end, comma, tab or quote. UTF-16 and UTF-32 have no such bytes: they are decoded as a stream.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import islice

from cluster import storage
from operators.sources.settings import ReadSettings, is_compressed
from operators.sources.streams import BrokenStream, read_blocks
from operators.text.encoding import decode

_SAMPLE_BYTES = 64 << 10
_SAMPLES = 5
_HEAD_BYTES = 256 << 10
_UTF8_SHARE = 0.5  # of the sampled lines beyond ASCII; below it, UTF-8 is not what the file was written in
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip


def file_encoding(path: str, read: ReadSettings) -> str:
    """Python's name of the encoding that the file is to be read in; the same for every unit of the file.

    A given encoding is taken as it is (GBK and GB2312 as GB18030, which holds both). Otherwise: the byte order mark, else
    UTF-8 where it fits half of the sampled lines or more, else what uchardet finds.
    """
    if read.encoding != "auto":
        name = codecs.lookup(read.encoding).name
        return "gb18030" if name in ("gbk", "gb2312") else name
    head = _head(path)
    marked = encoding_of_mark(head)
    if marked:
        return marked
    lines = [line for line in b"\n".join(_samples(path, head)).split(b"\n") if not line.isascii()]
    if not lines or sum(map(_is_utf8, lines)) >= _UTF8_SHARE * len(lines):
        return "utf-8"
    return decode(b"\n".join(lines), html=False).encoding


def encoding_of_mark(head: bytes) -> str | None:
    """The encoding whose byte order mark the bytes begin with."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def is_wide(encoding: str) -> bool:
    """Whether the encoding spends more than one byte on ASCII characters."""
    return "\n".encode(encoding) != b"\n"


def as_utf8(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """A stream of a wide encoding in UTF-8, without its byte order mark.

    What is no character there (a lone surrogate, a cut character) becomes bytes that are no UTF-8, for the reader of the
    line to find.
    """
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    first = True
    for block in blocks:
        text = _step(decoder, block, False)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text.encode("utf-8", "surrogatepass")
    yield _step(decoder, b"", True).encode("utf-8", "surrogatepass")


def _step(decoder: codecs.IncrementalDecoder, block: bytes, final: bool) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError:
        decoder.reset()
        return "\ud800"  # encoded as bytes that are no UTF-8


def decode_bytes(data: bytes, encoding: str) -> str:
    """Strictly; a leading mark of UTF-8 is left out. Raises UnicodeDecodeError."""
    return data.decode("utf-8-sig" if encoding == "utf-8" else encoding)


def _head(path: str) -> bytes:
    pieces: list[bytes] = []
    try:
        for block in islice(read_blocks(path), 1):
            pieces.append(block)
    except BrokenStream:
        pass  # the reader meets the same break and accounts for it
    return b"".join(pieces)[:_HEAD_BYTES]


def _samples(path: str, head: bytes) -> Iterator[bytes]:
    """Whole lines from the beginning of a file, and from further places where it is not compressed."""
    yield head if len(head) < _HEAD_BYTES else head[: head.rfind(b"\n") + 1 or len(head)]
    if is_compressed(path):
        return
    with storage.open_input(path) as stream:
        size = stream.size()
        if size <= _HEAD_BYTES:
            return
        for number in range(1, _SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            piece = stream.read(_SAMPLE_BYTES)
            first, last = piece.find(b"\n"), piece.rfind(b"\n")
            if 0 <= first < last:
                yield piece[first + 1 : last]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
