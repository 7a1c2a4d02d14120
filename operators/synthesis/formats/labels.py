"""KTO: conversations whose last reply is labelled as desirable or not.

Read are, told apart by their fields:

    messages, label                               OpenAI messages; also `tools` (LLaMA-Factory's demonstration data)
    conversations, label                          ShareGPT turns; also `system` and `tools`
    instruction, input, output, label             text; also `system` and `history`
    prompt, completion, label                     text, or lists of OpenAI messages (TRL); also `system`

`kto_tag` is another name of `label`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from operators.synthesis.formats import alpaca, calls, fields, messages, sharegpt
from operators.synthesis.formats.fields import Row, RowError, checked, only, text
from operators.synthesis.rows import INSTRUCTIONS

LABELLED = INSTRUCTIONS.append(pa.field("label", pa.bool_()))
"""INSTRUCTIONS whose last reply is desirable (`label` true) or not."""


def from_label(row: Mapping[str, Any], identity: str) -> Iterator[Row]:
    """One row of LABELLED. Raises RowError."""
    label = _label(row)
    rest = {name: value for name, value in row.items() if name not in ("label", "kto_tag")}
    if "messages" in rest:
        (found,) = messages.from_messages(rest, identity)
    elif "conversations" in rest:
        (found,) = sharegpt.from_sharegpt(rest, identity)
    elif "instruction" in rest:
        (found,) = alpaca.from_alpaca(rest, identity)
    else:
        only(rest, ("id", "prompt", "completion", "system", "tools"))
        numbers = calls.CallNumbers()
        system = [{"role": "system", "content": text(rest, "system")}] if rest.get("system") else []
        sides = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            given = rest.get(name)
            whole = isinstance(given, str)
            sides.append([{"role": role, "content": given}] if whole else messages.messages_of(given, name, numbers))
        found = checked(fields.conversation(identity, [*system, *sides[0], *sides[1]], fields.tools(rest)))
    if found["messages"][-1]["role"] not in ("assistant", "function_call"):
        raise RowError("no_reply", "the last message, to which the label belongs, is not the assistant's")
    yield {**found, "label": label}


def _label(row: Mapping[str, Any]) -> bool:
    given = [row[name] for name in ("label", "kto_tag") if row.get(name) is not None]
    if len(given) != 1 or not isinstance(given[0], bool):
        raise RowError("malformed", "'label' (or 'kto_tag') must be true or false, and stand once")
    return given[0]


def to_label(row: Mapping[str, Any]) -> Row:
    """OpenAI messages and `label`. Raises RowError."""
    return {**messages.to_messages(row), "label": _labelled(row)}


def to_sharegpt_label(row: Mapping[str, Any]) -> Row:
    """ShareGPT's fields and `label`. Raises RowError."""
    return {**sharegpt.to_sharegpt(row), "label": _labelled(row)}


def to_alpaca_label(row: Mapping[str, Any]) -> Row:
    """Alpaca's fields and `label`. Raises RowError."""
    return {**alpaca.to_alpaca(row), "label": _labelled(row)}


def _labelled(row: Mapping[str, Any]) -> bool:
    if not isinstance(row.get("label"), bool):
        raise RowError("no_label", "the row has no label")
    return bool(row["label"])


def labelled(pair: Mapping[str, Any]) -> list[Row]:
    """The two labelled conversations of a preference pair, `ID#chosen` and `ID#rejected`."""
    return [
        {**fields.conversation(f"{pair['id']}#{side}", [*pair["prompt"], *pair[side]]), "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]
