"""Asking a model through the reply cache, with a cap on generated tokens and an account of what was spent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from operators.synthesis.cache import ReplyCache
from operators.synthesis.engine import Engine
from operators.synthesis.requests import Reply, Request

_SYNC_REPLIES, _SYNC_S = 32, 1.0  # replies are on disk after this many, or this long


@dataclass
class Usage:
    """What replies cost. All but `cache_hits` and `seconds` are the same however often the run was interrupted."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    truncated: int = 0
    prompt_too_long: int = 0
    cache_hits: int = 0
    seconds: float = 0.0

    def add(self, reply: Reply) -> None:
        self.calls += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.truncated += reply.truncated
        self.prompt_too_long += reply.finish_reason == "prompt_too_long"


@dataclass
class Generator:
    """Answers requests from the cache first and from the engine where the cache has none.

    `engine` is called (and an engine started) only when a reply is missing. `max_completion_tokens` is a hard cap over
    everything asked, cached or not, so that a resumed run stops at the same place as an undisturbed one.
    """

    engine: Callable[[], Engine]
    revision: str
    cache: ReplyCache
    max_completion_tokens: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    progress: Callable[[int, int], None] = lambda done, total: None
    usage: Usage = field(default_factory=Usage)

    @property
    def exhausted(self) -> bool:
        """No tokens are left under the cap."""
        return self.max_completion_tokens is not None and self.usage.completion_tokens >= self.max_completion_tokens

    def ask(self, requests: Sequence[Request]) -> list[Reply | None]:
        """Replies in the order of the requests; None for those that the token cap left unasked.

        Under a cap, requests go out in waves whose longest possible replies fit what is left, in order, so the cap is
        never passed and which requests are asked depends on the replies alone.
        """
        replies: list[Reply | None] = [None] * len(requests)
        position = 0
        while position < len(requests):
            end = self._wave(requests, position)
            if end == position:
                break
            self._answer(requests, range(position, end), replies)
            for index in range(position, end):
                reply = replies[index]
                assert reply is not None
                self.usage.add(reply)
            position = end
        return replies

    def _wave(self, requests: Sequence[Request], start: int) -> int:
        if self.max_completion_tokens is None:
            return len(requests)
        left, end = self.max_completion_tokens - self.usage.completion_tokens, start
        while end < len(requests) and requests[end].sampling.max_tokens <= left:
            left -= requests[end].sampling.max_tokens
            end += 1
        return end

    def _answer(self, requests: Sequence[Request], wanted: range, replies: list[Reply | None]) -> None:
        keys = {index: requests[index].key(self.revision) for index in wanted}
        missing: dict[str, list[int]] = {}
        for index in wanted:
            replies[index] = self.cache.get(keys[index])
            if replies[index] is None:
                missing.setdefault(keys[index], []).append(index)  # equal requests of one wave are drawn once
            else:
                self.usage.cache_hits += 1
        if not missing:
            return
        started = time.monotonic()
        order = [places[0] for places in missing.values()]
        unsaved: list[tuple[str, Reply]] = []
        saved_at, done = time.monotonic(), 0
        try:
            for number, reply in self.engine().generate([requests[index] for index in order], self.cancelled):
                key = keys[order[number]]
                for index in missing[key]:
                    replies[index] = reply
                unsaved.append((key, reply))
                done += 1
                if len(unsaved) >= _SYNC_REPLIES or time.monotonic() - saved_at >= _SYNC_S:
                    self.cache.put(unsaved)
                    unsaved, saved_at = [], time.monotonic()
                    self.progress(done, len(order))
        finally:
            self.cache.put(unsaved)
            self.usage.seconds += time.monotonic() - started
        self.progress(done, len(order))
        if done < len(order):
            from operators.stage import Cancelled

            raise Cancelled(f"stopped with {len(order) - done} of {len(order)} replies outstanding; those received are kept")
