"""Models side by side: perplexity per language and source, preference accuracy, replies to the same prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipelines.report import charts
from pipelines.report.figures import change
from pipelines.report.view import StageView

ALL = "*"  # stands for every language or every source in the manifest
_MOST_ROWS = 8  # of the chart; where there are more, languages alone
_STEPS = (0.02, 0.05, 0.15, 0.4)  # relative change from which a cell takes the next depth of colour


@dataclass(frozen=True)
class Cell:
    """One model on one held-out set. `delta` and `depth` compare with the first model; depth < 0 is better."""

    perplexity: float | None
    delta: str
    depth: int


@dataclass(frozen=True)
class Row:
    lang: str
    source: str
    documents: int | None
    tokens: int | None
    cells: list[Cell]

    @property
    def total(self) -> bool:
        """Over all sources, or over all languages too."""
        return ALL in (self.lang, self.source)


def models(stage: StageView) -> list[str]:
    """Models in the order of the recipe's `models`, else as they appear."""
    seen = list(dict.fromkeys(str(entry.get("model")) for entry in _entries(stage)))
    seen += [name for name in stage.stats.get("preference_accuracy", {}) if name not in seen]
    seen += [name for name in dict.fromkeys(str(row.get("model")) for row in _rows(stage, "sets")) if name not in seen]
    for sample in _samples(stage):
        seen += [name for name in sample.get("replies", {}) if name not in seen]
    asked = stage.manifest.config.get("models") if stage.manifest is not None else None
    order = [str(name) for name in asked] if isinstance(asked, list) else []
    return [name for name in order if name in seen] + [name for name in seen if name not in order]


def perplexities(stage: StageView) -> list[Row]:
    """One row a language and source, in the manifest's order; a model that was not measured there has an empty cell."""
    names = models(stage)
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in _entries(stage):
        table.setdefault((str(entry.get("lang") or ""), str(entry.get("source") or "")), {})[str(entry.get("model"))] = entry
    rows = []
    for (lang, source), found in table.items():
        base = _value(found.get(names[0])) if names else None
        first = next(iter(found.values()))
        cells = [_cell(_value(found.get(name)), base, name == names[0]) for name in names]
        rows.append(Row(lang, source, first.get("documents"), first.get("tokens"), cells))
    return rows


def _value(entry: dict[str, Any] | None) -> float | None:
    value = None if entry is None else entry.get("perplexity")
    return float(value) if isinstance(value, int | float) else None


def _cell(value: float | None, base: float | None, is_base: bool) -> Cell:
    if value is None:
        return Cell(None, "", 0)
    if is_base or base is None or not base or not math.isfinite(value) or not math.isfinite(base):
        return Cell(value, "", 0)
    relative = (value - base) / base
    depth = sum(abs(relative) >= step for step in _STEPS)
    return Cell(value, change(value, base), -depth if relative < 0 else depth)


def perplexity_chart(stage: StageView, label_of: Any) -> Markup:
    """The table as dots on a logarithmic axis, one colour a model."""
    names = models(stage)
    rows = []
    found = [row for row in perplexities(stage) if row.lang != ALL]
    if len(found) > _MOST_ROWS:
        found = [row for row in found if row.source == ALL] or found
    for row in found:
        marks = [(name, style(index), cell.perplexity) for index, (name, cell) in enumerate(zip(names, row.cells, strict=True))]
        rows.append((label_of(row), [(name, css, value) for name, css, value in marks if value is not None]))
    return charts.dots(rows)


def style(index: int) -> str:
    return f"s{index % 8 + 1}"


def _entries(stage: StageView) -> list[dict[str, Any]]:
    return [entry for entry in stage.stats.get("perplexity", []) if isinstance(entry, dict)]


def _samples(stage: StageView) -> list[dict[str, Any]]:
    return [entry for entry in stage.stats.get("samples", []) if isinstance(entry, dict)]


def samples(stage: StageView) -> list[dict[str, Any]]:
    """Prompts with one reply a model, in the order of `models`."""
    names = models(stage)
    return [
        {
            "prompt": entry.get("prompt"),
            "lang": entry.get("lang"),
            "replies": [entry.get("replies", {}).get(name) for name in names],
        }
        for entry in _samples(stage)
    ]


def _rows(stage: StageView, key: str) -> list[dict[str, Any]]:
    return [entry for entry in stage.stats.get(key, []) if isinstance(entry, dict)]


@dataclass(frozen=True)
class SetRow:
    """A named set: one value a model, in the order of `models`."""

    name: str
    measure: str
    rows: int | None
    values: list[float | None]


def set_table(stage: StageView) -> list[SetRow]:
    """Scores on named sets."""
    names = models(stage)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in _rows(stage, "sets"):
        table.setdefault(str(entry.get("set")), {})[str(entry.get("model"))] = entry
    found = []
    for name, entries in table.items():
        first = next(iter(entries.values()))
        values = [entries.get(model, {}).get("value") for model in names]
        found.append(SetRow(name, str(first.get("measure")), first.get("rows"), values))
    return found


def set_changes(stage: StageView) -> list[dict[str, Any]]:
    """What was gained and lost, each row with the depth of its colour (below 0 is better)."""
    found = []
    for row in _rows(stage, "changes"):
        lost = row.get("lost")
        size = sum(abs(lost) >= step for step in _STEPS) if isinstance(lost, int | float) else 0
        found.append({**row, "depth": size if size and lost is not None and lost > 0 else -size})
    return found


def retention(stage: StageView) -> dict[str, Any] | None:
    """The matrix over a chain of fine-tunes, if the stage made one."""
    value = stage.stats.get("retention")
    return value if isinstance(value, dict) else None
