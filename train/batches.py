"""How the examples of a global batch lie in forward passes: grouped by length or packed, dealt out to the workers.

Global batch t is always the examples at positions t*B .. t*B+B-1 of the sample order, and the loss a mean over the tokens
of all of them. So how they are arranged inside the batch changes nothing but rounding and speed: every worker can compute
the whole arrangement, which is a pure function of the examples' lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from operators.tokens import layout
from train.loader import IGNORE

Pass = list[list[int]]
"""One forward pass of one worker: rows, each of which holds examples (their numbers); a row may be empty."""


def arrange(lengths: np.ndarray, world: int, rows_per_pass: int | None, pack_to: int | None) -> list[list[Pass]]:
    """[worker][pass][row] -> indices into `lengths` (int64[examples]).

    With `pack_to`, rows hold several examples, placed best-fit (operators.tokens.layout) into so many tokens, else one. Rows
    are dealt out from the longest, so that passes hold rows of like lengths and workers equal amounts; without `rows_per_pass`
    there are as few passes as keep the lengths in each within a factor of two. Every worker gets
    as many passes of as many rows as any other, which collectives inside a forward pass rely on; the last may be empty.
    Raises ValueError for an example longer than `pack_to`.
    """
    counts = np.asarray(lengths, np.int64)
    rows: list[list[int]] = [[index] for index in range(len(counts))]
    if pack_to is not None:
        if len(counts) and int(counts.max()) > pack_to:
            raise ValueError(f"an example of {int(counts.max())} tokens does not fit a row of {pack_to}")
        placed = layout.place(counts, pack_to, "best_fit")
        rows = [placed.document[a:b].tolist() for a, b in zip(placed.start[:-1], placed.start[1:], strict=True)]
    filled = np.array([counts[row].sum() for row in rows], np.int64)
    order = np.argsort(-filled, kind="stable").tolist()
    each = -(-len(rows) // world)
    starts = list(range(0, each, rows_per_pass)) if rows_per_pass is not None else _alike(filled[order][::world])
    result = []
    for worker in range(world):
        mine = [rows[index] for index in order[worker::world]]
        mine += [[]] * (each - len(mine))
        result.append([mine[start:end] for start, end in zip(starts, [*starts[1:], each], strict=True)])
    return result


def _alike(lengths: np.ndarray) -> list[int]:
    """Where passes begin among rows of falling length, if the longest row of each is to be at most twice the shortest."""
    starts: list[int] = []
    for row, length in enumerate(lengths.tolist()):
        if not starts or 2 * length < lengths[starts[-1]]:
            starts.append(row)
    return starts


class TokenRows:
    """Encoded examples over a memory-mapped Arrow table with `input_ids`, `labels` (lists of int32) and `weight`."""

    def __init__(self, table: pa.Table) -> None:
        self._first = np.cumsum([0, *(len(chunk) for chunk in table.column("input_ids").chunks)])
        self._columns = {
            name: [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in table.column(name).chunks]
            for name in ("input_ids", "labels")
        }
        self.weights = table.column("weight").to_numpy()
        parts = [np.diff(offsets) for offsets, _ in self._columns["input_ids"]]
        self.lengths: np.ndarray = np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def get(self, column: str, row: int) -> np.ndarray:
        """int32[length], a view."""
        chunk = int(np.searchsorted(self._first, row, side="right")) - 1
        offsets, values = self._columns[column][chunk]
        inside = row - self._first[chunk]
        return values[offsets[inside] : offsets[inside + 1]]

    def labelled(self, rows: np.ndarray) -> int:
        """Tokens with loss in these examples."""
        return sum(int((self.get("labels", row)[1:] != IGNORE).sum()) for row in rows.tolist())

    def tensors(self, rows: Pass, packed: bool, pad: int, mask: bool) -> dict[str, torch.Tensor]:
        """What a forward pass is given, [rows, longest row]: `input_ids`, `labels`, `weights` of each label's loss; packed
        also `position_ids` that restart with every example (and with the padding), which keeps examples apart where there
        is neither a cache nor an attention mask. `mask` adds the attention mask of rows with one example each."""
        longest = max(2, *(sum(int(self.lengths[example]) for example in row) for row in rows))
        ids = np.full((len(rows), longest), pad, np.int64)
        labels = np.full((len(rows), longest), IGNORE, np.int64)
        weights = np.zeros((len(rows), longest), np.float32)
        positions = np.zeros((len(rows), longest), np.int64)
        real = np.zeros((len(rows), longest), np.int64)
        for number, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + int(self.lengths[example])
                ids[number, start:end] = self.get("input_ids", example)
                labels[number, start:end] = self.get("labels", example)
                labels[number, start] = IGNORE  # nothing of this example foretells its first token
                weights[number, start:end] = self.weights[example]
                positions[number, start:end] = np.arange(end - start)
                real[number, start:end] = 1
                start = end
            positions[number, start:] = np.arange(longest - start)
        arrays = {"input_ids": ids, "labels": labels, "weights": weights}
        if packed:
            arrays["position_ids"] = positions
        elif mask:
            arrays["attention_mask"] = real
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class Step:
    """This worker's share of a global batch: its forward passes, and the tokens with loss of all workers together."""

    passes: list[dict[str, torch.Tensor]]
    tokens: int


class Steps:
    """The global batches from a certain step on, as this worker sees them.

    `order` is the planned order of examples, int64[steps * batch]; `first` tells the step to begin with when asked to.
    """

    def __init__(
        self, order: np.ndarray, batch: int, make: Callable[[np.ndarray], Step], first: Callable[[], int] = lambda: 0
    ) -> None:
        self._order, self._batch, self._make, self._first = order.reshape(-1, batch), batch, make, first

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Step]:
        for step in range(self._first(), len(self._order)):
            yield self._make(self._order[step])


def step_of(
    rows: TokenRows, chosen: np.ndarray, rank: int, world: int, rows_per_pass: int | None, pack_to: int | None, **options: Any
) -> Step:
    """The share of worker `rank` in the examples `chosen`; `options` are those of TokenRows.tensors."""
    mine = arrange(rows.lengths[chosen], world, rows_per_pass, pack_to)[rank]
    numbered = [[[int(chosen[index]) for index in row] for row in part] for part in mine]
    passes = [rows.tensors(part, pack_to is not None, **options) for part in numbered]
    return Step(passes, rows.labelled(chosen))
