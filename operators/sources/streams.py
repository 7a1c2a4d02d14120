"""Byte streams out of compressed files, read in bounded blocks, that deliver everything before a break and then name it."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cluster import storage

BLOCK_BYTES = 1 << 20
FREE_BYTES = 256 << 20
"""What any compressed file may hold; beyond that its size counts (`max_expansion`)."""
_XZ_MEMORY_BYTES = 256 << 20  # what `xz -9` needs is 65 MiB; a file may ask for gigabytes


class BrokenStream(Exception):
    """A compressed stream ends early or cannot be decoded. Everything before the break has been delivered."""

    def __init__(self, problem: str, reason: str, compressed_offset: int, offset: int) -> None:
        super().__init__(f"{problem} near byte {compressed_offset} of the file, after {offset} decompressed bytes")
        self.reason = reason  # truncated, corrupt or bomb
        self.offset = offset


def read_blocks(path: str, max_expansion: int | None = None) -> Iterator[bytes]:
    """The decompressed content of a whole file, by its name's ending, in blocks of about 1 MiB.

    Raises BrokenStream where a compressed file is truncated or corrupt, or holds more than `max_expansion` allows.
    """
    blocks = _decompressed(path)
    return blocks if max_expansion is None else expanding(blocks, path, max_expansion)


def expanding(blocks: Iterator[bytes], path: str, most: int) -> Iterator[bytes]:
    """Blocks of a file up to `most` times its size (and FREE_BYTES at least), where a decompression bomb ends as a BrokenStream."""
    size, offset = storage.size(path), 0
    for block in blocks:
        offset += len(block)
        if offset > max(FREE_BYTES, most * size):
            problem = f"the file of {size} bytes holds more than read.max_expansion {most} times as many: a decompression bomb?"
            raise BrokenStream(problem, "bomb", size, offset)
        yield block


def _decompressed(path: str) -> Iterator[bytes]:
    with storage.open_input(path) as stream:
        lowered = path.lower()
        if lowered.endswith(".gz"):
            yield from members(stream, "gzip", _Zlib)
        elif lowered.endswith(".bz2"):
            yield from members(stream, "bzip2", bz2.BZ2Decompressor)
        elif lowered.endswith(".xz"):
            yield from members(stream, "xz", lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES))
        elif lowered.endswith((".zst", ".lz4")):
            yield from _arrow_blocks(path, "zstd" if lowered.endswith(".zst") else "lz4")
        else:
            while block := stream.read(BLOCK_BYTES):
                yield block


class _Zlib:
    """zlib's gzip decoder with the interface of bz2's: input that did not fit into `max_length` is kept inside."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        data = self._inner.unconsumed_tail + data
        before = self._inner.copy()
        try:
            return self._inner.decompress(data, max_length)
        except zlib.error as error:
            raise _ZlibError(str(error), _until_error(before, data)) from None


class _ZlibError(ValueError):
    """`decoded` is what came out of the failing piece before the error."""

    def __init__(self, problem: str, decoded: bytes) -> None:
        super().__init__(problem)
        self.decoded = decoded


def _until_error(decoder: Any, data: bytes) -> bytes:
    """What a decoder yields of `data` before the byte that it fails at: zlib itself drops it with the error."""
    decoded = []
    for position in range(len(data)):
        try:
            decoded.append(decoder.decompress(data[position : position + 1]))
        except zlib.error:
            break
    return b"".join(decoded)


def members(stream: pa.NativeFile, name: str, make: Any, stop: int | None = None) -> Iterator[bytes]:
    """Concatenated members of a compressed file; zero padding after the last is allowed, as in gzip(1).

    Members that begin at `stop` or later are left out. Raises BrokenStream.
    """
    offset, pending, decoder = 0, b"", None
    while True:
        if not pending and (decoder is None or decoder.needs_input):
            pending = stream.read(BLOCK_BYTES)
            if not pending:
                if decoder is not None:
                    raise BrokenStream(f"{name} stream is truncated", "truncated", stream.tell(), offset)
                return
        if decoder is None:
            if not pending.strip(b"\0"):
                pending = b""
                continue
            if stop is not None and stream.tell() - len(pending) >= stop:
                return
            decoder = make()
        consumed = stream.tell() - len(pending)
        try:
            piece, pending = pending[:65536], pending[65536:]
            block = decoder.decompress(piece, BLOCK_BYTES)
        except _ZlibError as error:
            if error.decoded:
                offset += len(error.decoded)
                yield error.decoded
            raise BrokenStream(f"{name} stream is corrupt ({error})", "corrupt", consumed, offset) from None
        except (OSError, lzma.LZMAError) as error:
            raise BrokenStream(f"{name} stream is corrupt ({error})", "corrupt", consumed, offset) from None
        offset += len(block)
        if block:
            yield block
        if decoder.eof:
            pending = decoder.unused_data + pending
            decoder = None


def _arrow_blocks(path: str, codec: str) -> Iterator[bytes]:
    """zstd and lz4 through Arrow, which drops what it decoded of a block when the block ends in an error.

    So after an error the file is opened again and read in small steps from the last whole block on.
    """
    offset = 0
    for step in (BLOCK_BYTES, 64):
        with storage.open_input(path) as raw, pa.CompressedInputStream(raw, codec) as stream:
            position = 0
            try:
                while position < offset:
                    position += len(stream.read(min(BLOCK_BYTES, offset - position)))
                while block := stream.read(step):
                    offset += len(block)
                    yield block
                return
            except OSError as error:
                problem = str(error)
    reason = "truncated" if "runcated" in problem else "corrupt"
    raise BrokenStream(f"{codec} stream is {reason} ({problem})", reason, storage.size(path), offset)


def read_bounded(path: str, limit: int) -> bytes | None:
    """The decompressed content of a small file, or None if it is longer than `limit` bytes. Raises BrokenStream."""
    pieces, size = [], 0
    for block in read_blocks(path):
        pieces.append(block)
        size += len(block)
        if size > limit:
            return None
    return b"".join(pieces)
