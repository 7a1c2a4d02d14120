"""ShareGPT: conversations of {from, value}, with `system` and `tools` beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from operators.synthesis.formats import fields
from operators.synthesis.formats.fields import Message, Row, RowError, checked, only, text

FIELDS = ("id", "conversations", "system", "tools")

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system", "function_call": "function_call", "observation": "tool", "tool": "tool",
}  # fmt: skip
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "function_call": "function_call", "tool": "observation"}


def from_sharegpt(row: Mapping[str, Any], identity: str) -> Iterator[Row]:
    """conversations [{from, value}], `system` and `tools` (a JSON string or object). Raises RowError."""
    only(row, FIELDS)
    yield checked(fields.conversation(identity, turns(row), fields.tools(row)))


def turns(row: Mapping[str, Any]) -> list[Message]:
    """The messages of `system` and `conversations`. Raises RowError."""
    given = row.get("conversations")
    if not isinstance(given, list):
        raise RowError("malformed", "'conversations' must be a list of {from, value}")
    messages = [{"role": "system", "content": text(row, "system")}] if row.get("system") else []
    return messages + [message(turn) for turn in given]


def message(turn: Any) -> Message:
    """The message of one {from, value}. Raises RowError."""
    if not isinstance(turn, Mapping):
        raise RowError("malformed", "a turn must be {from, value}")
    only(turn, ("from", "value"))
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RowError("unknown_role", f"unknown speaker {speaker!r}; known: {', '.join(_ROLES)}")
    return {"role": _ROLES[speaker], "content": text(turn, "value")}


def turn(given: Mapping[str, str]) -> Message:
    """{from, value} of one message. Raises RowError."""
    if given["role"] not in _SPEAKERS:
        raise RowError("unknown_role", f"ShareGPT has no speaker for the role {given['role']!r}")
    return {"from": _SPEAKERS[given["role"]], "value": given["content"]}


def to_sharegpt(row: Mapping[str, Any]) -> Row:
    """The row as ShareGPT's fields; a first system message becomes `system`. Alpaca's split of the prompt is not kept."""
    found = {"id": row["id"], **conversation_fields(row["messages"])}
    if row.get("tools") is not None:
        found["tools"] = row["tools"]
    return found


def conversation_fields(messages: list[Message]) -> Row:
    """`conversations`, and `system` where the first message is one. Raises RowError."""
    found: Row = {}
    if messages and messages[0]["role"] == "system" and messages[0]["content"]:
        found["system"] = messages[0]["content"]
        messages = messages[1:]
    return {**found, "conversations": [turn(item) for item in messages]}
