"""Chat data from files to stages to files: one kind of rows a stage, every row accounted for, files that other tools take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from operators import shards
from operators.config import SettingsError, parse
from operators.sinks import export
from operators.stage import StageContext
from operators.supervise import Limits, Report, Task
from operators.synthesis import formats
from operators.synthesis.conversations import read_rows
from pipelines.graph import plan
from pipelines.recipe import parse_recipe
from pipelines.stages.conversations import ConversationsStage
from pipelines.stages.export import ExportStage

QA = [{"role": "user", "content": "问题？"}, {"role": "assistant", "content": "答案。"}]
CALL = {"type": "function", "id": "call_0", "function": {"name": "now", "arguments": '{"zone": "亚洲"}'}}
CHAT = [
    {"id": "plain", "messages": QA},
    {"id": "system", "messages": [{"role": "system", "content": "Be brief."}, *QA, *QA]},
    {"id": "calls", "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}],
     "messages": [QA[0], {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "call_0", "content": "正午"}, QA[1]]},
    {"id": "two questions", "messages": [QA[0], *QA]},
]  # fmt: skip
PAIR = {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"}}
PAIRS = [{**PAIR, "id": f"p{n}", "rejected": {"from": "gpt", "value": f"坏{n}"}, "margin": n / 10} for n in range(3)]


class Run:
    """Stages in a run directory, output files written in this process."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.logged = root, list[str]()
        self.directories: dict[str, str] = {}
        monkeypatch.setattr(export, "run_units", self._units)

    @staticmethod
    def _units(context: StageContext, target: str, todo: Sequence[dict[str, Any]], limits: Limits, **_: Any) -> None:
        for arguments in reversed(todo):
            export.write_file(Task(arguments, frozenset(), None), Report(lambda *_: None))

    def file(self, name: str, rows: Sequence[Any]) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf-8"
        )
        return name

    def stage(self, name: str, model: Any = ConversationsStage, limit: int | None = None, **values: Any) -> shards.Manifest:
        built = parse(model, {"kind": "export" if model is ExportStage else "conversations", **values}, name)
        directory = self.directories[name] = str(self.root / "runs" / "r" / name / "f0")
        inputs = {wanted: self.directories[wanted] for wanted in built.input_names()}
        built.run(
            StageContext(
                name, built.kind, directory, "f0", {}, inputs, 17, limit, base_directory=str(self.root), log=self.logged.append
            )
        )
        return shards.load_manifest(directory)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [
            row for part in shards.parts([self.directories[name]]) for _, batch in shards.read(part) for row in batch.to_pylist()
        ]

    def rejects(self, name: str) -> list[dict[str, Any]]:
        manifest = shards.load_manifest(self.directories[name])
        found: list[dict[str, Any]] = []
        for entry in manifest.rejects:
            found += pq.read_table(Path(self.directories[name]) / entry["name"]).to_pylist()
        return found

    def exported(self, name: str) -> Iterator[dict[str, Any]]:
        for path in sorted((Path(self.directories[name]) / "data").iterdir()):
            for _, item in read_rows(str(path)):
                assert isinstance(item, dict)
                yield item


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_files_of_several_formats_are_told_apart_by_their_fields(run: Run) -> None:
    run.file("in/a.jsonl", [{"instruction": "说", "input": "", "output": "好"}])
    run.file("in/b.jsonl", CHAT)
    manifest = run.stage("chat", path="in/*.jsonl", format="auto")
    assert manifest.rows == 5
    assert run.logged == [
        "a.jsonl: format alpaca, by the fields of its first row",
        "b.jsonl: format messages, by the fields of its first row",
    ]
    assert manifest.stats["formats"] == {"alpaca": 1, "messages": 4}
    run.file("in/c.jsonl", PAIRS)
    with pytest.raises(SettingsError, match=r"one kind of rows.*c\.jsonl \(dpo\) holds preferences"):
        run.stage("mixed", path="in/*.jsonl", format="auto")
    run.file("odd.jsonl", [{"text": "x"}])
    with pytest.raises(SettingsError, match=r"odd\.jsonl: the format cannot be told"):
        run.stage("odd", path="odd.jsonl", format="auto")


