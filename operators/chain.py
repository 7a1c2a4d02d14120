"""Row-local operators fused over one batch: one pass, one shared analysis of the text, every rejected row kept.

The funnel that the chain counts is the funnel of the report: for each operator the rows it saw, kept and rejected by
reason, so `in = kept + rejected` holds at each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators import registry, tables
from operators.config import SettingsError
from operators.measures import Measure, Recorder, replayable
from operators.operator import Filter, Operator, Verdict
from operators.text.analysis import Analysis


@dataclass
class ChainResult:
    """What became of one batch: kept rows, rejects (schema tables.REJECTS), the funnel counts, and what filters measured
    (see operators.measures; None unless asked for)."""

    kept: pa.Table
    rejects: list[pa.Table] = field(default_factory=list)
    funnel: dict[str, Any] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    measures: pa.Table | None = None


class Chain:
    """Operators in order. `entries` are recipe entries: `name` or `{name: {option: value}}`.

    `measure` asks for the scores: those of the rows that a filter `seen` anyway, or of `all` rows that come to its run of
    filters (up to the next operator that changes text), rejected ones too. What is kept and why does not depend on it.
    Raises SettingsError when an operator or option is unknown.
    """

    def __init__(self, entries: Sequence[str | dict[str, Any]], measure: Measure = "none") -> None:
        self.operators: list[Operator] = [registry.build(entry) for entry in entries]
        self.measure = measure if any(map(replayable, self.operators)) else "none"

    def run(self, table: pa.Table) -> ChainResult:
        """Apply every operator to the rows the ones before it kept."""
        result = ChainResult(table)
        recorder = Recorder(table.num_rows) if self.measure != "none" else None
        flow = _Flow(table)
        for place, operator in enumerate(self.operators):
            measures_all = self.measure == "all" and replayable(operator)
            if not measures_all:
                flow.drop_rejected()
            before = flow.table
            try:
                operator.check_columns(before.column_names)
            except KeyError as error:
                raise SettingsError(str(error.args[0])) from None
            if flow.analysis is None and operator.uses_analysis and before.num_rows:
                flow.analysis = Analysis.of(before["text"])
            verdict = operator.process(before, flow.analysis)
            if verdict.table.num_rows != before.num_rows:
                raise SettingsError(
                    f"operator {operator.name} returned {verdict.table.num_rows} rows for {before.num_rows}; "
                    "a row is dropped by a reason in the verdict, never by leaving it out"
                )
            if recorder is not None and replayable(operator):
                assert isinstance(operator, Filter)
                recorder.scores(place, operator, before, verdict, flow.rows)
            dropped = flow.reject(verdict)
            reasons: dict[str, int] = {}
            if dropped is not None:
                assert verdict.reason is not None
                mask = pa.array(dropped)
                found = verdict.reason.filter(mask)
                reasons = {entry["values"]: entry["counts"] for entry in pc.value_counts(found).to_pylist()}
                result.rejects.append(_rejects(operator.name, before, verdict, mask))
                if recorder is not None:
                    recorder.rejects(place, flow.rows[dropped], found)
            entered = flow.count + sum(reasons.values())
            result.funnel[f"{place:02d}:{operator.name}"] = {"in": entered, "kept": flow.count, "rejected": reasons}
            if verdict.counts:
                result.funnel[f"{place:02d}:{operator.name}"]["counts"] = verdict.counts
            result.rejected.update({f"{operator.name}:{reason}": count for reason, count in reasons.items()})
            flow.table = verdict.table
            if operator.changes_text:
                flow.analysis = None
            if not measures_all:
                flow.drop_rejected()
        flow.drop_rejected()
        result.kept = flow.table
        if recorder is not None:
            result.measures = recorder.table(flow.table, flow.rows)
        return result


class _Flow:
    """The rows on their way through the chain, with those that are measured although they are rejected already."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.rows = np.arange(table.num_rows)  # their places in the batch
        self.analysis: Analysis | None = None
        self._standing: np.ndarray | None = None  # bool[rows]; None: all of them

    @property
    def count(self) -> int:
        """Rows that no operator has rejected."""
        return len(self.rows) if self._standing is None else int(self._standing.sum())

    def reject(self, verdict: Verdict) -> np.ndarray | None:
        """bool[rows], the rows that this verdict rejects first; None where there are none."""
        if verdict.reason is None or verdict.reason.null_count == len(verdict.reason):
            return None
        dropped: np.ndarray = pc.is_valid(verdict.reason).to_numpy(zero_copy_only=False)
        if self._standing is not None:
            dropped = dropped & self._standing
            if not dropped.any():
                return None
        self._standing = ~dropped if self._standing is None else self._standing & ~dropped
        return dropped

    def drop_rejected(self) -> None:
        if self._standing is None:
            return
        self.table = self.table.filter(pa.array(self._standing))
        self.rows = self.rows[self._standing]
        if self.analysis is not None:
            self.analysis = self.analysis.filter(self._standing)
        self._standing = None


