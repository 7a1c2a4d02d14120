"""The synthesis stages as a recipe runs them: directories, ledgers, resume; replies are recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import shards, tables
from operators.config import SettingsError, parse
from operators.synthesis import heuristics
from operators.synthesis.requests import Reply, Request
from pipelines.stages.conversations import ConversationsStage
from pipelines.stages.preferences import PreferencesStage
from pipelines.stages.synthesis import EvolInstructStage, SelfInstructStage
from tests.operators.synthesis.bench import Bench
from tests.operators.synthesis.recorded import Recording, last

TASKS = {
    "en": ["Describe the taste of sea salt", "Give advice for a first marathon", "Invent a holiday for librarians"],
    "zh": ["描述海盐的味道", "给第一次跑马拉松的人提建议", "为图书管理员设计一个节日"],
}


def play(request: Request) -> str | Reply:
    text = last(request)
    lang = heuristics.language_of(request.messages[0][1] + text)
    if request.messages[-1][0] == "assistant" and text[:2] == "1.":
        return "\n".join(f"{n + 5}. {task}" for n, task in enumerate(TASKS[lang]))
    if text in ("New prompt:", "新的提示："):
        parent = request.messages[-2][1].split(":", 1)[-1].split("：", 1)[-1].strip()
        return parent + (" and then say why it matters to you" if lang == "en" else "，并说明它为什么重要")
    if request.sampling.max_tokens == 4:
        return "Not Equal" if lang == "en" else "不同"
    if request.sampling.max_tokens == 3:
        return "No" if lang == "en" else "否"
    if request.sample == 3:
        return "same same same same same same same same same" if lang == "en" else "同同同同同同同同同同"
    return f"Well, {text.lower()}: here it is." if lang == "en" else f"好的，{text}，内容在此。"


TASKS_STAGE = {"target": 6, "calls_per_round": 4, "max_rounds": 3, "languages": {"en": 0.5, "zh": 0.5}}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def self_instruct(bench: Bench, recording: Recording | None, name: str = "self_instruct", **values: Any) -> shards.Manifest:
    return bench.stage(SelfInstructStage, name, {**TASKS_STAGE, "seeds": str(bench.seeds), **values}, recording)


def test_the_chain_of_stages_writes_rows_rejects_and_statistics(bench: Bench) -> None:
    made = self_instruct(bench, Recording(play))
    assert made.rows == made.ledger.kept == 6
    assert made.ledger.created == made.ledger.kept + made.ledger.rejected.total()
    assert sum(part["rows"] for part in made.rejects) == made.ledger.rejected.total()
    assert {"calls", "prompt_tokens", "completion_tokens", "usage", "rounds", "novelty", "languages", "examples"} <= set(made.stats)
    assert set(made.stats["languages"]) == {"en", "zh"}

    evolved = bench.stage(EvolInstructStage, "evol_instruct", {"input": "self_instruct", "rounds": 2}, Recording(play))
    assert evolved.ledger.rows_in == 6
    assert evolved.ledger.created > 0
    assert evolved.rows > 6
    ids = {row["id"] for row in bench.rows("evol_instruct")}
    assert len(ids) == evolved.rows
    assert all(
        set(row["provenance"]["parents"]) <= ids
        for row in bench.rows("evol_instruct")
        if row["provenance"]["operation"].startswith("evol:")
    )
    assert any(operation.startswith("evol:") for operation in evolved.stats["operations"])

    pairs = bench.stage(PreferencesStage, "preferences", {"input": "self_instruct", "samples": 4}, Recording(play))
    assert pairs.stats["pairs"] == pairs.rows > 0
    assert pairs.ledger.rows_in == 6
    first = pq.read_table(shards.parts([bench.directories["preferences"]])[0].path)
    assert first.schema.names[: len(tables.PREFERENCES)] == tables.PREFERENCES.names


def test_an_interrupted_stage_repeats_nothing_and_ends_with_the_same_bytes(bench: Bench) -> None:
    self_instruct(bench, Recording(play))
    whole = bench.forget("self_instruct")
    (bench.run / ".replies" / "self_instruct.jsonl").unlink()
    first = Recording(play, stop_after=9)
    with pytest.raises(ConnectionError):
        self_instruct(bench, first)
    second = Recording(play)
    self_instruct(bench, second)
    done = {(r.messages, r.seed) for r in first.asked}
    assert not done & {(r.messages, r.seed) for r in second.asked}
    assert bench.forget("self_instruct") == whole


def test_a_finished_cache_needs_no_engine_and_a_changed_rule_reads_it_again(bench: Bench) -> None:
    self_instruct(bench, Recording(play))
    whole = bench.forget("self_instruct")
    self_instruct(bench, None)
    assert shards.load_timings(bench.directories["self_instruct"])["cache_hits"] > 0
    assert bench.forget("self_instruct") == whole
    changed = self_instruct(bench, None, rules={"max_length": {"en": 5, "zh": 250}}, max_rounds=1)
    assert changed.ledger.rejected["self_instruct.tasks:too_long"] > 0


def test_another_seed_or_sampling_does_not_reuse_replies(bench: Bench) -> None:
    self_instruct(bench, Recording(play))
    bench.forget("self_instruct")
    recording = Recording(play)
    self_instruct(bench, recording, instruction_sampling={"temperature": 0.9})
    assert recording.asked


def test_a_trial_run_makes_at_most_that_many_rows(bench: Bench) -> None:
    made = bench.stage(SelfInstructStage, "self_instruct", {**TASKS_STAGE, "seeds": str(bench.seeds)}, Recording(play), limit=2)
    assert made.rows == 2
    evolved = bench.stage(EvolInstructStage, "evol_instruct", {"input": "self_instruct"}, Recording(play), limit=1)
    assert evolved.rows <= 3
    pairs = bench.stage(PreferencesStage, "preferences", {"input": "self_instruct"}, Recording(play), limit=1)
    assert pairs.rows <= 1


def test_a_wrong_model_path_is_an_error_before_anything_starts(bench: Bench) -> None:
    stage = parse(SelfInstructStage, {"kind": "self_instruct", "seeds": "x", "generator": {"model": "/no/such/model"}}, "tasks")
    with pytest.raises(SettingsError, match="no such directory"):
        stage.validate_deep()
    stage = parse(PreferencesStage, {"kind": "preferences", "input": "x", "generator": {"model": "packaged:gpt-9"}}, "pairs")
    with pytest.raises(SettingsError, match="packaged:smollm2-135m-instruct"):
        stage.validate_deep()


def test_conversations_reads_human_answers_and_sets_bad_rows_aside(bench: Bench, tmp_path: Path) -> None:
    with open(bench.seeds, "ab") as stream:
        stream.write('{"id": "bad", "instruction": "没有实例"}\n{broken\n'.encode())
    made = bench.stage(ConversationsStage, "conversations", {"path": str(bench.seeds), "format": "seed_tasks"}, None)
    assert made.ledger.to_json() == {
        "in": 10, "created": 0, "kept": 8, "rejected": {"conversations:malformed": 1}, "quarantined": 1}  # fmt: skip
    rows = bench.rows("conversations")
    assert rows[0]["messages"] == [{"role": "user", "content": "Name a river in Asia."}, {"role": "assistant", "content": "fine"}]
    assert rows[0]["provenance"]["generator"] == "human"
    assert made.stats["languages"] == {"en": 4, "zh": 4}
    rejects = pa.concat_tables(pq.read_table(Path(bench.directories["conversations"]) / part["name"]) for part in made.rejects)
    assert sorted(rejects["reason"].to_pylist()) == ["malformed", "unreadable"]
    limited = bench.stage(ConversationsStage, "conversations-2", {"path": str(bench.seeds), "format": "seed_tasks"}, None, limit=3)
    assert limited.rows == 3


def test_cancelling_stops_between_replies_and_keeps_them(bench: Bench) -> None:
    import threading

    from operators.stage import Cancelled

    cancelled = threading.Event()

    def stop_later(request: Request) -> str | Reply:
        if len(recording.asked) == 6:
            cancelled.set()
        return play(request)

    recording = Recording(stop_later)
    with pytest.raises(Cancelled):
        bench.stage(
            SelfInstructStage,
            "self_instruct",
            {**TASKS_STAGE, "target": 60, "seeds": str(bench.seeds)},
            recording,
            cancelled=cancelled,
        )
    assert (bench.run / ".replies" / "self_instruct.jsonl").read_bytes().count(b"\n") >= 6


def _varied(request: Request) -> str | Reply:
    """New tasks for every request, so that there is something to do in every round."""
    if request.messages[-1][0] != "assistant" or last(request)[:2] != "1.":
        return play(request)
    zh = heuristics.language_of(last(request)) == "zh"
    stock = "山水风云花鸟星月天地江河湖海草木" if zh else ["amber", "brisk", "cedar", "delta", "ember", "fjord", "grove", "haze"]
    words = [[stock[(request.seed * (n + 3) >> (3 * k)) % len(stock)] for k in range(9)] for n in range(2)]
    return "\n".join(
        f"{n + 5}. 介绍{''.join(word)}" if zh else f"{n + 5}. Describe {' '.join(word)}" for n, word in enumerate(words)
    )


def test_committed_rounds_give_the_pool_back_without_a_reply(bench: Bench) -> None:
    values = {"target": 26, "max_rounds": 6, "min_yield": 0}
    made = self_instruct(bench, Recording(_varied), **values)
    assert len(made.stats["rounds"]) >= 3
    directory = Path(bench.directories["self_instruct"])
    whole = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.parquet"))}
    records = {p.name: p.read_bytes() for p in sorted((directory / "units").iterdir())}
    (directory / "manifest.json").unlink()
    final = f"{len(records) - 1:08d}"
    for path in [*directory.rglob(f"{final}-*.parquet"), directory / "units" / f"{final}.json"]:
        path.unlink()
    (bench.run / ".replies" / "self_instruct.jsonl").unlink()
    recording = Recording(_varied)
    again = self_instruct(bench, recording, **values)
    assert 0 < len(recording.asked) < made.stats["calls"]
    assert again.stats == made.stats
    assert {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.parquet"))} == whole
    assert {p.name: p.read_bytes() for p in sorted((directory / "units").iterdir())} == records


def test_committed_units_of_evolution_are_not_made_again(bench: Bench) -> None:
    self_instruct(bench, Recording(play))
    values = {"input": "self_instruct", "rounds": 2}
    made = bench.stage(EvolInstructStage, "evol_instruct", values, Recording(play))
    directory = Path(bench.directories["evol_instruct"])
    (directory / "manifest.json").unlink()
    (bench.run / ".replies" / "evol_instruct.jsonl").unlink()
    again = bench.stage(EvolInstructStage, "evol_instruct", values, None)
    assert again.to_json() == made.to_json()


def test_the_log_tells_the_yield_of_each_round_and_why_it_ended(bench: Bench) -> None:
    lines: list[str] = []
    values = {**TASKS_STAGE, "seeds": str(bench.seeds)}
    bench.stage(SelfInstructStage, "self_instruct", values, Recording(play), log=lines.append)
    assert "round 0: 4 requests, 6 new tasks, 6 rows (1.50 a request, 100% of the tasks); 6 of 6 rows" in lines[0]
    assert lines[-1] == "self_instruct stopped: the target is reached"
    lines.clear()
    quiet = Recording(lambda request: "")
    bench.stage(
        SelfInstructStage, "self_instruct-quiet", {**values, "instruction_sampling": {"max_tokens": 60}}, quiet, log=lines.append
    )
    assert "self_instruct.tasks:malformed 100%" in lines[-1]
    assert "min_yield" in lines[-1]


def test_raw_replies_are_kept_from_the_list_of_tasks_to_the_answer(bench: Bench) -> None:
    self_instruct(bench, Recording(play), keep_replies=True)
    row = bench.rows("self_instruct")[0]
    assert row["replies"][0].startswith("5. ")
    assert row["replies"][-1] == row["messages"][1]["content"]
    bench.stage(EvolInstructStage, "evol_instruct", {"input": "self_instruct", "keep_replies": True}, Recording(play))
    evolved = [row for row in bench.rows("evol_instruct") if row["provenance"]["operation"].startswith("evol:")]
    assert evolved
    assert all(row["replies"][-1] == row["messages"][1]["content"] for row in evolved)
