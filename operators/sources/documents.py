"""Readers for users of plain Ray Data: any supported format as a lazy dataset, one read task a work unit."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from operators.config import parse
from operators.sources.units import ReadSettings, Unit, plan_units, read_unit

_log = logging.getLogger(__name__)


class UnreadableRowsError(ValueError):
    """Input rows that cannot be read, under `on_bad_rows="raise"`."""


def read_documents(
    path: str | list[str],
    format: str = "auto",
    *,
    on_bad_rows: Literal["warn", "raise"] = "warn",
    base_directory: str | None = None,
    **settings: Any,
) -> ray.data.Dataset:
    """A dataset of documents (columns id, text, source, url) or, from WARC and HTML, of pages (content instead of text).

    `settings` are those of ReadSettings. A unit is read when Ray runs its task, in bounded batches; relative paths are
    below `base_directory` (default: the working directory). Rows that cannot be read are left out and counted by reason
    in a warning of the worker that met them, or, with `on_bad_rows="raise"`, fail the read.
    Raises SettingsError for wrong settings and FileNotFoundError when a path matches nothing.
    """
    if on_bad_rows not in ("warn", "raise"):
        raise ValueError(f"on_bad_rows must be 'warn' or 'raise', got {on_bad_rows!r}")
    read = parse(ReadSettings, {"path": path, "format": format, **settings}, "read_documents")
    units = plan_units(read, base_directory or os.getcwd())
    return ray.data.read_datasource(_Units(read, units, on_bad_rows), override_num_blocks=max(1, len(units)))


class _Units(Datasource):
    """The plan's units as Ray read tasks."""

    def __init__(self, read: ReadSettings, units: list[Unit], on_bad_rows: str) -> None:
        super().__init__()
        self._read, self._units, self._on_bad_rows = read, units, on_bad_rows

    def get_name(self) -> str:
        return "Documents"

    def estimate_inmemory_data_size(self) -> int:
        return sum(unit.size for unit in self._units)

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """One task a unit, whatever `parallelism` asks for: a unit is the grain at which input can be cut."""
        return [
            ReadTask(
                _task(unit, self._read, self._on_bad_rows),
                BlockMetadata(num_rows=None, size_bytes=unit.size, exec_stats=None, input_files=(unit.path,)),
                per_task_row_limit=per_task_row_limit,
            )
            for unit in self._units
        ]


def _task(unit: Unit, read: ReadSettings, on_bad_rows: str) -> Callable[[], Iterable[pa.Table]]:
    def blocks() -> Iterable[pa.Table]:
        bad: Counter[str] = Counter()
        for batch in read_unit(unit, read):
            unreadable = [item for item in batch.bad if not item.unwanted]
            if unreadable and on_bad_rows == "raise":
                first = unreadable[0]
                raise UnreadableRowsError(f"{first.where}: {first.reason}: {first.detail}")
            bad.update(item.reason for item in batch.bad)
            yield batch.table
        if bad:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(bad.items()))
            _log.warning(
                "%s, unit %d: %d rows could not be read and were left out (%s)", unit.relative, unit.index, bad.total(), reasons
            )

    return blocks
