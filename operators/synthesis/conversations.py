"""Files of instruction data to and from CONVERSATIONS rows: seed tasks, Alpaca, ShareGPT, OpenAI messages.

Reading loses nothing or rejects the row with a reason: a field that the table has no place for is no reason to drop it
silently. `read(write(row)) == row` for every row that a reader made, whatever its format.

Roles are `system`, `user`, `assistant`, and for tools `function_call` (JSON of the call) and `tool` (its result).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import pyarrow as pa

from cluster import storage
from operators import tables
from operators.synthesis.heuristics import language_of, script_share
from operators.synthesis.requests import Reject
from operators.synthesis.rows import instruction_row

Format = Literal["seed_tasks", "alpaca", "sharegpt", "messages"]

MAX_ROW_BYTES = 64 << 20
_MAX_ARRAY_BYTES = 1 << 30  # a JSON array is read whole; JSONL is streamed

_FROM_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system", "function_call": "function_call", "observation": "tool", "tool": "tool",
}  # fmt: skip
_TO_SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "function_call": "function_call", "tool": "observation"}
_OPENAI_ROLES = ("system", "user", "assistant", "tool", "function_call")


class RowError(ValueError):
    """A row that does not fit the format or the table. `reason` is stable, the message says what and where."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Unreadable:
    """Bytes that are no JSON object: quarantined, not rejected."""

    text: str
    detail: str


def read_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """(number of the row from 0, object) of a JSONL file (also .gz, .zst) or a JSON array.

    Lines are streamed; one longer than 64 MiB is unreadable. Raises ValueError for an array of more than 1 GiB, OSError
    for a broken compressed stream.
    """
    with storage.open_input(path) as source:
        compression = {"gz": "gzip", "zst": "zstd"}.get(path.rsplit(".", 1)[-1])
        stream: Any = pa.CompressedInputStream(source, compression) if compression else source
        head = stream.read(1 << 16)
        if head.lstrip()[:1] == b"[":
            data = head + stream.read(_MAX_ARRAY_BYTES + 1 - len(head))
            if len(data) > _MAX_ARRAY_BYTES:
                raise ValueError(f"{path}: a JSON array of more than {_MAX_ARRAY_BYTES >> 30} GiB; convert it to JSON lines")
            try:
                rows = orjson.loads(data)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"{path}: not a JSON array: {error}") from error
            for number, row in enumerate(rows):
                yield (
                    number,
                    row if isinstance(row, dict) else Unreadable(json.dumps(row)[:2000], f"{path}, item {number}: no object"),
                )
            return
        for number, line in enumerate(_lines(head, stream)):
            where = f"{path}, line {number + 1}"
            if line is None:
                yield number, Unreadable("", f"{where}: longer than {MAX_ROW_BYTES >> 20} MiB")
            elif line.strip():
                yield number, _object(line, where)


def _object(line: bytes, where: str) -> dict[str, Any] | Unreadable:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Unreadable(line.decode("utf-8", "replace"), f"{where}: {error}")
    return row if isinstance(row, dict) else Unreadable(line.decode("utf-8", "replace"), f"{where}: no JSON object")


def _lines(head: bytes, stream: Any) -> Iterator[bytes | None]:
    """Lines of a stream; None for one that is too long. Memory is bounded by MAX_ROW_BYTES and a block."""
    rest, oversized = io.BytesIO(), False
    block = head
    while block:
        *whole, tail = block.split(b"\n")
        for piece in whole:
            rest.write(piece)
            yield None if oversized or rest.tell() > MAX_ROW_BYTES else rest.getvalue()
            rest, oversized = io.BytesIO(), False
        rest.write(tail)
        if rest.tell() > MAX_ROW_BYTES:
            rest, oversized = io.BytesIO(), True
        block = stream.read(1 << 20)
    if oversized or rest.tell():
        yield None if oversized else rest.getvalue()


# --- reading


def from_seed_task(row: Mapping[str, Any], identity: str) -> Iterator[dict[str, Any]]:
    """One row an instance of a Self-Instruct seed task. Raises RowError."""
    _only(row, {"id", "name", "instruction", "instances", "is_classification"})
    instruction = _text(row, "instruction").strip()
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances:
        raise RowError("malformed", "'instances' must be a list of {input, output}")
    for index, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise RowError("malformed", f"instance {index} is no object")
        given, output = _text(instance, "input"), _text(instance, "output")
        suffix = f"#{index}" if len(instances) > 1 else ""
        yield _checked(instruction_row(identity + suffix, instruction, given, output, None, None))


def from_alpaca(row: Mapping[str, Any], identity: str) -> Iterator[dict[str, Any]]:
    """instruction, input, output; also LLaMA-Factory's `system` and `history` ([[question, answer], ...]). Raises RowError."""
    _only(row, {"id", "instruction", "input", "output", "system", "history"})
    found = instruction_row(identity, _text(row, "instruction"), _text(row, "input", ""), _text(row, "output"), None, None)
    earlier: list[dict[str, str]] = []
    if row.get("system"):
        earlier.append({"role": "system", "content": _text(row, "system")})
    for turn in row.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError("malformed", "'history' must be a list of [question, answer]")
        earlier += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    found["messages"] = earlier + found["messages"]
    yield _checked(found)


