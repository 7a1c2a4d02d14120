"""Instruction-following difficulty by the model's own loss (Li et al. 2023, "From Quantity to Quality", section 2.2).

IFD = s(answer | question) / s(answer), with s the mean negative log-likelihood of the answer's tokens. Near 0 the
question gives the answer away; at 1 and above it does not help at all, which the paper takes for a mismatch and drops.
Between the two, higher means harder, and the paper trains on the hardest tenth (`select` by the column `ifd`).

The question is rendered by the model's chat template (as the model will read it), the answer stands alone behind the
model's start token. Both losses are over the same tokens: the first `max_tokens` of the reply.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate import chat_tokens
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers
from operators.text.analysis import Analysis


class DifficultySettings(Settings):
    """The model and the limits. Adds `ifd`, null where a conversation has no reply behind a question."""

    model: str = Field(description="directory of a causal language model (safetensors), or `@stage` for that of a stage")
    min_ifd: float | None = Field(default=None, ge=0, description="lower ones are rejected as too easy")
    max_ifd: float | None = Field(
        default=1.0, ge=0, description="rows from here on are rejected: the question does not help the answer"
    )
    max_tokens: int = Field(default=512, ge=1, description="tokens of the reply that are scored")
    max_prompt_tokens: int = Field(default=1024, ge=1, description="tokens of the prompt that are read, from its end")
    batch_tokens: int = Field(
        default=2048, ge=1, description="tokens the model works on at once: memory is this x its vocabulary x 4 bytes"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the model runs")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="precision of the model")


class InstructionDifficulty(ConversationFilter):
    """Score conversations by instruction-following difficulty (IFD) under a model: `too_easy`, `question_does_not_help`.

    The last reply is scored, behind everything that was said before it.
    """

    name: ClassVar[str] = "instruction_difficulty"
    settings = DifficultySettings
    adds = ("ifd",)
    decide_options = frozenset({"min_ifd", "max_ifd"})

    def files(self) -> list[str]:
        return [self.config.model]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`ifd`, `conditioned`, `unconditioned` float64 (mean nats a token), null where there is nothing to score."""
        from operators.quality import causal_model

        config = self.config
        loaded, chat = causal_model.load(config.model, config.device, config.dtype), chat_tokens.load(config.model)
        room = loaded.context - 1
        reply_room = min(config.max_tokens, max(1, room // 2))
        tools = table["tools"].to_pylist() if "tools" in table.column_names else [None] * table.num_rows
        behind: list[tuple[np.ndarray, int]] = []
        alone: list[tuple[np.ndarray, int]] = []
        rows: list[int] = []
        for row, said in enumerate(table["messages"].to_pylist()):  # each row is a call into the model
            pair = _pair(chat, said or [], tools[row], reply_room, min(config.max_prompt_tokens, room - reply_room))
            if pair is None:
                continue
            prompt, reply = pair
            start = np.array([] if loaded.start is None else [loaded.start], np.int64)
            if not len(reply) or (not len(start) and len(reply) < 2):
                continue
            first = 1 - len(start)  # a model without a start token cannot predict a first token alone, so neither does
            behind.append((np.r_[prompt, reply], len(prompt) + first))
            alone.append((np.r_[start, reply], len(start) + first))
            rows.append(row)
        counts = np.array([len(tokens) - first for tokens, first in alone], np.int64)
        found: dict[str, np.ndarray] = {name: np.full(table.num_rows, np.nan) for name in ("ifd", "conditioned", "unconditioned")}
        if rows:
            conditioned = causal_model.sequence_losses(loaded, behind, config.batch_tokens) / counts
            unconditioned = causal_model.sequence_losses(loaded, alone, config.batch_tokens) / counts
            found["conditioned"][rows], found["unconditioned"][rows] = np.round(conditioned, 4), np.round(unconditioned, 4)
            with np.errstate(divide="ignore", invalid="ignore"):
                found["ifd"][rows] = np.round(conditioned / unconditioned, 4)
        return {name: pa.array(values, mask=np.isnan(values)) for name, values in found.items()}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        ifd: Any = numbers(scores, "ifd")
        rules = []
        if self.config.min_ifd is not None:
            rules.append(("too_easy", ifd < self.config.min_ifd, ifd))
        if self.config.max_ifd is not None:
            rules.append(("question_does_not_help", ifd >= self.config.max_ifd, ifd))
        return first_reason(rules, table.num_rows)


def _pair(
    chat: chat_tokens.ChatTokenizer, said: list[dict[str, Any]], tools: str | None, most_reply: int, most_prompt: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(prompt tokens, reply tokens) of the last reply, None where no reply follows a message or the template refuses."""
    if len(said) < 2 or said[-1]["role"] != "assistant" or not (said[-1]["content"] or "").strip():
        return None
    try:
        prompt = chat.ids(chat.render(said[:-1], tools, opens_reply=True))
    except ValueError:
        return None
    return prompt[-most_prompt:], chat.ids(said[-1]["content"][: 16 * most_reply])[:most_reply]
