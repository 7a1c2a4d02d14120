"""Rows of conversations and preferences as the report shows them: turns, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.report.samples import first_rows, varied
from pipelines.report.view import StageView

EXAMPLES = 6


@dataclass(frozen=True)
class Dialogue:
    """One row: its turns as (role, content), its language and its provenance."""

    id: str
    lang: str | None
    turns: list[tuple[str, str]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One preference: the prompt's turns, the better and the worse reply."""

    id: str
    lang: str | None
    prompt: list[tuple[str, str]]
    chosen: str
    rejected: str
    margin: float | None


def _turns(messages: Any) -> list[tuple[str, str]]:
    return [(str(item.get("role") or "?"), str(item.get("content") or "")) for item in messages or []]


def dialogues(stage: StageView) -> list[Dialogue]:
    """Example conversations, taken in turn from every operation and language that the first rows hold."""
    rows = first_rows(stage, ["id", "messages", "lang", "provenance"])
    rows = [row for row in rows if row.get("messages")]

    def group(row: dict[str, Any]) -> tuple[Any, Any]:
        return (row.get("provenance") or {}).get("operation"), row.get("lang")

    return [
        Dialogue(str(row["id"]), row.get("lang"), _turns(row["messages"]), row.get("provenance") or {})
        for row in varied(rows, group, EXAMPLES)
    ]


def pairs(stage: StageView) -> list[Pair]:
    """Example preference pairs, languages in turn."""
    rows = first_rows(stage, ["id", "prompt", "chosen", "rejected", "margin", "lang"])
    return [
        Pair(
            str(row["id"]),
            row.get("lang"),
            _turns(row.get("prompt")),
            "\n".join(content for _, content in _turns(row.get("chosen"))),
            "\n".join(content for _, content in _turns(row.get("rejected"))),
            row.get("margin"),
        )
        for row in varied(rows, lambda row: row.get("lang"), 4)
    ]
