"""Every format of chat data: real files come back as they were, what does not fit is a counted reject with its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.synthesis import formats, heuristics
from operators.synthesis.conversations import read_rows
from operators.synthesis.formats import RowError, calls, parse_row, write
from operators.synthesis.formats.fields import language
from operators.synthesis.requests import Reject

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SAID = TEXT.filter(str.strip)


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


def read_again(made: dict[str, Any], form: Any) -> dict[str, Any]:
    found = parse_row(json.loads(json.dumps(made, ensure_ascii=False)), form, "x", 0)
    assert not isinstance(found, Reject), found
    (row,) = found
    return row


def written(row: dict[str, Any], table: Any, form: Any, why: Counter[str]) -> dict[str, Any] | None:
    try:
        return write(row, table, form)
    except RowError as error:
        why[error.reason] += 1
        return None


@pytest.mark.parametrize(
    ("name", "form", "count", "kept_rows"),
    [
        ("instruct/alpaca_en.jsonl", "alpaca", 2500, 2500),
        ("instruct/alpaca_zh.jsonl", "alpaca", 2500, 2490),
        ("instruct/identity_91.jsonl", "alpaca", 91, 91),
        ("instruct/alpaca_gpt4_en_demo.jsonl", "alpaca", 300, 300),
        ("instruct/alpaca_gpt4_zh_demo.jsonl", "alpaca", 300, 300),
        ("sharegpt/glaive_toolcall_en.jsonl", "sharegpt", 150, 150),
        ("sharegpt/glaive_toolcall_zh.jsonl", "sharegpt", 150, 150),
        ("sharegpt/sharegpt_zh.jsonl", "sharegpt", 450, 450),
        ("sharegpt/fastchat_dummy_500.jsonl", "sharegpt", 500, 500),
        ("preference/dpo_en_demo.jsonl", "dpo", 150, 150),
        ("preference/dpo_zh_demo.jsonl", "dpo", 150, 150),
        ("preference/dpo_zh_500.jsonl", "dpo", 250, 250),
        ("preference/hh_rlhf_harmless.jsonl", "dpo", 600, 590),
        ("preference/kto_en_demo.jsonl", "kto", 150, 150),
    ],
)
def test_real_files_come_back_as_they_were(data_pack: Path, name: str, form: Any, count: int, kept_rows: int) -> None:
    kept, rejected = rows_of(data_pack / name, form)
    assert len(kept) + len(rejected) == count
    assert len(kept) >= kept_rows - 10, Counter(reject.reason for reject in rejected)
    table = formats.TABLES[form]
    for row in kept:
        assert read_again(write(row, table, form), form) == row  # exactly: also the JSON of calls and tools


def test_real_tool_calls_pass_through_openai_messages_unchanged(data_pack: Path) -> None:
    called = 0
    for lang in ("en", "zh"):
        kept, _ = rows_of(data_pack / f"sharegpt/glaive_toolcall_{lang}.jsonl", "sharegpt")
        for row in kept:
            made = write(row, "conversations", "messages")
            assert {message["role"] for message in made["messages"]} <= {"system", "user", "assistant", "tool"}
            for message in made["messages"]:
                for call in message.get("tool_calls", []):
                    called += 1
                    assert isinstance(json.loads(call["function"]["arguments"]), dict)
            ids = [call["id"] for message in made["messages"] for call in message.get("tool_calls", [])]
            assert ids == [message["tool_call_id"] for message in made["messages"] if message["role"] == "tool"]
            assert read_again(made, "messages") == row
    assert called == 229


def test_every_seed_task_instance_is_a_row(example_data: Path) -> None:
    for lang in ("en", "zh"):
        kept, rejected = rows_of(example_data / f"seed_tasks_{lang}.jsonl", "seed_tasks")
        assert not rejected
        assert len(kept) >= 175
        assert all(read_again(write(row, "conversations", "alpaca"), "alpaca") == row for row in kept)


def test_real_rows_go_from_any_form_to_any_other_or_say_why(data_pack: Path) -> None:
    why: Counter[str] = Counter()
    for name, form in (("sharegpt/glaive_toolcall_zh.jsonl", "sharegpt"), ("sharegpt/sharegpt_zh.jsonl", "sharegpt")):
        kept, _ = rows_of(data_pack / name, form)
        for row in kept[:150]:
            for other in ("alpaca", "sharegpt", "messages", "llama_factory"):
                made = written(row, "conversations", other, why)
                if made is not None and other != "llama_factory":
                    again = read_again(made, other)
                    assert (again["messages"], again["tools"]) == (row["messages"], row["tools"])
    assert set(why) == {"tools", "turns"}


@settings(deadline=None)
@given(TEXT, TEXT, TEXT)
def test_any_alpaca_row_comes_back_as_it_was(instruction: str, given_input: str, output: str) -> None:
    row = {"id": "a", "instruction": instruction, "input": given_input, "output": output}
    found = parse_row(row, "alpaca", "x", 0)
    if isinstance(found, Reject):
        assert found.reason in ("no_prompt", "no_reply")
        assert not output.strip() or not (instruction + given_input).strip()
    else:
        assert write(found[0], "conversations", "alpaca") == row


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
)
ARGUMENTS = st.dictionaries(TEXT, JSON, max_size=3).map(json.dumps) | st.dictionaries(TEXT, JSON, max_size=3) | TEXT
CALL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "arguments": ARGUMENTS})},
    optional={"id": st.sampled_from(["call_0", "call_1", "call_7", "x", ""])},
)
ADDRESSED = st.builds(
    lambda i, c: json.dumps({"tool_call_id": i, "content": c}, ensure_ascii=False), st.sampled_from(["x", None, "call_0"]), TEXT
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | TEXT, "tool_calls": st.lists(CALL, min_size=1, max_size=3)}
    ),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": TEXT | ADDRESSED},
        optional={"tool_call_id": st.sampled_from(["call_0", "call_1", "x"])},
    ),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(MESSAGE, max_size=6))
def test_any_openai_conversation_comes_back_as_the_row_it_was(messages: list[dict[str, Any]]) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, *messages, {"role": "assistant", "content": "a"}]}
    found = parse_row(row, "messages", "x", 0)
    assert not isinstance(found, Reject), found
    assert read_again(write(found[0], "conversations", "messages"), "messages") == found[0]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from(["human", "gpt", "function_call", "observation", "system"]), TEXT | ADDRESSED), max_size=6)
)
def test_any_sharegpt_conversation_comes_back_or_is_refused_where_the_form_has_no_place(turns: list[tuple[str, str]]) -> None:
    row = {"conversations": [{"from": who, "value": said} for who, said in [("human", "问"), *turns, ("gpt", "答")]]}
    found = parse_row(row, "sharegpt", "x", 0)
    assert not isinstance(found, Reject), found
    assert read_again(write(found[0], "conversations", "sharegpt"), "sharegpt") == found[0]
    for form in ("messages", "alpaca"):
        why: Counter[str] = Counter()
        made = written(found[0], "conversations", form, why)
        if made is None:
            assert set(why) <= {"turns", "function_call", "not_exact"}
        else:
            assert read_again(made, form)["messages"] == formats.kept_by(found[0], "conversations", form)["messages"]  # type: ignore[arg-type]


def test_calls_and_results_are_plain_json_where_their_place_says_all() -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    other = {"id": "abc", "type": "function", "function": {"name": "time", "arguments": '{ "zone":8 }'}}
    messages = [
        {"role": "user", "content": "天气和时间？"},
        {"role": "assistant", "content": "我查一下", "tool_calls": [call, other]},
        {"role": "tool", "tool_call_id": "call_0", "content": "晴"},
        {"role": "tool", "tool_call_id": "abc", "content": "8:00"},
        {"role": "assistant", "content": "晴，八点"},
    ]
    (row,) = parse_row({"id": "t", "messages": messages}, "messages", "x", 0)  # type: ignore[misc]
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "function_call", "tool", "tool", "assistant"]
    assert json.loads(row["messages"][2]["content"]) == [
        {"name": "weather", "arguments": {"city": "北京"}},
        {"name": "time", "arguments": '{ "zone":8 }', "id": "abc"},
    ]
    assert [m["content"] for m in row["messages"][3:5]] == ["晴", "8:00"]
    assert write(row, "conversations", "messages")["messages"] == messages
    messages[2], messages[3] = messages[3], messages[2]  # results in another order must say which call they answer
    (row,) = parse_row({"id": "t", "messages": messages}, "messages", "x", 0)  # type: ignore[misc]
    assert json.loads(row["messages"][3]["content"]) == {"tool_call_id": "abc", "content": "8:00"}
    assert write(row, "conversations", "messages")["messages"] == messages


def test_the_old_function_call_of_openai_is_read() -> None:
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    (row,) = parse_row({"messages": messages}, "messages", "x", 0)  # type: ignore[misc]
    assert row["messages"][1:3] == [
        {"role": "function_call", "content": '{"name": "now", "arguments": {}}'},
        {"role": "tool", "content": "noon"},
    ]


def test_json_with_a_key_twice_is_no_call() -> None:
    assert calls.calls_of('{"name": "f", "arguments": {"a": 1, "a": 2}}') is None
    assert calls.calls_of('{"name": "f", "arguments": {"a": 1}}') is not None


def test_alpaca_with_system_and_history_keeps_every_turn() -> None:
    row = {
        "id": "h",
        "instruction": "再短一些",
        "input": "原文",
        "output": "好",
        "system": "你是编辑",
        "history": [["改短", "已改"]],
    }
    (found,) = parse_row(row, "alpaca", "x", 0)  # type: ignore[misc]
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert write(found, "conversations", "alpaca") == row
    assert write(found, "conversations", "sharegpt")["system"] == "你是编辑"


HH = "\n\nHuman: a\n\nAssistant:"
QA = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        ({"instruction": 1, "input": "", "output": "x"}, "alpaca", "malformed"),
        ({"instruction": "a", "output": ""}, "alpaca", "no_reply"),
        ({"instruction": "a", "output": "b", "label": True}, "alpaca", "unknown_field"),
        ({"instruction": "a", "output": "b", "history": "x"}, "alpaca", "malformed"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "sharegpt", "unknown_role"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "sharegpt", "unknown_role"),
        ({"conversations": "x"}, "sharegpt", "malformed"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "sharegpt", "no_prompt"),
        ({"conversations": [{"from": "human", "value": "x", "weight": 0.5}]}, "sharegpt", "unknown_field"),
        ({"messages": [*QA, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages", "malformed"),
        ({"messages": [*QA, {"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "messages", "unknown_call"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages", "content_parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "content_parts"),
        ({"messages": [{"role": "user", "content": "x", "name": "Li"}]}, "messages", "unknown_field"),
        ({"messages": QA, "tools": "{"}, "messages", "malformed"),
        ({"id": "s", "instruction": "a", "instances": []}, "seed_tasks", "malformed"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "dpo", "tie"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "dpo", "no_reply"),
        ({"prompt": "a", "chosen": "b"}, "dpo", "malformed"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 8}, "dpo", "unknown_field"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"}, "dpo", "malformed"),
        ({"chosen": "a", "rejected": "b"}, "dpo", "malformed"),
        ({"chosen": HH + " b\n\nHuman: c\n\nAssistant: d", "rejected": HH + " x"}, "dpo", "diverging"),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c", "tools": "[1]"}, "dpo", "tools"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "chosen": "b", "rejected": "c"}, "dpo", "no_prompt"),
        ({"messages": QA}, "kto", "malformed"),
        ({"messages": QA, "label": 1}, "kto", "malformed"),
        ({"messages": [*QA, QA[0]], "label": True}, "kto", "no_reply"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_name_their_reason(row: dict[str, Any], form: Any, reason: str) -> None:
    found = parse_row(row, form, "file.jsonl", 7)
    assert isinstance(found, Reject)
    assert found.reason == reason
    assert found.detail is not None
    assert "file.jsonl, row 7" in found.detail


def test_a_conversation_with_tools_does_not_pass_as_alpaca() -> None:
    row = {"messages": QA, "tools": [{"name": "f"}]}
    (found,) = parse_row(row, "messages", "x", 0)  # type: ignore[misc]
    assert json.loads(found["tools"]) == [{"name": "f"}]
    assert write(found, "conversations", "messages")["tools"] == [{"name": "f"}]
    with pytest.raises(RowError, match="tools"):
        write(found, "conversations", "alpaca")


SYSTEM, ASKED = {"role": "system", "content": "简短"}, {"role": "user", "content": "问"}
GOOD, BAD = {"role": "assistant", "content": "好"}, {"role": "assistant", "content": "坏"}
TURNS = [{"from": "system", "value": "简短"}, {"from": "human", "value": "问"}]
PAIR_SHAPES: list[dict[str, Any]] = [
    {"prompt": "问", "chosen": "好", "rejected": "坏", "system": "简短"},
    {"prompt": [SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]},
    {"prompt": "问", "system": "简短", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"conversations": TURNS, "chosen": {"from": "gpt", "value": "好"}, "rejected": {"from": "gpt", "value": "坏"}},
    {"conversations": TURNS[1:], "system": "简短", "chosen": "好", "rejected": "坏"},
    {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏", "system": "简短"},
    {"system": "简短", "chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
]


@pytest.mark.parametrize("shape", PAIR_SHAPES)
def test_all_shapes_of_a_pair_are_one_row_and_go_to_every_form(shape: dict[str, Any]) -> None:
    (row,) = parse_row({"id": "p", **shape, "margin": 0.1}, "dpo", "x", 0)  # type: ignore[misc]
    assert row["prompt"] == [{"role": "system", "content": "简短"}, {"role": "user", "content": "问"}]
    assert [row["chosen"], row["rejected"]] == [[{"role": "assistant", "content": said}] for said in ("好", "坏")]
    for form in ("alpaca", "sharegpt", "messages", "dpo"):
        assert read_again(write(row, "preferences", form), "dpo") == row  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(SAID, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2), SAID, SAID, st.none() | st.floats(-9, 9))
def test_any_pair_comes_back_from_every_form(turns: list[str], good: str, bad: str, margin: float | None) -> None:
    prompt = [{"role": ("user", "assistant")[index % 2], "content": said} for index, said in enumerate(turns)]
    given_row = {"id": "p", "prompt": prompt, "chosen": good, "rejected": bad, "margin": margin}
    found = parse_row(given_row, "dpo", "x", 0)
    if isinstance(found, Reject):
        assert found.reason == "tie"
        assert good == bad
        return
    for form in ("alpaca", "sharegpt", "dpo"):
        assert read_again(write(found[0], "preferences", form), "dpo") == found[0]  # type: ignore[arg-type]


def test_all_shapes_of_a_label_are_one_row_and_go_to_every_form() -> None:
    shapes: list[dict[str, Any]] = [
        {"messages": QA, "label": False},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "kto_tag": False},
        {"instruction": "问", "input": "", "output": "答", "label": False},
        {"prompt": "问", "completion": "答", "label": False},
        {"prompt": QA[:1], "completion": QA[1:], "label": False},
    ]
    for shape in shapes:
        (row,) = parse_row({"id": "k", **shape}, "kto", "x", 0)  # type: ignore[misc]
        assert (row["messages"], row["label"], row["lang"]) == (QA, False, "zh")
        for form in ("alpaca", "sharegpt", "messages", "kto"):
            assert read_again(write(row, "labelled", form), "kto") == row  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"instruction": "a", "instances": []}, "seed_tasks"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"conversations": []}, "sharegpt"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "dpo"),
        ({"messages": [], "label": True}, "kto"),
        ({"text": "a"}, None),
        ({"messages": [], "conversations": []}, None),
        ({"chosen": "a", "rejected": "b", "messages": [], "label": True}, None),
    ],
)
def test_a_format_is_told_only_where_it_is_the_only_one(row: dict[str, Any], form: str | None) -> None:
    if form is None:
        with pytest.raises(ValueError, match="set `format`"):
            formats.detect(row)
    else:
        assert formats.detect(row) == form


@given(st.text(max_size=30))
def test_the_language_of_a_row_is_that_of_its_letters(text: str) -> None:
    found = language({"messages": [{"role": "user", "content": text}]})
    expected = heuristics.language_of(text)
    assert found == (expected if expected == "zh" or heuristics.script_share(text, "en") >= 0.9 else None)
