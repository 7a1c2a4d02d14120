"""Replies as JSON: what fits is found wherever it stands, what does not is a reject that says why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.config import SettingsError
from operators.synthesis.requests import Reject, Reply
from operators.synthesis.structured import parse_json, schema_text

SCHEMA = schema_text(
    {
        "type": "object",
        "properties": {"问题": {"type": "string", "minLength": 1}, "score": {"type": "integer", "minimum": 1, "maximum": 5}},
        "required": ["问题", "score"],
        "additionalProperties": False,
    }
)
GOOD = {"问题": "什么是共识算法？", "score": 4}


def reply(text: str, finish: str = "stop") -> Reply:
    return Reply(text, finish, 5, 5)


@pytest.mark.parametrize(
    "frame", ["{}", "```json\n{}\n```", "Sure! Here it is: {} I hope it helps.", "好的，结果如下：\n{}", "[note] {{a}} {}"]
)
def test_json_is_found_in_what_models_put_around_it(frame: str) -> None:
    text = frame.replace("{{a}}", "{a}").replace("{}", json.dumps(GOOD, ensure_ascii=False))
    assert parse_json(reply(text), SCHEMA) == GOOD


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("", "stop", "empty"),
        ("  \n", "length", "truncated"),
        ('{"问题": "什么是', "length", "truncated"),
        ('{"问题": "什么是', "stop", "malformed"),
        ("no idea", "stop", "malformed"),
        ('{"问题": "a", "score": 9}', "stop", "malformed"),
        ('{"问题": "a"}', "stop", "malformed"),
        ('{"问题": "a", "score": 2, "extra": 1}', "stop", "malformed"),
        ("[" * 100_000, "stop", "malformed"),
        ("{" * 100_000, "length", "truncated"),
    ],
)
def test_what_is_missing_or_wrong_is_a_reject(text: str, finish: str, reason: str) -> None:
    found = parse_json(reply(text, finish), SCHEMA)
    assert isinstance(found, Reject)
    assert found.reason == reason


def test_the_reject_says_where_the_reply_does_not_fit() -> None:
    found = parse_json(reply('{"问题": "a", "score": "five"}'), SCHEMA)
    assert isinstance(found, Reject)
    assert found.detail is not None
    assert found.detail.startswith("at score:")


def test_a_truncated_reply_that_is_complete_json_counts() -> None:
    assert parse_json(reply(json.dumps(GOOD), "length"), SCHEMA) == GOOD


def test_a_schema_that_is_none_is_refused_with_its_place() -> None:
    with pytest.raises(SettingsError, match=r"stages\.x\.schema: no valid JSON schema.*properties"):
        schema_text({"type": "object", "properties": {"a": {"type": "strnig"}}}, "stages.x.schema")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_any_json_comes_back_as_it_was(value: Any) -> None:
    assert parse_json(reply(json.dumps(value, ensure_ascii=False))) == value


@given(st.text(max_size=200))
def test_no_text_raises(text: str) -> None:
    parse_json(reply(text), SCHEMA)
