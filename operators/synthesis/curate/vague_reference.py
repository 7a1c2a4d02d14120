"""Vague references: a conversation that speaks of "the text above" or 这篇文章 where no such text stands.

What counts as context for the first question: an input of its own, a message of the system or a tool, or enough text of
the question besides the reference (after a line feed, a colon, in quotes, in a code fence). Replies that cite a text ("the
passage states") are judged alike: they come from document tasks whose document was left out.
Patterns: `patterns/LANG/vague_reference.txt`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate import patterns
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers, told
from operators.synthesis.curate.turns import ASKING, REPLIES, Turns, input_starts, sizes
from operators.text.analysis import Analysis

_REPLY_WINDOW = 200  # characters of a reply in which it says what it rests on

# What a question brings along: behind a colon, a line feed, in quotes or in a fence. Han characters say more than letters.
_BROUGHT = patterns.Patterns(
    [
        r"```",
        r"[\[({（【][^\])}）】\n]*\d[^\])}）】\n]{2,}",
        r"[\"“”「『《‘']\s*\p{Han}[^\"“”」』》’'\n]+[\"“”」』》’']",
        r"<image>|!\[|https?://",
        r"[\"“”„«»「『《‘][^\"“”„«»」』》’]{6,}[\"“”„«»」』》’]",
        r"(?:^|[\s(])'[^'\n]{10,}'",
        r"[:：]\s*\S[^\n]{7,}",
        r"[:：]\s*[^\n]{0,3}\p{Han}[^\n]{2,}",
        r"[:：]?\s*\n\s*\S[^\n]{11,}",
        r"\n[^\n]*\p{Han}[^\n]{3,}",
        r"[:：]\s*[-+\d(\[{$]",
    ]
)


class VagueReferenceSettings(Settings):
    """How much text counts as context, in characters; a Chinese one counts three times."""

    replies: bool = Field(default=True, description="judge what replies cite, too")
    min_context: int = Field(
        default=200, ge=1, description="characters of system, tool or later user messages that count as context"
    )
    long_question: int = Field(default=450, ge=1, description="a question of so many characters brings its own context")
    extra: list[str] = Field(default=[], description="more references in questions, as RE2 expressions")


class VagueReference(ConversationFilter):
    """Drop conversations that refer to material that is not there: `question_without_context`, `reply_without_context`."""

    name: ClassVar[str] = "vague_reference"
    settings = VagueReferenceSettings
    decide_options = frozenset({"replies", "min_context", "long_question"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._question = patterns.load("vague_reference", "question", extra=self.config.extra)
        self._spared = patterns.load("vague_reference", "spared")
        self._reply = patterns.load("vague_reference", "reply")

    def files(self) -> list[str]:
        return patterns.files("vague_reference")

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`question_refers`, `reply_refers`, `brought` (the question holds material) bool; `question_size`, `context_size`
        int64 (characters, Han ones three times); `found` string."""
        turns = Turns(table)
        asked = turns.of(*ASKING).first()
        replies = turns.of(*REPLIES)
        opened = pc.utf8_slice_codeunits(replies.text, 0, _REPLY_WINDOW)
        brought = asked.any(_BROUGHT.matches(asked.text)) | (input_starts(table) >= 0)
        found = pc.coalesce(told(asked, self._question.found(asked.text)), told(replies, self._reply.found(opened)))
        return {
            "question_refers": pa.array(asked.any(self._question.matches(asked.text) & ~self._spared.matches(asked.text))),
            "reply_refers": pa.array(replies.any(self._reply.matches(opened))),
            "brought": pa.array(brought),
            "question_size": pa.array(asked.sum(sizes(asked.text))),
            "context_size": pa.array(turns.context_size()),
            "found": found,
        }

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        config = self.config
        question, context = numbers(scores, "question_size"), numbers(scores, "context_size")
        without = (numbers(scores, "brought") == 0) & (question < config.long_question) & (context < config.min_context)
        asked = without & (numbers(scores, "question_refers") > 0)
        replied = without & (numbers(scores, "reply_refers") > 0) & config.replies
        rules = [("question_without_context", asked, question + context), ("reply_without_context", replied, question + context)]
        return first_reason(rules, table.num_rows)
