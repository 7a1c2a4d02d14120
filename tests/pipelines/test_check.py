"""The linter names the known causes of a model made worse, with evidence, and is silent where there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators import shards, tables
from operators.ledger import Ledger
from pipelines import cli
from pipelines.checks import rules
from pipelines.checks.catalogue import RULES
from pipelines.checks.evidence import Evidence
from pipelines.checks.finding import Finding
from pipelines.graph import plan
from pipelines.recipe import parse_recipe

SEEDS = {"kind": "self_instruct", "seeds": "seeds.jsonl"}
SERVER = {"model": "m", "endpoint": {"url": "http://127.0.0.1:1/v1"}}
LARGE = {"layers": 24, "hidden": 2048, "heads": 16}  # more than a billion parameters
BASE = {"kind": "pretrain", "input": "tokens", "steps": 100, "model": LARGE}
SFT = {
    "kind": "sft", "model": "base", "input": {"chats": 0.9, "general": 0.1}, "steps": 50, "learning_rate": 1e-5,
    "schedule": {"warmup": 0.05},
}  # fmt: skip
DPO = {"kind": "dpo", "model": "chat", "input": "pairs", "steps": 50, "learning_rate": 1e-6}
GRPO = {
    "kind": "grpo", "model": "base", "input": "chats", "steps": 50, "learning_rate": 1e-6,
    "rewards": {"right": {"check": "exact"}},
}  # fmt: skip
PACKAGED = "packaged:smollm2-135m-instruct"
GOOD: dict[str, dict[str, Any]] = {
    "docs": {"kind": "corpus", "read": {"path": "docs.jsonl"}, "operators": ["detect_language", "gopher_quality"]},
    "clean": {"kind": "dedup", "input": "docs"},
    "bpe": {"kind": "tokenizer", "input": "clean"},
    "tokens": {"kind": "pack", "input": "clean", "tokenizer": "bpe", "length": 64, "holdout": 0.02},
    "chats": {"kind": "conversations", "path": "chats.jsonl", "format": "messages"},
    "general": {"kind": "conversations", "path": "general.jsonl", "format": "messages"},
    "pairs": {"kind": "conversations", "path": "pairs.jsonl", "format": "dpo"},
    "base": BASE,
    "chat": SFT,
    "aligned": DPO,
    "scores": {"kind": "evaluate", "models": ["base", "chat", "aligned"], "input": "clean", "packed": "tokens"},
}


def findings(*, workers: int = 2, **changes: dict[str, Any]) -> list[Finding]:
    """Of a good recipe, after stages were put in place of its own or changed in single keys."""
    stages = {name: {**GOOD.get(name, {}), **stage} for name, stage in {**GOOD, **changes}.items()}
    recipe = parse_recipe(json.dumps({"name": "x", "stages": stages}))
    return rules.run(Evidence(recipe, workers=workers))


def codes(**changes: Any) -> set[tuple[str, str]]:
    return {(finding.code, finding.stage) for finding in findings(**changes)}


def test_a_careful_recipe_has_no_findings() -> None:
    assert findings() == []


MARKED = {"chats": 0.9, "general": {"weight": 0.1, "general": True}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"chat": {"input": MARKED}}, set()),  # scores itself, and what is trained from it has its sets
        ({"chat": {"evaluate": {"general": {"quiz": {"choices": "quiz.jsonl"}}}}}, set()),
        ({"chat": {"input": MARKED, "evaluate": False}}, {("unmeasured", "chat"), ("unmeasured", "aligned")}),
        ({"chat": {"input": MARKED}, "aligned": {"evaluate": False}}, {("unmeasured", "aligned")}),
        ({"chat": {"input": {**MARKED, "chats": 9.9}}}, {("little_general_data", "chat")}),
    ],
)
def test_a_stage_that_scores_itself_needs_no_evaluate_stage(changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    assert codes(**changes, scores={"models": ["base"]}) == expected


@pytest.mark.parametrize(
    ("code", "stage", "changes"),
    [
        ("no_general_data", "chat", {"chat": {"input": "chats"}}),
        ("no_general_data", "more", {"more": {**BASE, "model": "base", "learning_rate": 1e-5}}),
        ("little_general_data", "chat", {"chat": {"input": {"chats": 0.98, "general": 0.02}}}),
        ("learning_rate", "chat", {"chat": {"learning_rate": 2e-4}}),
        ("learning_rate", "chat", {"chat": {"learning_rate": 2e-3, "lora": {}}}),
        ("learning_rate", "aligned", {"aligned": {"learning_rate": 1e-4}}),
        ("no_warmup", "chat", {"chat": {"schedule": {"warmup": 0}}}),
        ("lora_targets", "chat", {"chat": {"lora": {"targets": ["q_proj", "v_proj"]}}}),
        ("template", "aligned", {"chat": {"chat_template": "llama3"}, "aligned": {"chat_template": "chatml"}}),
        ("batch", "chat", {"chat": {"batch_examples": 9}}),
        ("aligned_without_sft", "aligned", {"aligned": {"model": "base"}}),
        ("aligned_without_sft", "game", {"game": GRPO}),
        ("unmeasured", "aligned", {"scores": {"models": ["base", "chat"]}}),
        ("before_unmeasured", "chat", {"scores": {"models": ["chat", "aligned"]}}),
        ("evaluated_on_training_data", "scores", {"scores": {"pairs": "pairs"}, "aligned": {"held_out": 0.0}}),
        ("nothing_held_out", "tokens", {"tokens": {"holdout": 0.0}}),
        ("language_after_filters", "docs", {"docs": {"operators": ["gopher_quality"]}}),
        ("language_after_filters", "docs", {"docs": {"operators": ["gopher_quality", "detect_language"]}}),
        ("uncurated", "chat", {"chats": SEEDS | {"path": None, "format": None}}),
        ("no_token_cap", "tasks", {"tasks": {**SEEDS, "generator": SERVER}}),
    ],
)
def test_a_known_cause_is_found_where_it_is(code: str, stage: str, changes: dict[str, Any]) -> None:
    for name, change in changes.items():
        if None in change.values():  # another kind altogether
            changes = {**changes, name: {key: value for key, value in change.items() if value is not None}}
            stages = {**GOOD, **changes}
            recipe = parse_recipe(json.dumps({"name": "x", "stages": stages}))
            assert code in {finding.code for finding in rules.run(Evidence(recipe, workers=2)) if finding.stage == stage}
            return
    assert (code, stage) in codes(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"chat": {"input": "chats", "ewc": [{"fisher": "/f", "strength": 1.0}]}},  # held by EWC instead
        {"chat": {"learning_rate": 5e-4, "lora": {}}},  # adapters take more
        {"base": {"model": {"layers": 2, "hidden": 64, "heads": 2}}, "chat": {"learning_rate": 4e-4}},  # so do small models
        {"aligned": {"model": "base", "loss": {"sigmoid": 1.0, "sft": 1.0}}},  # learns the replies as well
        {"aligned": {"model": PACKAGED}, "scores": {"models": ["base", "chat", "aligned", PACKAGED]}},
        {"chats": {"kind": "conversations"}, "tasks": {**SEEDS, "generator": SERVER, "max_generated_tokens": 1000}},
    ],
)  # fmt: skip
def test_what_only_looks_like_a_cause_is_no_finding(changes: dict[str, Any]) -> None:
    assert codes(**changes) == set()


def finished(run: Path, stage: str, replies: list[str], fingerprint: str = "f0") -> None:
    """A finished stage of conversations."""
    rows = [
        {"id": f"{number}", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}],
         "lang": "en", "tools": None, "provenance": None}
        for number, reply in enumerate(replies)
    ]  # fmt: skip
    directory = str(run / stage / fingerprint)
    writer = shards.UnitWriter(directory, 0)
    writer.write(pa.Table.from_pylist(rows, schema=tables.CONVERSATIONS))
    writer.commit(Ledger(created=len(rows), kept=len(rows)))
    shards.finish(directory, stage=stage, kind="conversations", fingerprint=fingerprint, config={}, inputs={})


def test_evidence_comes_from_the_rows_that_stages_have_left(tmp_path: Path) -> None:
    for name in ("docs", "chats", "general", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text('{"id": "1"}\n' * 10)
    plain = [f"{number} answers the question in its own words" for number in range(50)]
    finished(tmp_path / "x", "chats", ["I'm sorry, but I can't help with that."] * 5 + ["抱歉，我无法回答这个问题。"] * 5 + plain)
    finished(tmp_path / "x", "general", ["Sure, here is what you asked for"] * 30 + plain, "older")
    recipe = parse_recipe(json.dumps({"name": "x", "stages": GOOD}))
    nodes = {node.name: node for node in plan(recipe, str(tmp_path / "x"), str(tmp_path), None)}
    found = {finding.code: finding for finding in rules.run(Evidence(recipe, nodes, str(tmp_path), 2))}
    assert found["refusals"].facts["share"] == pytest.approx(10 / 60) and found["refusals"].facts["rows"] == 60
    assert found["openings"].facts["opening"] == "sure, here is" and found["openings"].facts["input"] == "general"
    assert "16.7% of 60 replies looked at in chats refuse" in found["refusals"].line("en")
    assert "chats 中检查的 60 条回复有 16.7% 是拒答" in found["refusals"].line("zh")
    # 50 steps of 8 examples over 60 and 80 rows, and over the 10 lines of a file that no stage has read yet.
    passes = {
        finding.facts["input"]: finding
        for finding in rules.run(Evidence(recipe, nodes, str(tmp_path), 2))
        if finding.code == "epochs"
    }
    assert passes["chats"].facts["epochs"] == pytest.approx(50 * 8 * 0.9 / 60) and passes["chats"].facts["basis"] == ""
    assert passes["pairs"].facts["epochs"] == pytest.approx(50 * 8 / 10) and "estimated" in passes["pairs"].facts["basis"]
    assert "general" not in passes


def test_models_at_a_path_are_judged_by_their_own_files(tmp_path: Path) -> None:
    model = tmp_path / "outside"
    model.mkdir()
    config = {"model_type": "falcon_h1", "hidden_size": 2048, "num_hidden_layers": 24}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '<start_of_turn>' }}"}))
    changes = {"model": str(model), "packing": True, "chat_template": "llama3"}
    found = codes(chat=changes, scores={"models": ["base", str(model), "chat", "aligned"]})
    assert found == {("packing_not_isolated", "chat"), ("template", "chat")}
    (model / "tokenizer_config.json").write_text("{}")
    assert ("aligned_without_sft", "aligned") in codes(
        aligned={"model": str(model)}, scores={"models": ["base", "chat", "aligned", str(model)]}
    )


def test_a_reward_that_never_moved_in_the_last_run_is_found(tmp_path: Path) -> None:
    recipe = parse_recipe(json.dumps({"name": "x", "stages": {**GOOD, "game": {**GRPO, "model": "chat"}}}))
    for name in ("docs", "chats", "general", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text('{"id": "1"}\n' * 1000)
    curve = [{"step": step, "loss": 0.1, "reward_right": 0.0} for step in range(6)]
    directory = str(tmp_path / "x" / "game" / "f0")
    shards.finish(directory, stage="game", kind="grpo", fingerprint="f0", config={}, inputs={}, stats={"curve": curve})
    nodes = {node.name: node for node in plan(recipe, str(tmp_path / "x"), str(tmp_path), None)}
    found = {finding.code: finding for finding in rules.run(Evidence(recipe, nodes, str(tmp_path), 2)) if finding.stage == "game"}
    assert found["rewards_all_zero"].facts == {"reward": "right", "value": 0.0}
    curve[3]["reward_right"] = 0.5
    shards.finish(
        str(tmp_path / "x" / "game" / "f1"),
        stage="game",
        kind="grpo",
        fingerprint="f1",
        config={},
        inputs={},
        stats={"curve": curve},
    )
    again = rules.run(Evidence(recipe, nodes, str(tmp_path), 2))
    assert "rewards_all_zero" not in {finding.code for finding in again}


def test_every_rule_has_both_languages_and_names_the_same_facts_in_each() -> None:
    for code, rule in RULES.items():
        for english, chinese in (rule.evidence, rule.reason, rule.remedy):
            assert english and re.search(r"[\u4e00-\u9fff]", chinese), code
            names = [{name.removesuffix("_zh") for name in re.findall(r"\{(\w+)", text)} for text in (english, chinese)]
            assert names[0] == names[1], code


def test_the_command_prints_findings_in_a_language_as_json_and_strictly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "chats", "general", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text('{"id": "1"}\n' * 1000)
    stages = {**GOOD, "chat": {**SFT, "learning_rate": 1e-3}}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "x", "stages": stages}))
    assert cli.main(["check", "r.yaml", "--lang", "zh"]) == 0
    assert "warning: stages.chat: 学习率 0.001 高于 5e-05" in capsys.readouterr().out
    assert cli.main(["check", "r.yaml", "--json", "--strict"]) == 1
    [found] = json.loads(capsys.readouterr().out)
    assert (found["code"], found["stage"]) == ("learning_rate", "chat") and found["source"].startswith("Biderman")
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "x", "stages": GOOD}))
    assert cli.main(["check", "r.yaml", "--strict"]) == 0
