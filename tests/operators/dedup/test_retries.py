"""Units that die after their work and before their record are done again, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from operators.dedup import exchange, stage
from operators.dedup.plan import Plan
from operators.dedup.schedule import Phase
from operators.stage import StageContext
from pipelines.stages.dedup import DedupStage
from tests.operators.dedup.corpus import bytes_below, context_of, documents, run_here, write_corpus

OPTIONS: dict[str, Any] = {"threshold": 0.6, "bands": 28, "rows": 4, "verify": True, "partitions": 2, "keep": "best"}


class Killed(RuntimeError):
    pass


def run_dying(context: StageContext, plan: Plan, phases: list[Phase]) -> dict[str, float]:
    """Every unit loses its first attempt when it is about to commit; its files stay behind. Then it is done twice more."""
    commit = exchange.commit

    def die(*_: Any) -> None:
        raise Killed

    for phase in phases:
        for number in range(phase.units):
            exchange.commit = die
            try:
                with pytest.raises(Killed):
                    phase.run(plan, number)
            finally:
                exchange.commit = commit
            phase.run(plan, number)
            phase.run(plan, number)  # an attempt that was thought dead and was not
    return {}


def test_every_unit_may_die_or_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for name, scheduler in (("calm", run_here), ("hurt", run_dying)):
        monkeypatch.setattr(stage, "run_phases", scheduler)
        table = documents(4, seed=1)
        sources = [
            write_corpus(tmp_path / name, f"web{i}", rows, 6) for i, rows in enumerate((table.slice(0, 10), table.slice(10)))
        ]
        for fingerprint, source in zip(("first", "second"), sources, strict=True):
            context = context_of(tmp_path / name, "clean", {"web": source}, fingerprint=fingerprint)
            context.base_directory = str(tmp_path / name)
            DedupStage(input="web", index="kept", **OPTIONS).run(context)
        outcomes.append({**bytes_below(tmp_path / name / "clean"), **bytes_below(tmp_path / name / "kept")})
    assert outcomes[0] == outcomes[1]
    assert any(name.startswith("second/bands") for name in outcomes[0])
