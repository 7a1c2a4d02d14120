"""What the row-local operators over conversations have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from operators.operator import Filter, Verdict
from operators.synthesis.curate.turns import Said
from operators.text.analysis import Analysis


class ConversationFilter(Filter):
    """A filter of conversations: `measure` reads the column `messages`.

    A score `found` (string) tells in the account of a rejected row what was found; it decides nothing.
    """

    needs = ("messages",)
    uses_analysis: ClassVar[bool] = False
    reads: tuple[str, ...] = ()
    decide_options: ClassVar[frozenset[str]] = frozenset()

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        scores = self.measure(table, analysis)
        reason, value = self.decide(table, scores)
        return Verdict(self.annotate(table, scores), reason, value, scores=scores, detail=scores.get("found"))


def first_reason(rules: Sequence[tuple[str, Any, Any]], rows: int) -> tuple[pa.Array, pa.Array]:
    """(reason string[rows], value float64[rows]) of the first rule that a row fails.

    A rule is (reason, bool[rows] that fail, value[rows]); nulls where none fails.
    """
    chosen, values = np.full(rows, -1, np.int32), np.zeros(rows)
    for number in range(len(rules) - 1, -1, -1):
        _, fails, value = rules[number]
        fails = np.asarray(fails, bool)
        chosen[fails] = number
        values[fails] = np.broadcast_to(np.asarray(value, np.float64), rows)[fails]
    kept = chosen < 0
    names = pa.array([reason for reason, _, _ in rules], pa.string())
    return names.take(pa.array(chosen, mask=kept)), pa.array(values, pa.float64(), mask=kept)


def numbers(scores: dict[str, pa.Array], name: str) -> np.ndarray:
    """A score as float64[rows], NaN where it is null."""
    return np.asarray(scores[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def told(said: Said, found: pa.Array) -> pa.Array:
    """string[rows]: of each row the first of `found` (string[messages]) that is not null."""
    known = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
    rows, first = np.unique(said.row[known], return_index=True)
    index = np.full(said.rows, -1, np.int64)
    index[rows] = known[first]
    return found.take(pa.array(index, mask=index < 0))
