"""Evol-Instruct on recorded replies, English and Chinese."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from operators.synthesis import heuristics
from operators.synthesis.evol_instruct import (
    OPERATIONS,
    EvolInstruct,
    EvolSettings,
    EvolUnit,
    check_answer,
    parse_judgement,
    parse_rewrite,
)
from operators.synthesis.requests import Reject, Reply, Request
from operators.synthesis.rows import instruction_row
from tests.operators.synthesis.recorded import Recording, generator, last

EVOL = EvolSettings(rounds=2)
POOL = [
    ("a", "Explain how bread rises in the oven.", "en"),
    ("b", "解释面包在烤箱里为什么会膨胀。", "zh"),
    ("c", "Describe a walk along the harbour.", "en"),
]


def row(identity: str, text: str, lang: str | None) -> dict[str, Any]:
    return instruction_row(identity, text, "", "fine", lang, None)


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


def evolve(
    tmp_path: Path,
    rows: Iterable[dict[str, Any] | None],
    settings: EvolSettings = EVOL,
    engine: Recording | None = None,
    cap: int | None = None,
    **more: Any,
) -> list[EvolUnit]:
    engine = engine or Recording(play)
    return list(EvolInstruct(settings, generator(engine, str(tmp_path), cap), "recorded", 17, **more).units(rows))


def evolved(unit: EvolUnit, number: int | None = None) -> list[dict[str, Any]]:
    made = [row for row in unit.account.rows if row["provenance"]]
    return [row for row in made if number is None or row["provenance"]["round"] == number]


def test_evolved_rows_keep_their_lineage_over_rounds(tmp_path: Path) -> None:
    (unit,) = evolve(tmp_path, [row(*item) for item in POOL[:2]])
    assert [made["id"] for made in unit.account.rows[:2]] == ["a", "b"], "the input's rows are written as well"
    first, second = evolved(unit, 0), evolved(unit, 1)
    assert [made["provenance"]["parents"] for made in first] == [["a"], ["b"]]
    assert [made["provenance"]["parents"][0] for made in second] == [made["id"] for made in first]
    assert {made["lang"] for made in first} == {"en", "zh"}
    for made in [*first, *second]:
        operation = made["provenance"]["operation"].removeprefix("evol:")
        assert operation in OPERATIONS
        assert f"evol_{operation}@" in made["provenance"]["template"]
    assert unit.account.stats()["rounds"] == {"0": {"asked": 2, "kept": 2}, "1": {"asked": 2, "kept": 2}}
    unit.account.ledger.check("test")


def test_a_failed_item_returns_to_the_pool_and_is_tried_again(tmp_path: Path) -> None:
    def refuse_first(request: Request) -> str | Reply:
        refused = last(request) == "New prompt:" and len(recording.asked) <= 1
        return said("Bake it.") if refused else play(request)

    recording = Recording(refuse_first)
    settings = EvolSettings(rounds=2, operations={"deepen": 1.0})
    (unit,) = evolve(tmp_path, [row(*POOL[0])], settings, recording)
    assert [r["reason"] for r in unit.account.rejects] == ["lost_topic"]
    assert unit.account.rejects[0]["source"] == "a"
    assert [made["provenance"]["parents"] for made in evolved(unit)] == [["a"]]
    assert [made["provenance"]["round"] for made in evolved(unit)] == [1]
    unit.account.ledger.check("test")


def many(count: int) -> list[dict[str, Any]]:
    topics = ["bread", "glass", "paper", "steel", "wool", "salt", "honey", "cork", "ink", "soap"]
    return [row(f"r{n}", f"Explain how {topics[n % 10]} number {n} is made in a workshop.", None) for n in range(count)]


@pytest.mark.parametrize("cap", [None, 900])
def test_neither_completion_order_nor_a_slow_input_changes_a_row(tmp_path: Path, cap: int | None) -> None:
    """Equal rewrites of different items, so that novelty decides by order."""

    def alike(request: Request) -> str | Reply:
        if last(request) == "New prompt:" and request.seed % 3 == 0:
            return "Explain how bread and glass and paper are made in a workshop, and what they have in common."
        return play(request)

    def dripping() -> Iterator[dict[str, Any] | None]:
        for made in many(30):
            yield from (None, made, None)

    settings = EvolSettings(rounds=3, operations={"deepen": 1.0, "breadth": 1.0}, min_parent_recall=0.1)
    found = []
    for number, (rows, reverse) in enumerate([(many(30), False), (many(30), True), (dripping(), True)]):
        units = evolve(tmp_path / str(number), rows, settings, Recording(alike, reverse), cap, unit_rows=8, lag=5)
        assert [unit.number for unit in units] == [0, 1, 2, 3]
        for unit in units:
            unit.account.ledger.check("test")
        found.append([(unit.account.rows, unit.account.rejects, unit.account.stats(), unit.rewrites) for unit in units])
    assert found[0] == found[1] == found[2]
    reasons = {reject["reason"] for _, rejects, _, _ in found[0] for reject in rejects}
    assert "not_novel" in reasons if cap is None else "token_cap" in reasons
    assert sum(len(rows) for rows, _, _, _ in found[0]) > 30


def test_what_is_known_of_committed_units_takes_the_place_of_asking_again(tmp_path: Path) -> None:
    settings = EvolSettings(rounds=2)
    whole = evolve(tmp_path / "a", many(30), settings, unit_rows=8, lag=5)
    known = {
        unit.number: {
            place: {number: (identity, text) for at, number, identity, text in unit.rewrites if at == place}
            for place in {rewrite[0] for rewrite in unit.rewrites}
        }
        for unit in whole[:2]
    }
    recording = Recording(play)
    method = EvolInstruct(settings, generator(recording, str(tmp_path / "b")), "recorded", 17, unit_rows=8, lag=5)
    rest = list(method.units(many(30), known.get))
    assert [unit.number for unit in rest] == [2, 3]
    assert [unit.account.rows for unit in rest] == [unit.account.rows for unit in whole[2:]]
    assert [unit.account.rejects for unit in rest] == [unit.account.rejects for unit in whole[2:]]
    assert not any(f"number {n} is" in last(request) for request in recording.asked for n in range(16))


def test_early_items_are_answered_while_the_input_is_still_growing(tmp_path: Path) -> None:
    recording = Recording(play)
    answers = []

    def growing() -> Iterator[dict[str, Any] | None]:
        for made in many(20):
            yield made
            yield None
            yield None
        answers.append(sum(request.messages[-1][0] == "user" for request in recording.asked))

    evolve(tmp_path, growing(), EvolSettings(), recording, unit_rows=8, lag=5)
    assert answers[0] > 8


def test_rows_that_are_no_single_turn_pass_through_and_an_empty_input_is_a_unit(tmp_path: Path) -> None:
    dialogue = {**row("d", "x", "en"), "messages": [{"role": "user", "content": "a"}]}
    (unit,) = evolve(tmp_path, [dialogue])
    assert [made["id"] for made in unit.account.rows] == ["d"]
    assert unit.account.ledger.to_json() == {"in": 1, "created": 0, "kept": 1, "rejected": {}, "quarantined": 0}
    (nothing,) = evolve(tmp_path, [])
    assert nothing.account.ledger.kept == 0


def test_a_rewrite_that_adds_far_too_much_is_set_aside_on_request() -> None:
    long = said("Explain how bread rises in the oven, " + "and why this matters to a baker, " * 9)
    assert isinstance(parse_rewrite(long, POOL[0][1], "en", "deepen", EVOL), str)
    found = parse_rewrite(long, POOL[0][1], "en", "deepen", EvolSettings(most_added=1.5))
    assert isinstance(found, Reject)
    assert found.reason == "adds_too_much"


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
        (said("  "), "en", "empty"),
        (
            said("Explain why we need sleep, what happens in the brain during its stages, and how a lack of it changes mood."),
            "en",
            "copied_example",
        ),
        (said("解释人为什么需要睡眠，睡眠各阶段大脑里发生了什么，以及缺觉会怎样影响记忆和情绪。"), "zh", "copied_example"),
        (said("I'm glad to explain how bread rises in the oven for you today."), "en", "no_instruction"),
    ],
)
def test_rewrites_are_eliminated_with_a_reason(reply: Reply, lang: str, reason: str | None) -> None:
    parent = POOL[0][1] if lang == "en" else POOL[1][1]
    found = parse_rewrite(reply, parent, lang, "deepen", EVOL)
    assert (found.reason if isinstance(found, Reject) else None) == reason


def test_the_judge_is_read_in_both_languages() -> None:
    assert [parse_judgement(said(text), "en") for text in ("Equal", "Not Equal.", "Hm")] == [True, False, None]
    assert [parse_judgement(said(text), "zh") for text in ("相同", "不同", "不相同", "嗯")] == [True, False, False, None]


def test_a_judge_who_sees_no_gain_eliminates_and_an_unclear_one_by_choice(tmp_path: Path) -> None:
    for said_, settings, reason in [
        ("Equal", EvolSettings(), "judged_equal"),
        ("Hm", EvolSettings(judge_unclear="drop"), "judged_unclear"),
        ("Hm", EvolSettings(), None),
    ]:
        engine = Recording(lambda r, said_=said_: said_ if r.sampling.max_tokens == 4 else play(r))
        (unit,) = evolve(tmp_path / f"{said_}{reason}", [row(*POOL[0])], settings, engine)
        assert [r["reason"] for r in unit.account.rejects] == ([reason] if reason else [])


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
