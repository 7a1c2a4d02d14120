"""Playing flows against a model through the reply cache, with a cap on generated tokens and an account of what was spent."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from operators.synthesis.cache import ReplyCache
from operators.synthesis.flow import Flow, ask
from operators.synthesis.requests import PROMPT_TOO_LONG, REFUSED, EngineError, EngineSession, Reply, Request, TextEngine

T = TypeVar("T")

_SYNC_REPLIES, _SYNC_S = 256, 1.0  # replies are synced after this many, or this long
_AHEAD = 16  # windows of finished flows that may wait for one straggler before them
_POLL_S = 0.5  # cancelling, and a source that had nothing yet, are looked at this often


@dataclass
class Usage:
    """What the replies of one or many flows cost, cached ones included: the same however often the run was interrupted.

    `prompt_tokens` are those that a model has read: not those of prompts that were too long. `retried`: calls that drew
    again what was malformed the first time.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    truncated: int = 0
    prompt_too_long: int = 0
    refused: int = 0
    retried: int = 0

    def add(self, reply: Reply, redraw: bool = False) -> None:
        too_long = reply.finish_reason == PROMPT_TOO_LONG
        self.calls += 1
        self.prompt_tokens += 0 if too_long else reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        self.truncated += reply.truncated
        self.prompt_too_long += too_long
        self.refused += reply.finish_reason == REFUSED
        self.retried += redraw

    def merge(self, other: Usage) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def to_json(self) -> dict[str, int]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Usage:
        return cls(**{item.name: int(data.get(item.name, 0)) for item in fields(cls)})


@dataclass
class Outcome(Generic[T]):
    """What became of one flow. `value` is None when the token cap left it unasked (`admitted` is False)."""

    value: T | None
    admitted: bool
    usage: Usage
    replies: list[Reply] = field(default_factory=list)  # in the order they were asked for, if the generator keeps them


class _Playing(Generic[T]):
    """A flow under way."""

    def __init__(self, number: int, bound: int, flow: Flow[T]) -> None:
        self.number, self.bound, self.flow = number, bound, flow
        self.usage = Usage()
        self.asked_tokens = 0
        self.requests: list[Request] = []  # of the step in progress
        self.step: list[Reply | None] = []  # their replies
        self.missing = 0
        self.history: list[Reply] = []


@dataclass
class Generator:
    """Answers requests from the cache first and from the engine where the cache has none.

    `engine` is called (and an engine started) only when a reply is missing. `max_completion_tokens` is a hard cap over
    everything asked, cached or not, so that a resumed run stops at the same place as an undisturbed one.
    """

    engine: Callable[[], TextEngine]
    revision: str
    cache: ReplyCache
    max_completion_tokens: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    progress: Callable[[int, int], None] = lambda done, total: None
    keep_replies: bool = False
    max_model_len: int | None = None  # the longest prompt and reply that the engine takes now, where that is known
    usage: Usage = field(default_factory=Usage)
    capped: bool = False  # the cap has left something unasked
    drawn: Usage = field(default_factory=Usage)  # replies that did not come from the cache: what this process paid for
    cache_hits: int = 0
    prefix_tokens: int = 0  # prompt tokens among `drawn` that the engine found in its prefix cache
    seconds: float = 0.0  # wall time in which replies were outstanding

    @property
    def exhausted(self) -> bool:
        """No tokens are left under the cap, or too few for what was asked last."""
        cap = self.max_completion_tokens
        return self.capped or (cap is not None and self.usage.completion_tokens >= cap)

    def cached(self, key: str, request: Request) -> Reply | None:
        """The reply received before, unless a shorter limit of the model than today's is what it ended by."""
        reply = self.cache.get(key)
        if reply is None or self.max_model_len is None or reply.finish_reason == "stop":
            return reply
        by_length = reply.finish_reason == "length" and reply.completion_tokens < request.sampling.max_tokens
        if by_length or reply.finish_reason == PROMPT_TOO_LONG:
            return reply if reply.prompt_tokens + reply.completion_tokens >= self.max_model_len else None
        return reply

    def timings(self) -> dict[str, Any]:
        """What this process paid and waited for; never compared between runs."""
        return {
            "generation_seconds": self.seconds,
            "cache_hits": self.cache_hits,
            "prefix_tokens": self.prefix_tokens,
            **{f"drawn_{name}": value for name, value in self.drawn.to_json().items()},
        }

    def ask(self, requests: Sequence[Request]) -> list[Reply | None]:
        """Replies in the order of the requests; None for those that the token cap left unasked."""
        return [outcome.value for outcome in self.run((request.sampling.max_tokens, ask(request)) for request in requests)]

    def run(self, flows: Iterable[tuple[int, Flow[T]] | None]) -> Iterator[Outcome[T]]:
        """Play flows beside each other; their outcomes in the order of the flows.

        A flow comes with the most completion tokens that it may ask for (the sum over its requests of `max_tokens`). A
        source may yield None for "nothing yet": what is under way goes on and the source is asked again, so it may wait
        for outcomes that this very iterator has given. Memory is bounded: a few thousand flows are open at once, and no
        flow is opened while as many requests are outstanding.

        Under a cap, flow i is played if U(i) + b(i) <= cap, where U(i) is what the flows before it use in all and b(i) the
        most that it may use, and once one is left out all after it are. Which ones are played depends on the replies
        alone: flow i is admitted early only if (used by flows that have ended) + (the most that open ones may use) + b(i)
        <= cap, which is at least U(i) + b(i) because each flow uses at most what it announced; otherwise it waits until
        no flow is open, when U(i) is known and decides. Hence nothing ever exceeds the cap either. This needs an engine
        that keeps `max_tokens`: one that does not can pass the cap by what it adds to the flows then open.

        A refusal that cost nothing is not kept in the cache, so that it is asked again once the server has been mended.
        Raises Cancelled, EngineError, OSError (the cache cannot be written) and what a flow or the source raises; replies
        received until then are kept.
        """
        play: _Play[T] = _Play(self, iter(flows))
        try:
            yield from play.outcomes()
        finally:
            play.close()