def test_preference_files_become_the_rows_that_dpo_reads(run: Run) -> None:
    run.file("p.jsonl", [*PAIRS, {**PAIRS[0], "score": 3}, "{broken", {**PAIR, "rejected": PAIR["chosen"]}])
    manifest = run.stage("pairs", path="p.jsonl", format="dpo")
    assert [name for name, _ in manifest.schema][:4] == ["id", "prompt", "chosen", "rejected"]
    ledger = {
        "in": 6,
        "created": 0,
        "kept": 3,
        "rejected": {"conversations:tie": 1, "conversations:unknown_field": 1},
        "quarantined": 1,
    }
    assert manifest.ledger.to_json() == ledger
    assert run.rows("pairs")[1]["chosen"] == [{"role": "assistant", "content": "好"}]
    again = run.stage("scored", path="p.jsonl", format="dpo", leave_out=["score"])
    assert again.ledger.kept == 4
    assert again.stats["left_out"] == {"score": 1}


def test_labels_are_kept_and_can_choose_rows(run: Run) -> None:
    run.file("k.jsonl", [{"id": str(n), "messages": QA, "label": n % 2 == 0} for n in range(5)])
    assert [row["label"] for row in (run.stage("all", path="k.jsonl", format="kto"), run.rows("all"))[1]] == [True, False] * 2 + [
        True
    ]
    manifest = run.stage("good", path="k.jsonl", format="kto", label=True)
    assert manifest.ledger.rejected == {"conversations:other_label": 2}
    with pytest.raises(SettingsError, match="`label` is for rows that have one"):
        run.stage("no", path="k.jsonl", format="alpaca", label=True)


@pytest.mark.parametrize("container", ["jsonl", "jsonl.zst", "parquet"])
def test_what_is_exported_is_read_back_as_the_same_rows(run: Run, container: str) -> None:
    run.file("chat.jsonl", CHAT)
    run.file("pairs.jsonl", PAIRS)
    run.file("labels.jsonl", [{"id": str(n), "messages": QA, "label": n % 2 == 0} for n in range(5)])
    run.stage("chat", path="chat.jsonl", format="messages")
    run.stage("pairs", path="pairs.jsonl", format="dpo")
    run.stage("labels", path="labels.jsonl", format="kto")
    plain = {"chat": None, "pairs": "dpo", "labels": "kto"}
    for source, forms in (
        ("chat", ("sharegpt", "messages")),
        ("pairs", ("alpaca", "sharegpt", "messages", "dpo")),
        ("labels", ("kto", "alpaca")),
    ):
        for form in forms:
            name = f"{source}-{form}"
            manifest = run.stage(name, ExportStage, input=source, format=form, container=container)
            assert manifest.ledger.to_json()["rejected"] == {}
            run.stage(f"{name}-back", path=f"runs/r/{name}/f0/data/*", format=plain[source] or form)
            assert run.rows(f"{name}-back") == run.rows(source)


def test_rows_without_a_place_in_a_form_are_counted_rejects(run: Run) -> None:
    run.file("chat.jsonl", CHAT)
    run.stage("chat", path="chat.jsonl", format="messages")
    manifest = run.stage("out", ExportStage, input="chat", format="alpaca")
    assert manifest.ledger.to_json() == {
        "in": 4, "created": 0, "kept": 2, "rejected": {"export:tools": 1, "export:turns": 1}, "quarantined": 0,
    }  # fmt: skip
    assert [row["id"] for row in run.exported("out")] == ["plain", "system"]
    assert {row["id"]: row["reason"] for row in run.rejects("out")} == {"calls": "tools", "two questions": "turns"}
    assert json.loads(run.rejects("out")[0]["text"])["messages"][0] == QA[0]
    with pytest.raises(SettingsError, match=r"`format: dpo` needs preferences, its input holds conversations"):
        run.stage("no", ExportStage, input="chat", format="dpo")


def test_a_pair_gives_kto_two_labelled_rows(run: Run) -> None:
    run.file("pairs.jsonl", PAIRS)
    run.stage("pairs", path="pairs.jsonl", format="dpo")
    manifest = run.stage("out", ExportStage, input="pairs", format="kto")
    assert (manifest.ledger.rows_in, manifest.ledger.created, manifest.ledger.kept) == (3, 3, 6)
    assert [(row["id"], row["label"], row["messages"][-1]["content"]) for row in run.exported("out")][:2] == [
        ("p0#chosen", True, "好"),
        ("p0#rejected", False, "坏0"),
    ]


