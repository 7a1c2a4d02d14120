"""What readers yield: tables of documents, the rows that could not be read, and the row number of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

EXCERPT_CHARACTERS = 2000


@dataclass(frozen=True)
class BadRow:
    """A row or record that could not be read: where it stands, why, and the first characters of it if there are any."""

    row: int  # within the unit
    id: str
    where: str  # file and place in it
    reason: str
    detail: str
    raw: str | None = None
    unwanted: bool = False  # readable, but no document by the format's own rules (a redirect, say): rejected, not quarantined


@dataclass
class SourceBatch:
    """Some rows of a unit: `rows[i]` is the row number within the unit of row i of `table`."""

    table: pa.Table
    rows: np.ndarray  # int64[table.num_rows]
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class RowRange:
    """The rows of a unit that are wanted: [start, stop) without `skip`.

    Rows in `crashed` ended their reader before (with what is said there) and are bad rows unread; a reader whose library
    may crash works inside `reading(row)`, which tells the supervisor.
    """

    start: int = 0
    stop: int | None = None
    skip: frozenset[int] = frozenset()
    crashed: Mapping[int, str] = field(default_factory=dict)
    reading: Callable[[int], contextlib.AbstractContextManager[None]] = lambda row: contextlib.nullcontext()

    def wants(self, row: int) -> bool:
        return row >= self.start and not self.past(row) and row not in self.skip

    def past(self, row: int) -> bool:
        return self.stop is not None and row >= self.stop

    def mask(self, first: int, count: int) -> np.ndarray:
        """bool[count] for rows first, first + 1, ..."""
        rows = np.arange(first, first + count)
        wanted = rows >= self.start
        if self.stop is not None:
            wanted &= rows < self.stop
        for row in self.skip:
            if first <= row < first + count:
                wanted[row - first] = False
        return wanted


TEXT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("url", pa.string()),
    ]
)
"""Documents as text; carried columns follow."""

CONTENT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("content", pa.large_binary(), nullable=False),  # the page's bytes, transfer and content encoding removed
        pa.field("content_type", pa.string()),  # media type in lower case without parameters; null if not declared
        pa.field("charset", pa.string()),  # as declared by the server; null if not declared
        pa.field("source", pa.string(), nullable=False),
        pa.field("url", pa.string()),
    ]
)
"""Pages as bytes, before text is extracted."""


class BatchBuilder:
    """Collects rows one by one into columns and cuts them into batches of bounded size."""

    def __init__(self, schema: pa.Schema, batch_rows: int, batch_bytes: int) -> None:
        self.schema, self._max_rows, self._max_bytes = schema, batch_rows, batch_bytes
        self._clear()

    def _clear(self) -> None:
        self._columns: list[list[Any]] = [[] for _ in self.schema]
        self._rows: list[int] = []
        self._bad: list[BadRow] = []
        self._bytes = 0

    def add(self, row: int, values: tuple[Any, ...], size: int) -> None:
        """One row, its values in the schema's order, about `size` bytes large."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self._rows.append(row)
        self._bytes += size

    def add_bad(self, bad: BadRow) -> None:
        self._bad.append(bad)
        self._bytes += 2 * EXCERPT_CHARACTERS

    @property
    def full(self) -> bool:
        return self._bytes >= self._max_bytes or len(self._rows) + len(self._bad) >= self._max_rows

    @property
    def empty(self) -> bool:
        return not self._rows and not self._bad

    def take(self) -> SourceBatch:
        arrays = [pa.array(column, item.type) for column, item in zip(self._columns, self.schema, strict=True)]
        batch = SourceBatch(pa.Table.from_arrays(arrays, schema=self.schema), np.array(self._rows, np.int64), self._bad)
        self._clear()
        return batch


def excerpt(data: bytes) -> str:
    """The first characters of raw bytes, for a person to look at."""
    return data[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")[:EXCERPT_CHARACTERS]
