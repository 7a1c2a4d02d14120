"""Several models behind one generator: one that answers and, say, one that judges, under one token cap and one reply cache.

A request whose `model` is empty goes to the stage's own generator, any other to the model of that revision. Engines are
asked for when the first request for them comes, so that a stage whose answers are cached starts only its judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from operators.synthesis.requests import EngineError, EngineSession, Reply, Request, TextEngine

_TURN_S = 0.05  # how long one engine is listened to while another may have something to say


class RoutedEngine:
    """A TextEngine over others (see requests.TextEngine); `others` are named by the revision that requests carry."""

    def __init__(self, own: Callable[[], TextEngine], others: Mapping[str, Callable[[], TextEngine]]) -> None:
        self._makers = {"": own, **others}
        self._engines: dict[str, TextEngine] = {}

    @property
    def revision(self) -> str:
        return self.engine("").revision

    @property
    def in_flight(self) -> int:
        """The largest wish of the engines that have been asked for."""
        return max((engine.in_flight for engine in self._engines.values()), default=0)

    def engine(self, model: str) -> TextEngine:
        """The engine of a route, made on first use. Raises KeyError for a revision that is no route."""
        if model not in self._engines:
            self._engines[model] = self._makers[model]()
        return self._engines[model]

    def open(self) -> RoutedSession:
        return RoutedSession(self)

    def start(self) -> None:
        """Nothing: engines start when they are asked for."""

    def stop(self) -> None:
        for engine in self._engines.values():
            engine.stop()


class RoutedSession:
    """One caller's requests at several engines (see requests.EngineSession)."""

    def __init__(self, routes: RoutedEngine) -> None:
        self._routes = routes
        self._sessions: dict[str, EngineSession] = {}
        self._outstanding: dict[str, int] = {}

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        by_model: dict[str, list[tuple[int, Request]]] = {}
        for number, request in requests:
            by_model.setdefault(request.model, []).append((number, request))
        for model, share in by_model.items():
            if model not in self._sessions:
                self._sessions[model] = self._routes.engine(model).open()
            self._sessions[model].submit(share)
            self._outstanding[model] = self._outstanding.get(model, 0) + len(share)

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        deadline = time.monotonic() + timeout_s
        while True:
            busy = [model for model, count in self._outstanding.items() if count]
            found: list[tuple[int, Reply]] = []
            for model in busy:
                left = max(0.0, deadline - time.monotonic())
                try:
                    arrived = self._sessions[model].collect(left if len(busy) == 1 else min(left, _TURN_S))
                except EngineError:
                    if not found:
                        raise
                    return found  # what the others said is kept; a dead engine says so again when it is asked next
                self._outstanding[model] -= len(arrived)
                found += arrived
            if found or not busy or time.monotonic() >= deadline:
                return found

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