# --- LLaMA-Factory: what its parser and converters make of a folder, as its documentation (data/README.md) has it


def their_examples(folder: Path, name: str) -> list[dict[str, Any]]:
    """(prompt turns, replies, system, tools) of each row as LLaMA-Factory trains on it; a row that it would skip is an error."""
    entry = json.loads((folder / "dataset_info.json").read_text("utf-8"))[name]
    columns, found = entry["columns"], []
    (file,) = (folder / entry["file_name"]).iterdir()
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        system, tools = row[columns["system"]], row[columns["tools"]] if "tools" in columns else ""
        if entry["formatting"] == "alpaca":
            prompt = [turn for pair in row[columns["history"]] for turn in pair]
            prompt.append("\n".join(piece for piece in (row[columns["prompt"]], row[columns["query"]]) if piece))
            replies = [row[columns[side]] for side in (("chosen", "rejected") if entry.get("ranking") else ("response",))]
        else:
            turns = row[columns["messages"]]
            allowed = (("human", "observation"), ("gpt", "function_call"))
            assert all(turn["from"] in allowed[index % 2] for index, turn in enumerate(turns)), f"skipped: {turns}"
            assert len(turns) % 2 == bool(entry.get("ranking")), f"skipped: {turns}"
            prompt = [turn["value"] for turn in turns]
            replies = [row[columns[side]]["value"] for side in ("chosen", "rejected")] if entry.get("ranking") else [prompt.pop()]
        found.append({"prompt": prompt, "replies": replies, "system": system, "tools": tools})
        if "kto_tag" in columns:
            assert isinstance(row[columns["kto_tag"]], bool)
    return found


def test_llama_factory_takes_every_exported_row(run: Run) -> None:
    run.file("chat.jsonl", CHAT)
    run.stage("chat", path="chat.jsonl", format="messages")
    manifest = run.stage("out", ExportStage, input="chat", format="llama_factory", dataset_name="mine")
    assert manifest.ledger.to_json()["rejected"] == {"export:turns": 1}
    theirs = their_examples(Path(run.directories["out"]), "mine")
    assert [row["system"] for row in theirs] == ["", "Be brief.", ""]
    assert theirs[2]["prompt"] == ["问题？", '{"name": "now", "arguments": {"zone": "亚洲"}}', "正午"]
    assert json.loads(theirs[2]["tools"])[0]["function"]["name"] == "now"
    run.stage("back", path="runs/r/out/f0/dataset_info.json", format="llama_factory", datasets=["mine"])
    assert run.rows("back") == run.rows("chat")[:3]


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_pairs_and_labels_come_back_from_llama_factory(run: Run, formatting: str) -> None:
    run.file("pairs.jsonl", PAIRS)
    run.file("labels.jsonl", [{"id": str(n), "messages": QA, "label": n % 2 == 0} for n in range(5)])
    for name, form in (("pairs", "dpo"), ("labels", "kto")):
        run.stage(name, path=f"{name}.jsonl", format=form)
        run.stage(f"{name}-out", ExportStage, input=name, format="llama_factory", formatting=formatting)
        assert len(their_examples(Path(run.directories[f"{name}-out"]), f"{name}-out")) == len(run.rows(name))
        run.stage(f"{name}-back", path=f"runs/r/{name}-out/f0", format="llama_factory")
        assert run.rows(f"{name}-back") == run.rows(name)


