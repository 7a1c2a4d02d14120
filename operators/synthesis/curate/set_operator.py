"""Operators that look at a whole set: each row gives a small key, and the keys of all rows decide together.

`keys` is row-local and runs beside the row-local operators, on every work unit; `resolve` sees the keys of the rows that
are still standing, in row order, in one task, and says which go. Texts are not gathered: an operator that compares texts
(ROUGE-L) reads them from the parts as they stream by. Memory of the task: the keys, a documented number of bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.config import SettingsError
from operators.dedup.exact import content_hashes
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis


@dataclass(frozen=True)
class Keys:
    """The keys of some rows that stand next to each other: `ordinals` uint64[rows]; `table` has `id` and the key columns."""

    ordinals: np.ndarray
    table: pa.Table


ReadKeys = Callable[[], Iterator[Keys]]
"""Begins a pass over the keys of all rows that are still standing, in row order."""


@dataclass(frozen=True)
class Removed:
    """The rows that go: `ordinals` uint64[rows] ascending, and of each its reason, the measured value and a detail."""

    ordinals: np.ndarray
    reasons: pa.Array  # string[rows]
    values: pa.Array  # float64[rows]
    details: pa.Array  # string[rows]
    stats: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ordinals: np.ndarray,
        reason: str,
        values: Any,
        details: Sequence[str | None] | None = None,
        stats: dict[str, Any] | None = None,
    ) -> Removed:
        """Rows in any order that go for one reason; `values` is one number or one a row."""
        order = np.argsort(ordinals, kind="stable")
        numbers = np.broadcast_to(np.asarray(values, np.float64), len(ordinals))[order]
        told: Any = pa.nulls(len(order), pa.string()) if details is None else pa.array(details, pa.string()).take(pa.array(order))
        return cls(ordinals[order], pa.array([reason] * len(order), pa.string()), pa.array(numbers), told, stats or {})


class SetOperator(Operator):
    """Base of the operators of a `curate` stage that decide over all rows together."""

    needs = ("messages",)

    def keys(self, table: pa.Table) -> dict[str, pa.Array]:
        """What the decision needs to know of each row: columns of one value a row."""
        raise NotImplementedError

    def resolve(self, read: ReadKeys, seed: int) -> Removed:
        """The rows that go. Depends on the keys and their order alone; ties and samples go by a seeded hash of the id."""
        raise NotImplementedError

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        raise SettingsError(f"operator {self.name} decides over a whole set: use it in a stage of kind `curate`")


def gather(read: ReadKeys, columns: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """The named key columns of all rows as arrays, `ordinal` uint64, and `draw` uint64: a seeded hash of the id."""
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in ("ordinal", "draw", *columns)}
    for keys in read():
        pieces["ordinal"].append(keys.ordinals)
        pieces["draw"].append(draws(keys.table["id"], seed))
        for name in columns:
            pieces[name].append(keys.table[name].to_numpy())
    empty = {"ordinal": np.uint64, "draw": np.uint64}
    return {name: np.concatenate(found) if found else np.zeros(0, empty.get(name, np.int64)) for name, found in pieces.items()}


def draws(ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """uint64[rows]: the order in which rows are drawn by chance, the same on every machine."""
    text = pc.binary_join_element_wise(pa.scalar(str(seed)), ids.cast(pa.string()), ":")
    return content_hashes(text)[:, 0]


def surplus(rows: np.ndarray, drawn: np.ndarray, keep: int) -> np.ndarray:
    """int64: those of `rows` that go when `keep` of them stay, by lowest draw (ties: the earlier row)."""
    if len(rows) <= keep:
        return np.zeros(0, np.int64)
    order = np.lexsort((rows, drawn[rows]))
    return np.sort(rows[order[max(0, keep) :]])


def ids_of(read: ReadKeys, ordinals: np.ndarray) -> list[str]:
    """The ids of some rows (uint64, in any order), by another pass."""
    wanted = np.unique(ordinals)
    found: dict[int, str] = {}
    for keys in read():
        if not len(keys.ordinals):
            continue
        at = np.minimum(np.searchsorted(keys.ordinals, wanted), len(keys.ordinals) - 1)
        inside = keys.ordinals[at] == wanted
        if np.any(inside):
            names = keys.table["id"].take(pa.array(at[inside])).to_pylist()
            found.update(zip(wanted[inside].tolist(), names, strict=True))
    return [found[int(ordinal)] for ordinal in ordinals]
