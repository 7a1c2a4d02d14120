"""What is asked of a model and what comes back; no engine is needed to make or read either."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import Field

from operators.config import Settings

Messages = tuple[tuple[str, str], ...]
"""(role, content) pairs. A last message of role `assistant` is continued by the model rather than answered."""

PROMPT_TOO_LONG = "prompt_too_long"
REFUSED = "refused"


class SamplingSettings(Settings):
    """How a reply is drawn."""

    temperature: float = Field(default=0.7, ge=0, le=5, description="0 is greedy decoding")
    top_p: float = Field(default=1.0, gt=0, le=1, description="smallest set of tokens with this probability is drawn from")
    top_k: int = Field(default=0, ge=0, description="draw from this many likeliest tokens; 0 = all")
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from the logit of every token already generated"
    )
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="subtracted once for each time a token was generated")
    repetition_penalty: float = Field(default=1.0, gt=0, le=2, description="divides logits of tokens in the prompt or the reply")
    max_tokens: int = Field(default=256, ge=1, description="longest reply in tokens; a reply cut there is reported as truncated")
    stop: list[str] = Field(default=[], description="the reply ends before any of these strings")


@dataclass(frozen=True)
class Request:
    """One reply to draw. `seed` is its own random seed, so a reply does not depend on which requests run beside it.

    With `json_schema` (JSON text) the engine lets the model write nothing but JSON that fits the schema.
    """

    messages: Messages
    sampling: SamplingSettings
    seed: int
    sample: int = 0  # number of this sample among several of one prompt
    json_schema: str | None = None
    model: str = ""  # revision of the model to ask, where it is not the stage's own generator (see operators.synthesis.routing)
    redraw: bool = field(default=False, compare=False)  # asks again what was malformed: counted, not part of the key

    def key(self, revision: str) -> str:
        """32 hex digits that name the reply: model revision (weights, tokenizer and chat template, hence the rendered
        prompt is a function of it and the messages), messages, sampling settings, schema, seed and sample number."""
        pieces = [self.model or revision, self.sampling.model_dump_json(), self.json_schema or "", str(self.seed), str(self.sample)]
        for role, text in self.messages:
            pieces += (role, text)
        encoded = [piece.encode("utf-8", "surrogatepass") for piece in pieces]
        data = b"".join([part for piece in encoded for part in (len(piece).to_bytes(8, "little"), piece)])
        return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What came back.

    `finish_reason`: `stop`, `length` (cut at max_tokens or at the model's length), `prompt_too_long`, or `refused` (a
    server will not answer this request, whenever it is asked; `text` says why).
    `cached_tokens`: prompt tokens that the engine did not have to compute, because an earlier prompt began alike.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def unanswered(self) -> Reject | None:
        """Why there is nothing to parse, if there is not: the prompt was too long, or the server refuses it."""
        if self.finish_reason == PROMPT_TOO_LONG:
            return Reject(PROMPT_TOO_LONG, self.prompt_tokens)
        return Reject(REFUSED, detail=self.text) if self.finish_reason == REFUSED else None


@dataclass(frozen=True)
class Reject:
    """Why a reply or a row was set aside: a stable reason, the measured value, and what it collided with."""

    reason: str
    value: float | None = None
    detail: str | None = None


class EngineSession(Protocol):
    """One caller's stream of requests and replies. Not thread-safe; each caller opens its own."""

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        """Send requests, each with the caller's own number for it. Returns without waiting for replies."""

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        """Replies that have come, in any order, each once; waits up to `timeout_s` for the first. May be empty.

        Raises EngineError when replies can no longer come.
        """

    def close(self) -> None:
        """Take back what is still outstanding. May be called twice."""


class TextEngine(Protocol):
    """Where replies come from. `open` may be called by several threads at once."""

    @property
    def revision(self) -> str:
        """What names the model behind: another model, tokenizer or chat template has another revision."""

    @property
    def in_flight(self) -> int:
        """How many requests a caller should keep outstanding, so that the engine always has its next batch at hand."""

    def open(self) -> EngineSession: ...

    def start(self) -> None:
        """Begin loading, if there is something to load; returns at once."""

    def stop(self) -> None: ...


class EngineError(RuntimeError):
    """The engine could not be started or reached, or died again and again without a reply."""


def request_seed(run_seed: int, *key: str | int) -> int:
    """A seed in [0, 2^31) from the run's seed and the request's place in the work, never from its batch."""
    data = "\x00".join(map(str, (run_seed, *key))).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little") & 0x7FFFFFFF
