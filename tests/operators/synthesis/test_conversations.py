"""Instruction files are read and written without loss, or a row is set aside with its reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.synthesis.conversations import WRITERS, RowError, Unreadable, parse_row, read_rows
from operators.synthesis.requests import Reject

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def rows_of(path: Path, form: Any) -> tuple[list[dict[str, Any]], list[Reject]]:
    kept, rejected = [], []
    for number, item in read_rows(str(path)):
        assert isinstance(item, dict)
        found = parse_row(item, form, path.name, number)
        if isinstance(found, Reject):
            rejected.append(found)
        else:
            kept += found
    return kept, rejected


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [
        ("instruct/alpaca_en.jsonl", "alpaca", 2500),
        ("instruct/alpaca_zh.jsonl", "alpaca", 2500),
        ("sharegpt/glaive_toolcall_en.jsonl", "sharegpt", None),
        ("sharegpt/glaive_toolcall_zh.jsonl", "sharegpt", None),
        ("sharegpt/sharegpt_zh.jsonl", "sharegpt", None),
        ("instruct/seed_tasks_zh.jsonl", "seed_tasks", 175),
    ],
)
def test_real_files_round_trip(data_pack: Path, name: str, form: Any, count: int | None) -> None:
    kept, rejected = rows_of(data_pack / name, form)
    read = sum(1 for _ in read_rows(str(data_pack / name)))
    assert len(kept) + len(rejected) == (count or read)
    assert len(kept) > 0.95 * read
    writer = "alpaca" if form == "seed_tasks" else form
    for row in kept:
        again = parse_row(json.loads(json.dumps(WRITERS[writer](row))), writer, "x", 0)
        assert again == [row]


@settings(deadline=None)
@given(TEXT, TEXT, TEXT)
def test_any_alpaca_row_comes_back_as_it_was(instruction: str, given_input: str, output: str) -> None:
    row = {"id": "a", "instruction": instruction, "input": given_input, "output": output}
    found = parse_row(row, "alpaca", "x", 0)
    if isinstance(found, Reject):
        assert found.reason in ("no_prompt", "no_reply")
        assert not output.strip() or not (instruction + given_input).strip()
    else:
        assert WRITERS["alpaca"](found[0]) == row


def test_alpaca_with_system_and_history_keeps_every_turn() -> None:
    row = {
        "id": "h",
        "instruction": "再短一些",
        "input": "原文",
        "output": "好",
        "system": "你是编辑",
        "history": [["改短", "已改"]],
    }
    (found,) = parse_row(row, "alpaca", "x", 0)
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert WRITERS["alpaca"](found) == row
    assert WRITERS["sharegpt"](found)["system"] == "你是编辑"


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        ({"instruction": 1, "input": "", "output": "x"}, "alpaca", "malformed"),
        ({"instruction": "a", "output": ""}, "alpaca", "no_reply"),
        ({"instruction": "a", "output": "b", "label": True}, "alpaca", "unknown_field"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "sharegpt", "unknown_role"),
        ({"conversations": "x"}, "sharegpt", "malformed"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "sharegpt", "no_prompt"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages", "unknown_field"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages", "malformed"),
        ({"id": "s", "instruction": "a", "instances": []}, "seed_tasks", "malformed"),
    ],
)
def test_rows_that_do_not_fit_name_their_reason(row: dict[str, Any], form: Any, reason: str) -> None:
    found = parse_row(row, form, "file.jsonl", 7)
    assert isinstance(found, Reject)
    assert found.reason == reason
    assert found.detail is not None
    assert "file.jsonl, row 7" in found.detail


def test_a_conversation_with_tools_does_not_pass_as_alpaca() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "f"}]}
    (found,) = parse_row(row, "messages", "x", 0)
    assert json.loads(found["tools"]) == [{"name": "f"}]
    assert WRITERS["messages"](found)["tools"] == [{"name": "f"}]
    with pytest.raises(RowError, match="tools"):
        WRITERS["alpaca"](found)


def test_bad_lines_are_unreadable_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        stream.write(b'{"a": 1}\n\n{broken\n"text"\n\xff\xfe\n{"a": "\\ud800"}\n' + b'{"a": "' + b"x" * 3_000_000 + b'"}')
    items = [item for _, item in read_rows(str(path))]
    assert [isinstance(item, Unreadable) for item in items] == [False, True, True, True, True, False]
    assert isinstance(items[1], Unreadable)
    assert "line 3" in items[1].detail


def test_an_overlong_line_is_set_aside_without_holding_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators.synthesis.conversations.MAX_ROW_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 5_000_000 + b'"}\n{"a": 2}\n')
    assert [type(item) for _, item in read_rows(str(path))] == [dict, Unreadable, dict]


def test_a_json_array_is_read_like_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, 5, {"a": 2}]))
    assert [type(item) for _, item in read_rows(str(path))] == [dict, Unreadable, dict]
