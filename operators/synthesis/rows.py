"""Rows that a synthesis stage writes, with their provenance, and the account of what became of every candidate."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from operators import tables
from operators.ledger import Ledger, merge_stats
from operators.synthesis.prompts import Prompt
from operators.synthesis.requests import Reject, SamplingSettings

INSTRUCTIONS = tables.CONVERSATIONS.append(pa.field("input_start", pa.int32()))
"""CONVERSATIONS whose first user message may be an Alpaca pair: `input_start` is the character at which the input begins
(null where there is none), so that instruction and input can be told apart again without loss."""

_EXAMPLES = 5


@dataclass(frozen=True)
class Provenance:
    """Where a row comes from; see tables.PROVENANCE."""

    generator: str
    revision: str
    prompts: Sequence[Prompt]
    sampling: dict[str, SamplingSettings]
    seed: int
    parents: Sequence[str]
    operation: str
    round: int

    def to_row(self) -> dict[str, Any]:
        return {
            "generator": self.generator,
            "revision": self.revision,
            "template": ",".join(f"{prompt.lang}/{prompt.name}@{prompt.hash}" for prompt in self.prompts),
            "sampling": json.dumps({step: values.model_dump() for step, values in self.sampling.items()}, sort_keys=True),
            "seed": self.seed,
            "parents": list(self.parents),
            "operation": self.operation,
            "round": self.round,
        }


def instruction_row(
    row_id: str, instruction: str, given: str, output: str, lang: str | None, provenance: dict[str, Any] | None
) -> dict[str, Any]:
    """One single-turn row of INSTRUCTIONS."""
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return {
        "id": row_id,
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}],
        "lang": lang,
        "tools": None,
        "provenance": provenance,
        "input_start": len(prompt) - len(given) if given else None,
    }


def table_of(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema)


@dataclass
class Account:
    """What one work unit made: kept rows, rejects with reasons, and the statistics of both."""

    operator: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    novelty: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # further statistics of the method; merged by ledger.merge_stats

    def merge(self, other: Account) -> None:
        """Add another account of the same operator, after this one's rows."""
        self.rows += other.rows
        self.rejects += other.rejects
        self.ledger.add(other.ledger)
        self.novelty.update(other.novelty)
        self.languages.update(other.languages)
        self.operations.update(other.operations)
        self.examples += other.examples[: max(0, _EXAMPLES - len(self.examples))]
        merge_stats(self.extra, other.extra)

    def keep(self, row: dict[str, Any], operation: str, example: dict[str, Any] | None = None, created: bool = True) -> None:
        """Keep a row; `created` is False for a row that came in."""
        self.rows.append(row)
        self.ledger.kept += 1
        self.ledger.created += created
        self.ledger.rows_in += not created
        self.languages[row.get("lang") or "unknown"] += 1
        self.operations[operation] += 1
        if example is not None and len(self.examples) < _EXAMPLES:
            self.examples.append(example)

    def reject(
        self, row_id: str, text: str, why: Reject, *, source: str | None = None, created: bool = True, step: str = ""
    ) -> None:
        """Set a candidate aside; `step` names the part of the method (default: the whole method)."""
        operator = f"{self.operator}.{step}" if step else self.operator
        row = {"id": row_id, "text": text, "source": source, "operator": operator, "reason": why.reason}
        self.rejects.append({**row, "value": why.value, "detail": why.detail})
        self.ledger.rejected[f"{operator}:{why.reason}"] += 1
        self.ledger.created += created
        self.ledger.rows_in += not created

    def withdraw(self, place: int, why: Reject, text: str, step: str = "") -> None:
        """Set the kept row at `place` aside after all; `text` is what the reject shows."""
        row = self.rows.pop(place)
        operator = f"{self.operator}.{step}" if step else self.operator
        self.rejects.append(
            {"id": row["id"], "text": text, "operator": operator, "reason": why.reason, "value": why.value, "detail": why.detail}
        )
        self.ledger.kept -= 1
        self.ledger.rejected[f"{operator}:{why.reason}"] += 1
        self.languages[row.get("lang") or "unknown"] -= 1
        self.operations[row["provenance"]["operation"]] -= 1

    def score(self, similarity: float) -> None:
        """Count the highest similarity of a candidate in the histogram of novelty, in tenths."""
        self.novelty[f"{min(int(similarity * 10), 10) / 10:.1f}"] += 1

    def stats(self) -> dict[str, Any]:
        counters = {"novelty": self.novelty, "languages": self.languages, "operations": self.operations}
        return {
            **{name: dict(sorted(counter.items())) for name, counter in counters.items()},
            "examples": self.examples,
            **self.extra,
        }
