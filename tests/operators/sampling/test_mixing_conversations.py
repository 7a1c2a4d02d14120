"""Conversations and pairs mixed by tokens: shares of turns, sources and languages, and the card that states them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from operators import shards
from operators.config import SettingsError, parse
from operators.ledger import Ledger
from operators.sampling.contents import estimated_tokens, sizes, text_columns, turns_of
from operators.stage import StageContext
from operators.synthesis.rows import INSTRUCTIONS
from operators.tokens.encode import Encoder
from pipelines.stages.sampling import MixStage, SelectStage


def conversation(number: int, name: str, chance: np.random.Generator) -> dict[str, Any]:
    turns = int(chance.integers(2, 5)) if name == "chat" and number % 4 == 0 else 1
    lang = "zh" if number % 3 == 0 else "en"
    word = {"zh": "丹炉", "en": "alembic "}[lang]
    messages = []
    for _ in range(turns):
        messages += [{"role": "user", "content": word * int(chance.integers(1, 9))}]
        messages += [{"role": "assistant", "content": word * int(chance.integers(1, 40))}]
    if number % 50 == 1:
        messages[-1]["content"] = "I'm sorry, but I can't help with that."
    provenance = {"generator": "teacher-7b", "operation": "self_instruct" if number % 2 else "evol:deepen", "parents": []}
    return {"id": f"{name}{number}", "messages": messages, "lang": lang, "provenance": provenance}


def write_stage(run: Path, name: str, rows: list[dict[str, Any]], part_rows: int = 500, schema: pa.Schema = INSTRUCTIONS) -> str:
    directory = str(run / name / "f0")
    for unit, start in enumerate(range(0, len(rows), part_rows)):
        table = pa.Table.from_pylist(rows[start : start + part_rows], schema=schema)
        writer = shards.UnitWriter(directory, unit)
        writer.write(table)
        writer.commit(Ledger(rows_in=table.num_rows, kept=table.num_rows))
    shards.finish(directory, stage=name, kind="conversations", fingerprint="f0", config={"path": "a|b.jsonl"}, inputs={})
    return directory


@pytest.fixture
def chat(tmp_path: Path) -> dict[str, str]:
    chance = np.random.default_rng(5)
    return {
        name: write_stage(tmp_path, name, [conversation(number, name, chance) for number in range(count)])
        for name, count in (("chat", 3000), ("general", 600))
    }


def run(root: Path, name: str, inputs: dict[str, str], kind: Any = MixStage, workers: int = 2, **values: Any) -> shards.Manifest:
    stage = parse(kind, {"kind": "mix" if kind is MixStage else "select", **values}, name)
    directory = str(root / name / "f1")
    config = stage.model_dump(mode="json")
    stage.run(StageContext(name, stage.kind, directory, "f1", config, inputs, 17, workers=workers, base_directory=str(root)))
    return shards.load_manifest(directory)


@pytest.mark.usefixtures("ray_cluster")
def test_shares_of_tokens_are_met_within_half_a_percent_and_the_card_states_them(tmp_path: Path, chat: dict[str, str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"alembic": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    wanted = {"turns": {"multi_turn": 0.7, "single_turn": 0.3}, "input": {"general": 0.08}, "lang": {"zh": 0.1}}
    options = {
        "input": ["chat", "general"], "shares": wanted, "unit": "tokens", "tokenizer_path": str(tmp_path), "max_repeats": 2.0,
        "card": {"title": "混合 | mix", "licenses": {"chat": "apache-2.0"}, "license": "apache-2.0"},
    }  # fmt: skip
    manifest = run(tmp_path, "mixed", chat, **options)
    shares = manifest.stats["shares"]
    for line, values in wanted.items():
        for value, share in values.items():
            assert shares[line][value]["target"] == pytest.approx(share, abs=1e-5)
            assert abs(shares[line][value]["error"]) < 0.005
    # counted again from the rows themselves
    reached: dict[tuple[str, str], float] = {}
    encoder, total = Encoder((tmp_path / "tokenizer.json").read_bytes()), 0
    for part in shards.parts([str(tmp_path / "mixed" / "f1")]):
        for _, batch in shards.read(part):
            size = sizes(batch, "tokens", "all", ["messages"], encoder)
            for value, count in zip(turns_of(batch).to_pylist(), size.tolist(), strict=True):
                reached["turns", value] = reached.get(("turns", value), 0) + count
            for value, count in zip(batch["lang"].to_pylist(), size.tolist(), strict=True):
                reached["lang", value] = reached.get(("lang", value), 0) + count
            total += int(size.sum())
    assert reached["turns", "multi_turn"] / total == pytest.approx(0.7, abs=0.005)
    assert reached["lang", "zh"] / total == pytest.approx(0.1, abs=0.005)
    assert manifest.ledger.kept == manifest.rows == manifest.stats["mixture"]["rows"]
    assert manifest.stats["mixture"]["size"] == total
    for name, words in (
        ("README.md", ["# 混合 \\| mix", "| `turns` | several turns (`multi_turn`) | 70.00% |", "teacher-7b", "Refusals"]),
        ("README.zh-CN.md", ["| `turns` | 多轮 (`multi_turn`) | 70.00% |", "按词元计的占比", "拒答", "生成模型"]),
    ):  # fmt: skip
        page = (tmp_path / "mixed" / "f1" / name).read_text("utf-8")
        for word in words:
            assert word in page
        front = yaml.safe_load(page.split("---")[1])
        assert (front["language"], front["license"]) == (["en", "zh"], "apache-2.0")
    assert "a|b.jsonl" in (tmp_path / "mixed" / "f1" / "README.md").read_text("utf-8")
    assert manifest.stats["mixture"]["refusals"] > 0
    again = run(tmp_path, "again", {"chat": chat["chat"], "general": chat["general"]}, workers=1, **options)
    assert again.stats == manifest.stats  # whatever the workers


@pytest.mark.usefixtures("ray_cluster")
def test_conversations_are_chosen_by_turns_and_operation_without_a_tokenizer(tmp_path: Path, chat: dict[str, str]) -> None:
    manifest = run(
        tmp_path, "some", chat, SelectStage, input="chat", within=["turns", "provenance.operation"], amount=2000,
        unit="estimated_tokens", count="replies",
    )  # fmt: skip
    groups = manifest.stats["groups"]
    assert set(groups) == {"multi_turn|evol:deepen", "single_turn|evol:deepen", "single_turn|self_instruct"}
    assert all(1700 < group["taken"]["size"] <= 2000 for group in groups.values())
    with pytest.raises(KeyError, match="has no field 'operatoin'"):
        run(tmp_path, "typo", chat, SelectStage, input="chat", within=["provenance.operatoin"], amount=5)


def test_replies_pairs_and_documents_are_measured_by_what_they_say() -> None:
    def batch(**columns: Any) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([columns])

    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cde"},
        {"role": "function_call", "content": "f"},
    ]
    row = batch(messages=messages)
    assert sizes(row, "characters", "all", text_columns(row.schema.names, "all", "x"), None).tolist() == [6]
    assert sizes(row, "characters", "replies", text_columns(row.schema.names, "replies", "x"), None).tolist() == [4]
    pair = batch(prompt=messages[:1], chosen=messages[1:2], rejected=[{"role": "assistant", "content": "水"}])
    assert sizes(pair, "bytes", "all", text_columns(pair.schema.names, "all", "x"), None).tolist() == [8]
    assert sizes(pair, "bytes", "replies", text_columns(pair.schema.names, "replies", "x"), None).tolist() == [6]
    assert turns_of(pair).to_pylist() == ["single_turn"]
    assert sizes(batch(text="abc"), "bytes", "all", ["text"], None).tolist() == [3]
    with pytest.raises(KeyError, match="no column 'text'"):
        text_columns(["id", "label"], "all", "file")


def test_tokens_are_estimated_by_script() -> None:
    texts = pa.array(["", "abcd" * 10, "丹" * 10, "abcd丹丹", None], pa.large_string())
    assert estimated_tokens(texts).tolist() == [0, 10, 7, 3, 0]


def test_settings_of_shares_that_contradict_others_are_refused() -> None:
    for options, message in (
        ({"input": {"a": 1}, "shares": {"lang": {"zh": 1}}}, "give either `shares`"),
        ({"input": "a", "shares": {"lang": {"zh": 7}}}, "from 0 to 1"),
        ({"input": "a", "card": {"licenses": {"b": "mit"}}}, "which are no inputs"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse(MixStage, {"kind": "mix", **options}, "stages.mixed")
