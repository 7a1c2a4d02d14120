"""Stock phrases: what models say whatever they are asked ("As an AI language model", 作为一个人工智能).

Taori et al. and those after them filter such replies because a model trained on them answers with its own nature instead
of the matter. The phrases stand in `patterns/LANG/stock_phrases.txt` by kind; `ban_line` is the line that forbids them in
a prompt, so that fewer have to be filtered.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate import patterns
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers, told
from operators.synthesis.curate.turns import ASKING, REPLIES, Turns
from operators.synthesis.prompts import load
from operators.text.analysis import Analysis

Kind = Literal["identity", "cutoff", "opening", "closing"]


def ban_line(lang: str, folder: str | None = None) -> str:
    """The sentence for a system prompt that forbids stock phrases (`prompts/LANG/ban.txt`)."""
    return load("ban", lang, folder).sections[0][1]


class StockPhrasesSettings(Settings):
    """Which kinds of phrases count, and how many are too many."""

    kinds: list[Kind] = Field(
        default=["identity", "cutoff"],
        min_length=1,
        description="identity: names itself a machine; cutoff: speaks of its training; opening: `Certainly! Here is`; closing: "
        "`I hope this helps`",
    )
    extra: list[str] = Field(default=[], description="more phrases, as RE2 expressions that match in any case")
    max_count: int = Field(default=0, ge=0, description="most phrases in the replies of a conversation")
    spare_identity: bool = Field(default=True, description="let conversations pass whose user asks who or what it speaks to")


class StockPhrases(ConversationFilter):
    """Drop conversations whose replies hold stock phrases (`stock_phrase`); the value is their number, the detail the first."""

    name: ClassVar[str] = "stock_phrases"
    settings = StockPhrasesSettings
    decide_options = frozenset({"max_count", "spare_identity"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._patterns = patterns.load("stock_phrases", *self.config.kinds, extra=self.config.extra)

    def files(self) -> list[str]:
        return patterns.files("stock_phrases")

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`phrases` int64, `asked` bool (the user asks who the speaker is), `found` string."""
        turns = Turns(table)
        replies = turns.of(*REPLIES)
        asking = turns.of(*ASKING)
        return {
            "phrases": pa.array(replies.sum(self._patterns.counts(replies.text))),
            "asked": pa.array(asking.any(patterns.load("stock_phrases", "spared").matches(asking.text))),
            "found": told(replies, self._patterns.found(replies.text)),
        }

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        count = numbers(scores, "phrases")
        fails = count > self.config.max_count
        if self.config.spare_identity:
            fails &= numbers(scores, "asked") == 0
        return first_reason([("stock_phrase", fails, count)], table.num_rows)