def test_columns_and_tags_of_a_description_are_followed(run: Run) -> None:
    info = {
        "openai": {"file_name": "o.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages", "system": "sys"},
                   "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        "alpaca": {"file_name": "a", "columns": {"prompt": "q", "response": "r"}},
        "calls": {"file_name": "c.jsonl", "formatting": "openai", "columns": {"messages": "messages", "tools": "tools"},
                  "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                           "observation_tag": "tool", "function_tag": "function", "system_tag": "system"}},
        "defaults": {"file_name": "d.json"},
    }  # fmt: skip
    (run.root / "data" / "a").mkdir(parents=True)
    (run.root / "data" / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    run.file(
        "data/o.jsonl", [{"messages": QA, "sys": "简短", "note": "x"}, {"messages": [{"role": "system", "content": "x"}, *QA]}]
    )
    run.file("data/a/1.jsonl", [{"q": "问", "r": "答", "input": "not named"}])
    run.file("data/c.jsonl", [CHAT[2]])
    run.file("data/d.json", [json.dumps([{"instruction": "说", "input": "它", "output": "好", "system": "not named"}])])
    manifest = run.stage("all", path="data/dataset_info.json", format="llama_factory")
    rows = run.rows("all")
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[1]["messages"][0]["content"] == "问"
    assert [m["role"] for m in rows[2]["messages"]] == ["user", "function_call", "tool", "assistant"]
    assert rows[3]["messages"][0]["content"] == "说\n\n它"
    assert rows[3]["input_start"] == 3
    assert manifest.ledger.rejected == {"conversations:unknown_role": 1}  # tags are given, and no tag for system among them
    assert manifest.stats["left_out"] == {"note": 1, "input": 1, "system": 1}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"hf_hub_url": "a/b"}, "lies elsewhere"),
        ({"file_name": "x.jsonl", "num_samples": 5}, "num_samples"),
        ({"file_name": "x.csv"}, "cannot be read"),
        ({"file_name": "x.jsonl", "ranking": True}, "needs the columns `chosen` and `rejected`"),
        ({"file_name": "x.jsonl", "colums": {}}, "did you mean 'columns'"),
        ({"file_name": "x.jsonl", "split": "test"}, "belong to data sets of a hub"),
    ],
)
def test_descriptions_that_cannot_be_followed_are_refused(run: Run, entry: dict[str, Any], told: str) -> None:
    (run.root / "dataset_info.json").write_text(json.dumps({"mine": entry}), "utf-8")
    with pytest.raises(SettingsError, match=told):
        run.stage("no", path="dataset_info.json", format="llama_factory")
    with pytest.raises(SettingsError, match="did you mean 'mine'"):
        run.stage("no", path="dataset_info.json", format="llama_factory", datasets=["mien"])


def test_a_changed_data_file_of_a_description_redoes_the_stage(run: Run) -> None:
    (run.root / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "x.jsonl"}}), "utf-8")
    run.file("x.jsonl", [{"instruction": "a", "output": "b"}])
    recipe = parse_recipe("name: r\nstages:\n  a: {kind: conversations, path: dataset_info.json, format: llama_factory}")
    first = plan(recipe, "/runs/r", str(run.root), None)[0].fingerprint
    run.file("x.jsonl", [{"instruction": "a", "output": "c"}])
    assert plan(recipe, "/runs/r", str(run.root), None)[0].fingerprint != first


def test_every_real_file_passes_through_every_export(run: Run, data_pack: Path) -> None:
    for name, form in (
        ("preference/kto_en_demo.jsonl", "kto"),
        ("preference/dpo_zh_demo.jsonl", "dpo"),
        ("sharegpt/sharegpt_zh.jsonl", "sharegpt"),
    ):
        source = Path(name).stem
        before = run.stage(source, path=str(data_pack / name), format=form)
        out = run.stage(f"{source}-out", ExportStage, input=source, format="llama_factory")
        assert out.ledger.kept + out.ledger.rejected.total() == before.ledger.kept
        assert len(their_examples(Path(run.directories[f"{source}-out"]), f"{source}-out")) == out.ledger.kept
        run.stage(f"{source}-back", path=f"runs/r/{source}-out/f0", format="llama_factory")
        kept = {row["id"]: row for row in run.rows(f"{source}-back")}
        gone = {row["id"] for row in run.rejects(f"{source}-out")}
        assert [kept.get(row["id"]) for row in run.rows(source) if row["id"] not in gone] == [
            row for row in run.rows(source) if row["id"] not in gone
        ]


def test_written_rows_have_the_table_of_their_schema() -> None:
    assert {name: formats.table_of_schema(schema.names) for name, schema in formats.SCHEMAS.items()} == {
        name: name for name in formats.SCHEMAS
    }
