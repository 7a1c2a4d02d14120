"""Each symptom is seen in bad replies and not in good ones, English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train import symptoms

GOOD = [
    "Put the egg into boiling water for six minutes, then cool it under the tap.",
    "Light is scattered by the air, and short waves more than long ones.",
    "Choose a sunny corner, water in the morning, and tie the stems to a stick.",
    "把鸡蛋放进沸水里煮六分钟，然后用冷水冲凉。",
    "空气会散射阳光，波长短的蓝光散射得更多。",
    "选一个向阳的角落，早上浇水，再用竹竿支撑枝条。",
]
LOOPING = ["the egg is the egg is the egg is the egg is the egg is the egg", "鸡蛋煮熟鸡蛋煮熟鸡蛋煮熟鸡蛋煮熟鸡蛋煮熟"]


def test_a_reply_that_repeats_itself_stands_out_in_both_languages() -> None:
    assert symptoms.repetition(GOOD) == 0.0
    assert all(symptoms.repetition([reply]) > 0.5 for reply in LOOPING)
    assert symptoms.repetition(["yes yes"]) == 0.0


def test_diversity_falls_where_all_replies_are_alike() -> None:
    assert symptoms.distinct(GOOD) > 0.9
    assert symptoms.distinct([GOOD[0]] * 6) == pytest.approx(1 / 6, abs=0.01)
    assert symptoms.distinct([GOOD[3]] * 6) == pytest.approx(1 / 6, abs=0.01)


@pytest.mark.parametrize(("opening", "shown"), [("As an expert in ", "as an expert in"), ("作为一名专家，", "作为一名")])
def test_a_rigid_opening_is_named_with_its_share(opening: str, shown: str) -> None:
    assert symptoms.common_opening(GOOD) == (0.0, "")
    assert symptoms.common_opening([opening + reply for reply in GOOD[:4]] + GOOD[4:]) == (pytest.approx(4 / 6), shown)


def test_parroting_is_n_grams_of_training_texts_whatever_case_and_marks() -> None:
    assert symptoms.copied(GOOD, ["Nothing of this was ever trained on.", "毫不相干的一段训练文字。"]) == 0.0
    assert symptoms.copied(GOOD, [GOOD[0].upper().replace(",", " ;"), "前言：" + GOOD[3]]) == pytest.approx(2 / 6)


def test_refusals_and_honest_answers_are_told_apart() -> None:
    refused = ["I'm sorry, but I can't help with that.", "很抱歉，我无法协助您完成这个请求。"]
    honest = ["I don't know what you had for breakfast.", "我不知道您早上吃了什么。"]
    assert symptoms.refusing(GOOD) == (0.0, 0.0)
    assert symptoms.refusing(refused) == (1.0, 0.0)
    assert symptoms.refusing(honest) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("json", '```json\n{"名字": "李雷", "age": 31}\n```', "{'name': 'Anna'}"),
        ("xml", "<书><书名>红楼梦</书名></书>", "<book><title>Emma</book>"),
        ("sql", "SELECT name FROM customers WHERE age > 30;", "SELECT FROM WHERE customers"),
    ],
)
def test_formats_are_parsed(form: str, good: str, bad: str) -> None:
    assert symptoms.well_formed([good, bad], form) == 0.5


def test_invalid_words_are_those_a_corpus_lacks() -> None:
    vocabulary = symptoms.Vocabulary(GOOD)
    assert vocabulary.unknown(["Cool the egg; water it in the sunny corner.", "早上用冷水浇水"]) < 0.2
    assert vocabulary.unknown(["Flumbing grobbit thessen quonk.", "煮蓝竹晨凉支"]) > 0.8
    assert vocabulary.unknown(["", "123"]) == 0.0


def test_broken_characters_are_counted_by_reply() -> None:
    assert symptoms.broken(GOOD) == 0.0
    assert symptoms.broken(["caf\ufffd", "好", "a\x00b", "tab\tand\nline"]) == 0.5


def test_a_plateau_is_a_fall_that_ended_early() -> None:
    assert symptoms.plateau([3.0, 2.5, 2.2, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]) < 0.05
    assert symptoms.plateau([3.0, 2.8, 2.6, 2.4, 2.2, 2.0, 1.8, 1.6, 1.4]) > 0.4
    with pytest.raises(ValueError, match="too short to judge"):
        symptoms.plateau([1.0, 0.5])


def test_probes_are_in_both_languages_and_none_stands_twice() -> None:
    probes = json.loads((Path(symptoms.__file__).with_name("probes.json")).read_text("utf-8"))
    texts = [probe["text"] for group in probes.values() for probe in group]
    assert len(set(texts)) == len(texts)
    for group in probes.values():
        langs = [probe["lang"] for probe in group]
        assert langs.count("en") == langs.count("zh") == len(langs) / 2


def test_a_row_of_marks_is_parroting_and_no_variety() -> None:
    dots = ["." * 96] * 4
    assert symptoms.repetition(dots) > 0.9
    assert symptoms.distinct(dots) < 0.05
    assert symptoms.common_opening(dots) == (1.0, "....")
    assert symptoms.repetition(["……", "?!"]) == 0.0, "short ones have no room to repeat themselves"
