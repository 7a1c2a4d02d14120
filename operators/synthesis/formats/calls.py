"""Calls of functions: OpenAI's `tool_calls` and `tool_call_id` to and from the text of messages.

CONVERSATIONS has messages of {role, content}. A message that calls functions is one of role `function_call` whose content
is the JSON that ShareGPT files have, `{"name": ..., "arguments": {...}}`, or a list of such where several are called at
once; a result is a message of role `tool`. What OpenAI's form says beyond that is kept in the same JSON, only where it says
something:

- `arguments` is an object; where the text that OpenAI has there is not the usual spelling of one, it stays a string.
- A call has an `id`, where that is not `call_N`, N being the number of the call in the conversation from 0.
- A result's text stands alone where it answers the call of its place: the first result after a message the first call of
  it, and so on. Otherwise it is `{"tool_call_id": ..., "content": ...}`; so is a text that looks like that itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from operators.synthesis.formats.fields import RowError, only, parsed, spelled, text

Call = dict[str, Any]


class CallNumbers:
    """Follows the calls and results of one conversation: which id each has by its place."""

    def __init__(self) -> None:
        self._count = 0
        self._open: list[str] = []  # ids of the calls of the last message that called, in order
        self._answered = 0

    def copy(self) -> CallNumbers:
        """The same numbers, to go on from here in two ways."""
        other = CallNumbers()
        other._count, other._open, other._answered = self._count, list(self._open), self._answered
        return other

    def called(self, ids: Sequence[str | None]) -> list[str]:
        """A message calls as many functions; the ids that they have, by place where None is given."""
        found = [f"call_{self._count + index}" if given is None else given for index, given in enumerate(ids)]
        self._count += len(ids)
        self._open, self._answered = found, 0
        return found

    def place(self, index: int) -> str:
        """The id that the call `index` places further would have."""
        return f"call_{self._count + index}"

    def answered(self) -> str | None:
        """The id of the call that the next result answers by its place."""
        found = self._open[self._answered] if self._answered < len(self._open) else None
        self._answered += 1
        return found


def content_of_calls(given: Any, numbers: CallNumbers) -> str:
    """The content of a `function_call` message from OpenAI's `tool_calls`. Raises RowError."""
    if not isinstance(given, list) or not given:
        raise RowError("malformed", "'tool_calls' must be a list of calls")
    calls, ids = [], []
    for index, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise RowError("malformed", "a tool call must be {id, type, function}")
        only(item, ("id", "type", "function"))
        if item.get("type") not in (None, "function"):
            raise RowError("unknown_call", f"a tool call of type {item['type']!r}; known: function")
        identity = item.get("id")
        if identity is not None and not isinstance(identity, str):
            raise RowError("malformed", "the id of a tool call must be a string")
        call = function(item.get("function"))
        if identity is not None and identity != numbers.place(index):
            call["id"] = identity
        calls.append(call)
        ids.append(identity)
    numbers.called(ids)
    return spelled(calls[0] if len(calls) == 1 else calls)


def function(given: Any) -> Call:
    """`{name, arguments}` with arguments as an object where its text is the usual spelling of one. Raises RowError."""
    if not isinstance(given, Mapping):
        raise RowError("malformed", "a call must be {name, arguments}")
    only(given, ("name", "arguments"))
    arguments = given.get("arguments")
    if isinstance(arguments, str):
        try:
            value = parsed(arguments)
        except ValueError:
            value = None
        arguments = value if isinstance(value, dict) and spelled(value) == arguments else arguments
    elif not isinstance(arguments, Mapping):
        raise RowError("malformed", "the arguments of a call must be JSON text or an object")
    return {"name": text(given, "name"), "arguments": arguments}


def calls_of(content: str) -> list[Call] | None:
    """The calls that the content of a `function_call` message holds, None where it is no such JSON."""
    try:
        value = parsed(content)
    except ValueError:
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or (isinstance(value, list) and len(value) == 1):  # a single call stands alone
        return None
    return calls if all(_is_call(call) for call in calls) else None


def _is_call(call: Any) -> bool:
    return (
        isinstance(call, dict)
        and {"name", "arguments"} <= call.keys() <= {"name", "arguments", "id"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], dict | str)
        and isinstance(call.get("id", ""), str)
    )


def tool_calls(content: str, numbers: CallNumbers) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls` of a `function_call` message. Raises RowError where its content is no call."""
    calls = calls_of(content)
    if calls is None:
        raise RowError("function_call", "the content of a function_call message is no JSON of {name, arguments}")
    ids = numbers.called([call.get("id") for call in calls])
    return [
        {
            "id": identity,
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": call["arguments"] if isinstance(call["arguments"], str) else spelled(call["arguments"]),
            },
        }
        for identity, call in zip(ids, calls, strict=True)
    ]


def content_of_result(content: str, identity: str | None, numbers: CallNumbers) -> str:
    """The content of a `tool` message from OpenAI's content and `tool_call_id`."""
    by_place = numbers.answered()
    if (identity is None or identity == by_place) and _addressed(content) is None:
        return content
    return spelled({"tool_call_id": by_place if identity is None else identity, "content": content})


def result(content: str, numbers: CallNumbers) -> tuple[str, str | None]:
    """(content, tool_call_id) of a `tool` message; no id where no call has that place."""
    by_place = numbers.answered()
    found = _addressed(content)
    return (content, by_place) if found is None else found


def _addressed(content: str) -> tuple[str, str | None] | None:
    """(content, id) of a content that says which call it answers."""
    if not content.startswith('{"tool_call_id": '):
        return None
    try:
        value = parsed(content)
    except ValueError:
        return None
    if isinstance(value, dict) and list(value) == ["tool_call_id", "content"] and isinstance(value["content"], str):
        identity = value["tool_call_id"]
        if identity is None or isinstance(identity, str):
            return value["content"], identity
    return None


def respelled(role: str, content: str) -> str:
    """The content as it comes back from OpenAI's form: calls in the usual spelling of JSON, everything else as it is."""
    calls = calls_of(content) if role == "function_call" else None
    if calls is None:
        return content
    return spelled([_plain(call) for call in calls] if len(calls) > 1 else _plain(calls[0]))


def _plain(call: Call) -> Call:
    found = function({"name": call["name"], "arguments": call["arguments"]})
    return {**found, "id": call["id"]} if "id" in call else found
