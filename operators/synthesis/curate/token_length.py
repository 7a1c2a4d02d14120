"""Length in tokens of the model to be trained: what its context holds, counted as it will read the conversation."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from operators.config import Settings
from operators.synthesis.curate import chat_tokens
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers
from operators.synthesis.curate.turns import REPLIES, Turns
from operators.text.analysis import Analysis

_BATCH_ROWS = 256  # rendered at once


class TokenLengthSettings(Settings):
    """The tokenizer and the limits. Without a limit the lengths are only measured."""

    tokenizer: str = Field(description="directory with the target model's tokenizer, or `@stage` for that of a stage's model")
    min: int | None = Field(default=None, ge=0, description="fewest tokens of a conversation, with the chat template")
    max: int | None = Field(default=None, ge=1, description="most tokens of a conversation, with the chat template")
    min_reply: int | None = Field(default=None, ge=0, description="fewest tokens of all replies of a conversation")
    max_reply: int | None = Field(default=None, ge=1, description="most tokens of all replies of a conversation")

    @model_validator(mode="after")
    def _in_order(self) -> TokenLengthSettings:
        for low, high in ((self.min, self.max), (self.min_reply, self.max_reply)):
            if low is not None and high is not None and low > high:
                raise ValueError(f"the minimum {low} is above the maximum {high}")
        return self


class TokenLength(ConversationFilter):
    """Drop conversations too long or too short for the model: `too_long`, `too_short`, `long_reply`, `short_reply`.

    Tokens are those of the model's own tokenizer and chat template (ChatML where it has none). A conversation that the
    template refuses (turns that do not alternate, say) is `no_template`.
    """

    name: ClassVar[str] = "token_length"
    settings = TokenLengthSettings
    decide_options = frozenset({"min", "max", "min_reply", "max_reply"})

    def files(self) -> list[str]:
        return [self.config.tokenizer]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`tokens` int64 (-1 where the template refuses), `reply_tokens` int64, `found` string (why it refuses)."""
        chat = chat_tokens.load(self.config.tokenizer)
        tools = table["tools"] if "tools" in table.column_names else None
        tokens, why = np.zeros(table.num_rows, np.int64), list[str | None]()
        for start in range(0, table.num_rows, _BATCH_ROWS):  # the template is a program: a call a conversation
            messages = table["messages"].slice(start, _BATCH_ROWS).to_pylist()
            listed = tools.slice(start, _BATCH_ROWS).to_pylist() if tools is not None else [None] * len(messages)
            texts: list[str] = []
            for said, tool in zip(messages, listed, strict=True):
                try:
                    texts.append(chat.render(said or [], tool))
                    why.append(None)
                except ValueError as error:
                    texts.append("")
                    why.append(str(error)[:200])
            tokens[start : start + len(texts)] = chat.counts(texts)
        refused = np.array([item is not None for item in why], bool)
        replies = Turns(table).of(*REPLIES)
        return {
            "tokens": pa.array(np.where(refused, -1, tokens)),
            "reply_tokens": pa.array(replies.sum(chat.counts(replies.text.to_pylist()))),
            "found": pa.array(why, pa.string()),
        }

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        config, tokens, reply = self.config, numbers(scores, "tokens"), numbers(scores, "reply_tokens")
        rules = [("no_template", tokens < 0, tokens)]
        for reason, limit, score, above in (
            ("too_long", config.max, tokens, True), ("too_short", config.min, tokens, False),
            ("long_reply", config.max_reply, reply, True), ("short_reply", config.min_reply, reply, False),
        ):  # fmt: skip
            if limit is not None:
                rules.append((reason, score > limit if above else score < limit, score))
        return first_reason(rules, table.num_rows)
