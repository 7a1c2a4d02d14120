"""A model passes on only if it lost no more than the bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from operators import shards
from operators.config import SettingsError
from operators.stage import StageContext
from pipelines.stages.promotion import NotPromoted, PromoteStage


def finished(run: Path, name: str, kind: str, **values: Any) -> str:
    directory = str(run / name / "f0")
    shards.finish(directory, stage=name, kind=kind, fingerprint="f0", config={}, inputs={}, **values)
    return directory


def changed(name: str, before: float, after: float) -> dict[str, Any]:
    return {
        "after": "chat", "before": "base", "set": name, "measure": "accuracy", "before_value": before, "after_value": after,
        "kept": after / before, "lost": round(1 - after / before, 6),
    }  # fmt: skip


def promote(run: Path, rows: list[dict[str, Any]], **settings: Any) -> StageContext:
    inputs = {
        "chat": finished(run, "chat", "sft", files={"model": "model", "adapter": "adapter"}),
        "scores": finished(run, "scores", "evaluate", stats={"changes": rows}),
    }
    context = StageContext("good", "promote", str(run / "good" / "f0"), "f0", {}, inputs, 0)
    values = {"kind": "promote", "model": "chat", "scores": "scores", "max_loss": {"general": 0.05}, **settings}
    PromoteStage.model_validate(values).run(context)
    return context


def test_a_model_within_its_bounds_is_what_later_stages_are_given(tmp_path: Path) -> None:
    context = promote(tmp_path, [changed("general", 0.8, 0.78), changed("domain", 0.5, 0.6)], min_gain={"domain": 0.1})
    later = StageContext("later", "dpo", str(tmp_path / "later" / "f0"), "f0", {}, {"good": context.directory}, 0)
    assert later.model_of("good") == str(tmp_path / "chat" / "f0" / "model")
    assert shards.load_manifest(context.directory).stats["broken"] == []


def test_a_model_that_lost_more_is_refused_with_the_numbers_and_the_way_on(tmp_path: Path) -> None:
    with pytest.raises(NotPromoted, match=r"lost 25\.0%, more than 5\.0% \(accuracy 0\.8 in base, 0\.6 now\)") as caught:
        promote(tmp_path, [changed("general", 0.8, 0.6)])
    assert "set `override: REASON` on stages.good" in str(caught.value) and str(tmp_path / "chat") in str(caught.value)
    assert not (tmp_path / "good" / "f0" / "manifest.json").exists()


def test_too_small_a_gain_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(NotPromoted, match=r"on domain it gained 2\.0%, a gain below 10\.0%"):
        promote(tmp_path, [changed("general", 0.8, 0.8), changed("domain", 0.5, 0.51)], min_gain={"domain": 0.1})


def test_an_override_promotes_and_its_reason_is_kept(tmp_path: Path) -> None:
    context = promote(tmp_path, [changed("general", 0.8, 0.6)], override="demonstration only")
    stats = shards.load_manifest(context.directory).stats
    assert stats["overridden"] == "demonstration only" and "lost 25.0%" in stats["broken"][0]


def test_a_set_that_was_not_scored_is_an_error_that_names_those_that_were(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no set 'general' \(it has \['domain'\]\)"):
        promote(tmp_path, [changed("domain", 0.5, 0.6)])
