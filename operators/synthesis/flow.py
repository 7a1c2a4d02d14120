"""One item's talk with the model, written as a generator: yield requests, receive their replies, return what was made.

    def answer(row):
        reply = yield from ask(render(row))
        return parse(reply)

`render` and `parse` stay pure functions; `Generator.run` plays thousands of such flows beside each other, so that the
second step of one item runs while the first of another is still being drawn, and nothing waits for the slowest of a
batch. What a flow returns depends on its own replies alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from operators.synthesis.requests import Reject, Reply, Request

T = TypeVar("T")

Flow = Generator[Sequence[Request], list[Reply], T]
"""Yields the requests of a step (all drawn beside each other), is sent their replies in the same order."""

MALFORMED = frozenset({"truncated", "malformed", "empty"})
"""Reasons for which a reply is worth drawing again: another seed may well give a sound one."""


def ask(request: Request) -> Flow[Reply]:
    """One reply."""
    replies = yield [request]
    return replies[0]


def ask_all(requests: Sequence[Request]) -> Flow[list[Reply]]:
    """Several replies, drawn beside each other."""
    if not requests:
        return []
    return (yield list(requests))


def attempt(render: Callable[[int], Request], parse: Callable[[Reply], T | Reject], attempts: int = 2) -> Flow[T | Reject]:
    """Draw until `parse` accepts, at most `attempts` times; the last reject otherwise.

    `render(n)` is the request of attempt n from 0 and must carry a seed of its own (or temperature above 0 and a new
    sample number), or the same reply comes back. Only replies that are malformed (see MALFORMED) are drawn again.
    """
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    result: T | Reject = Reject("malformed")
    for number in range(attempts):
        reply = yield from ask(_numbered(render(number), number))
        unanswered = reply.unanswered
        if unanswered is not None:
            return unanswered
        result = parse(reply)
        if not isinstance(result, Reject) or result.reason not in MALFORMED:
            return result
    return result


def _numbered(request: Request, number: int) -> Request:
    """The request of an attempt, marked where it is not the first, so that redraws are counted."""
    return replace(request, redraw=True) if number else request


def attempt_all(
    renders: Sequence[Callable[[int], Request]], parses: Sequence[Callable[[Reply], T | Reject]], attempts: int = 2
) -> Flow[list[T | Reject]]:
    """As `attempt` for several requests, drawn beside each other; what is malformed among them is drawn again together."""
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    results: list[T | Reject] = [Reject("malformed")] * len(renders)
    left = list(range(len(renders)))
    for number in range(attempts):
        replies = yield from ask_all([_numbered(renders[place](number), number) for place in left])
        for place, reply in zip(left, replies, strict=True):
            results[place] = reply.unanswered or parses[place](reply)
        left = [place for place in left if isinstance(found := results[place], Reject) and found.reason in MALFORMED]
        if not left:
            break
    return results


class Watched(Generic[T]):
    """A flow whose value can be seen as soon as it ends, before its turn among the outcomes has come.

    A source of flows that decides by earlier results (see `Generator.run`) waits for `ended` in an order of its own, so
    that what it decides does not depend on the order of completion. `ended` with no value: the token cap left it out.
    """

    def __init__(self, flow: Flow[T]) -> None:
        self._flow = flow
        self.value: T | None = None
        self.ended = False

    def play(self) -> Flow[T]:
        """The flow to give to the generator."""
        self.value = yield from self._flow
        self.ended = True
        return self.value

    def settle(self) -> None:
        """To be called when its outcome is given: without a value by now, it was never asked."""
        self.ended = True


def asks_nothing(value: T) -> Flow[T]:
    """A flow that ends at once: a mark in the order of outcomes."""
    return value
    yield []  # makes this a generator
