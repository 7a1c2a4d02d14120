"""What is asked of a model and what comes back; no engine is needed to make or read either."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydantic import Field

from operators.config import Settings

Messages = tuple[tuple[str, str], ...]
"""(role, content) pairs. A last message of role `assistant` is continued by the model rather than answered."""

PROMPT_TOO_LONG = "prompt_too_long"


class SamplingSettings(Settings):
    """How a reply is drawn."""

    temperature: float = Field(default=0.7, ge=0, le=5, description="0 is greedy decoding")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampling: smallest set of tokens with this probability")
    top_k: int = Field(default=0, ge=0, description="only the k likeliest tokens; 0 = all")
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from the logit of every token already generated"
    )
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="subtracted once for each time a token was generated")
    repetition_penalty: float = Field(default=1.0, gt=0, le=2, description="divides logits of tokens in the prompt or the reply")
    max_tokens: int = Field(default=256, ge=1, description="longest reply in tokens; a reply cut there is reported as truncated")
    stop: list[str] = Field(default=[], description="the reply ends before any of these strings")


@dataclass(frozen=True)
class Request:
    """One reply to draw. `seed` is its own random seed, so a reply does not depend on which requests run beside it."""

    messages: Messages
    sampling: SamplingSettings
    seed: int
    sample: int = 0  # number of this sample among several of one prompt

    def key(self, revision: str) -> str:
        """32 hex digits that name the reply: model revision (weights, tokenizer and chat template, hence the rendered
        prompt is a function of it and the messages), messages, sampling settings, seed and sample number."""
        digest = hashlib.blake2b(digest_size=16)
        pieces = [revision, self.sampling.model_dump_json(), str(self.seed), str(self.sample)]
        for piece in [*pieces, *(text for message in self.messages for text in message)]:
            data = piece.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Reply:
    """`finish_reason`: `stop`, `length` (cut at max_tokens or at the model's length) or `prompt_too_long`."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Reject:
    """Why a reply or a row was set aside: a stable reason, the measured value, and what it collided with."""

    reason: str
    value: float | None = None
    detail: str | None = None


def request_seed(run_seed: int, *key: str | int) -> int:
    """A seed in [0, 2^31) from the run's seed and the request's place in the work, never from its batch."""
    data = "\x00".join(map(str, (run_seed, *key))).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little") & 0x7FFFFFFF
