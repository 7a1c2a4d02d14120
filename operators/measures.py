"""What the filters of a chain measured, stored beside the rows, so that thresholds can be tried without reading text again.

`measures/part-*` holds one row for each document that entered the chain, in order:

    position   int64    its row among the unit's kept rows, or among the unit's rejects
    step       int16    place in the chain of the operator that rejected it, -1 where it was kept
    reason     string   null where it was kept
    lang       string   its language when it left the chain, null if none was known
    NN.score            what the filter at place NN measured; null where the document did not reach it
    NN@column           a column besides its scores that the filter's decision read

Scores are stored as they were measured (no rounding), so a replay with the same thresholds makes the same decisions. Rows
name no document: `position` finds the id in the parts or rejects of the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.operator import Filter, Operator, Verdict

Measure = Literal["seen", "all", "none"]
KEPT = -1


def replayable(operator: Operator) -> bool:
    """Whether decisions of this operator can be made again from scores: a filter that leaves the text alone."""
    return isinstance(operator, Filter) and not operator.changes_text


def segments(operators: Sequence[Operator]) -> list[tuple[int, int]]:
    """[start, stop) of the runs of replayable filters: inside one, every filter could see every row that entered it."""
    found: list[tuple[int, int]] = []
    for place, operator in enumerate(operators):
        if not replayable(operator):
            continue
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


class Recorder:
    """Collects the measures of one batch of `rows` rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._step = np.full(rows, KEPT, np.int16)
        self._position = np.zeros(rows, np.int64)
        self._reasons: list[tuple[np.ndarray, pa.Array]] = []
        self._columns: dict[str, pa.Array] = {}
        self._rejected = 0

    def scores(self, place: int, operator: Filter, table: pa.Table, verdict: Verdict, rows: np.ndarray) -> None:
        """What a filter measured; `rows` are the batch's rows that it saw (int64, ascending), `table` what it was given."""
        for name, values in (verdict.scores or {}).items():
            self._columns[f"{place:02d}.{name}"] = self._spread(values, rows)
        for name in operator.reads:
            if name in table.column_names:
                self._columns[f"{place:02d}@{name}"] = self._spread(table[name], rows)

    def rejects(self, place: int, rows: np.ndarray, reasons: pa.Array) -> None:
        """Rows that the operator rejected, in the order in which they go to the rejects."""
        self._step[rows] = place
        self._position[rows] = self._rejected + np.arange(len(rows))
        self._rejected += len(rows)
        self._reasons.append((rows, reasons))

    def table(self, kept: pa.Table, rows: np.ndarray) -> pa.Table:
        """The measures of the batch; `rows` are those that were kept."""
        self._position[rows] = np.arange(len(rows))
        order = np.concatenate([found for found, _ in self._reasons] or [np.zeros(0, np.int64)])
        named: Any = pa.chunked_array([pa.array(reasons, pa.string()) for _, reasons in self._reasons], pa.string())
        lang = kept["lang"].cast(pa.string()) if "lang" in kept.column_names else pa.nulls(kept.num_rows, pa.string())
        langs = self._spread(lang, rows)
        for name, values in reversed(self._columns.items()):  # of a rejected row the last that a filter found or was shown
            if name.endswith((".lang", "@lang")):
                langs = pc.coalesce(langs, values.cast(pa.string()))
        return pa.table(
            {
                "position": pa.array(self._position),
                "step": pa.array(self._step),
                "reason": self._spread(named.combine_chunks(), order),
                "lang": langs,
                **self._columns,
            }
        )

    def _spread(self, values: pa.Array | pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
        """The values at their rows of the batch, null elsewhere."""
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
        if isinstance(values, pa.ChunkedArray):  # of no chunk at all
            values = pa.array([], values.type)
        if pa.types.is_null(values.type):
            values = values.cast(pa.float64())
        if len(rows) == self._rows and (len(rows) < 2 or rows[0] < rows[-1]):
            return values
        index = np.full(self._rows, -1, np.int64)
        index[rows] = np.arange(len(rows))
        return values.take(pa.array(index, mask=index < 0))


def placed(measures: pa.Table, kept_before: int, rejects_before: int) -> pa.Table:
    """The measures of a batch with positions in its unit instead of in the batch."""
    step = measures["step"].to_numpy()
    position = measures["position"].to_numpy() + np.where(step == KEPT, kept_before, rejects_before)
    return measures.set_column(0, "position", pa.array(position))
