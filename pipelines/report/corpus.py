"""What the operators of each corpus stage let through and what they removed, with examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.report import charts
from pipelines.report.charts import Segment
from pipelines.report.figures import Number, number, percent
from pipelines.report.view import StageView

TOP = 14  # bars of a distribution; the rest is said as a count
EXAMPLES = 8  # reasons that are shown with examples


@dataclass(frozen=True)
class FunnelRow:
    operator: str
    rows_in: Number
    removed: Number
    left: Number
    reasons: list[tuple[str, Number]]
    bar: Any


@dataclass(frozen=True)
class Reason:
    """Why rows were removed: by which operator, how many, and a few of them."""

    operator: str
    reason: str
    count: int
    examples: list[dict[str, Any]]


def funnel(stage: StageView) -> list[FunnelRow]:
    """One row an operator, in chain order; `left` and bars are shares of all that the stage read."""
    assert stage.manifest is not None
    total = stage.manifest.ledger.rows_in + stage.manifest.ledger.created
    rows = []
    for key, entry in sorted(stage.stats.get("funnel", {}).items()):
        name = key.split(":", 1)[1] if key[:2].isdigit() and ":" in key else key
        kept, entered = entry.get("kept", 0), entry.get("in", 0)
        reasons = sorted(entry.get("rejected", {}).items(), key=lambda item: (-item[1], item[0]))
        removed = sum(count for _, count in reasons)
        bar = charts.bar(
            [
                Segment(kept, "kept", f"{name} · {number(kept)} · {percent(kept, total)}"),
                Segment(removed, "lost", f"{name} · −{number(removed)} · {percent(removed, entered)}"),
            ],
            total,
        )
        rows.append(FunnelRow(name, entered, removed, kept, reasons, bar))
    return rows


def reasons(stage: StageView, examples: Mapping[str, list[dict[str, Any]]], shown: int = EXAMPLES) -> list[Reason]:
    """All reasons of a stage's ledger, most frequent first; the first `shown` of them have their examples."""
    assert stage.manifest is not None
    counts = sorted(stage.manifest.ledger.rejected.items(), key=lambda item: (-item[1], item[0]))
    found = []
    for index, (key, count) in enumerate(counts):
        operator, _, reason = key.partition(":")
        found.append(Reason(operator, reason, count, examples.get(key, []) if index < shown else []))
    return found


def quarantined(stage: StageView, examples: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A few of the rows that could not be read."""
    assert stage.manifest is not None
    known = set(stage.manifest.ledger.rejected)
    return [row for key, rows in examples.items() if key not in known for row in rows][:4]


def distribution(counts: Mapping[str, Number]) -> tuple[list[tuple[str, Number]], int, Number]:
    """The largest counts, how many more there are, and the sum of all."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ranked[:TOP], max(0, len(ranked) - TOP), sum(counts.values())


def lengths(stage: StageView, most: int = 6) -> list[tuple[str, list[tuple[str, Number]]]]:
    """For the most frequent languages, documents by power of two of their length; all on the same bins."""
    tables = {
        lang: {_power(key): count for key, count in bins.items()}
        for lang, bins in stage.stats.get("lengths", {}).items()
        if isinstance(bins, dict) and bins
    }
    if not tables:
        return []
    ranked = sorted(tables, key=lambda lang: (-sum(tables[lang].values()), lang))[:most]
    low, high = min(min(tables[lang]) for lang in ranked), max(max(tables[lang]) for lang in ranked)
    return [(lang, [(power_label(k), tables[lang].get(k, 0)) for k in range(low, high + 1)]) for lang in ranked]


def _power(key: str) -> int:
    return int(str(key).removeprefix("2^"))


def power_label(k: int) -> str:
    """Where the bin begins: 2^12 as 4k."""
    value = 1 << max(0, k)
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if value >= size:
            return f"{value // size}{unit}"
    return str(value)


def tenths(counts: Mapping[str, Number]) -> list[tuple[str, Number]]:
    """Counts by score 0.0 .. 0.9, absent ones as zero; other keys follow in numeric order."""
    usual = [f"{index / 10:.1f}" for index in range(10)]
    known = {f"{float(key):.1f}" if is_number(key) else key: count for key, count in counts.items()}
    extra = numeric_order(key for key in known if key not in usual)
    return [(key, known.get(key, 0)) for key in usual] + [(key, known[key]) for key in extra]


def numeric_order(keys: Iterable[str]) -> list[str]:
    """Keys that are numbers by value, the others after them by name."""
    return sorted(keys, key=lambda key: (0, float(key), key) if is_number(key) else (1, 0.0, key))


def is_number(key: str) -> bool:
    """True for the name of a bin that is a number."""
    try:
        return float(key) == float(key)
    except ValueError:
        return False
