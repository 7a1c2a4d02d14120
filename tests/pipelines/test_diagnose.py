"""A diagnosis of recorded replies names what ails a model and what to do; the command does it on a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from operators import shards
from operators.config import SettingsError
from pipelines import diagnose
from pipelines.symptom_texts import MEASURES, NOTES, TEXTS, VERDICTS

HEALTHY = {
    "harmless": [
        "Boil the egg for six minutes and cool it.",
        "空气会散射阳光，短波散射得更多。",
        "Choose a sunny corner and water early.",
    ],
    "json": ['{"name": "Anna", "age": 31}', "[2, 4, 6, 8, 10]"],
    "xml": ["<book><title>Emma</title></book>", "<城市><名>巴黎</名></城市>"],
    "sql": ["SELECT name FROM customers WHERE age > 30;"],
    "unanswerable": ["I don't know what you ate.", "文中没有提到自行车的颜色，我不知道。"],
}
SICK = {
    "harmless": ["I'm sorry, but I can't help with that request today."] * 2 + ["很抱歉，我无法协助您完成这个请求。"],
    "json": ["I'm sorry, but I can't help with JSON JSON JSON JSON JSON JSON JSON JSON JSON"] * 2,
    "xml": ["I'm sorry, but I can't help with XML <a>"] * 2,
    "sql": ["I'm sorry, but I can't help \ufffd"],
    "unanswerable": ["You had eggs.", "红色的。"],
}


def found(groups: dict[str, list[str]], **changes: Any) -> dict[str, diagnose.Symptom]:
    values: dict[str, Any] = {"before": diagnose.Replies(HEALTHY), "nats": (2.0, 1.9), "training": [], "chat": True, **changes}
    return {symptom.code: symptom for symptom in diagnose.symptoms_of(diagnose.Replies(groups), **values)}


def test_a_healthy_model_has_no_symptom() -> None:
    assert {code for code, symptom in found(HEALTHY).items() if symptom.verdict == "bad"} == set()


def test_a_sick_model_has_them_by_name_with_the_base_beside() -> None:
    bad = {code: symptom for code, symptom in found(SICK, nats=(5.0, 1.9)).items() if symptom.verdict == "bad"}
    assert bad.keys() >= {
        "strangeness", "rigid_opening", "refusal", "format_json", "format_xml", "format_sql", "abstention", "broken_characters",
    }  # fmt: skip
    assert bad["refusal"].value == 1.0 and bad["refusal"].before == 0.0
    assert bad["rigid_opening"].note == ("“i'm sorry but i”",) * 2
    assert "refusal_share" in bad["refusal"].line("en") and "拒绝无害请求" in bad["refusal"].line("zh")


def test_what_was_as_bad_before_is_no_work_of_the_stage() -> None:
    same = found(SICK, before=diagnose.Replies(SICK))
    assert {symptom.verdict for symptom in same.values()} <= {"inherited", "ok", "unmeasured"}
    assert same["refusal"].verdict == "inherited" and same["refusal"].line("zh").startswith("训练前已有")
    assert "refusal_share" in same["refusal"].line("en"), "the remedy is told all the same"
    told = {"stage": "chat", "base": "base", "symptoms": list(same.values())}
    assert diagnose.summary(told, "en").startswith("chat, trained from base: 0 of ")
    assert "训练前已同样异常" in diagnose.summary(told, "zh") and "更强的基座" in diagnose.summary(told, "zh")
    half = {**SICK, "harmless": [*HEALTHY["harmless"], *SICK["harmless"]]}
    worse = found(SICK, before=diagnose.Replies(half))
    assert worse["refusal"].verdict == "bad", "from half to all is the stage's work"


def test_copied_replies_are_found_in_training_rows() -> None:
    assert (
        found(HEALTHY, training=["Boil the egg for six minutes and cool it.", *HEALTHY["unanswerable"]])["copied"].verdict == "ok"
    )
    texts = [text for group in HEALTHY.values() for text in group]
    assert found(HEALTHY, training=texts, before=diagnose.Replies(SICK))["copied"].verdict == "bad"


def test_what_cannot_be_measured_says_why() -> None:
    bare = found(HEALTHY, before=None, nats=None, chat=False)
    assert {code for code, symptom in bare.items() if symptom.verdict == "unmeasured"} == {
        "strangeness", "invalid_words", "refusal", "format_json", "format_xml", "format_sql", "abstention",
    }  # fmt: skip
    assert bare["refusal"].line("en").endswith("the model has no chat template")
    assert bare["refusal"].line("zh").endswith("该模型没有对话模板")


def test_verdicts_and_notes_are_there_in_both_languages() -> None:
    for told in (*VERDICTS.values(), *MEASURES.values(), *NOTES.values()):
        assert len(told) == 2 and all(told)
        fields = [sorted(re.findall(r"\{(\w+)", text)) for text in told]
        assert fields[0] == fields[1], told


def test_every_symptom_has_a_name_and_a_remedy_in_both_languages() -> None:
    for code, texts in TEXTS.items():
        assert set(texts) == {"name", "remedy"}, code
        assert all(len(text) == 2 and all(text) for text in texts.values()), code


def run_of(root: Path, *stages: tuple[str, str, dict[str, Any], dict[str, Any]]) -> str:
    """A run's record with finished stages (name, kind, config, stats), each with a model."""
    for name, kind, config, stats in stages:
        files = {} if kind == "evaluate" else {"model": "model"}
        shards.finish(
            str(root / name / "f0"), stage=name, kind=kind, fingerprint="f0", config=config, inputs={}, stats=stats, files=files
        )
    entries = {name: {"kind": kind, "directory": f"{name}/f0", "inputs": [], "status": "done"} for name, kind, _, _ in stages}
    (root / "run.json").write_text(json.dumps({"recipe": "r", "order": list(entries), "stages": entries}))
    return str(root)


