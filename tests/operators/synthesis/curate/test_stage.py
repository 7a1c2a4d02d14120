"""The `curate` stage as a recipe runs it: accounts, determinism, resume, what later stages see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from operators import registry, shards
from operators.config import SettingsError
from operators.dedup import exchange
from operators.ledger import Ledger
from operators.supervise import Report, Task
from operators.synthesis.curate import run, units
from operators.synthesis.rows import INSTRUCTIONS
from pipelines import describe
from pipelines.recipe import parse_recipe
from tests.operators.synthesis.curate.bench import curate, kept, rejects, row, write_input

LOCAL: list[Any] = ["malformed_reply", "stock_phrases", {"bad_words": {"max_count": 0, "max_fraction": None}}]
WHOLE: list[Any] = [
    "contradictions",
    {"refusal_share": {"max_share": 0.1}},
    {"opening_diversity": {"max_share": 0.3, "at_least": 3}},
]
SUBJECTS = ["salt", "iron", "wool", "glass", "paper", "clay", "silk", "bread", "cheese", "honey", "copper", "leather"]


def rows() -> list[dict[str, Any]]:
    found = [
        row(f"Describe {name}.", f"{name.title()} is a stuff of many uses.", identity=f"d{n}") for n, name in enumerate(SUBJECTS)
    ]
    found += [
        row(f"{verb} the word {name}.", name[::-1], identity=f"{verb}{name}") for verb in ("Spell", "Turn") for name in SUBJECTS[:6]
    ]
    found += [
        row(f"How do I steal {name}?", "I'm sorry, but I can't help with that.", identity=f"r{n}")
        for n, name in enumerate(SUBJECTS)
    ]
    found += [row("Is glass a liquid?", "No.", identity="c1"), row("Is glass a liquid?", "Yes.", identity="c2")]
    found += [
        row("玻璃是液体吗？", "不是。", identity="z1"),
        row("写一个谜语。", "作为一个人工智能语言模型，我不会。", identity="z2"),
    ]
    found += [row("Say it.", "Say it.", identity="m1"), row("Swear.", "Well, shit.", identity="b1")]
    return found


def inputs(root: Path) -> dict[str, str]:
    half = len(rows()) // 2
    return {"a": write_input(root, "a", rows()[:half], 7), "b": write_input(root, "b", rows()[half:], 11)}


@pytest.mark.usefixtures("ray_cluster")
def test_every_row_is_accounted_for_and_the_same_with_any_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(tmp_path)
    monkeypatch.setattr(run, "UNIT_ROWS", 16)
    made = curate(tmp_path, given, [*LOCAL, *WHOLE], workers=2)
    count = len(rows())
    assert made.ledger.rows_in == count
    assert made.ledger.kept + made.ledger.rejected.total() == count
    found, gone = kept(tmp_path), rejects(tmp_path)
    assert [item["id"] for item in found] == [item["id"] for item in rows() if item["id"] in {one["id"] for one in found}]
    assert {item["id"] for item in found} | {item["id"] for item in gone} == {item["id"] for item in rows()}
    assert len(found) + len(gone) == count
    why = {item["id"]: f"{item['operator']}:{item['reason']}" for item in gone}
    assert why["m1"] == "malformed_reply:reply_is_prompt"
    assert why["z2"] == "stock_phrases:stock_phrase"
    assert why["b1"] == "bad_words:bad_words"
    assert why["c1"] == why["c2"] == "contradictions:contradiction"
    told = {item["id"]: item for item in gone}
    assert told["c2"]["detail"] == "c1"
    assert told["c2"]["text"] == "Is glass a liquid?\n\nYes."
    assert told["z2"]["detail"].startswith("作为一个人工智能")
    refused = [name for name in why if name.startswith("r")]
    assert {why[name] for name in refused} == {"refusal_share:refusal"}
    assert (12 - len(refused)) / len([item for item in rows() if item["id"] not in why]) <= 0.11
    assert made.stats["sets"]["refusal_share"] == {"refusals": 12, "unknown": 0, "refusals_kept": 12 - len(refused)}
    assert [entry[0] for entry in made.schema] == INSTRUCTIONS.names
    funnel = made.stats["funnel"]
    assert list(funnel) == [f"{n:02d}:{name}" for n, name in enumerate(
        ["malformed_reply", "stock_phrases", "bad_words", "contradictions", "refusal_share", "opening_diversity"])]  # fmt: skip
    left = count
    for entry in funnel.values():
        assert entry["in"] == left == entry["kept"] + sum(entry["rejected"].values())
        left = entry["kept"]
    assert left == made.ledger.kept
    assert made.stats["measures"]["stock_phrases.phrases"] == {"0": count - 2, "1": 1}
    directory = tmp_path / "runs" / "test" / "clean" / "f0"
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json",
        "parts",
        "rejects",
        "timings",
        "timings.json",
        "units",
    ]

    curate(tmp_path, given, [*LOCAL, *WHOLE], name="again", workers=1)
    for folder in ("parts", "rejects", "units"):
        one, two = (sorted((tmp_path / "runs" / "test" / name / "f0" / folder).iterdir()) for name in ("clean", "again"))
        assert [path.name for path in one] == [path.name for path in two]
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.usefixtures("ray_cluster")
def test_repeats_by_minhash_name_the_row_that_stays(tmp_path: Path) -> None:
    texts = [
        ("a", "Write a letter to the mayor about the broken bridge over the river."),
        ("b", "Write a letter to the mayor about the broken bridge over the river!"),
        ("c", "Write a letter to the mayor about the old broken bridge over the river."),
        ("d", "Explain how a bicycle stays upright while it rolls down a hill."),
        ("e", "请给市长写一封信，说明河上那座破损的桥需要修理。"),
        ("f", "请给市长写一封信，说明河上那座破损的桥需要尽快修理。"),
    ]
    source = write_input(tmp_path, "in", [row(text, f"reply {name}", identity=name) for name, text in texts])
    made = curate(tmp_path, {"in": source}, [{"near_repeats": {"threshold": 0.6}}])
    assert [item["id"] for item in kept(tmp_path)] == ["a", "d", "e"]
    gone = {item["id"]: item for item in rejects(tmp_path)}
    assert {name: (item["reason"], item["detail"]) for name, item in gone.items()} == {
        "b": ("near_repeat", "a"), "c": ("near_repeat", "a"), "f": ("near_repeat", "e"),
    }  # fmt: skip
    assert gone["b"]["value"] == 1
    assert 0.6 <= gone["c"]["value"] < 1
    assert dict(made.ledger.rejected) == {"near_repeats:near_repeat": 3}


def test_a_unit_is_done_in_one_process_and_a_probe_writes_nothing(tmp_path: Path) -> None:
    source = write_input(tmp_path, "in", rows())
    part = shards.parts([source])[0]
    arguments = {
        "unit": {"index": 0, "path": part.path}, "span": {"parts": [part.__dict__], "skip": 3, "rows": 20},
        "local": LOCAL, "whole": [[3, "contradictions"]], "directory": str(tmp_path / "out"), "batch_rows": 6,
        "schema": INSTRUCTIONS.serialize().to_pybytes().hex(),
    }  # fmt: skip
    silent = Report(lambda message: None)
    assert units.curate_unit(Task(arguments, probe=(2, 5)), silent) == {}
    assert not (tmp_path / "out").exists()
    units.curate_unit(Task(arguments, set_aside={4: "killed"}), silent)
    record = shards.committed_units(str(tmp_path / "out"))[0]
    assert record["ledger"]["in"] == 20
    assert record["ledger"]["quarantined"] == 1
    written = shards.committed_units(str(tmp_path / "out"))
    assert sum(part["rows"] for part in written[0]["parts"]) == record["ledger"]["kept"]


def test_a_killed_stage_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units and set operators that are committed are not done again."""

    def in_process(context: Any, target: str, todo: Any, limits: Any, **ignored: Any) -> None:
        asked.append([item["unit"]["index"] for item in todo])
        for item in todo:
            if len(shards.committed_units(item["directory"])) == stop:
                raise KeyboardInterrupt
            units.curate_unit(Task(json.loads(json.dumps(item))), Report(lambda message: None))

    def phases(context: Any, plan: Any, wanted: Any) -> dict[str, float]:
        for phase in wanted:
            for number in sorted(set(range(phase.units)) - exchange.committed(plan.directory, phase.name)):
                if fail == phase.name:
                    raise KeyboardInterrupt
                done.append((phase.name, number))
                phase.run(plan, number)
        return {}

    asked: list[list[int]] = []
    done: list[tuple[str, int]] = []
    stop, fail = 2, ""
    monkeypatch.setattr(run, "run_units", in_process)
    monkeypatch.setattr(run, "run_phases", phases)
    monkeypatch.setattr(run, "UNIT_ROWS", 16)
    given = inputs(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        curate(tmp_path, given, [*LOCAL, *WHOLE])
    directory = tmp_path / "runs" / "test" / "clean" / "f0"
    assert not (directory / "units").exists(), "later stages must not follow units that are not final"
    stop, fail = 99, "write"
    with pytest.raises(KeyboardInterrupt):
        curate(tmp_path, given, [*LOCAL, *WHOLE])
    assert asked == [[0, 1, 2], [2]]
    assert done == [("resolve", 0)] * 3
    fail = ""
    made = curate(tmp_path, given, [*LOCAL, *WHOLE])
    assert done == [("resolve", 0)] * 3 + [("write", n) for n in range(3)]
    curate(tmp_path, given, [*LOCAL, *WHOLE], name="straight")
    assert made.parts == shards.load_manifest(str(tmp_path / "runs" / "test" / "straight" / "f0")).parts
    assert made.rejects == shards.load_manifest(str(tmp_path / "runs" / "test" / "straight" / "f0")).rejects


def test_columns_that_operators_add_stay_and_keys_go(tmp_path: Path) -> None:
    source = write_input(tmp_path, "in", rows()[:3])
    part = shards.parts([source])[0]
    table = pa.table({"id": ["x"], "ifd": [0.5], "03.prompt": [1], "11.text": ["t"]})
    writer = shards.UnitWriter(str(tmp_path / "work"), 0)
    writer.write(table)
    made = writer.commit(Ledger(rows_in=1, kept=1))
    written = shards.Part(str(tmp_path / "work" / made["parts"][0]["name"]), 1, 0)
    assert run._own_columns(written) == ["id", "ifd"]
    assert run._own_columns(part) == INSTRUCTIONS.names


def test_inputs_with_other_columns_go_together(tmp_path: Path) -> None:
    schema = INSTRUCTIONS.append(pa.field("span", pa.string()))
    one = write_input(tmp_path, "one", [row("A?", "Yes.", identity="1")])
    two = write_input(tmp_path, "two", [{**row("B?", "No.", identity="2"), "span": "B."}], schema=schema)
    parts = shards.parts([one, two])
    joined = units.input_schema(parts)
    assert joined.names == schema.names
    span = units.Span(tuple(parts), 0, 2)
    (table,) = list(units.read_rows(span, joined, 10))
    assert table["span"].to_pylist() == [None, "B."]
    bad = tmp_path / "runs" / "test" / "docs" / "f0"
    writer = shards.UnitWriter(str(bad), 0)
    writer.write(pa.table({"id": ["x"], "text": ["y"]}))
    writer.commit(Ledger(rows_in=1, kept=1))
    shards.finish(str(bad), stage="docs", kind="corpus", fingerprint="f0", config={}, inputs={})
    with pytest.raises(SettingsError, match="no conversations"):
        units.input_schema(shards.parts([str(bad)]))


RECIPE = (
    "name: x\nstages:\n  s: {kind: conversations, path: a.jsonl, format: alpaca}\n  c: {kind: curate, input: s, operators: %s}\n"
)


@pytest.mark.parametrize(
    ("operators", "problem"),
    [
        ("[refusal_share, stock_phrases]", "must stand before"),
        ("[fix_text]", "changes text"),
        ("[filter_urls]", "needs the columns"),
        ("[stock_phrase]", "did you mean 'stock_phrases'"),
        ("[{stock_phrases: {knds: [identity]}}]", "did you mean 'kinds'"),
        ("[{token_length: {tokenizer: x, min: 9, max: 3}}]", "above the maximum"),
        ("[]", "at least 1 item"),
    ],
)
def test_a_recipe_that_cannot_work_says_so(operators: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        parse_recipe(RECIPE % operators)


def test_a_corpus_stage_refuses_operators_for_conversations() -> None:
    with pytest.raises(SettingsError, match="use it in a stage of kind `curate`"):
        parse_recipe("name: x\nstages:\n  c: {kind: corpus, read: {path: a.jsonl}, operators: [stock_phrases]}\n")


def test_a_model_of_another_stage_is_an_input() -> None:
    recipe = parse_recipe(RECIPE % "[{token_length: {tokenizer: '@s', max: 9}}, {instruction_difficulty: {model: '@s'}}]")
    assert recipe.stages["c"].input_names() == ["s"]
    assert recipe.stages["c"].files() == []


def test_operators_are_listed_and_documented() -> None:
    for name in ("vague_reference", "refusal_share", "instruction_difficulty", "reply_repeats"):
        assert name in registry.OPERATORS
        assert len(describe.describe_one(name)) > 6
    assert "operators" in "\n".join(describe.describe_one("curate"))


def test_histograms_have_tenths_below_one_and_powers_of_two_above() -> None:
    chain = units.Chain(["stock_phrases"], "seen")
    measures = pa.table(
        {"00.phrases": pa.array([0, 1, 5, 7, 0.25, -1, np.nan, None], pa.float64()), "00.found": pa.array(["x"] * 8)}
    )
    assert units.histograms(measures, chain) == {"stock_phrases.phrases": {"-1": 1, "0": 1, "0.2": 1, "1": 1, "4": 2}}
