"""Unsupported numbers: figures in a reply that stand neither in what it was given nor follow from it simply.

Only conversations that give a text to rest on are judged: a question with an input or a passage, a message of the system
or a tool, or the document spans of generated rows. A number is supported if it stands there (however it is
written: see `numerals`), is small, numbers a list, counts its items, is a year's decade, the sum, difference, product,
quotient or percentage of two given ones, or the total of all. Questions that ask for calculation pass.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate import patterns
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers
from operators.synthesis.curate.numerals import values
from operators.synthesis.curate.turns import ASKING, GIVEN, REPLIES, Said, Turns, input_starts, sizes
from operators.text.analysis import Analysis

_LIST_MARK = re.compile(r"(?m)^\s*(?:[#>*-]\s*)*(?:step\s*|第)?\(?\d{1,3}[.)、:：）步条点]", re.IGNORECASE)
_MOST_PAIRS = 60  # given numbers that are combined with each other
_ANY_NUMBER = r"(?i)\d|[零〇一二两三四五六七八九十百千万亿]|\b(?:eleven|twelve|\w+teen|\w+ty|hundred|thousand|million|billion)\b"


class UnsupportedNumbersSettings(Settings):
    """What a reply rests on, and how many unsupported numbers are too many."""

    min_context: int = Field(
        default=160,
        ge=1,
        description="characters of given text from which it is judged; Chinese ones count three times",
    )
    small: float = Field(default=10, ge=0, description="whole numbers up to this are taken for counting")
    arithmetic: bool = Field(default=True, description="results of one operation on two given numbers are supported")
    columns: list[str] = Field(
        default=["span_text", "span", "context", "document", "key_points"],
        description="columns with what a row rests on, if there are any",
    )
    max_count: int = Field(default=0, ge=0, description="most unsupported numbers in the replies")
    spare_calculations: bool = Field(default=True, description="let questions that ask for calculation, code or invention pass")


class UnsupportedNumbers(ConversationFilter):
    """Drop conversations whose replies state numbers that the given text does not support (`unsupported_numbers`)."""

    name: ClassVar[str] = "unsupported_numbers"
    settings = UnsupportedNumbersSettings
    decide_options = frozenset({"max_count", "spare_calculations", "min_context"})

    def files(self) -> list[str]:
        return patterns.files("calculations")

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`unsupported` int64 (0 where nothing is given), `given_size` int64, `calculates` bool, `found` string."""
        turns = Turns(table)
        asked = turns.of(*ASKING)
        replies, given = turns.of(*REPLIES).by_row(), turns.of(*GIVEN)
        extra = _spans(table, self.config.columns)
        first = asked.first()
        holds_text = (input_starts(table) >= 0) | first.any(_holds_text(first))
        alone = asked.sum(np.ones(len(asked))) <= 2  # what a longer talk comes to has left its first text behind
        told = turns.of("system", "tool")
        size = told.sum(sizes(told.text)) + first.sum(sizes(first.text)) * (holds_text & alone) + sizes(extra)
        unsupported = np.zeros(table.num_rows, np.int64)
        found: list[str | None] = [None] * table.num_rows
        speaks = pc.fill_null(pc.match_substring_regex(replies, _ANY_NUMBER), False).to_numpy(zero_copy_only=False)
        rows = np.flatnonzero((size > 0) & speaks)
        texts = given.by_row().take(pa.array(rows)).to_pylist()
        spans, said = extra.take(pa.array(rows)).to_pylist(), replies.take(pa.array(rows)).to_pylist()
        for row, text, span, reply in zip(rows, texts, spans, said, strict=True):  # rows that give a text and speak of numbers
            bad = unsupported_values(reply, f"{text or ''}\n{span}", self.config.small, self.config.arithmetic)
            unsupported[row] = len(bad)
            found[row] = ", ".join(bad[:5]) or None
        return {
            "unsupported": pa.array(unsupported),
            "given_size": pa.array(size),
            "calculates": pa.array(asked.any(patterns.load("calculations").matches(asked.text))),
            "found": pa.array(found, pa.string()),
        }

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        count = numbers(scores, "unsupported")
        fails = (count > self.config.max_count) & (numbers(scores, "given_size") >= self.config.min_context)
        if self.config.spare_calculations:
            fails &= numbers(scores, "calculates") == 0
        return first_reason([("unsupported_numbers", fails, count)], table.num_rows)


def unsupported_values(reply: str, given: str, small: float = 10, arithmetic: bool = True) -> list[str]:
    """The numbers of a reply, as written, that the given text does not support; each value once."""
    known = {value for value, _ in values(given)}
    items = len(_LIST_MARK.findall(reply))
    bad: dict[float, str] = {}
    derived: set[float] | None = None
    for value, written in values(_LIST_MARK.sub("\n", reply)):
        if value in known or value in bad or (value == int(value) and value <= max(small, items)):
            continue
        if value / 100 in known or round(value * 100, 6) in known:  # 12% and 0.12
            continue
        if derived is None:
            derived = _derived(known) if arithmetic else set()
        if round(value, 2) in derived or any(abs(value - item) < 0.5 and value == int(value) and item > 20 for item in derived):
            continue
        bad[value] = written
    return list(bad.values())


def _derived(known: set[float]) -> set[float]:
    """Results of one operation on two numbers, rounded to 2 places, and the total of all."""
    numbers = sorted(known)[:_MOST_PAIRS]
    if len(numbers) < 2:
        return set()
    a, b = np.meshgrid(np.array(numbers), np.array(numbers), indexing="ij")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        every: Any = np.concatenate([x.ravel() for x in (a + b, a - b, a * b, a / b, 100 * a / b, a * b / 100)])
    return set(np.round(every[np.isfinite(every)], 2).tolist()) | {round(sum(numbers), 2)}


def _holds_text(questions: Said) -> np.ndarray:
    """bool[questions]: something stands behind a line feed or in quotes."""
    found = pc.match_substring_regex(questions.text, r"\n\s*\S[^\n]{30,}|[\"“「][^\"”」]{40,}")
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def _spans(table: pa.Table, names: list[str]) -> pa.Array:
    """large_string[rows]: the columns that say what a row rests on, joined."""
    found: list[Any] = []
    for name in names:
        if name not in table.column_names:
            continue
        column = table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            if not (pa.types.is_string(column.type.value_type) or pa.types.is_large_string(column.type.value_type)):
                continue
            column = pc.binary_join(column, "\n")
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            found.append(pc.fill_null(column.cast(pa.large_string()), ""))
    if not found:
        return pa.array([""] * table.num_rows, pa.large_string())
    return pc.binary_join_element_wise(*found, pa.scalar("\n", pa.large_string()))
