"""Replies written down beforehand, played back in any order: what a model said, without the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from operators.synthesis.cache import ReplyCache
from operators.synthesis.generator import Generator
from operators.synthesis.requests import Reply, Request

Answer = Callable[[Request], str | Reply]


class Recording:
    """Plays replies back to `Generator`; `reverse` completes the last request first. Counts what was asked."""

    def __init__(self, answer: Answer, reverse: bool = False, stop_after: int | None = None) -> None:
        self.answer, self.reverse, self.stop_after = answer, reverse, stop_after
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request], cancelled: threading.Event | None = None) -> Iterator[tuple[int, Reply]]:
        order = range(len(requests))
        for index in reversed(order) if self.reverse else order:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise ConnectionError("the engine is gone")
            self.asked.append(requests[index])
            said = self.answer(requests[index])
            yield index, said if isinstance(said, Reply) else Reply(said, "stop", 10, max(1, len(said) // 4))


def generator(recording: Recording, directory: str, cap: int | None = None) -> Generator:
    return Generator(lambda: recording, "revision", ReplyCache(directory, "test"), cap)  # type: ignore[arg-type, return-value]


def last(request: Request) -> str:
    """The last message's text."""
    return request.messages[-1][1]
