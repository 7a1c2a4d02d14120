"""Parquet: runs of row groups, read in batches whose size follows from the file alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators.sources.batches import BadRow, RowRange, SourceBatch
from operators.sources.columns import Piece, check_columns, first_line, read_pieces, wanted_columns
from operators.sources.settings import ReadSettings
from operators.sources.units import Unit
from operators.tables import stable_id

_READ_BYTES = 8 << 20


def read_parquet(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """The unit's row groups. A group that cannot be read to its end is one bad row after the rows before the damage."""
    yield from read_pieces(unit, read, rows, _pieces(unit, read), batch_rows, batch_bytes)


def _pieces(unit: Unit, read: ReadSettings) -> Iterator[Piece | BadRow]:
    """The rows in order, or a bad row where rows were lost."""
    with storage.open_input(unit.path) as stream:
        try:
            file = pq.ParquetFile(stream, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            if unit.size == 0:
                detail = "the file is empty: not even a Parquet footer"
            else:
                detail = f"not readable as Parquet: {first_line(error)}"
            yield BadRow(0, stable_id(unit.relative, "file"), unit.relative, "corrupt_file", detail)
            return
        check_columns(file.schema_arrow, read, unit.path)
        columns = wanted_columns(read, file.schema_arrow.names)
        first = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        for group in range(unit.start, unit.stop):
            metadata = file.metadata.row_group(group)
            # A batch size that depends on nothing but the file: what is delivered before damage must not vary.
            size = max(1, min(2048, _READ_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))
            done = 0
            try:
                for batch in file.iter_batches(size, [group], columns, use_threads=False):
                    places = np.arange(first + done, first + done + batch.num_rows)
                    yield Piece(places, pa.Table.from_batches([batch]))
                    done += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                lost = f"rows {first + done} to {first + metadata.num_rows - 1} of the file ({metadata.num_rows - done} rows)"
                detail = f"row group {group} cannot be read: {first_line(error)}; lost: {lost}"
                where = f"{unit.relative}: row group {group}"
                yield BadRow(0, stable_id(unit.relative, "group", group), where, "corrupt_row_group", detail)
            first += metadata.num_rows
