"""Arrow IPC files, as `datasets.save_to_disk` writes them: streams of record batches, read one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from cluster import storage
from operators.sources.batches import BadRow, RowRange, SourceBatch
from operators.sources.columns import Piece, check_columns, first_line, read_pieces, wanted_columns
from operators.sources.settings import ReadSettings
from operators.sources.units import Unit
from operators.tables import stable_id

_ROWS = 2048
_FILE_MARK = b"ARROW1"


def read_arrow(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """The file's rows. From a damaged batch on, a stream cannot be read: one bad row stands for the rest.

    Memory is bounded by one record batch of the file (`datasets` writes 1,000 rows each).
    """
    yield from read_pieces(unit, read, rows, _pieces(unit, read), batch_rows, batch_bytes)


def _pieces(unit: Unit, read: ReadSettings) -> Iterator[Piece | BadRow]:
    done = 0
    with storage.open_input(unit.path) as stream:
        try:
            for batch in _batches(stream):
                batch.validate(full=True)  # offsets of a damaged or hostile file may lie outside its buffers
                check_columns(batch.schema, read, unit.path)
                table = pa.Table.from_batches([batch]).select(wanted_columns(read, batch.schema.names))
                for start in range(0, table.num_rows, _ROWS):
                    part = table.slice(start, _ROWS)
                    yield Piece(np.arange(done, done + part.num_rows), part)
                    done += part.num_rows
        except (pa.ArrowException, OSError) as error:
            detail = f"not readable as Arrow IPC after {done} rows: {first_line(error)}"
            yield BadRow(0, stable_id(unit.relative, "file", done), unit.relative, "corrupt_file", detail)


def _batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """Of the streaming format, and of the file format with its footer."""
    head = stream.read(len(_FILE_MARK))
    stream.seek(0)
    if head == _FILE_MARK:
        file = pa.ipc.open_file(stream)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        yield from pa.ipc.open_stream(stream)
