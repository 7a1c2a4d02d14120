"""The evaluate stage: what may stand together, what its models were trained on, and how the report shows sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from operators import shards
from operators.ledger import Ledger
from operators.stage import StageContext
from pipelines.report import evaluation
from pipelines.report.view import StageView
from pipelines.stages.evaluation import EvaluateStage, trained_on


def stage(**values: Any) -> EvaluateStage:
    return EvaluateStage.model_validate({"kind": "evaluate", "models": ["base", "chat"], **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"before": "base"}, "`before` needs `sets`"),
        ({"before": "other", "sets": {"a": {"choices": "a.jsonl"}}}, "'other', which is not one of `models`"),
        ({"before": {"chat": "chat"}, "sets": {"a": {"choices": "a.jsonl"}}}, "compares a model with itself"),
        ({"retention": {"chat": "b"}, "sets": {"a": {"choices": "a.jsonl"}}}, "'b', which is not one of `sets`"),
        ({"sets": {"a": {}}}, "exactly one of `input` and `choices`"),
        ({"sets": {"a": {"choices": "a.jsonl", "held_out": 0.1}}}, "`held_out` belongs to `input`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**values)


def test_sets_are_inputs_and_files_of_the_stage() -> None:
    made = stage(before="base", sets={"domain": {"input": "help"}, "general": {"choices": ["a.jsonl"]}})
    assert made.input_names() == ["base", "chat", "help"]
    assert made.files() == ["a.jsonl"]
    assert made.pairs_before() == {"chat": "base"}


def finished(run: Path, name: str, kind: str, inputs: dict[str, str], **values: Any) -> str:
    directory = str(run / name / "f0")
    if kind in ("corpus", "conversations"):
        text = (
            {"text": pa.array(["x"]), "source": pa.array(["s"])}
            if kind == "corpus"
            else {"messages": pa.array([[{"role": "user"}]])}
        )
        writer = shards.UnitWriter(directory, 0)
        writer.write(pa.table({"id": pa.array(["a"]), **text}))
        writer.commit(Ledger(created=1, kept=1))
    named = {stage: shards.relative_to_run(directory, path) for stage, path in inputs.items()}
    values.setdefault("config", {})
    shards.finish(directory, stage=name, kind=kind, fingerprint="f0", inputs=named, **values)
    return directory


def test_what_models_were_trained_on_is_followed_through_promotion_to_the_documents_of_packs(tmp_path: Path) -> None:
    model = {"model": "model"}
    docs = finished(tmp_path, "docs", "corpus", {})
    tokens = finished(tmp_path, "tokens", "pack", {"docs": docs}, config={"holdout": 0.02})
    base = finished(tmp_path, "base", "pretrain", {"tokens": tokens}, files=model)
    talks = finished(tmp_path, "talks", "conversations", {})
    chat = finished(tmp_path, "chat", "sft", {"talks": talks, "base": base}, files=model, config={"held_out": 0.1})
    links = {"model": shards.linked(chat, chat + "/model")}
    quiz = finished(tmp_path, "quiz", "conversations", {})
    scores = finished(tmp_path, "scores", "evaluate", {"chat": chat, "quiz": quiz})
    good = finished(tmp_path, "good", "promote", {"chat": chat, "scores": scores}, files=links)
    context = StageContext("later", "evaluate", str(tmp_path / "later" / "f0"), "f0", {}, {"good": good}, 0)
    assert [(row["stage"], row["input"], row["held_out"]) for row in trained_on(context, ["good", "packaged:x"])] == [
        ("base", "docs", 0.02), ("chat", "talks", 0.1),
    ]  # fmt: skip


def test_the_report_shows_scores_changes_and_the_matrix(tmp_path: Path) -> None:
    stats = {
        "sets": [
            {"model": "base", "set": "general", "measure": "accuracy", "rows": 9, "tokens": 90, "value": 0.5},
            {"model": "chat", "set": "general", "measure": "accuracy", "rows": 9, "tokens": 90, "value": 0.4},
        ],
        "changes": [{"after": "chat", "before": "base", "set": "general", "lost": 0.2, "kept": 0.8}],
    }  # fmt: skip
    directory = finished(tmp_path, "scores", "evaluate", {}, stats=stats, config={"models": ["base", "chat"]})
    view = StageView("scores", "evaluate", directory, "scores/f0", [], "done", 0.0, False, manifest=shards.load_manifest(directory))
    assert evaluation.models(view) == ["base", "chat"]
    assert [(row.name, row.values) for row in evaluation.set_table(view)] == [("general", [0.5, 0.4])]
    assert evaluation.set_changes(view)[0]["depth"] > 0
    assert evaluation.retention(view) is None
