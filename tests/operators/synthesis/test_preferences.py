"""Preference pairs and labels on recorded replies, English and Chinese."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import shards, tables
from operators.config import SettingsError, parse
from operators.ledger import Ledger
from operators.stage import StageContext
from operators.synthesis import length_bias
from operators.synthesis.packaged import model_revision
from operators.synthesis.preferences import PAIRS, PairingSettings, PreferenceSettings, choose, preference_flow
from operators.synthesis.requests import Reject, Reply, Request
from operators.synthesis.rows import Account, table_of
from operators.synthesis.scoring import OpenPrompt, Panel, Scored, Scores, form_score, open_prompt, score
from operators.synthesis.seen import SeenHashes
from pipelines.stages.preferences import PreferencesStage
from tests.operators.synthesis.bench import Bench
from tests.operators.synthesis.recorded import Recording, generator, last, played

PANEL = Panel(17, "recorded", "revision")
PREFERENCES = PreferenceSettings(samples=4, min_margin=0.1)
RIVERS = {
    "en": [
        "Nile.",
        "The Nile flows north through Egypt.",
        "The Nile, a river of Egypt, flows north.",
        "no no no no no no no no no no",
    ],
    "zh": ["尼罗河。", "尼罗河向北流经埃及。", "埃及的尼罗河向北流。", "不不不不不不不不不不不不"],
}


def said(text: str, reason: str = "stop", tokens: int = 10) -> Reply:
    return Reply(text, reason, 10, tokens)


def prompt(identity: str, text: str, lang: str = "en", reference: str | None = None) -> OpenPrompt:
    return OpenPrompt(identity, (("user", text),), reference, lang)


def lang_of(request: Request) -> str:
    return "zh" if "河" in last(request) else "en"


def river(request: Request) -> str | Reply:
    return RIVERS[lang_of(request)][request.sample]


def pairs_of(recording: Recording, prompts: list[OpenPrompt], settings: PreferenceSettings, directory: Path) -> Account:
    return played(generator(recording, str(directory)), (preference_flow(item, settings, PANEL) for item in prompts))


BOTH = [prompt("p", "Tell me about the longest river of Africa."), prompt("q", "介绍一下非洲最长的河。", "zh")]


def test_the_best_and_the_worst_sample_become_a_pair(tmp_path: Path) -> None:
    recording = Recording(river)
    account = pairs_of(recording, BOTH, PREFERENCES, tmp_path)
    assert [row["rejected"][0]["content"] for row in account.rows] == [RIVERS["en"][3], RIVERS["zh"][3]]
    assert all("Nile" in row["chosen"][0]["content"] or "尼罗河" in row["chosen"][0]["content"] for row in account.rows)
    for row in account.rows:
        assert row["margin"] == round(row["score_chosen"] - row["score_rejected"], 4) >= 0.1
    assert account.rows[0]["prompt"] == [{"role": "user", "content": BOTH[0].messages[0][1]}]
    assert len({r.seed for r in recording.asked}) == 8, "samples of one prompt have seeds of their own"
    account.ledger.check("test")


def test_completion_order_does_not_matter(tmp_path: Path) -> None:
    forward = pairs_of(Recording(river), BOTH, PREFERENCES, tmp_path / "a")
    backward = pairs_of(Recording(river, reverse=True), BOTH, PREFERENCES, tmp_path / "b")
    assert (forward.rows, forward.rejects, forward.stats()) == (backward.rows, backward.rejects, backward.stats())


def test_ties_and_small_margins_never_become_pairs(tmp_path: Path) -> None:
    recording = Recording(
        lambda r: "Paris." if "tie" in last(r) else f"The capital of France is Paris, dear reader{'.' * (r.sample + 1)}"
    )
    found = [prompt("p", "tie: the capital of France?"), prompt("q", "What is the capital of France?")]
    account = pairs_of(recording, found, PREFERENCES, tmp_path)
    assert not account.rows
    assert {r["reason"] for r in account.rejects} <= {"tie", "margin"}
    assert account.ledger.rows_in == 2
    account.ledger.check("test")


def scored(*values: float | None, tokens: list[int] | None = None, form: float = 1.0) -> Scores:
    lengths = tokens or [10] * len(values)
    return Scores(
        [
            Scored(f"text {n}", value, form, lengths[n], n, value, why=Reject("judge_malformed") if value is None else None)
            for n, value in enumerate(values)
        ]
    )


def chosen(scores: Scores, margin: float = 0.1, **values: Any) -> list[tuple[int, int, float]] | str:
    found = choose(scores, PairingSettings(**values), margin)
    return found.reason if isinstance(found, Reject) else [(a.number, b.number, m) for a, b, m in found]


def test_choose_needs_the_margin_and_breaks_ties_by_sample_number() -> None:
    assert chosen(scored(0.5, 0.9, 0.9, 0.5)) == [(1, 0, 0.4)]
    assert chosen(scored(0.5, 0.9), 0.5) == "margin"
    assert chosen(scored(0.9, 0.9)) == "tie"
    assert chosen(scored(0.9, None)) == "judge_malformed"
    assert chosen(scored(0.5, 0.9, form=0.0)) == "none_good"
    assert chosen(scored(0.5, 0.9), min_chosen=0.95) == "below_minimum"


def test_all_pairs_come_widest_first_up_to_the_most_of_a_prompt() -> None:
    found = chosen(scored(1.0, 4.0, 2.0, 3.0), 1.0, pairs="all")
    assert found == [(1, 0, 3.0), (1, 2, 2.0), (3, 0, 2.0), (1, 3, 1.0), (2, 0, 1.0), (3, 2, 1.0)]
    assert chosen(scored(1.0, 4.0, 2.0, 3.0), 1.5, pairs="all") == found[:3]
    assert chosen(scored(1.0, 4.0, 2.0, 3.0), 1.0, pairs="all", max_pairs=2) == found[:2]


def test_a_pair_of_too_unlike_lengths_gives_way_to_the_next() -> None:
    lengths = [10, 90, 20, 12]
    assert chosen(scored(1.0, 4.0, 2.0, 3.0, tokens=lengths), 1.0) == [(1, 0, 3.0)]
    assert chosen(scored(1.0, 4.0, 2.0, 3.0, tokens=lengths), 1.0, max_length_ratio=2.0) == [(3, 0, 2.0)]
    assert chosen(scored(1.0, 4.0, tokens=lengths), 1.0, max_length_ratio=2.0) == "length_ratio"


@given(
    st.lists(st.none() | st.integers(0, 40).map(lambda n: n / 8), min_size=2, max_size=8),
    st.sampled_from([0.01, 0.125, 0.5, 2.0]),
    st.sampled_from(["best_worst", "all"]),
    st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_pairs_are_exactly_those_at_least_the_margin_apart(
    values: list[float | None], margin: float, pairs: str, most: int
) -> None:
    expected = sorted(
        (
            (i, j, a - b)
            for i, a in enumerate(values)
            for j, b in enumerate(values)
            if a is not None and b is not None and a - b >= margin
        ),
        key=lambda pair: (-pair[2], pair[0], pair[1]),
    )
    found = chosen(scored(*values), margin, pairs=pairs, max_pairs=most)
    if not expected:
        assert isinstance(found, str)
    else:
        assert found == expected[: 1 if pairs == "best_worst" else most]


def test_form_counts_faults_and_not_length() -> None:
    question = "Tell me about rivers."
    assert form_score(question, said("Rivers carry water to the sea."), "en") == 1.0
    assert form_score(question, said("Rivers carry water to the sea. " + " ".join(f"w{n}" for n in range(300))), "en") == 1.0
    assert form_score(question, said("Rivers carry water", "length"), "en") == 0.5
    assert form_score(question, said("I'm sorry, I can't help."), "en") == 0.5
    assert form_score("介绍一下河流。", said("Rivers carry water to the sea."), "zh") == 0.0
    assert form_score("Расскажи о реках.", said("Реки несут воду в море."), "ru") == 1.0
    assert form_score(question, said("?!"), "en") == 0.0
    assert form_score(question, said("Tell me about rivers."), "en") == 0.0


def run_score(item: OpenPrompt, replies: list[Reply], settings: PreferenceSettings) -> list[Scored]:
    flow = score(item, list(enumerate(replies)), settings, PANEL)
    with pytest.raises(StopIteration) as end:
        next(flow)
    return end.value.value.samples  # type: ignore[no-any-return]


def test_reference_agreement_prefers_what_is_like_the_rows_own_answer(tmp_path: Path) -> None:
    settings = PreferenceSettings(agreement="reference", agreement_weight=1.0)
    item = prompt("p", "What is the capital of France?", reference="Paris is the capital of France.")
    assert [s.score for s in run_score(item, [said("Paris is the capital of France."), said("Berlin.")], settings)] == [1.0, 0.0]
    account = pairs_of(Recording(river), [BOTH[0]], settings, tmp_path)
    assert [r["reason"] for r in account.rejects] == ["no_reference"]


def test_the_length_penalty_takes_points_off_for_every_doubling() -> None:
    settings = PreferenceSettings(scorer="form", length_penalty=0.25)
    replies = [said("The Nile flows north.", tokens=8), said("The Nile flows north through Egypt to the sea.", tokens=32)]
    found = run_score(BOTH[0], replies, settings)
    assert [(s.raw, s.score) for s in found] == [(1.0, 1.25), (1.0, 0.75)]


def test_an_empty_reply_has_no_score_where_a_model_would_have_to_judge_it(tmp_path: Path) -> None:
    settings = PreferenceSettings(scorer="judge", samples=3)
    answers = ["", "The Nile.", "The Nile flows north."]
    recording = Recording(lambda r: '{"helpful": 5, "correct": 5, "clear": 5}' if r.json_schema else answers[r.sample])
    account = pairs_of(recording, BOTH[:1], settings, tmp_path)
    assert [r["reason"] for r in account.rejects] == ["tie"]
    assert account.extra["unscored"] == {"empty": 1}
    assert sum(r.json_schema is not None for r in recording.asked) == 2


# --- length bias


@given(st.lists(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 80)), min_size=2, max_size=6), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_bias_is_the_correlation_of_scores_and_log_lengths_centred_within_prompts(groups: list[list[tuple[int, int]]]) -> None:
    by_lang: dict[str, dict[str, float]] = {"en": {}}
    xs: list[float] = []
    ys: list[float] = []
    for group in groups:
        sums = length_bias.score_sums([(tokens, points / 8, 0.0) for tokens, points in group])
        for name, value in sums.items():
            by_lang["en"][name] = by_lang["en"].get(name, 0) + value
        logs = [math.log2(tokens) for tokens, _ in group]
        xs += [value - sum(logs) / len(group) for value in logs]
        ys += [points / 8 - sum(p / 8 for _, p in group) / len(group) for _, points in group]
    found = length_bias.biases(by_lang)["all"]
    spread, height = sum(x * x for x in xs), sum(y * y for y in ys)
    if spread > 1e-9 and height > 1e-9:
        shared = sum(x * y for x, y in zip(xs, ys, strict=True))
        assert found["correlation"] == pytest.approx(shared / math.sqrt(spread * height), abs=1e-4)
        assert found["points_per_doubling"] == pytest.approx(shared / spread, abs=1e-3)


def pair_row(n: int, margin: float, chosen: int, rejected: int, lang: str = "en") -> dict[str, Any]:
    message = [{"role": "user", "content": f"text {n}"}]
    return {
        "id": f"r{n}", "prompt": message, "chosen": message, "rejected": message, "margin": margin, "lang": lang,
        "provenance": {"operation": "preference"}, "tokens_chosen": chosen, "tokens_rejected": rejected,
    }  # fmt: skip


def test_the_share_of_longer_chosen_replies_is_bound_and_the_narrowest_go() -> None:
    account = Account("preferences")
    for n, (margin, chosen, rejected) in enumerate([(0.5, 20, 10), (0.2, 20, 10), (0.9, 5, 10), (0.4, 20, 10), (0.3, 10, 10)]):
        account.keep(pair_row(n, margin, chosen, rejected), "preference", created=False)
    length_bias.bound_length(account, 0.5, None)
    assert [row["id"] for row in account.rows] == ["r0", "r2", "r3", "r4"]
    assert [(r["id"], r["reason"], r["value"]) for r in account.rejects] == [("r1", "chosen_longer", 2.0)]
    account.ledger.check("test")
    assert account.operations["preference"] == 4
    length_bias.bound_length(account, 0.0, None)
    assert [row["id"] for row in account.rows] == ["r2", "r4"]
    length_bias.bound_length(account, 1.0, 0.4)
    assert [row["id"] for row in account.rows] == ["r4"]
    assert account.rejects[-1]["reason"] == "chosen_shorter"
    account.ledger.check("test")


# --- labels


def test_labels_come_from_thresholds_and_everything_drawn_is_accounted_for(tmp_path: Path) -> None:
    settings = PreferenceSettings.model_validate({"samples": 4, "scorer": "agreement", "unpaired": {"good": 0.6, "bad": 0.4}})
    account = pairs_of(Recording(river), BOTH, settings, tmp_path)
    labels = {(row["lang"], row["messages"][-1]["content"]): row["label"] for row in account.rows}
    assert labels["en", RIVERS["en"][3]] is False and labels["zh", RIVERS["zh"][3]] is False
    assert True in labels.values()
    assert all(row["score"] >= 0.6 if row["label"] else row["score"] <= 0.4 for row in account.rows)
    assert account.ledger.rows_in == 2
    assert account.ledger.kept + account.ledger.rejected.total() == 8
    account.ledger.check("test")


def test_a_prompt_without_a_label_is_itself_rejected(tmp_path: Path) -> None:
    settings = PreferenceSettings.model_validate({"samples": 4, "unpaired": {"good": 5.0, "bad": -5.0}})
    account = pairs_of(Recording(river), BOTH[:1], settings, tmp_path)
    assert sorted(r["reason"] for r in account.rejects) == ["between"] * 4 + ["no_label"]
    account.ledger.check("test")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unpaired": {"good": 1, "bad": 0}, "pairs": "all"}, "`unpaired` makes no pairs"),
        ({"unpaired": {"good": 0, "bad": 0}}, "must be below"),
        ({"scorer": "reward"}, "needs `reward"),
        ({"reward": {"model": "x"}}, "write `scorer: reward`"),
        ({"judge": {"method": "pairs"}}, "write `scorer: judge`"),
        ({"scorer": "judge", "judge": {"low": 5, "high": 5}}, "must be below"),
        ({"scorer": "judge", "judge": {"repeats": 3}}, "needs `sampling"),
        ({"scorer": "judge", "judge": {"rubric": [{"name": "a", "question": {}}]}}, "asks nothing"),
        ({"samples": 1}, "greater than or equal to 2"),
        ({"min_margin": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(PreferencesStage, {"kind": "preferences", "input": "x", **values}, "stages.pairs")


# --- prompts of rows


def row_of(*messages: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"id": "r", "messages": [{"role": r, "content": c} for r, c in messages], "lang": None, "tools": None, **more}


def test_prompts_may_be_answered_or_not_and_of_several_turns() -> None:
    turns = [("system", "Be kind."), ("user", "你好"), ("assistant", "你好！"), ("user", "再见")]
    open_ = open_prompt(row_of(*turns))
    assert isinstance(open_, OpenPrompt) and open_.reference is None and open_.lang == "zh" and len(open_.messages) == 4
    answered = open_prompt(row_of(*turns, ("assistant", "再见！")))
    assert isinstance(answered, OpenPrompt) and answered.reference == "再见！" and answered.messages == open_.messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row_of(), "no_prompt"),
        (row_of(("system", "x")), "no_prompt"),
        (row_of(("user", "  "), ("assistant", "x")), "no_prompt"),
        (row_of(("user", "a"), ("assistant", "b"), ("assistant", "c")), "no_prompt"),
        (row_of(("user", "a"), tools="[]"), "tools"),
        (row_of(("user", "a"), ("function_call", "{}"), ("tool", "1"), ("assistant", "b")), "tools"),
        (row_of(("narrator", "once"), ("user", "a")), "unknown_role"),
    ],
)
def test_rows_without_a_prompt_are_rejected(row: dict[str, Any], reason: str) -> None:
    found = open_prompt(row)
    assert isinstance(found, Reject) and found.reason == reason


def test_seen_prompts_are_remembered_by_their_pieces_through_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.synthesis.seen._RECENT", 16)
    seen = SeenHashes()
    assert all(seen.add(["user", f"text {n}"]) for n in range(500))
    assert not any(seen.add(["user", f"text {n}"]) for n in range(500))
    assert seen.add(["user", "tex", "t 1"]) and seen.add(["\ud800", "\x00"])
    assert len(seen) == 502 and len(seen._recent) < 80


# --- the stage


def write_rows(bench: Bench, rows: list[dict[str, Any]], name: str = "tasks") -> None:
    """Conversations as if a stage had made them."""
    directory = str(bench.run / name / "f0")
    writer = shards.UnitWriter(directory, 0)
    writer.write(table_of(rows, tables.CONVERSATIONS))
    writer.commit(Ledger(rows_in=len(rows), kept=len(rows)), {})
    shards.finish(directory, stage=name, kind="conversations", fingerprint="f0", config={}, inputs={})
    bench.directories[name] = directory


def conversations(count: int) -> list[dict[str, Any]]:
    """Every fifth prompt came before; a few have no prompt."""
    rows = []
    for n in range(count):
        text = f"第 {n - n % 5 // 4} 条：介绍一条河。" if n % 2 else f"Number {n - n % 5 // 4 * 2}: tell me about a river."
        turns = [("user", text)] if n % 7 else [("assistant", "?")]
        rows.append({**row_of(*turns), "id": f"c{n}", "provenance": None})
    return rows


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def longwinded(request: Request) -> str | Reply:
    """Four replies; the longer the better, with noise by prompt, and the judge sees that."""
    text = request.messages[-1][1]
    if request.json_schema is not None:
        points = min(10, len(text.split("<<REPLY")[1].split("<<END REPLY")[0]) // 9)
        return json.dumps({"helpful": points, "correct": points, "clear": points})
    words = (request.sample * 3 + len(text)) % 9 + 2
    reply = " ".join(f"river{n}" for n in range(words)) if lang_of(request) == "en" else "河水流向大海，" * words
    return Reply(reply, "stop", 10, words)


def test_a_resumed_stage_sees_the_same_duplicates_and_ends_with_the_same_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.generating.UNIT_ROWS", 8)
    monkeypatch.setattr("pipelines.stages.generating.GeneratingStage.run_rows.__defaults__", (8, None))
    write_rows(bench, conversations(40))
    values = {"input": "tasks", "scorer": "judge", "min_margin": 0.5, "max_chosen_longer": 0.5}
    first = Recording(longwinded)
    made = bench.stage(PreferencesStage, "preferences", values, first)
    assert made.ledger.rejected["preferences:duplicate_prompt"] > 0
    assert made.ledger.rejected["preferences:no_prompt"] > 0
    assert made.ledger.rows_in == 40
    units = shards.committed_units(bench.directories["preferences"])
    assert len(units) == 5
    whole = bench.forget("preferences")
    (bench.run / ".replies" / "preferences.jsonl").unlink()
    with pytest.raises(ConnectionError):
        bench.stage(PreferencesStage, "preferences", values, Recording(longwinded, stop_after=len(first.asked) - 15))
    assert 0 < len(shards.committed_units(bench.directories["preferences"])) < 5
    again = bench.stage(PreferencesStage, "preferences", values, Recording(longwinded, reverse=True))
    assert bench.forget("preferences") == whole
    assert again.stats == made.stats and again.ledger == made.ledger


def test_a_judge_who_likes_length_is_found_out_and_held_in_bounds(bench: Bench) -> None:
    write_rows(
        bench, [{**row_of(("user", f"Number {n}: tell me about a river.")), "id": f"c{n}", "provenance": None} for n in range(30)]
    )
    values = {"input": "tasks", "scorer": "judge", "min_margin": 0.5}
    free = bench.stage(PreferencesStage, "preferences", values, Recording(longwinded))
    bias = free.stats["length_bias"]["all"]
    assert bias["correlation"] > 0.8 and bias["chosen_longer"] == 1.0 and bias["length_ratio"] > 1.5
    assert free.stats["pairs"] == free.rows > 10
    bound = bench.stage(PreferencesStage, "preferences-2", {**values, "max_chosen_longer": 0.6}, Recording(longwinded))
    assert bound.rows == 0 and bound.ledger.rejected["preferences:chosen_longer"] == free.rows, "all were longer: none may stay"
    penalty = bias["points_per_doubling"]
    controlled = bench.stage(PreferencesStage, "preferences-3", {**values, "length_penalty": penalty}, Recording(longwinded))
    measured = controlled.stats["length_bias"]["all"]
    assert abs(measured["controlled_correlation"]) < 0.02 < bias["correlation"]
    assert measured["correlation"] == bias["correlation"], "the scores before the penalty are the same"
    table = pq.read_table(shards.parts([bench.directories["preferences"]])[0].path)
    assert table.schema.names == PAIRS.names


def test_the_judge_may_be_another_model_and_both_share_the_cap(bench: Bench) -> None:
    write_rows(bench, conversations(12))
    answering, judging = Recording(longwinded), Recording(longwinded)
    values = {
        "input": "tasks", "scorer": "judge", "min_margin": 0.5, "keep_replies": True,
        "judge": {"generator": {"model": "judge", "endpoint": {"url": "http://127.0.0.1:1/v1"}}},
    }  # fmt: skip

    def engine(settings: Any) -> Recording:
        return judging if settings.endpoint is not None else answering

    built = parse(PreferencesStage, {"kind": "preferences", **values}, "preferences")

    def run(name: str, **more: Any) -> shards.Manifest:
        stage = built.model_copy(update=more)
        directory = str(bench.run / name / "f0")
        stage.run(
            StageContext(
                name, "preferences", directory, "f0", {}, {"tasks": bench.directories["tasks"]}, 17,
                cache_directory=str(bench.run.parent / ".cache"), services={"engine": engine},
            )
        )  # fmt: skip
        bench.directories[name] = directory
        return shards.load_manifest(directory)

    whole = run("pairs")
    assert all(r.json_schema is None and not r.model for r in answering.asked)
    assert all(r.json_schema is not None and r.model for r in judging.asked) and judging.asked
    assert whole.stats["calls"] == len(answering.asked) + len(judging.asked)
    row = bench.rows("pairs")[0]
    sampling = json.loads(row["provenance"]["sampling"])
    assert sampling["judge"]["model"] == "judge" and sampling["judge"]["revision"] == judging.asked[0].model
    assert row["provenance"]["generator"] == "smollm2-135m-instruct"
    assert "judge_points@" in row["provenance"]["template"] and "answer@" in row["provenance"]["template"]
    assert any("helpful" in reply for reply in row["replies"])
    capped = run("capped", max_generated_tokens=950)
    assert capped.ledger.rejected["preferences:token_cap"] > 0 and capped.stats["completion_tokens"] <= 950


# --- models of the run


def trained(bench: Bench, name: str, text: str) -> Path:
    """A finished stage with a model of its own, as a training stage leaves it (nothing here reads the weights)."""
    directory = bench.run / name / "f0"
    model = directory / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text(text)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    shards.finish(
        str(directory), stage=name, kind="sft", fingerprint="f0", config={}, inputs={}, files={"model": "model"}, ledger=Ledger()
    )
    bench.directories[name] = str(directory)
    return model


def test_on_policy_pairs_come_from_the_model_of_a_stage_and_are_named_by_its_weights(bench: Bench) -> None:
    write_rows(bench, conversations(6))
    model, judge = trained(bench, "chat", "weights of chat"), trained(bench, "critic", "weights of critic")
    values = {
        "input": "tasks", "generator": {"model": "@chat"}, "scorer": "judge", "framed": False, "min_margin": 0.1,
        "judge": {"generator": {"model": "@critic"}},
    }  # fmt: skip
    stage = parse(PreferencesStage, {"kind": "preferences", **values}, "stages.pairs")
    assert stage.input_names() == ["tasks", "chat", "critic"] and stage.model_stages() == ["chat", "critic"]
    assert not stage.files(), "the models are inputs: their fingerprints are in this stage's"
    recording = Recording(longwinded)
    bench.stage(PreferencesStage, "preferences", values, recording)
    sampling = json.loads(bench.rows("preferences")[0]["provenance"]["sampling"])
    revisions = {path: model_revision(str(path), str(bench.run.parent / ".cache")) for path in (model, judge)}
    assert bench.rows("preferences")[0]["provenance"]["generator"] == "@chat"
    assert bench.rows("preferences")[0]["provenance"]["revision"] == revisions[model]
    assert sampling["judge"]["model"] == "@critic" and sampling["judge"]["revision"] == revisions[judge]
    assert all(r.messages == (("user", last(r)),) for r in recording.asked if not r.model), "asked as it will be trained"
    bench.forget("preferences")
    (model / "model.safetensors").write_text("weights of chat after another step")
    again = Recording(longwinded)
    bench.stage(PreferencesStage, "preferences", values, again)
    assert any(not r.model for r in again.asked), "another model is asked anew"


def test_a_stage_that_made_no_model_cannot_generate(bench: Bench) -> None:
    write_rows(bench, conversations(2))
    with pytest.raises(SettingsError, match="makes no model"):
        bench.stage(PreferencesStage, "preferences", {"input": "tasks", "generator": {"model": "@tasks"}}, Recording(longwinded))
