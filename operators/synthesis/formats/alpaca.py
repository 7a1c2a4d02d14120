"""Alpaca's fields and Self-Instruct's seed tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from operators.synthesis.formats.fields import Message, Row, RowError, checked, only, text
from operators.synthesis.rows import instruction_row

FIELDS = ("id", "instruction", "input", "output", "system", "history")


def from_seed_task(row: Mapping[str, Any], identity: str) -> Iterator[Row]:
    """One row an instance of a Self-Instruct seed task. Raises RowError."""
    only(row, {"id", "name", "instruction", "instances", "is_classification"})
    instruction = text(row, "instruction").strip()
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances:
        raise RowError("malformed", "'instances' must be a list of {input, output}")
    for index, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise RowError("malformed", f"instance {index} is no object")
        given, output = text(instance, "input"), text(instance, "output")
        suffix = f"#{index}" if len(instances) > 1 else ""
        yield checked(instruction_row(identity + suffix, instruction, given, output, None, None))


def from_alpaca(row: Mapping[str, Any], identity: str) -> Iterator[Row]:
    """instruction, input, output; also LLaMA-Factory's `system` and `history` ([[question, answer], ...]). Raises RowError."""
    only(row, FIELDS)
    found = instruction_row(identity, text(row, "instruction"), text(row, "input", ""), text(row, "output"), None, None)
    found["messages"] = earlier(row) + found["messages"]
    yield checked(found)


def earlier(row: Mapping[str, Any]) -> list[Message]:
    """The messages before the last question: `system` and `history`. Raises RowError."""
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": text(row, "system")})
    history = row.get("history")
    if history is not None and not isinstance(history, list):
        raise RowError("malformed", "'history' must be a list of [question, answer]")
    for turn in history or []:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(piece, str) for piece in turn)):
            raise RowError("malformed", "'history' must be a list of [question, answer]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def to_alpaca(row: Mapping[str, Any]) -> Row:
    """The row as Alpaca's fields. Raises RowError when its turns do not fit them (tools, two users in a row, ...)."""
    messages = list(row["messages"])
    if row.get("tools") is not None:
        raise RowError("tools", "Alpaca has no place for tools")
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError("turns", "Alpaca's output is the assistant's last message")
    found = prompt_fields(messages[:-1], row.get("input_start"))
    first = {name: found.pop(name) for name in ("instruction", "input")}
    return {"id": row["id"], **first, "output": messages[-1]["content"], **found}


def prompt_fields(messages: list[Message], input_start: int | None = None) -> Row:
    """instruction, input, and `system` and `history` where there are some, of the messages up to the last question.

    Raises RowError when they do not alternate, or would not be read back as they are.
    """
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    if system == "":
        raise RowError("turns", "Alpaca has no place for an empty system message")
    turns = messages[1:] if system is not None else messages
    if len(turns) % 2 != 1 or any(turn["role"] != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise RowError("turns", "Alpaca holds alternating user and assistant turns only")
    prompt = turns[-1]["content"]
    instruction, given = (prompt, "") if input_start is None else (prompt[: input_start - 2], prompt[input_start:])
    found: Row = {"instruction": instruction, "input": given}
    if system is not None:
        found["system"] = system
    if len(turns) > 1:
        found["history"] = [[turns[index]["content"], turns[index + 1]["content"]] for index in range(0, len(turns) - 1, 2)]
    return found
