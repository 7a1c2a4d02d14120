"""The messages of a batch of conversations as flat columns, so that rules run over columns instead of rows.

A conversation's messages lie one after the other in one Arrow array; a rule looks at those of some roles at once and
folds what it found back to the conversations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

REPLIES = ("assistant",)
ASKING = ("user",)
GIVEN = ("system", "user", "tool")  # what a reply can rest on
_JOINED = pa.scalar("\n\n", pa.large_string())


@dataclass(frozen=True)
class Said:
    """Some messages of a batch, in order: `text` large_string[messages] without nulls, `row` int64[messages] of the batch."""

    text: pa.Array
    row: np.ndarray
    rows: int

    def __len__(self) -> int:
        return len(self.row)

    def where(self, mask: np.ndarray) -> Said:
        """The messages where bool[messages] holds."""
        return Said(self.text.filter(pa.array(mask)), self.row[mask], self.rows)

    def any(self, flags: np.ndarray) -> np.ndarray:
        """bool[rows]: whether a message of the row has its flag (bool[messages])."""
        found = np.zeros(self.rows, bool)
        found[self.row[flags]] = True
        return found

    def sum(self, values: np.ndarray) -> np.ndarray:
        """int64[rows]: the sum of a number of each message."""
        return np.bincount(self.row, weights=values, minlength=self.rows).astype(np.int64)

    def is_first(self) -> np.ndarray:
        """bool[messages]: the first one of its row."""
        return np.r_[True, self.row[1:] != self.row[:-1]] if len(self) else np.zeros(0, bool)

    def first(self) -> Said:
        """Each row's first message."""
        return self.where(self.is_first())

    def last(self) -> Said:
        """Each row's last message."""
        return self.where(np.r_[self.row[1:] != self.row[:-1], True] if len(self) else np.zeros(0, bool))

    def by_row(self) -> pa.Array:
        """large_string[rows]: of a row with one message its text, joined by empty lines of several, null of none."""
        starts = np.searchsorted(self.row, np.arange(self.rows + 1))
        lists = pa.LargeListArray.from_arrays(pa.array(starts), self.text)
        joined = pc.binary_join(lists, _JOINED)
        return pc.if_else(pa.array(np.diff(starts) > 0), joined, pa.scalar(None, pa.large_string()))


class Turns:
    """The messages of a table with a column `messages` list<struct<role, content>>. A null list has no message."""

    def __init__(self, table: pa.Table) -> None:
        column = table["messages"]
        whole: Any = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        if isinstance(whole, pa.ChunkedArray):  # of no chunk at all
            whole = pa.array([], column.type)
        flat = whole.flatten()
        self.rows = len(whole)
        self.counts = pc.fill_null(pc.list_value_length(whole), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        self.row = np.repeat(np.arange(self.rows), self.counts)
        self.text = pc.fill_null(_field(flat, "content").cast(pa.large_string()), "")
        self._role = pc.fill_null(_field(flat, "role").cast(pa.string()), "")

    def is_role(self, *roles: str) -> np.ndarray:
        """bool[messages]"""
        return np.asarray(pc.is_in(self._role, value_set=pa.array(roles, pa.string())).to_numpy(zero_copy_only=False), bool)

    def of(self, *roles: str) -> Said:
        """The messages of these roles."""
        mask = self.is_role(*roles)
        return Said(self.text.filter(pa.array(mask)), self.row[mask], self.rows)

    @cached_property
    def all(self) -> Said:
        return Said(self.text, self.row, self.rows)

    @cached_property
    def last_role(self) -> np.ndarray:
        """object[rows]: role of the last message, an empty string where there is none."""
        found = np.full(self.rows, "", object)
        ends = np.cumsum(self.counts)
        some = self.counts > 0
        found[some] = np.array(self._role.take(pa.array(ends[some] - 1)).to_pylist(), object)
        return found

    def is_last_reply(self) -> np.ndarray:
        """bool[messages]: the reply that ends its conversation."""
        found = np.zeros(len(self.row), bool)
        ends = np.cumsum(self.counts)[self.counts > 0] - 1
        found[ends] = self.is_role(*REPLIES)[ends]
        return found

    def before(self, marked: np.ndarray) -> Said:
        """The messages of the marked rows that are not marked themselves, each behind its role."""
        rows = np.zeros(self.rows, bool)
        rows[self.row[marked]] = True
        mask = rows[self.row] & ~marked
        text = pc.binary_join_element_wise(self._role.cast(pa.large_string()), self.text, pa.scalar(": ", pa.large_string()))
        return Said(text.filter(pa.array(mask)), self.row[mask], self.rows)

    def context_size(self) -> np.ndarray:
        """int64[rows]: `sizes` of the messages that are neither replies nor the first question (system, tool, later users')."""
        other = ~self.is_role("assistant", "function_call")
        asked = np.flatnonzero(self.is_role("user"))
        first = asked[np.r_[True, self.row[asked][1:] != self.row[asked][:-1]]] if len(asked) else asked
        other[first] = False
        return self.all.sum(np.where(other, sizes(self.text), 0))


def sizes(text: pa.Array) -> np.ndarray:
    """int64[texts]: characters, Chinese ones three times: so much does one say beside a letter."""
    han = pc.count_substring_regex(text, r"\p{Han}").to_numpy(zero_copy_only=False).astype(np.int64)
    return np.asarray(pc.utf8_length(text).to_numpy(zero_copy_only=False).astype(np.int64) + 2 * han)


def _field(flat: Any, name: str) -> Any:
    if flat.type.get_field_index(name) < 0:
        raise KeyError(f"a message needs the fields role and content; these have {[field.name for field in flat.type]}")
    return pc.struct_field(flat, name)


def input_starts(table: pa.Table) -> np.ndarray:
    """int64[rows]: character at which the input begins in the first question of an Alpaca pair, -1 where there is none."""
    if "input_start" not in table.column_names:
        return np.full(table.num_rows, -1, np.int64)
    return np.asarray(pc.fill_null(table["input_start"].cast(pa.int64()), -1).to_numpy(), np.int64)


def instructions(table: pa.Table, turns: Turns) -> pa.Array:
    """large_string[rows]: the first question without its input, null where nobody asks."""
    first = turns.of(*ASKING).first().by_row()
    starts = input_starts(table)
    cut = np.flatnonzero(starts >= 0)
    if not len(cut):
        return first
    # sparse and by slices: Arrow slices all rows at one place only
    given = zip(cut, first.take(pa.array(cut)).to_pylist(), strict=True)
    heads = [text[: starts[row]].rstrip() if text is not None else None for row, text in given]
    index = np.full(len(starts), -1, np.int64)
    index[cut] = np.arange(len(cut))
    replaced = pa.array(heads, pa.large_string()).take(pa.array(index, mask=index < 0))
    return pc.if_else(pa.array(index >= 0), replaced, first)


def whole_text(turns: Turns) -> pa.Array:
    """large_string[rows]: all that was said, messages joined by empty lines; what operators for documents read."""
    return pc.fill_null(turns.all.by_row(), "")
