"""Replies written down beforehand, played back in any order: what a model said, without the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from operators.synthesis.cache import ReplyCache
from operators.synthesis.flow import Flow
from operators.synthesis.generator import Generator
from operators.synthesis.requests import Reply, Request
from operators.synthesis.rows import Account

Answer = Callable[[Request], str | Reply]


class Recording:
    """An engine that plays replies back to `Generator`; `reverse` completes the last request first. Counts what was asked."""

    revision = "revision"
    in_flight = 64

    def __init__(self, answer: Answer, reverse: bool = False, stop_after: int | None = None) -> None:
        self.answer, self.reverse, self.stop_after = answer, reverse, stop_after
        self.asked: list[Request] = []

    def open(self) -> _Session:
        return _Session(self)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def reply(self, request: Request) -> Reply:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise ConnectionError("the engine is gone")
        self.asked.append(request)
        said = self.answer(request)
        return said if isinstance(said, Reply) else Reply(said, "stop", 10, max(1, len(said) // 4))


class _Session:
    """A few replies at a time, so that first replies are handled while later ones are outstanding."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._waiting: deque[tuple[int, Request]] = deque()

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        self._waiting.extend(requests)

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        take = self._waiting.pop if self._recording.reverse else self._waiting.popleft
        found: list[tuple[int, Reply]] = []
        while self._waiting and len(found) < 3:
            number, request = take()
            try:
                found.append((number, self._recording.reply(request)))
            except ConnectionError:
                self._waiting.append((number, request))
                if not found:
                    raise
                break  # what came before the engine went is delivered
        return found

    def close(self) -> None:
        self._waiting.clear()


def generator(recording: Recording, directory: str, cap: int | None = None) -> Generator:
    return Generator(lambda: recording, "revision", ReplyCache(directory, "test"), cap)


def last(request: Request) -> str:
    """The last message's text."""
    return request.messages[-1][1]


def played(generator: Generator, flows: Iterable[tuple[int, Flow[Account]]]) -> Account:
    """The accounts of flows in one."""
    total = Account("")
    for outcome in generator.run(flows):
        assert outcome.value is not None, "left out by the token cap"
        total.merge(outcome.value)
    return total
