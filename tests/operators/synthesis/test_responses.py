"""Prompts answered anew on recorded replies, English and Chinese: all, the best, or until one passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from operators.config import SettingsError, parse
from operators.synthesis.requests import PROMPT_TOO_LONG, Reply, Request
from operators.synthesis.responses import ResponseSettings, response_flow
from operators.synthesis.rows import Account
from operators.synthesis.scoring import OpenPrompt, Panel
from pipelines.stages.responses import ResponsesStage
from tests.operators.synthesis.bench import Bench
from tests.operators.synthesis.recorded import Recording, generator, last, played
from tests.operators.synthesis.test_preferences import row_of, write_rows

PANEL = Panel(17, "recorded", "revision")
ASKED = {
    "en": OpenPrompt("p", (("user", "Tell me about rivers."),), "Rivers flow to the sea.", "en"),
    "zh": OpenPrompt("q", (("system", "简短。"), ("user", "你好"), ("assistant", "你好！"), ("user", "介绍河流。")), None, "zh"),
}
REPLIES = {
    "en": ["Sorry, I cannot say. I am sorry.", "Rivers flow", "Rivers flow to the sea.", "Water runs in rivers."],
    "zh": ["抱歉，我不能回答。对不起。", "河流流", "河流流向大海。", "水在河里流。"],
}


def answer(request: Request) -> str | Reply:
    """A refusal, a reply that is cut off, two good ones. The judge gives 2 points to the third sample and 9 to the fourth."""
    text = last(request)
    lang = "zh" if "河" in text else "en"
    if request.json_schema:
        reply = text.split("<<REPLY")[1].split("<<END")[0]
        points = 9 if REPLIES[lang][3] in reply else 2
        return json.dumps({"helpful": points, "correct": points, "clear": points})
    said = REPLIES[lang][request.sample]
    cut = request.sample == 1
    return Reply(said, "length" if cut else "stop", 10, request.sampling.max_tokens if cut else 5)


def answered(recording: Recording, directory: Path, lang: str = "en", **values: Any) -> Account:
    settings = ResponseSettings.model_validate(values)
    return played(generator(recording, str(directory)), [response_flow(ASKED[lang], settings, PANEL)])


def texts(account: Account) -> list[str]:
    return [row["messages"][-1]["content"] for row in account.rows]


def reasons(account: Account) -> list[str]:
    return [f"{row['operator']}:{row['reason']}" for row in account.rejects]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_all_replies_that_pass_are_kept_with_their_scores(lang: str, tmp_path: Path) -> None:
    account = answered(Recording(answer), tmp_path, lang, min_form=0.6)
    assert texts(account) == REPLIES[lang][2:]
    assert reasons(account) == ["responses.samples:form", "responses.samples:truncated"]
    row = account.rows[0]
    assert row["messages"][:-1] == [{"role": r, "content": c} for r, c in ASKED[lang].messages]
    assert row["score"] == row["form"] == 1.0 and row["tokens"] == 5
    assert row["provenance"]["parents"] == [ASKED[lang].id] and row["provenance"]["operation"] == "response"
    assert len({row["id"] for row in account.rows}) == 2
    assert (account.ledger.rows_in, account.ledger.created, account.ledger.kept) == (1, 3, 2)
    account.ledger.check("test")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_best_reply_is_the_one_that_the_judge_scores_highest(lang: str, tmp_path: Path) -> None:
    account = answered(Recording(answer), tmp_path, lang, keep="best", scorer="judge")
    assert texts(account) == [REPLIES[lang][3]]
    assert account.rows[0]["score"] == 9.0
    assert json.loads(account.rows[0]["scores"]) == {"helpful": 9.0, "correct": 9.0, "clear": 9.0}
    assert "responses.samples:not_best" in reasons(account)
    assert (account.ledger.rows_in, account.ledger.created, account.ledger.kept) == (1, 3, 1)
    account.ledger.check("test")
    low = answered(Recording(answer), tmp_path / "low", lang, keep="best", scorer="judge", minimum=9.5)
    assert not low.rows and reasons(low)[-1] == "responses:none_passed"
    low.ledger.check("test")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_rejection_sampling_draws_until_one_passes_and_no_more(lang: str, tmp_path: Path) -> None:
    recording = Recording(answer)
    account = answered(recording, tmp_path, lang, keep="first_passing", scorer="judge", minimum=1.5, min_form=0.6)
    assert texts(account) == [REPLIES[lang][2]]
    drawn = [r for r in recording.asked if not r.json_schema]
    assert [r.sample for r in drawn] == [0, 1, 2] and len({r.seed for r in drawn}) == 3
    assert reasons(account) == ["responses.samples:form", "responses.samples:truncated"]
    assert account.extra["draws"] == {"3": 1}
    assert account.extra["judge"]["judgements"] == 3
    account.ledger.check("test")
    strict = answered(Recording(answer), tmp_path / "strict", lang, keep="first_passing", scorer="judge", minimum=10)
    assert reasons(strict)[-1] == "responses:none_passed" and len(strict.rejects) == 5
    strict.ledger.check("test")


def test_all_samples_and_rejection_sampling_draw_the_same_replies(tmp_path: Path) -> None:
    """They share the reply cache: going from one to the other pays for nothing twice."""
    first, second = Recording(answer), Recording(answer)
    answered(first, tmp_path, keep="all")
    answered(second, tmp_path, keep="first_passing")
    assert len(first.asked) == 4 and not second.asked


def test_a_reference_scores_and_is_missed_where_there_is_none(tmp_path: Path) -> None:
    values = {"keep": "first_passing", "scorer": "agreement", "agreement": "reference", "minimum": 0.9, "min_form": 0.0}
    assert texts(answered(Recording(answer), tmp_path, "en", **values)) == [REPLIES["en"][2]]
    assert reasons(answered(Recording(answer), tmp_path, "zh", **values)) == ["responses:no_reference"]


def test_a_prompt_that_is_too_long_is_rejected_and_not_drawn_again(tmp_path: Path) -> None:
    recording = Recording(lambda r: Reply("", PROMPT_TOO_LONG, 9000, 0))
    account = answered(recording, tmp_path, keep="first_passing", scorer="form")
    assert reasons(account) == ["responses.samples:prompt_too_long", "responses:none_passed"] and len(recording.asked) == 1
    account.ledger.check("test")
    whole = answered(Recording(lambda r: Reply("", PROMPT_TOO_LONG, 9000, 0)), tmp_path / "all")
    assert reasons(whole) == ["responses.samples:prompt_too_long"] * 4 + ["responses:none_passed"]
    whole.ledger.check("test")


def test_empty_replies_and_equal_ones_are_rejected_with_their_reasons(tmp_path: Path) -> None:
    account = answered(Recording(lambda r: "" if r.sample == 0 else "Rivers flow to the sea."), tmp_path)
    assert reasons(account) == ["responses.samples:empty", *["responses.samples:duplicate_reply"] * 2]
    assert len(account.rows) == 1
    account.ledger.check("test")


def test_prompts_are_framed_or_asked_as_they_are(tmp_path: Path) -> None:
    framed, bare = Recording(answer), Recording(answer)
    answered(framed, tmp_path / "a", samples=1)
    answered(bare, tmp_path / "b", samples=1, framed=False)
    assert framed.asked[0].messages[0][0] == "system" and framed.asked[0].messages[1:] == ASKED["en"].messages
    assert bare.asked[0].messages == ASKED["en"].messages
    own = Recording(answer)
    answered(own, tmp_path / "c", "zh", samples=1)
    assert own.asked[0].messages == ASKED["zh"].messages, "a prompt's own system message stays the only one"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": "first_passing", "scorer": "agreement"}, "several at once"),
        ({"keep": "first_passing", "scorer": "judge", "judge": {"method": "pairs"}}, "several replies at once"),
        ({"keep": "first_passing", "length_penalty": 1}, "several replies"),
        ({"keep": "best", "samples": 1}, "above 1"),
    ],
)
def test_settings_that_cannot_work_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(ResponsesStage, {"kind": "responses", "input": "x", **values}, "stages.new")


def test_the_stage_answers_rows_with_and_without_answers_and_each_of_equal_prompts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    rows = [
        row_of(("user", "Tell me about rivers."), ("assistant", "No.")),
        row_of(("user", "Tell me about rivers.")),
        row_of(("user", "介绍河流。")),
        row_of(("assistant", "?")),
        row_of(("user", "Tell me\x00 about \U0001f30a rivers." + "x" * 10_000)),
    ]
    write_rows(bench, [{**row, "id": f"c{n}", "provenance": None} for n, row in enumerate(rows)])
    values = {"input": "tasks", "samples": 4, "min_form": 0.6}
    made = bench.stage(ResponsesStage, "responses", values, Recording(answer))
    found = bench.rows("responses")
    assert [row["provenance"]["parents"] for row in found] == [["c0"], ["c0"], ["c1"], ["c1"], ["c2"], ["c2"], ["c4"], ["c4"]]
    assert len({row["id"] for row in found}) == 8
    assert found[0]["messages"][-1]["content"] == REPLIES["en"][2]
    assert made.ledger.to_json() == {
        "in": 5, "created": 12, "kept": 8, "quarantined": 0,
        "rejected": {"responses.samples:form": 4, "responses.samples:truncated": 4, "responses:no_prompt": 1},
    }  # fmt: skip
    whole = bench.forget("responses")
    bench.stage(ResponsesStage, "responses", values, None)
    assert bench.forget("responses") == whole
    once = bench.stage(ResponsesStage, "responses-2", {**values, "duplicates": "reject"}, Recording(answer, reverse=True))
    assert once.ledger.rejected["responses:duplicate_prompt"] == 1
    few = bench.stage(ResponsesStage, "responses-3", values, Recording(answer), limit=1)
    assert few.ledger.rejected["responses:left_over"] == 3
