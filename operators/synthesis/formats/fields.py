"""What readers of all formats share: fields of a row checked by name and type, and the errors they are rejected with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_ASCII_LETTER = re.compile("[A-Za-z]")
_LANGUAGE_CHARACTERS = 4000  # of each message: enough to tell the language


class RowError(ValueError):
    """A row that does not fit the format or the table. `reason` is stable, the message says what and where."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def only(row: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises RowError for a field with a value that has no place: dropping it would lose it without a word."""
    names = set(known)
    for name, value in row.items():
        if name not in names and value is not None and value != "" and value != [] and value != {}:
            raise RowError("unknown_field", f"no place for field {name!r}; known: {', '.join(sorted(names))}")


def text(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A string field; `default` where it is absent or null. Raises RowError."""
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError("malformed", f"{name!r} must be a string, got {type(value).__name__}")
    return value


def items(value: Any, what: str) -> list[Mapping[str, Any]]:
    """A list of objects. Raises RowError."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowError("malformed", f"{what} must be a list of objects")
    return value


def spelled(value: Any) -> str:
    """The JSON of a value as all readers spell it."""
    return json.dumps(value, ensure_ascii=False)


def parsed(written: str) -> Any:
    """The value of JSON text.

    Raises ValueError, also for what would not come back: a key twice in one object, an integer of more than 64 bits, NaN.
    """
    return json.loads(written, object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_number)


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"the number {digits[:40]} does not fit 64 bits")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is not finite")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def tools(row: Mapping[str, Any]) -> str | None:
    """The `tools` field as JSON text: a string is kept as it is, a value is spelled. Raises RowError."""
    value = row.get("tools")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        return spelled(value)
    try:
        parsed(value)
    except ValueError as error:
        raise RowError("malformed", f"'tools' is no JSON: {error}") from error
    return value


def conversation(identity: str, messages: list[Message], tool_text: str | None = None) -> Row:
    """A row of rows.INSTRUCTIONS without provenance."""
    return {"id": identity, "messages": messages, "lang": None, "tools": tool_text, "provenance": None, "input_start": None}


def checked(row: Row) -> Row:
    """The row, if there is something to learn from it. Raises RowError."""
    messages = row["messages"]
    _prompted(messages)
    if not any(message["role"] in ("assistant", "function_call") and message["content"].strip() for message in messages):
        raise RowError("no_reply", "no assistant message with content")
    return row


def checked_pair(row: Row) -> Row:
    """A row of PREFERENCES, if its replies answer a prompt and differ. Raises RowError."""
    _prompted(row["prompt"])
    if row["prompt"][-1]["role"] not in ("user", "tool"):
        raise RowError("no_prompt", f"the prompt ends with a message of {row['prompt'][-1]['role']!r}, not of the user")
    for side in ("chosen", "rejected"):
        found = row[side]
        if not found or not any(message["content"].strip() for message in found):
            raise RowError("no_reply", f"{side!r} is empty")
        if found[0]["role"] not in ("assistant", "function_call"):
            raise RowError("malformed", f"{side!r} begins with a message of {found[0]['role']!r}, not of the assistant")
    if row["chosen"] == row["rejected"]:
        raise RowError("tie", "chosen and rejected are the same")
    return row


def _prompted(messages: list[Message]) -> None:
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise RowError("no_prompt", "no user message with content")


def language(row: Mapping[str, Any]) -> str | None:
    """`en` or `zh` by the letters of the messages, None where they are neither.

    The decisions of heuristics.language_of and script_share, with the letters counted once.
    """
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"]]
    joined = "\n".join(message["content"][:_LANGUAGE_CHARACTERS] for message in messages)
    letters = sum(map(str.isalpha, joined))
    if letters and len(_HAN.findall(joined)) >= 0.2 * letters:
        return "zh"
    return "en" if round(len(_ASCII_LETTER.findall(joined)) / letters if letters else 1.0, 6) >= 0.9 else None