def from_sharegpt(row: Mapping[str, Any], identity: str) -> Iterator[dict[str, Any]]:
    """conversations [{from, value}], `system` and `tools` (a JSON string or object). Raises RowError."""
    _only(row, {"id", "conversations", "system", "tools"})
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise RowError("malformed", "'conversations' must be a list of {from, value}")
    messages = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError("malformed", "a turn must be {from, value}")
        _only(turn, {"from", "value"})
        speaker = turn.get("from")
        if speaker not in _FROM_SHAREGPT:
            raise RowError("unknown_role", f"unknown speaker {speaker!r}; known: {', '.join(_FROM_SHAREGPT)}")
        messages.append({"role": _FROM_SHAREGPT[speaker], "content": _text(turn, "value")})
    yield _checked(_conversation(identity, messages, _tools(row)))


def from_messages(row: Mapping[str, Any], identity: str) -> Iterator[dict[str, Any]]:
    """messages [{role, content}] and `tools`, as OpenAI's chat format. Raises RowError (also for `tool_calls`)."""
    _only(row, {"id", "messages", "tools"})
    given = row.get("messages")
    if not isinstance(given, list):
        raise RowError("malformed", "'messages' must be a list of {role, content}")
    messages = []
    for message in given:
        if not isinstance(message, dict):
            raise RowError("malformed", "a message must be {role, content}")
        _only(message, {"role", "content"})
        if message.get("role") not in _OPENAI_ROLES:
            raise RowError("unknown_role", f"unknown role {message.get('role')!r}; known: {', '.join(_OPENAI_ROLES)}")
        messages.append({"role": str(message["role"]), "content": _text(message, "content")})
    yield _checked(_conversation(identity, messages, _tools(row)))


READERS: dict[str, Callable[[Mapping[str, Any], str], Iterator[dict[str, Any]]]] = {
    "seed_tasks": from_seed_task,
    "alpaca": from_alpaca,
    "sharegpt": from_sharegpt,
    "messages": from_messages,
}


def parse_row(row: Mapping[str, Any], form: Format, source: str, number: int) -> list[dict[str, Any]] | Reject:
    """The INSTRUCTIONS rows of one object of a file. The id is the row's own, else a hash of file and row number."""
    identity = str(row["id"]) if isinstance(row.get("id"), str | int) else tables.stable_id(source, number)
    try:
        return list(READERS[form](row, identity))
    except RowError as error:
        return Reject(error.reason, detail=f"{source}, row {number}: {error}")


# --- writing


def to_alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as Alpaca's fields. Raises RowError when its turns do not fit them (tools, two users in a row, ...)."""
    messages = list(row["messages"])
    if row.get("tools") is not None:
        raise RowError("tools", "Alpaca has no place for tools")
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    if len(messages) < 2 or len(messages) % 2 or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(messages)):
        raise RowError("turns", "Alpaca holds alternating user and assistant turns only")
    prompt, start = messages[-2]["content"], row.get("input_start")
    instruction, given = (prompt, "") if start is None else (prompt[: start - 2], prompt[start:])
    found: dict[str, Any] = {"instruction": instruction, "input": given, "output": messages[-1]["content"]}
    if system is not None:
        found["system"] = system
    if len(messages) > 2:
        found["history"] = [[messages[i]["content"], messages[i + 1]["content"]] for i in range(0, len(messages) - 2, 2)]
    return {"id": row["id"], **found}


def to_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as ShareGPT's fields; a first system message becomes `system`. Alpaca's split of the prompt is not kept."""
    messages = list(row["messages"])
    found: dict[str, Any] = {"id": row["id"]}
    if messages and messages[0]["role"] == "system" and messages[0]["content"]:
        found["system"] = messages.pop(0)["content"]
    found["conversations"] = [{"from": _TO_SHAREGPT[m["role"]], "value": m["content"]} for m in messages]
    if row.get("tools") is not None:
        found["tools"] = row["tools"]
    return found


def to_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as OpenAI messages. Alpaca's split of the prompt is not kept."""
    found: dict[str, Any] = {"id": row["id"], "messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
    if row.get("tools") is not None:
        found["tools"] = json.loads(row["tools"])
    return found


WRITERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "alpaca": to_alpaca,
    "sharegpt": to_sharegpt,
    "messages": to_messages,
}


# --- shared checks


def _only(row: Mapping[str, Any], known: set[str]) -> None:
    extra = [name for name, value in row.items() if name not in known and value not in (None, "", [], {})]
    if extra:
        raise RowError("unknown_field", f"no place for field {extra[0]!r}; known: {', '.join(sorted(known))}")


def _text(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError("malformed", f"{name!r} must be a string, got {type(value).__name__}")
    return value


def _tools(row: Mapping[str, Any]) -> str | None:
    value = row.get("tools")
    if value in (None, "", []):
        return None
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        json.loads(value)
    except ValueError as error:
        raise RowError("malformed", f"'tools' is no JSON: {error}") from error
    return value


def _conversation(identity: str, messages: list[dict[str, str]], tools: str | None) -> dict[str, Any]:
    return {"id": identity, "messages": messages, "lang": None, "tools": tools, "provenance": None, "input_start": None}


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its language, if there is something to learn from it. Raises RowError."""
    if not any(message["role"] == "user" and message["content"].strip() for message in row["messages"]):
        raise RowError("no_prompt", "no user message with content")
    if not any(message["role"] in ("assistant", "function_call") and message["content"].strip() for message in row["messages"]):
        raise RowError("no_reply", "no assistant message with content")
    text = "\n".join(message["content"][:4000] for message in row["messages"])
    lang = language_of(text)
    row["lang"] = lang if lang == "zh" or script_share(text, "en") >= 0.9 else None
    return row
