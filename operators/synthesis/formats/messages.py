"""OpenAI's chat messages, calls of functions included (see `calls` for what becomes of those)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from operators.synthesis.formats import calls, fields
from operators.synthesis.formats.fields import Message, Row, RowError, checked, only, text

FIELDS = ("id", "messages", "tools")
_KNOWN = ("system", "user", "assistant", "tool", "function", "function_call")


def from_messages(row: Mapping[str, Any], identity: str) -> Iterator[Row]:
    """messages [{role, content}] and `tools`, as OpenAI's chat format. Raises RowError."""
    only(row, FIELDS)
    yield checked(fields.conversation(identity, messages_of(row.get("messages"), "messages"), fields.tools(row)))


def messages_of(given: Any, what: str, numbers: calls.CallNumbers | None = None) -> list[Message]:
    """Messages of CONVERSATIONS from OpenAI's. Raises RowError."""
    if not isinstance(given, list):
        raise RowError("malformed", f"{what!r} must be a list of {{role, content}}")
    numbers = numbers or calls.CallNumbers()
    found: list[Message] = []
    for message in given:
        if not isinstance(message, Mapping):
            raise RowError("malformed", "a message must be {role, content}")
        found += _message(message, numbers)
    return found


def _message(message: Mapping[str, Any], numbers: calls.CallNumbers) -> list[Message]:
    role = message.get("role")
    if role not in _KNOWN:
        raise RowError("unknown_role", f"unknown role {role!r}; known: {', '.join(_KNOWN)}")
    if role == "assistant":
        only(message, ("role", "content", "tool_calls", "function_call"))
        called, old = message.get("tool_calls"), message.get("function_call")
        if not called and not old:
            return [{"role": role, "content": _content(message)}]
        if called and old:
            raise RowError("malformed", "a message has both 'tool_calls' and 'function_call'")
        said = _content(message, "")
        content = calls.content_of_calls(called or [{"function": old}], numbers)
        return [*([{"role": role, "content": said}] if said else []), {"role": "function_call", "content": content}]
    if role in ("tool", "function"):
        only(message, ("role", "content", *(("tool_call_id",) if role == "tool" else ("name",))))
        identity = message.get("tool_call_id")
        if identity is not None and not isinstance(identity, str):
            raise RowError("malformed", "'tool_call_id' must be a string")
        return [{"role": "tool", "content": calls.content_of_result(_content(message), identity, numbers)}]
    only(message, ("role", "content"))
    content = _content(message)
    if role == "function_call":
        found = calls.calls_of(content)
        if found is not None:
            numbers.called([call.get("id") for call in found])
    return [{"role": str(role), "content": content}]


def _content(message: Mapping[str, Any], default: str | None = None) -> str:
    """The text of a message: a string, or a list that holds one part of type `text`. Raises RowError."""
    value = message.get("content")
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], Mapping) or value[0].get("type") != "text":
            raise RowError("content_parts", "'content' has several parts, or one that is no text")
        only(value[0], ("type", "text"))
        return text(value[0], "text")
    return text(message, "content", default)


def to_messages(row: Mapping[str, Any]) -> Row:
    """The row as OpenAI messages. Alpaca's split of the prompt is not kept. Raises RowError."""
    found: Row = {"id": row["id"], "messages": openai_messages(row["messages"])}
    if row.get("tools") is not None:
        try:
            found["tools"] = fields.parsed(row["tools"])
        except ValueError as error:
            raise RowError("tools", f"'tools' is no JSON: {error}") from error
    return found


def openai_messages(messages: Sequence[Mapping[str, str]], numbers: calls.CallNumbers | None = None) -> list[Row]:
    """OpenAI's messages. A text and a call that follow each other are one message of the assistant. Raises RowError."""
    numbers = numbers or calls.CallNumbers()
    found: list[Row] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "function_call":
            called = calls.tool_calls(content, numbers)
            before = found[-1] if found else None
            if before is not None and before["role"] == "assistant" and before["content"] and "tool_calls" not in before:
                before["tool_calls"] = called
            else:
                found.append({"role": "assistant", "content": None, "tool_calls": called})
        elif role == "tool":
            said, identity = calls.result(content, numbers)
            found.append({"role": role, "content": said, **({} if identity is None else {"tool_call_id": identity})})
        else:
            found.append({"role": role, "content": content})
    return found


def respelled(row: Row) -> Row:
    """The row as it comes back from OpenAI's form: the JSON of calls and tools in its usual spelling, nothing else changed."""
    messages = [{"role": m["role"], "content": calls.respelled(m["role"], m["content"])} for m in row["messages"]]
    tool_text = row.get("tools")
    return {
        **row,
        "messages": messages,
        "tools": None if tool_text is None else fields.spelled(fields.parsed(tool_text)),
        "input_start": None,
    }
