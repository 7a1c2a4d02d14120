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
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis


@dataclass
class ChainResult:
    """What became of one batch: kept rows, rejects (schema tables.REJECTS) and the funnel counts."""

    kept: pa.Table
    rejects: list[pa.Table] = field(default_factory=list)
    funnel: dict[str, Any] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)


class Chain:
    """Operators in order. `entries` are recipe entries: `name` or `{name: {option: value}}`.

    Raises SettingsError when an operator or option is unknown.
    """

    def __init__(self, entries: Sequence[str | dict[str, Any]]) -> None:
        self.operators: list[Operator] = [registry.build(entry) for entry in entries]

    def run(self, table: pa.Table) -> ChainResult:
        """Apply every operator to the rows the ones before it kept."""
        result = ChainResult(table)
        analysis: Analysis | None = None
        for position, operator in enumerate(self.operators):
            try:
                operator.check_columns(result.kept.column_names)
            except KeyError as error:
                raise SettingsError(str(error.args[0])) from None
            before = result.kept
            if analysis is None and operator.uses_analysis and before.num_rows:
                analysis = Analysis.of(before["text"])
            verdict = operator.process(before, analysis)
            if verdict.table.num_rows != before.num_rows:
                raise SettingsError(
                    f"operator {operator.name} returned {verdict.table.num_rows} rows for {before.num_rows}; "
                    "a row is dropped by a reason in the verdict, never by leaving it out"
                )
            self._count(result, f"{position:02d}:{operator.name}", operator.name, before, verdict)
            if operator.changes_text:
                analysis = None
            elif analysis is not None and result.kept.num_rows != before.num_rows:
                assert verdict.reason is not None
                analysis = analysis.filter(pc.is_null(verdict.reason).to_numpy(zero_copy_only=False))
        return result

    @staticmethod
    def _count(result: ChainResult, step: str, name: str, before: pa.Table, verdict: Verdict) -> None:
        result.kept = verdict.kept()
        reasons: dict[str, int] = {}
        if result.kept.num_rows < before.num_rows:
            assert verdict.reason is not None
            dropped = pc.is_valid(verdict.reason)
            counts = pc.value_counts(verdict.reason.filter(dropped))
            reasons = {entry["values"]: entry["counts"] for entry in counts.to_pylist()}
            result.rejects.append(_rejects(name, before, verdict, dropped))
        result.funnel[step] = {"in": before.num_rows, "kept": result.kept.num_rows, "rejected": reasons}
        result.rejected.update({f"{name}:{reason}": count for reason, count in reasons.items()})


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
        "detail": rows["url"] if "url" in rows.column_names else pa.nulls(count, pa.string()),
        "quarantined": pa.array(np.zeros(count, bool)),
    }
    return pa.table(columns).cast(tables.REJECTS)


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
