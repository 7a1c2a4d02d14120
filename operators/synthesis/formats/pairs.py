"""Preference pairs in the shapes that public data sets have them, to and from PREFERENCES.

Read are, told apart by their fields:

    prompt, chosen, rejected                      text, or lists of OpenAI messages (TRL); also `system`
    chosen, rejected                              whole conversations with a common beginning, as lists of messages, or as
                                                  `\\n\\nHuman: ... \\n\\nAssistant: ...` (hh-rlhf)
    conversations, chosen, rejected               ShareGPT turns and a reply each, {from, value} or text (LLaMA-Factory)
    instruction, input, chosen, rejected          text; also `system` and `history` (LLaMA-Factory)

A `margin` is kept where there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from operators.synthesis.formats import alpaca, calls, messages, sharegpt
from operators.synthesis.formats.fields import Message, Row, RowError, checked_pair, items, only, text
from operators.synthesis.rows import instruction_row

_SIDES = ("chosen", "rejected")
_BESIDE = ("id", "margin")
_TURN = re.compile(r"\n\n(Human|Assistant):")


def from_pair(row: Mapping[str, Any], identity: str) -> Iterator[Row]:
    """One row of PREFERENCES. Raises RowError."""
    if "conversations" in row:
        only(row, (*sharegpt.FIELDS, *_SIDES, *_BESIDE))
        prompt, (chosen, rejected) = sharegpt.turns(row), [_turn(row[side]) for side in _sides(row)]
    elif "instruction" in row:
        only(row, ("instruction", "input", "system", "history", *_SIDES, *_BESIDE))
        asked = instruction_row(identity, text(row, "instruction"), text(row, "input", ""), "", None, None)["messages"][:1]
        prompt, (chosen, rejected) = [*alpaca.earlier(row), *asked], [_said(text(row, side)) for side in _sides(row)]
    elif row.get("prompt") is not None:
        only(row, ("prompt", "system", *_SIDES, *_BESIDE))
        prompt, chosen, rejected = _with_prompt(row)
    else:
        only(row, ("system", *_SIDES, *_BESIDE))
        prompt, chosen, rejected = _without_prompt(row)
    if row.get("tools"):
        raise RowError("tools", "a preference pair has no place for tools")
    found = {"id": identity, "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": _margin(row)}
    yield checked_pair({**found, "lang": None, "provenance": None})


def _sides(row: Mapping[str, Any]) -> tuple[str, str]:
    for side in _SIDES:
        if row.get(side) is None:
            raise RowError("malformed", f"{side!r} is missing")
    return _SIDES


def _margin(row: Mapping[str, Any]) -> float | None:
    value = row.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError("malformed", "'margin' must be a finite number")
    return float(np.float32(value))  # as the table holds it


def _said(content: str) -> list[Message]:
    return [{"role": "assistant", "content": content}]


def _turn(given: Any) -> list[Message]:
    """A reply as text, as {from, value}, or as a list of such."""
    if isinstance(given, str):
        return _said(given)
    return [sharegpt.message(turn) for turn in (given if isinstance(given, list) else [given])]


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": text(row, "system")}] if row.get("system") else []


def _with_prompt(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    sides = _sides(row)
    if isinstance(row["prompt"], str):
        prompt: list[Message] = [*_system(row), {"role": "user", "content": row["prompt"]}]
        if all(isinstance(row[side], str) for side in sides):
            chosen, rejected = (_said(row[side]) for side in sides)
            return prompt, chosen, rejected
        # the prompt again as text beside whole conversations (UltraFeedback): it must be their question
        beginning, chosen, rejected = _without_prompt(row)
        if not any(message["role"] == "user" and message["content"] == row["prompt"] for message in beginning):
            raise RowError("malformed", "'prompt' is not in the conversations of 'chosen' and 'rejected'")
        if sum(message["role"] == "user" for message in beginning) != 1:
            raise RowError("malformed", "'prompt' is text, but 'chosen' and 'rejected' have several questions")
        return beginning, chosen, rejected
    numbers = calls.CallNumbers()
    prompt = [*_system(row), *messages.messages_of(row["prompt"], "prompt", numbers)]
    replies = [
        _said(row[side]) if isinstance(row[side], str) else messages.messages_of(row[side], side, numbers.copy()) for side in sides
    ]
    return prompt, replies[0], replies[1]


def _without_prompt(row: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """The common beginning of two conversations is the prompt, what follows are the replies."""
    both = [_transcript(row[side], side) for side in _sides(row)]
    common = 0
    while common < min(map(len, both)) and both[0][common] == both[1][common]:
        common += 1
    prompt, chosen, rejected = both[0][:common], both[0][common:], both[1][common:]
    if not chosen or not rejected:
        raise RowError("tie", "one conversation is the beginning of the other, or they are the same")
    if len(chosen) > 1 or len(rejected) > 1:
        raise RowError("diverging", "the conversations differ in more than the last reply")
    return [*_system(row), *prompt], chosen, rejected


def _transcript(given: Any, side: str) -> list[Message]:
    if not isinstance(given, str):
        found = items(given, repr(side))
        if found and "from" in found[0]:
            return [sharegpt.message(turn) for turn in found]
        return messages.messages_of(given, side)
    beginning, *pieces = _TURN.split(given)
    if beginning or not pieces:
        raise RowError("malformed", f"{side!r} is text without a prompt, and does not begin with '\\n\\nHuman:'")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.removeprefix(" ")} for who, said in turns]


# --- writing


def to_pair(row: Mapping[str, Any]) -> Row:
    """prompt, chosen and rejected as lists of OpenAI messages, as TRL reads them. Raises RowError."""
    numbers = calls.CallNumbers()
    prompt = messages.openai_messages(row["prompt"], numbers)
    sides = {side: messages.openai_messages(row[side], numbers.copy()) for side in _SIDES}
    return {"id": row["id"], "prompt": prompt, **sides, **_beside(row)}


def to_sharegpt_pair(row: Mapping[str, Any]) -> Row:
    """conversations, and chosen and rejected as {from, value}. Raises RowError where a reply has several messages."""
    sides = {side: sharegpt.turn(_one(row[side], side)) for side in _SIDES}
    return {"id": row["id"], **sharegpt.conversation_fields(list(row["prompt"])), **sides, **_beside(row)}


def to_alpaca_pair(row: Mapping[str, Any]) -> Row:
    """instruction, input, chosen and rejected, and `system` and `history` where there are some. Raises RowError."""
    found = alpaca.prompt_fields(list(row["prompt"]))
    sides: Row = {}
    for side in _SIDES:
        reply = _one(row[side], side)
        if reply["role"] != "assistant":
            raise RowError("turns", f"Alpaca holds replies of the assistant only, {side!r} is a {reply['role']!r}")
        sides[side] = reply["content"]
    return {"id": row["id"], **found, **sides, **_beside(row)}


def _one(reply: Sequence[Message], side: str) -> Message:
    if len(reply) != 1:
        raise RowError("turns", f"{side!r} has {len(reply)} messages, the form holds one")
    return reply[0]


def _beside(row: Mapping[str, Any]) -> Row:
    return {} if row.get("margin") is None else {"margin": row["margin"]}


def respelled(row: Row) -> Row:
    """The row as it comes back from OpenAI's form: the JSON of calls in its usual spelling, nothing else changed."""
    sides = {
        name: [{"role": m["role"], "content": calls.respelled(m["role"], m["content"])} for m in row[name]]
        for name in ("prompt", *_SIDES)
    }
    return {**row, **sides}
