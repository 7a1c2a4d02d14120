"""The generate stage: any prompt over any rows, as a recipe runs it; replies are recorded."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators import shards
from operators.config import SettingsError, parse
from operators.ledger import Ledger
from operators.synthesis.requests import Messages, Reject, Reply, Request
from pipelines.stages.generate import GenerateStage
from pipelines.stages.generating import GeneratingStage
from tests.operators.synthesis.bench import Bench
from tests.operators.synthesis.recorded import Recording, last

DOCUMENTS = [
    {"id": "a", "text": "The pump runs at $price and ${name}.", "tags": ["pump", "泵"]},
    {"id": "b", "text": "涡轮由叶片和轴组成。", "tags": []},
    {"id": "c", "text": "", "tags": None},
]
SCHEMA = {
    "type": "object",
    "properties": {
        "topic": {"type": "string"}, "level": {"type": "integer"}, "words": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
    },
    "required": ["topic", "level"],
}  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path)
    directory = str(made.run / "docs" / "f0")
    for unit, rows in enumerate((DOCUMENTS[:2], DOCUMENTS[2:])):
        writer = shards.UnitWriter(directory, unit)
        schema = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("tags", pa.list_(pa.string()))])
        writer.write(pa.Table.from_pylist(rows, schema=schema))
        writer.commit(Ledger(rows_in=len(rows), kept=len(rows)))
    shards.finish(directory, stage="docs", kind="corpus", fingerprint="f0", config={}, inputs={})
    made.directories["docs"] = directory
    return made


def stage(bench: Bench, recording: Recording | None, **values: Any) -> shards.Manifest:
    return bench.stage(GenerateStage, "generate", {"input": "docs", **values}, recording)


def test_columns_go_into_the_prompt_once_and_the_reply_becomes_a_column(bench: Bench) -> None:
    recording = Recording(lambda request: f"about {len(last(request))}")
    made = stage(bench, recording, prompt={"system": "Price: $$1", "user": "Sum up: $text ($tags)"}, column="summary")
    assert made.ledger.to_json() == {"in": 3, "created": 0, "kept": 3, "rejected": {}, "quarantined": 0}
    assert [request.messages[0][1] for request in recording.asked] == ["Price: $1"] * 3
    asked = [last(request) for request in recording.asked]
    assert asked == [
        'Sum up: The pump runs at $price and ${name}. (["pump", "泵"])',
        "Sum up: 涡轮由叶片和轴组成。 ([])",
        "Sum up:  ()",
    ]
    rows = bench.rows("generate")
    assert [{name: row[name] for name in ("id", "text", "tags")} for row in rows] == DOCUMENTS
    assert [row["summary"] for row in rows] == [f"about {len(text)}" for text in asked]
    assert rows[0]["generation"]["parents"] == ["a"]
    assert made.stats["calls"] == 3


def test_properties_of_a_schema_become_columns_and_what_does_not_fit_is_drawn_again_then_rejected(bench: Bench) -> None:
    drawn: dict[str, int] = {}

    def answer(request: Request) -> str | Reply:
        assert request.json_schema is not None
        document = last(request)
        drawn[document] = drawn.get(document, 0) + 1
        if "pump" in document:
            return json.dumps({"topic": "pump", "level": 2, "words": ["a", "b"], "more": {"x": 1}})
        if "涡轮" in document:
            return '{"topic": "涡轮", "lev' if drawn[document] == 1 else '好的：{"topic": "涡轮", "level": 3}'
        return Reply('{"topic": "', "length", 5, 5)

    made = stage(bench, Recording(answer), prompt={"user": "$text"}, json_schema=SCHEMA, attempts=3)
    assert made.ledger.to_json()["rejected"] == {"generate:truncated": 1}
    assert drawn[""] == 3
    rows = bench.rows("generate")
    assert [(row["topic"], row["level"], row["words"], row["more"]) for row in rows] == [
        ("pump", 2, ["a", "b"], '{"x": 1}'),
        ("涡轮", 3, None, None),
    ]


def test_several_samples_are_rows_of_their_own_and_the_account_balances(bench: Bench) -> None:
    def answer(request: Request) -> str:
        return "" if "涡轮" in last(request) and request.sample < 2 else f"s{request.sample}"

    made = stage(bench, Recording(answer, reverse=True), prompt={"user": "$text"}, samples=3, attempts=1)
    assert made.ledger.to_json() == {"in": 3, "created": 6, "kept": 7, "rejected": {"generate:empty": 2}, "quarantined": 0}
    assert [(row["id"], row["sample"], row["reply"]) for row in bench.rows("generate")] == [
        ("a", 0, "s0"), ("a", 1, "s1"), ("a", 2, "s2"), ("b", 2, "s2"), ("c", 0, "s0"), ("c", 1, "s1"), ("c", 2, "s2"),
    ]  # fmt: skip


def test_greedy_replies_are_asked_once_and_raw_replies_are_kept_on_request(bench: Bench) -> None:
    recording = Recording(lambda request: " x " if last(request) else "")
    made = stage(
        bench, recording, prompt={"user": "$text"}, sampling={"temperature": 0}, attempts=4, keep_replies=True,
        price={"prompt_per_million": 2, "completion_per_million": 4},
    )  # fmt: skip
    assert len(recording.asked) == 3
    assert made.ledger.rejected["generate:empty"] == 1
    assert [row["replies"] for row in bench.rows("generate")] == [[" x "], [" x "]]
    assert shards.load_timings(bench.directories["generate"])["cost"] == pytest.approx((30 * 2 + 3 * 4) / 1e6)


def test_a_cap_leaves_rows_out_and_says_so(bench: Bench) -> None:
    made = stage(
        bench, Recording(lambda request: "x" * 40), prompt={"user": "$text"}, sampling={"max_tokens": 15}, attempts=1,
        max_generated_tokens=25,
    )  # fmt: skip
    assert made.ledger.to_json()["rejected"] == {"generate:token_cap": 1}
    assert made.stats["completion_tokens"] == 20


def test_an_interrupted_stage_goes_on_after_its_last_unit_with_the_same_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenerateStage, "run_rows", functools.partialmethod(GeneratingStage.run_rows, unit_rows=1))
    values: dict[str, Any] = {"prompt": {"user": "$text"}, "samples": 2}
    stage(bench, Recording(lambda request: f"r{request.sample}"), **values)
    whole = bench.forget("generate")
    assert len([name for name in whole if name.startswith("parts/")]) == 3
    (bench.run / ".replies" / "generate.jsonl").unlink()
    first = Recording(lambda request: f"r{request.sample}", stop_after=3)
    with pytest.raises(ConnectionError):
        stage(bench, first, **values)
    assert len(shards.committed_units(bench.directories["generate"])) == 1
    second = Recording(lambda request: f"r{request.sample}")
    made = stage(bench, second, **values)
    assert len(second.asked) == 3
    assert made.stats["calls"] == 6
    assert bench.forget("generate") == whole


class Shout:
    """A user's own method."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def render(self, row: dict[str, Any]) -> Messages:
        return (("user", row["text"].upper()),)

    def parse(self, reply: Reply, row: dict[str, Any]) -> dict[str, Any] | Reject:
        return {"loud": reply.text + self.mark} if row["text"] else Reject("nothing_to_shout")

    def fields(self) -> list[pa.Field]:
        return [pa.field("loud", pa.string())]


