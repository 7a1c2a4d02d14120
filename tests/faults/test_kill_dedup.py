"""A worker is killed in every phase of dedup, its files written and its record not: Ray does the unit again, nothing changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from operators.dedup import exchange, stage
from operators.dedup.plan import Plan
from operators.dedup.schedule import Phase
from pipelines.stages.dedup import DedupStage
from tests.operators.dedup.corpus import bytes_below, context_of, documents, run_here, write_corpus

OPTIONS: dict[str, Any] = {"threshold": 0.6, "bands": 28, "rows": 4, "verify": True, "keep": "longest", "index": "kept"}


def killed_once(run: Callable[[Any, int], None], marker: Path) -> Callable[[Any, int], None]:
    """The unit that comes first ends its worker when it is about to commit."""

    def unit(plan: Any, number: int) -> None:
        if not marker.exists():
            marker.touch()
            exchange.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run(plan, number)

    return unit


def run_both(directory: Path, partitions: int, between: Callable[[], None] = lambda: None) -> dict[str, bytes]:
    """Two days of rows against one index, `between` in between; everything they leave."""
    table = documents(6, seed=11)
    for day, rows in (("first", table.slice(0, 15)), ("second", table.slice(15))):
        if day == "second":
            between()
        source = write_corpus(directory, day, rows, 8)
        context = context_of(directory, "clean", {"web": source}, fingerprint=day)
        context.base_directory = str(directory)
        DedupStage(input="web", partitions=partitions, **OPTIONS).run(context)
    return {**bytes_below(directory / "clean"), **{f"kept/{name}": data for name, data in bytes_below(directory / "kept").items()}}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_killed_in_any_phase_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases_of, markers = stage.phases_of, tmp_path / "markers"
    markers.mkdir()

    def deadly(plan: Plan) -> list[Phase]:
        return [phase._replace(run=killed_once(phase.run, markers / phase.name)) for phase in phases_of(plan)]

    def attack() -> None:
        monkeypatch.setattr(stage, "run_phases", run_phases)
        monkeypatch.setattr(stage, "phases_of", deadly)

    run_phases = stage.run_phases
    monkeypatch.setattr(stage, "run_phases", run_here)
    calm = run_both(tmp_path / "calm", 3)
    assert run_both(tmp_path / "hurt", 3, between=attack) == calm
    assert {marker.name for marker in markers.iterdir()} == {
        "map", "index", "lookup", "candidates", "shingles", "pairs", "verify", "join", "resolve", "cards", "remove", "examples",
        "grow", "publish",
    }  # fmt: skip


@pytest.mark.parametrize("partitions", [1, 8])
def test_the_number_of_partitions_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitions: int) -> None:
    monkeypatch.setattr(stage, "run_phases", run_here)
    few, many = run_both(tmp_path / "few", 3), run_both(tmp_path / "many", partitions)
    rows = {name for name in few if "/removed/" in name}
    assert rows == {name for name in many if "/removed/" in name}
    assert all(few[name] == many[name] for name in rows)
