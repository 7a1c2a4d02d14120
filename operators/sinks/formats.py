"""One output file of a format, written batch by batch in bounded memory to a local path."""

from __future__ import annotations

import io
from typing import Any, Protocol

import polars
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from operators.config import SettingsError

_ROW_GROUP_BYTES = 32 << 20  # of Arrow data: small enough to hold, large enough to compress
_JSON_BYTES = 8 << 20  # of Arrow data turned into JSON at a time


class Sink(Protocol):
    """A file being written. `close` completes it; `abandon` only lets go of it, and does nothing after `close`."""

    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class ParquetSink:
    """Parquet with zstd and row groups of about 32 MiB of Arrow data."""

    def __init__(self, path: str, schema: pa.Schema, level: int) -> None:
        self._writer: Any = pq.ParquetWriter(path, schema, compression="zstd", compression_level=level)
        self._schema = schema
        self._pending: list[pa.Table] = []
        self._bytes = 0

    def write(self, table: pa.Table) -> None:
        self._pending.append(table)
        self._bytes += table.nbytes
        if self._bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        table = pa.concat_tables(self._pending)
        self._pending, self._bytes = [], 0
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def close(self) -> None:
        if self._pending:
            self._flush()
        self.abandon()

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class JsonlSink:
    """JSON Lines in UTF-8, compressed with zstd (one frame with a checksum). NaN and infinities become null."""

    def __init__(self, path: str, schema: pa.Schema, level: int) -> None:
        check_json(schema)
        self._file: Any = open(path, "wb")  # noqa: SIM115 - closed by `close` or `abandon`
        self._stream = zstandard.ZstdCompressor(level=level, write_checksum=True).stream_writer(self._file, closefd=False)

    def write(self, table: pa.Table) -> None:
        start = 0
        while start < table.num_rows:
            rows = max(1, int(_JSON_BYTES * (table.num_rows - start) / max(1, table.slice(start).nbytes)))
            buffer = io.BytesIO()
            polars.DataFrame(polars.from_arrow(table.slice(start, rows))).write_ndjson(buffer)
            self._stream.write(buffer.getbuffer())
            start += rows

    def close(self) -> None:
        self._stream.close()
        self.abandon()

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def check_json(schema: pa.Schema) -> None:
    """Raises SettingsError when a column holds bytes, which JSON has no way to write."""
    for field in schema:
        if any(word in str(field.type) for word in ("binary", "union", "map<")):
            raise SettingsError(
                f"column {field.name!r} of type {field.type} cannot be written as JSON: name others in `columns`, or take Parquet"
            )


def make_sink(format_: str, path: str, schema: pa.Schema, level: int) -> Sink:
    return JsonlSink(path, schema, level) if format_ == "jsonl.zst" else ParquetSink(path, schema, level)