def test_a_class_of_ones_own_renders_and_parses(bench: Bench) -> None:
    made = stage(bench, Recording(last), method=f"{__name__}:Shout", options={"mark": "!"})
    assert [row["loud"] for row in bench.rows("generate")] == ["THE PUMP RUNS AT $PRICE AND ${NAME}.!", "涡轮由叶片和轴组成。!"]
    assert made.ledger.rejected["generate:nothing_to_shout"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either `prompt` or `method`"),
        ({"prompt": {"user": "costs 5$"}}, r"write `\$\$` for a dollar"),
        ({"prompt": {"user": "$text"}, "json_schema": {"type": "array"}}, "must be of type `object`"),
        ({"prompt": {"user": "$text"}, "json_schema": {"type": "object", "properties": {"a": {"type": "text"}}}}, "no valid JSON"),
        ({"prompt": {"user": "$text"}, "options": {"mark": "!"}}, "are for `method`"),
        ({"method": f"{__name__}:Shout", "options": {"loudness": 1}}, "options do not fit"),
        ({"method": f"{__name__}:Bench"}, "lacks render, parse, fields"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(values: dict[str, Any], message: str) -> None:
    built = parse(GenerateStage, {"kind": "generate", "input": "docs", **values}, "ask")
    with pytest.raises(SettingsError, match=message):
        built.validate_deep()


def test_a_prompt_that_reads_a_column_that_is_not_there_names_the_nearest(bench: Bench) -> None:
    with pytest.raises(SettingsError, match=r"reads \$txt.*did you mean 'text'"):
        stage(bench, Recording(last), prompt={"user": "$txt"})
    with pytest.raises(SettingsError, match="has a column 'tags' already"):
        stage(bench, Recording(last), prompt={"user": "$text"}, column="tags")
