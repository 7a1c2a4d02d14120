"""Packed sequences without the pieces of a document.

The pieces that stay move up and padding takes the room at the end, so a sequence keeps its number and its length, and the loader
meets nothing that it does not know; what a training has logged about sequence numbers stays true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass
class Removed:
    """What was taken out of some packed rows. `documents` counts those whose first piece was."""

    tokens: int = 0
    documents: int = 0
    languages: Counter[str] = field(default_factory=Counter)  # tokens
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, other: Removed) -> None:
        self.tokens += other.tokens
        self.documents += other.documents
        self.languages.update(other.languages)
        self.sources.update(other.sources)


def without(gone: np.ndarray, ids: set[str], padding: int, removed: Removed) -> Callable[[pa.Table, int], pa.Table]:
    """Takes the pieces of these documents out of the rows `gone` (int64, ascending, in the file); counts them in `removed`."""

    def change(table: pa.Table, start: int) -> pa.Table:
        low, high = np.searchsorted(gone, [start, start + table.num_rows])
        if low == high:
            return table
        rows = gone[low:high] - start
        edited = [_without(row, ids, padding, removed) for row in table.take(pa.array(rows)).to_pylist()]
        order = np.arange(table.num_rows)
        order[rows] = table.num_rows + np.arange(len(rows))
        return pa.concat_tables([table, pa.Table.from_pylist(edited, schema=table.schema)]).take(pa.array(order))

    return change


def _without(row: dict[str, Any], ids: set[str], padding: int, removed: Removed) -> dict[str, Any]:
    tokens, bounds = np.array(row["tokens"], np.uint32), row["cu_seqlens"]
    loss = np.zeros(len(tokens), bool)
    for first, last in zip(row["loss_spans"][::2], row["loss_spans"][1::2], strict=True):
        loss[first:last] = True
    stay: list[int] = []
    for piece, document in enumerate(row["documents"]):
        if document not in ids:
            stay.append(piece)
            continue
        length = bounds[piece + 1] - bounds[piece]
        removed.tokens += length
        removed.documents += row["offsets"][piece] == 0
        removed.languages[row["langs"][piece]] += length
        removed.sources[row["sources"][piece]] += length
    taken = np.concatenate([np.zeros(0, np.int64), *(np.arange(bounds[piece], bounds[piece + 1]) for piece in stay)])
    left = np.full(len(tokens), padding, np.uint32)
    left[: len(taken)] = tokens[taken]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss[taken].astype(np.int8), [0]])))
    lengths = [bounds[piece + 1] - bounds[piece] for piece in stay]
    return {
        **row,
        **{name: [row[name][piece] for piece in stay] for name in ("documents", "offsets", "sources", "langs")},
        "tokens": left.tolist(),
        "cu_seqlens": np.cumsum([0, *lengths]).tolist(),
        "loss_spans": edges.tolist() or [0, 0],
    }


def settle(stats: dict[str, Any], removed: Removed, aside: Counter[str]) -> None:
    """The statistics of a unit, or of the stage, after it. `aside` counts documents that were set aside, by `pack:reason`."""
    stats["packed"] -= removed.documents
    stats["tokens"] -= removed.tokens
    stats["padding_tokens"] += removed.tokens
    for name, counts in (("languages", removed.languages), ("sources", removed.sources)):
        for key, tokens in counts.items():
            stats[name][key] = stats[name].get(key, 0) - tokens
    for fate, count in aside.items():
        stats["set_aside"][fate.partition(":")[2]] -= count


def settled(equations: list[dict[str, Any]], removed: Removed, aside: Counter[str]) -> list[dict[str, Any]]:
    """The stage's equations after it: what came in is what it was, and a term says what is there no more."""
    found = []
    for equation in equations:
        right = dict(equation["right"])
        if "set aside" in equation["name"]:
            right["packed"] -= removed.documents
            for fate, count in aside.items():
                right[fate.partition(":")[2]] -= count
            right["forgotten"] = right.get("forgotten", 0) + removed.documents + aside.total()
        elif "cut" in right:
            right["packed"] -= removed.tokens
            right["forgotten"] = right.get("forgotten", 0) + removed.tokens
        elif "padding" in right:
            right["packed"] -= removed.tokens
            right["padding"] += removed.tokens
        found.append({**equation, "right": right})
    return found
