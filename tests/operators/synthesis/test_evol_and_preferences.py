"""Evol-Instruct on recorded replies, English and Chinese."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.synthesis import heuristics
from operators.synthesis.evol_instruct import (
    OPERATIONS,
    EvolInstruct,
    EvolSettings,
    Instruction,
    check_answer,
    parse_judgement,
    parse_rewrite,
)
from operators.synthesis.requests import Reject, Reply, Request
from tests.operators.synthesis.recorded import Recording, generator, last

EVOL = EvolSettings(rounds=2)
POOL = [
    Instruction("a", "Explain how bread rises in the oven.", "en"),
    Instruction("b", "解释面包在烤箱里为什么会膨胀。", "zh"),
    Instruction("c", "Describe a walk along the harbour.", "en"),
]


def said(text: str, reason: str = "stop") -> Reply:
    return Reply(text, reason, 10, 10)


def play(request: Request) -> str | Reply:
    text = last(request)
    if text in ("New prompt:", "新的提示："):
        parent = request.messages[-2][1].split(":", 1)[-1].split("：", 1)[-1].strip()
        if (
            "harbour" in parent
            and "Original prompt: Describe a walk along the harbour." in request.messages[-2][1]
            and request.seed % 2
        ):
            return said(parent)
        more = (
            ", and compare it with a second example of your own"
            if heuristics.language_of(parent) == "en"
            else "，并与你自己的另一个例子比较"
        )
        return parent.rstrip(".。") + more
    if request.sampling.max_tokens == 4:
        return "Not Equal" if "First" in text else "不同"
    return (
        "Yeast makes gas, and the gas lifts the dough."
        if heuristics.language_of(text) == "en"
        else "酵母产生气体，气体把面团撑起来。"
    )


def test_evolved_rows_keep_their_lineage_over_rounds(tmp_path: Path) -> None:
    method = EvolInstruct(EVOL, POOL[:2], generator(Recording(play), str(tmp_path)), "recorded", 17)
    first, second = method.rounds()
    assert [row["provenance"]["parents"] for row in first.account.rows] == [["a"], ["b"]]
    assert [row["provenance"]["parents"][0] for row in second.account.rows] == [row["id"] for row in first.account.rows]
    assert {row["lang"] for row in first.account.rows} == {"en", "zh"}
    for row in [*first.account.rows, *second.account.rows]:
        operation = row["provenance"]["operation"].removeprefix("evol:")
        assert operation in OPERATIONS
        assert f"evol_{operation}@" in row["provenance"]["template"]
    assert [row["provenance"]["round"] for row in second.account.rows] == [1, 1]


def test_a_failed_item_returns_to_the_pool_and_is_tried_again(tmp_path: Path) -> None:
    def refuse_first(request: Request) -> str | Reply:
        refused = last(request) == "New prompt:" and len(recording.asked) <= 1
        return said("Bake it.") if refused else play(request)

    recording = Recording(refuse_first)
    settings = EvolSettings(rounds=2, operations={"deepen": 1.0})
    first, second = EvolInstruct(settings, POOL[:1], generator(recording, str(tmp_path)), "m", 17).rounds()
    assert [r["reason"] for r in first.account.rejects] == ["lost_topic"]
    assert first.account.rejects[0]["source"] == "a"
    assert [row["provenance"]["parents"] for row in second.account.rows] == [["a"]]
    for made in (first, second):
        made.account.ledger.check("test")


def test_completion_order_does_not_matter(tmp_path: Path) -> None:
    both = [
        [m.account.rows for m in EvolInstruct(EVOL, POOL, generator(Recording(play, r), str(tmp_path / str(r))), "m", 3).rounds()]
        for r in (False, True)
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("reply", "lang", "reason"),
    [
        (said(" Explain how bread rises in the oven, and why steam matters to its crust."), "en", None),
        (said("解释面包在烤箱里为什么会膨胀，以及水汽对外壳的作用。"), "zh", None),
        (said(" Explain how bread rises in the oven.\n"), "en", "adds_nothing"),
        (said("解释面包在烤箱里为什么会膨胀！"), "zh", "adds_nothing"),
        (said("Explain how bread rises in the oven. Original prompt: x"), "en", "copied_prompt"),
        (said("解释面包在烤箱里为什么会膨胀，只写出新的提示"), "zh", "copied_prompt"),
        (said("Is it? To be, or not."), "en", "no_content"),
        (said("的了吗？"), "zh", "no_content"),
        (said("Yeast eats sugar and makes carbon dioxide, which is a gas."), "en", "lost_topic"),
        (said("Explain how bread rises in", "length"), "en", "truncated"),
        (said("I'm glad to explain how bread rises in the oven for you today."), "en", "no_instruction"),
    ],
)
def test_rewrites_are_eliminated_with_a_reason(reply: Reply, lang: str, reason: str | None) -> None:
    parent = POOL[0].text if lang == "en" else POOL[1].text
    found = parse_rewrite(reply, parent, lang, "deepen", EVOL)
    assert (found.reason if isinstance(found, Reject) else None) == reason


def test_the_judge_is_read_in_both_languages() -> None:
    assert [parse_judgement(said(text), "en") for text in ("Equal", "Not Equal.", "Hm")] == [True, False, None]
    assert [parse_judgement(said(text), "zh") for text in ("相同", "不同", "不相同", "嗯")] == [True, False, False, None]


def test_a_judge_who_sees_no_gain_eliminates(tmp_path: Path) -> None:
    answer = lambda r: "Equal" if r.sampling.max_tokens == 4 else play(r)  # noqa: E731
    made = next(EvolInstruct(EVOL, POOL[:1], generator(Recording(answer), str(tmp_path)), "m", 17).rounds())
    assert [r["reason"] for r in made.account.rejects] == ["judged_equal"]


def test_short_apologies_and_empty_answers_eliminate() -> None:
    for text, lang, reason in [
        ("Sorry, that is beyond me.", "en", "apology"),
        ("对不起，我不知道。", "zh", "apology"),
        ("...", "en", "no_content"),
    ]:
        found = check_answer("Explain x.", said(text), lang, EVOL)
        assert found is not None
        assert found.reason == reason
    assert check_answer("Explain x.", said("It rises because of yeast."), "en", EVOL) is None