class _Play(Generic[T]):
    """The state of one `Generator.run`."""

    def __init__(self, generator: Generator, source: Iterator[tuple[int, Flow[T]] | None]) -> None:
        self._generator, self._source = generator, source
        self._ended = False
        self._held: tuple[int, Flow[T]] | None = None  # taken from the source, waiting for room under the cap
        self._engine: TextEngine | None = None
        self._session: EngineSession | None = None
        self._window = 256  # flows open, and requests outstanding, until an engine says how many it wants
        self._live: dict[int, _Playing[T]] = {}
        self._done: dict[int, Outcome[T]] = {}
        self._admitted = self._given = 0
        self._asked: dict[str, list[tuple[_Playing[T], int]]] = {}  # key -> who waits for that reply
        self._keys: dict[int, str] = {}  # number of a request at the engine -> key
        self._next_request = 0
        self._outbox: list[tuple[int, Request]] = []
        self._unsaved: list[tuple[str, Reply]] = []
        self._unsaved_by_key: dict[str, Reply] = {}
        self._saved_at = time.monotonic()

    def outcomes(self) -> Iterator[Outcome[T]]:
        generator = self._generator
        while True:
            idle = self._admit()
            if self._outbox:
                self._send()
            self._save_if_due()
            while self._given in self._done:
                outcome = self._done.pop(self._given)
                self._given += 1
                yield outcome
                self._save_if_due()
                idle = False
            if self._ended and not self._live:
                if self._given == self._admitted and self._held is None:
                    return
                continue
            self._check_cancelled()
            if self._keys:
                self._collect(0.02 if idle else _POLL_S)
            elif idle:
                time.sleep(0.02)  # the source waits for something outside
            generator.progress(self._given, self._admitted)

    def _admit(self) -> bool:
        """Open flows while there is room; True when the source had nothing to give at present."""
        while max(len(self._live), len(self._keys)) < self._window and len(self._done) < _AHEAD * self._window:
            if self._held is None:
                if self._ended:
                    return False
                try:
                    self._held = next(self._source)
                except StopIteration:
                    self._ended = True
                    return False
                if self._held is None:
                    return True
            bound, flow = self._held
            room = self._room(bound)
            if room is None:
                return False
            self._held = None
            playing = _Playing(self._admitted, bound, flow)
            self._admitted += 1
            if not room:
                flow.close()
                self._generator.capped = True
                self._done[playing.number] = Outcome(None, False, Usage())
                continue
            self._live[playing.number] = playing
            self._advance(playing, None)
        return False

    def _room(self, bound: int) -> bool | None:
        """Whether the next flow fits under the cap; None while that depends on flows under way."""
        generator = self._generator
        cap = generator.max_completion_tokens
        if cap is None:
            return True
        if generator.capped:
            return False
        most = sum(max(playing.bound, playing.usage.completion_tokens) for playing in self._live.values())
        if generator.usage.completion_tokens + most + bound <= cap:
            return True
        return None if self._live else False

    def _advance(self, playing: _Playing[T], replies: list[Reply] | None) -> None:
        """Send replies into a flow and ask for what it wants next, until a reply has to be waited for."""
        generator = self._generator
        while True:
            try:
                requests = next(playing.flow) if replies is None else playing.flow.send(replies)
            except StopIteration as end:
                del self._live[playing.number]
                generator.usage.merge(playing.usage)
                self._done[playing.number] = Outcome(end.value, True, playing.usage, playing.history)
                return
            playing.asked_tokens += sum(request.sampling.max_tokens for request in requests)
            if playing.asked_tokens > playing.bound:
                raise RuntimeError(f"a flow asks for {playing.asked_tokens} tokens and was announced with {playing.bound}")
            playing.requests = list(requests)
            playing.step = [None] * len(requests)
            playing.missing = 0
            for place, request in enumerate(requests):
                key = request.key(generator.revision)
                waiting = self._asked.get(key)
                reply = None if waiting is not None else self._unsaved_by_key.get(key) or generator.cached(key, request)
                if reply is not None:
                    generator.cache_hits += 1
                    playing.step[place] = reply
                    continue
                playing.missing += 1
                if waiting is not None:  # equal requests are drawn once
                    waiting.append((playing, place))
                    continue
                self._asked[key] = [(playing, place)]
                self._keys[self._next_request] = key
                self._outbox.append((self._next_request, request))
                self._next_request += 1
            if playing.missing:
                return
            replies = self._complete(playing)

    def _complete(self, playing: _Playing[T]) -> list[Reply]:
        replies = [reply for reply in playing.step if reply is not None]
        for request, reply in zip(playing.requests, replies, strict=True):
            playing.usage.add(reply, request.redraw)
        if self._generator.keep_replies:
            playing.history += replies
        return replies

    def _send(self) -> None:
        if self._session is None:
            self._engine = self._generator.engine()
            self._session = self._engine.open()
        self._session.submit(self._outbox)
        assert self._engine is not None
        self._window = max(self._window, 2 * self._engine.in_flight)  # a routed engine grows by the models that are asked
        self._outbox = []

    def _collect(self, timeout_s: float) -> None:
        generator, session = self._generator, self._session
        assert session is not None
        began = time.monotonic()
        try:
            arrived = session.collect(timeout_s)
        finally:
            generator.seconds += time.monotonic() - began
        ready: deque[_Playing[T]] = deque()
        for number, reply in arrived:
            key = self._keys.pop(number)
            generator.drawn.add(reply)
            generator.prefix_tokens += reply.cached_tokens
            if reply.finish_reason != REFUSED or reply.completion_tokens:
                self._unsaved.append((key, reply))
                self._unsaved_by_key[key] = reply
            for playing, place in self._asked.pop(key):
                playing.step[place] = reply
                playing.missing -= 1
                if not playing.missing:
                    ready.append(playing)
        self._save_if_due()
        for playing in ready:
            self._advance(playing, self._complete(playing))

    def _save_if_due(self) -> None:
        """Write what has come at once, so that a killed process has lost nothing, and sync now and then, for the machine.

        On an object store replies are written together when a sync is due: each write is an object.
        """
        cache, now = self._generator.cache, time.monotonic()
        due = len(self._unsaved) >= _SYNC_REPLIES or now - self._saved_at >= _SYNC_S
        if self._unsaved and (due or cache.is_local):
            self._save(sync=due)
        elif due:
            cache.sync()
        if due:
            self._saved_at = now

    def _save(self, sync: bool) -> None:
        self._generator.cache.put(self._unsaved, sync=sync)
        self._unsaved, self._unsaved_by_key = [], {}

    def _check_cancelled(self) -> None:
        if self._generator.cancelled.is_set():
            from operators.stage import Cancelled

            raise Cancelled(f"stopped with {len(self._keys)} replies outstanding; those received are kept")

    def close(self) -> None:
        """Save what was received and take back the rest."""
        try:
            if self._unsaved:
                self._save(sync=True)
            self._generator.cache.sync()
        finally:
            if self._session is not None:
                self._session.close()
            for playing in self._live.values():
                playing.flow.close()
            if self._held is not None:
                self._held[1].close()


__all__ = ["EngineError", "Generator", "Outcome", "Usage"]
