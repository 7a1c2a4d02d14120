"""Read whole inputs in tests: all rows and bad rows of a plan, checked for dense and ordered row numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators.sources import BadRow, ReadSettings, Unit, plan_units, read_unit


@dataclass
class Reading:
    units: list[Unit]
    rows: list[dict[str, Any]]
    bad: list[BadRow]

    @property
    def ids(self) -> list[str]:
        return [row["id"] for row in self.rows]

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in self.rows]

    @property
    def reasons(self) -> list[str]:
        return [row.reason for row in self.bad]


def read_all(
    path: str | Path | list[str], base: str | Path = ".", limit: int | None = None, batches: Any = None, **settings: Any
) -> Reading:
    read = ReadSettings(path=[str(item) for item in path] if isinstance(path, list) else str(path), **settings)
    result = Reading(plan_units(read, str(base), limit), [], [])
    for unit in result.units:
        numbers: list[int] = []
        for batch in read_unit(unit, read, **(batches or {})):
            assert batch.table.num_rows == len(batch.rows)
            assert batch.rows.tolist() == sorted(batch.rows.tolist())
            batch.table.validate(full=True)
            result.rows += batch.table.to_pylist()
            result.bad += batch.bad
            numbers += [*batch.rows.tolist(), *(row.row for row in batch.bad)]
        assert sorted(numbers) == list(range(len(numbers))), "row numbers of a unit are dense"
    return result
