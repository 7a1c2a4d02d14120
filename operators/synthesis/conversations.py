"""Files of chat data, row by row: JSON lines (also compressed), JSON arrays, Parquet and Arrow files.

What the rows mean is told by `operators.synthesis.formats`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage

MAX_ROW_BYTES = 64 << 20
_MAX_ARRAY_BYTES = 1 << 30  # a JSON array is read whole; JSONL is streamed
_TABLE_ROWS = 1024
_ARROW_MAGIC = b"ARROW1"


@dataclass(frozen=True)
class Unreadable:
    """Bytes that are no JSON object: quarantined, not rejected."""

    text: str
    detail: str


def read_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """(number of the row from 0, object) of a JSONL file (also .gz, .zst), a JSON array, a Parquet or an Arrow file.

    Lines and record batches are streamed; a line longer than 64 MiB is unreadable. Raises ValueError for an array of more
    than 1 GiB and for a file that is not what its name says, OSError for a broken compressed stream.
    """
    if path.endswith((".parquet", ".arrow")):
        yield from enumerate(_table_rows(path))
        return
    with storage.open_input(path) as source:
        compression = {"gz": "gzip", "zst": "zstd"}.get(path.rsplit(".", 1)[-1])
        stream: Any = pa.CompressedInputStream(source, compression) if compression else source
        head = stream.read(1 << 16)
        if head.lstrip()[:1] == b"[":
            data = head + stream.read(_MAX_ARRAY_BYTES + 1 - len(head))
            if len(data) > _MAX_ARRAY_BYTES:
                raise ValueError(f"{path}: a JSON array of more than {_MAX_ARRAY_BYTES >> 30} GiB; convert it to JSON lines")
            try:
                rows = orjson.loads(data)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"{path}: not a JSON array: {error}") from error
            for number, row in enumerate(rows):
                yield (
                    number,
                    row if isinstance(row, dict) else Unreadable(json.dumps(row)[:2000], f"{path}, item {number}: no object"),
                )
            return
        for number, line in enumerate(_lines(head, stream)):
            where = f"{path}, line {number + 1}"
            if line is None:
                yield number, Unreadable("", f"{where}: longer than {MAX_ROW_BYTES >> 20} MiB")
            elif line.strip():
                yield number, _object(line, where)


def _object(line: bytes, where: str) -> dict[str, Any] | Unreadable:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Unreadable(line.decode("utf-8", "replace"), f"{where}: {error}")
    return row if isinstance(row, dict) else Unreadable(line.decode("utf-8", "replace"), f"{where}: no JSON object")


def _lines(head: bytes, stream: Any) -> Iterator[bytes | None]:
    """Lines of a stream; None for one that is too long. Memory is bounded by MAX_ROW_BYTES and a block."""
    rest, oversized = io.BytesIO(), False
    block = head
    while block:
        *whole, tail = block.split(b"\n")
        for piece in whole:
            rest.write(piece)
            yield None if oversized or rest.tell() > MAX_ROW_BYTES else rest.getvalue()
            rest, oversized = io.BytesIO(), False
        rest.write(tail)
        if rest.tell() > MAX_ROW_BYTES:
            rest, oversized = io.BytesIO(), True
        block = stream.read(1 << 20)
    if oversized or rest.tell():
        yield None if oversized else rest.getvalue()


def _table_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or Arrow file (either form of Arrow's), a batch at a time."""
    with storage.open_input(path) as source:
        try:
            if path.endswith(".parquet"):
                for batch in pq.ParquetFile(source).iter_batches(_TABLE_ROWS):
                    yield from batch.to_pylist()
                return
            whole = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
            source.seek(0)
            if whole:
                file = pa.ipc.open_file(source)
                for index in range(file.num_record_batches):
                    yield from file.get_batch(index).to_pylist()
            else:
                for batch in pa.ipc.open_stream(source):
                    yield from batch.to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: {error}") from error