def _rejects(name: str, before: pa.Table, verdict: Verdict, dropped: pa.Array) -> pa.Table:
    """The rejected rows with the text as it entered the operator."""
    rows = before.filter(dropped)
    assert verdict.reason is not None
    count = rows.num_rows
    values = verdict.value.filter(dropped) if verdict.value is not None else pa.nulls(count, pa.float64())
    columns = {
        "id": rows["id"] if "id" in rows.column_names else pa.array([str(i) for i in range(count)]),
        "text": _entered(rows),
        "source": rows["source"] if "source" in rows.column_names else pa.nulls(count, pa.string()),
        "operator": pa.array([name] * count),
        "reason": verdict.reason.filter(dropped),
        "value": values,
        "detail": _detail(rows, verdict.detail.filter(dropped) if verdict.detail is not None else None),
        "quarantined": pa.array(np.zeros(count, bool)),
    }
    return pa.table(columns).cast(tables.REJECTS)


def _detail(rows: pa.Table, told: pa.Array | None) -> Any:
    """What the verdict tells about a row, else its URL."""
    url = rows["url"].cast(pa.string()) if "url" in rows.column_names else pa.nulls(rows.num_rows, pa.string())
    return url if told is None else pc.coalesce(told, url)


def _entered(rows: pa.Table) -> Any:
    if "text" in rows.column_names:
        return rows["text"]
    if "content" in rows.column_names:  # pages before extraction: bytes that may be of any encoding
        raw = rows["content"].to_pylist()
        return pa.array([None if item is None else item.decode("utf-8", "replace") for item in raw], pa.large_string())
    if "html" in rows.column_names:
        return rows["html"]
    return pa.nulls(rows.num_rows, pa.large_string())


def describe(table: pa.Table) -> dict[str, Any]:
    """Counts of kept rows by language, source, length (power of two of characters) and quality (tenths)."""
    if not table.num_rows:
        return {}
    langs = pc.fill_null(table["lang"], "") if "lang" in table.column_names else pa.array([""] * table.num_rows)
    found: dict[str, Any] = {"languages": _counts(langs), "sources": _counts(table["source"])}
    lengths = np.maximum(pc.utf8_length(table["text"]).to_numpy(), 1)
    powers = pa.array(np.floor(np.log2(lengths)).astype(np.int64))
    grouped = pa.table({"lang": langs, "power": powers}).group_by(["lang", "power"]).aggregate([([], "count_all")])
    by_language: dict[str, dict[str, int]] = {}
    for row in grouped.to_pylist():
        by_language.setdefault(row["lang"], {})[f"2^{row['power']}"] = row["count_all"]
    found["lengths"] = by_language
    if "quality" in table.column_names:
        tenths = np.clip(np.floor(table["quality"].to_numpy() * 10 + 1e-6), 0, 9).astype(int)
        found["quality"] = {f"0.{tenth}": int((tenths == tenth).sum()) for tenth in range(10)}
    return found


def _counts(column: Any) -> dict[str, int]:
    return {entry["values"] or "": entry["counts"] for entry in pc.value_counts(column).to_pylist()}
