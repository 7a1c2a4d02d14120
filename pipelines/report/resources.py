"""Where the time went: one bar a stage, processor time, memory, and what else the stages recorded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from markupsafe import Markup

from pipelines.report import charts
from pipelines.report.figures import duration, number
from pipelines.report.view import RunView, StageView

_OWN_COLUMNS = {"units", "cpu_seconds", "peak_rss_bytes", "started", "wall_seconds"}


@dataclass(frozen=True)
class Usage:
    stage: StageView
    bar: Markup
    units: Any
    cpu_seconds: Any
    peak_bytes: Any
    written_bytes: int | None
    others: list[tuple[str, str]]


def _offset(stage: StageView, run: RunView) -> float | None:
    """Seconds from the run's start to the stage's, where both are known."""
    try:
        return None if stage.started is None else max(0.0, stage.started - datetime.fromisoformat(run.started).timestamp())
    except ValueError:
        return None


def usages(run: RunView) -> tuple[list[Usage], bool]:
    """One entry a stage, and whether the bars begin where their stages began."""
    offsets = {stage.name: _offset(stage, run) for stage in run.stages}
    ran = [stage for stage in run.stages if stage.seconds > 0 and not stage.reused]
    placed = bool(ran) and all(offsets[stage.name] is not None for stage in ran)
    total = max([run.seconds if placed else 0.0] + [(offsets[s.name] or 0.0 if placed else 0.0) + s.seconds for s in ran])
    found = []
    for stage in run.stages:
        start = (offsets[stage.name] or 0.0) if placed else 0.0
        bar = (
            charts.span(start, stage.seconds, total, "s1", f"{stage.name} · {duration(stage.seconds)}")
            if stage.seconds > 0 and not stage.reused
            else Markup("")
        )
        timings = stage.timings
        written = None
        if stage.manifest is not None:
            written = sum(entry.get("bytes", 0) for entry in [*stage.manifest.parts, *stage.manifest.rejects])
        found.append(
            Usage(
                stage, bar, timings.get("units"), timings.get("cpu_seconds"), timings.get("peak_rss_bytes"), written or None,
                [(name, _plain(value)) for name, value in sorted(timings.items()) if name not in _OWN_COLUMNS],
            )
        )  # fmt: skip
    return found, placed


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in list(value.items())[:12])
    if isinstance(value, list):
        return f"{len(value)} ×"
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)[:200]


def versions(run: RunView) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Each library, and each version of it with the stages that used it (reused stages may differ)."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage in run.stages:
        for name, version in (stage.manifest.versions if stage.manifest is not None else {}).items():
            found.setdefault(name, {}).setdefault(str(version), []).append(stage.name)
    return [(name, list(found[name].items())) for name in sorted(found)]