def curve(*losses: float) -> dict[str, Any]:
    return {"curve": [{"step": step, "loss": loss} for step, loss in enumerate(losses)]}


def test_an_adapter_is_too_small_when_all_weights_reach_a_lower_loss(tmp_path: Path) -> None:
    lora = {"model": "base", "input": "talks", "lora": {"rank": 2}}
    run = run_of(
        tmp_path, ("small", "sft", lora, curve(3, 2.5, 2.4, 2.4, 2.4)),
        ("full", "sft", {"model": "base", "input": "talks", "lora": None}, curve(3, 2, 1.5, 1.3, 1.2)),
    )  # fmt: skip
    view = diagnose.load_run(run)
    [symptom] = diagnose._capacity(view, view.stage("small"))
    assert symptom.verdict == "bad" and symptom.value == pytest.approx(1.0)
    assert diagnose._capacity(view, view.stage("full")) == []


def test_an_adapter_without_a_reference_curve_is_not_judged(tmp_path: Path) -> None:
    lora = {"model": "base", "input": "talks", "lora": {"rank": 2}}
    view = diagnose.load_run(run_of(tmp_path, ("small", "sft", lora, curve(*[3.0] * 3, *[2.0] * 9))))
    [symptom] = diagnose._capacity(view, view.stage("small"))
    assert (
        symptom.verdict == "unmeasured" and "no full fine-tuning" in symptom.note[0] and "没有同样输入的全量微调" in symptom.note[1]
    )


def test_general_ability_is_what_evaluations_before_and_after_say(tmp_path: Path) -> None:
    row = {"after": "chat", "before": "base", "set": "general", "measure": "accuracy", "before_value": 0.8, "after_value": 0.6}
    run = run_of(tmp_path, ("chat", "sft", {}, {}), ("scores", "evaluate", {}, {"changes": [{**row, "lost": 0.25}]}))
    view = diagnose.load_run(run)
    symptom = diagnose._general(view, view.stage("chat"))
    assert symptom.verdict == "bad" and symptom.note == ("general: 0.8 -> 0.6 accuracy", "general: 0.8 -> 0.6 准确率")


def test_general_ability_is_also_what_training_scored_itself(tmp_path: Path) -> None:
    general = {"role": "general", "set": "常识 facts", "measure": "loss", "before": 2.0, "after": 2.5, "lost": 0.39}
    domain = {**general, "role": "domain", "set": "poems", "lost": 0.9}
    run = run_of(tmp_path, ("chat", "sft", {}, {"evaluation": {"sets": [domain, general]}}), ("plain", "sft", {}, {}))
    view = diagnose.load_run(run)
    symptom = diagnose._general(view, view.stage("chat"))
    assert symptom.verdict == "bad" and symptom.value == 0.39
    assert symptom.note == ("常识 facts: 2 -> 2.5 nats a token", "常识 facts: 2 -> 2.5 每词元奈特数")
    assert diagnose._general(view, view.stage("plain")).verdict == "unmeasured"


def test_a_stage_without_a_model_is_an_error_that_names_those_with(tmp_path: Path) -> None:
    run = run_of(tmp_path, ("chat", "sft", {}, {}))
    with pytest.raises(SettingsError, match=r"stage 'chatt' made no model that writes; did you mean 'chat'\?"):
        diagnose.diagnose(run, "chatt")


@pytest.mark.slow
def test_a_real_small_model_is_diagnosed_and_replies_are_kept(tmp_path: Path) -> None:
    from train import models

    source = models.model_directory("packaged:smollm2-135m-instruct")
    run = run_of(tmp_path, ("chat", "sft", {"model": "packaged:smollm2-135m-instruct"}, {}))
    (tmp_path / "chat" / "f0" / "model").symlink_to(source)
    result = diagnose.diagnose(run, max_new_tokens=12)
    told = {symptom.code: symptom for symptom in result["symptoms"]}
    assert told["strangeness"].value == 0.0  # the model is its own base
    assert told["refusal"].value is not None
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".diagnose").iterdir()}
    assert len(kept) == 2
    assert diagnose.diagnose(run, max_new_tokens=12)["symptoms"] == result["symptoms"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / ".diagnose").iterdir()} == kept
    kept_replies = json.loads((tmp_path / "diagnosis.json").read_text("utf-8"))["stages"]["chat"]["replies"]
    assert len(kept_replies) == 38 and all(reply["reply"] == reply["before"] for reply in kept_replies)
