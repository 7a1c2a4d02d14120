"""Time-sensitive questions: what the right answer is depends on the day it is asked (the weather today, 现任总统).

Only questions are judged, and of a question its instruction: a news item to be summarised may speak of today.
Conversations with tools pass, for a tool can know. Patterns: `patterns/LANG/time_sensitive.txt`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate import patterns
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers, told
from operators.synthesis.curate.turns import ASKING, Said, Turns, instructions
from operators.text.analysis import Analysis

_QUOTED = r"“[^”\n]*”|\"[^\"\n]*\"|「[^」\n]*」|《[^》\n]*》|(?:^|[\s(])'[^'\n]{4,}'"  # what is quoted is not asked


class TimeSensitiveSettings(Settings):
    """What is looked at."""

    window: int = Field(default=240, ge=1, description="characters of a question's beginning that are judged")
    spare_tools: bool = Field(default=True, description="let conversations with tools pass")
    extra: list[str] = Field(default=[], description="more patterns, as RE2 expressions")


class TimeSensitive(ConversationFilter):
    """Drop conversations with a question whose answer goes out of date (`time_sensitive`); the detail is what says so."""

    name: ClassVar[str] = "time_sensitive"
    settings = TimeSensitiveSettings
    decide_options = frozenset({"spare_tools"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._patterns = patterns.load("time_sensitive", "strong", extra=self.config.extra)
        self._spared = patterns.load("time_sensitive", "spared")

    def files(self) -> list[str]:
        return patterns.files("time_sensitive")

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`questions` int64 (those that are time-sensitive), `tools` bool, `found` string."""
        turns = Turns(table)
        asked = turns.of(*ASKING)
        first = asked.is_first()
        heads = instructions(table, turns).take(pa.array(asked.row[first]))  # of the first question its instruction alone
        both = Said(
            pa.concat_arrays([heads, asked.text.filter(pa.array(~first))]), np.r_[asked.row[first], asked.row[~first]], asked.rows
        )
        begin = pc.replace_substring_regex(pc.utf8_slice_codeunits(both.text, 0, self.config.window), _QUOTED, '""')
        flags = self._patterns.matches(begin) & ~self._spared.matches(begin)
        said = Said(begin, both.row, both.rows).where(flags)
        tools = np.zeros(table.num_rows, bool)
        if "tools" in table.column_names:
            tools = np.asarray(pc.is_valid(table["tools"]).to_numpy(), bool)
        found = self._patterns.found(said.text)
        return {
            "questions": pa.array(said.sum(np.ones(len(said)))),
            "tools": pa.array(tools),
            "found": told(said, found),
        }

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        count = numbers(scores, "questions")
        fails = count > 0
        if self.config.spare_tools:
            fails &= numbers(scores, "tools") == 0
        return first_reason([("time_sensitive", fails, count)], table.num_rows)
