"""Evol-Instruct and preference pairs on recorded replies, English and Chinese."""

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
from operators.synthesis.preferences import (
    PreferencePrompt,
    PreferenceSettings,
    Scored,
    choose,
    form_score,
    pair_flow,
    score_samples,
)
from operators.synthesis.requests import Reject, Reply, Request
from tests.operators.synthesis.recorded import Recording, generator, last, played

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


PREFERENCES = PreferenceSettings(samples=4, min_margin=0.1)


def prompt(identity: str, text: str, lang: str = "en") -> PreferencePrompt:
    return PreferencePrompt(identity, (("user", text),), "Paris is the capital of France.", lang)


def test_the_best_and_the_worst_sample_become_a_pair(tmp_path: Path) -> None:
    samples = [
        "The capital is Paris.",
        "The capital of France is Paris.",
        "France's capital is Paris.",
        "no no no no no no no no no no no no",
    ]
    chinese = ["首都是巴黎。", "法国的首都是巴黎。", "法国首都是巴黎。", "不不不不不不不不不不不不"]
    recording = Recording(lambda r: (chinese if "首都" in last(r) else samples)[r.sample])
    found = [prompt("p", "What is the capital of France?"), prompt("q", "法国的首都是哪里？", "zh")]
    account = played(
        generator(recording, str(tmp_path)), (pair_flow(prompt, PREFERENCES, "revision", "recorded", 17) for prompt in found)
    )
    stats = account.stats()
    assert [row["rejected"][0]["content"] for row in account.rows] == [samples[3], chinese[3]]
    assert all("Paris" in row["chosen"][0]["content"] or "巴黎" in row["chosen"][0]["content"] for row in account.rows)
    assert all(row["margin"] >= 0.1 for row in account.rows)
    assert stats["pairs"] == 2
    assert account.rows[0]["prompt"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert len({r.seed for r in recording.asked}) == 8, "samples of one prompt have seeds of their own"


def test_ties_and_small_margins_never_become_pairs(tmp_path: Path) -> None:
    recording = Recording(
        lambda r: "Paris." if "tie" in last(r) else f"The capital of France is Paris, dear reader{'.' * (r.sample + 1)}"
    )
    found = [prompt("p", "tie: the capital of France?"), prompt("q", "What is the capital of France?")]
    account = played(generator(recording, str(tmp_path)), (pair_flow(prompt, PREFERENCES, "revision", "m", 17) for prompt in found))
    assert not account.rows
    assert {r["reason"] for r in account.rejects} <= {"tie", "margin"}
    account.ledger.check("test")
    assert account.ledger.rows_in == 2


def test_choose_needs_the_margin_and_breaks_ties_by_sample_number() -> None:
    scored = [Scored("a", 0.5, 0, 1), Scored("b", 0.9, 0, 1), Scored("c", 0.9, 0, 1), Scored("d", 0.5, 0, 1)]
    best, worst, margin = choose(scored, 0.1)  # type: ignore[misc]
    assert (best.text, worst.text, margin) == ("b", "a", 0.4)
    assert choose(scored, 0.5) == Reject("margin", 0.4)
    assert choose([scored[1], scored[1]], 0.1) == Reject("tie", 0.0)


def test_form_counts_faults_and_not_length() -> None:
    question = "Tell me about rivers."
    assert form_score(question, said("Rivers carry water to the sea."), "en") == 1.0
    assert form_score(question, said("Rivers carry water to the sea. " + " ".join(f"w{n}" for n in range(300))), "en") == 1.0
    assert form_score(question, said("Rivers carry water", "length"), "en") == 0.5
    assert form_score(question, said("I'm sorry, I can't help."), "en") == 0.5
    assert form_score("介绍一下河流。", said("Rivers carry water to the sea."), "zh") == 0.0
    assert form_score(question, said("?!"), "en") == 0.0
    assert form_score(question, said("Tell me about rivers."), "en") == 0.0


def test_reference_agreement_prefers_what_is_like_the_rows_own_answer() -> None:
    settings = PreferenceSettings(agreement="reference", agreement_weight=1.0)
    replies = [said("Paris is the capital of France."), said("Berlin.")]
    scored = score_samples(prompt("p", "What is the capital of France?"), replies, settings)
    assert scored[0].score == 1.0
    assert scored[1].score == 0.0
