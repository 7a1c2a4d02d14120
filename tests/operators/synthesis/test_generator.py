"""Flows played in any order, under any cap, stopped anywhere: the same outcomes, and nothing is asked twice."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.stage import Cancelled
from operators.synthesis.cache import ReplyCache
from operators.synthesis.flow import Flow, ask, ask_all, attempt, attempt_all
from operators.synthesis.generator import Generator, Outcome, Usage
from operators.synthesis.requests import PROMPT_TOO_LONG, REFUSED, Reject, Reply, Request, SamplingSettings
from tests.operators.synthesis.recorded import Recording, last

Tree = tuple[list[int], list["Tree"]]
"""Requests of a step (by number), and the trees that may follow: the replies choose which one does."""

leaves = st.tuples(st.lists(st.integers(0, 30), max_size=3), st.just([]))
trees = st.recursive(
    leaves, lambda inner: st.tuples(st.lists(st.integers(0, 30), max_size=3), st.lists(inner, max_size=3)), max_leaves=5
)


def request(number: int) -> Request:
    return Request((("user", f"问题 {number}"),), SamplingSettings(max_tokens=1 + number % 7), number)


def said(request: Request) -> Reply:
    """What the model answers: a function of the request, within its max_tokens."""
    return Reply(f"{request.seed * 7 % 11}", "stop", 1 + request.seed, request.seed * 5 % (request.sampling.max_tokens + 1))


def bound(tree: Tree) -> int:
    return sum(request(n).sampling.max_tokens for n in tree[0]) + max((bound(inner) for inner in tree[1]), default=0)


def play(tree: Tree) -> Flow[list[str]]:
    """Asks a step, then goes on in the tree that the replies choose."""
    told: list[str] = []
    while True:
        replies = yield [request(n) for n in tree[0]]
        told += [reply.text for reply in replies]
        if not tree[1]:
            return told
        tree = tree[1][sum(int(reply.text) for reply in replies) % len(tree[1])]


def spent(tree: Tree) -> tuple[list[int], int]:
    """The requests of a tree's flow and the tokens it really uses, played by hand."""
    asked = list(tree[0])
    used = sum(said(request(n)).completion_tokens for n in tree[0])
    if tree[1]:
        more, further = spent(tree[1][sum(int(said(request(n)).text) for n in tree[0]) % len(tree[1])])
        asked, used = asked + more, used + further
    return asked, used


def reference(forest: Sequence[Tree], cap: int | None) -> tuple[list[bool], set[int], int]:
    """Which flows are played by the rule in the docstring of `Generator.run`, the requests they pay, the tokens they use."""
    total, paid, played = 0, set(), []
    for tree in forest:
        fits = cap is None or (all(played) and total + bound(tree) <= cap)
        played.append(fits)
        if fits:
            asked, used = spent(tree)
            paid.update(asked)
            total += used
    return played, paid, total


class Gone(Exception):
    pass


@dataclass
class Shuffled:
    """An engine that answers in random order, a few at a time, and dies after `lives` replies."""

    random: Random
    lives: int | None = None
    revision: str = "r"
    in_flight: int = 3
    asked: list[int] = field(default_factory=list)
    waiting: list[tuple[int, Request]] = field(default_factory=list)

    def open(self) -> Shuffled:
        return self

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        self.waiting += requests

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        found = []
        for _ in range(min(len(self.waiting), self.random.randint(0, 4))):
            if self.lives is not None and len(self.asked) >= self.lives:
                if not found:
                    raise Gone
                break
            number, request = self.waiting.pop(self.random.randrange(len(self.waiting)))
            self.asked.append(request.seed)
            found.append((number, said(request)))
        return found

    def close(self) -> None:
        self.waiting.clear()


def generator(engine: Any, directory: str, cap: int | None = None, **options: Any) -> Generator:
    return Generator(lambda: engine, "r", ReplyCache(directory, "test"), cap, **options)


def sources(forest: Sequence[Tree], random: Random) -> Iterator[tuple[int, Flow[list[str]]] | None]:
    """The flows, with pauses in which there is nothing yet."""
    for tree in forest:
        while random.random() < 0.2:
            yield None
        yield bound(tree), play(tree)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(trees, max_size=12), st.none() | st.integers(0, 120), st.lists(st.integers(0, 12), max_size=3), st.integers(0, 2**32)
)
def test_any_flows_in_any_order_stopped_anywhere_end_alike_and_pay_once(
    forest: list[Tree], cap: int | None, lives: list[int], seed: int
) -> None:
    random = Random(seed)
    played, paid, total = reference(forest, cap)
    with tempfile.TemporaryDirectory() as directory:
        asked: list[int] = []
        for life in [*lives, None]:
            engine = Shuffled(random, life)
            player = generator(engine, directory, cap)
            outcomes: list[Outcome[list[str]]] = []
            with contextlib.suppress(Gone):
                outcomes.extend(player.run(sources(forest, random)))
            asked += engine.asked
            if life is None or len(outcomes) == len(forest):
                break
    assert [outcome.admitted for outcome in outcomes] == played
    assert sorted(asked) == sorted(paid), "every reply is paid once, however often the run was stopped"
    expected = [[said(request(n)).text for n in spent(tree)[0]] for tree in forest]
    assert [outcome.value for outcome in outcomes] == [told if fits else None for told, fits in zip(expected, played, strict=True)]
    assert player.usage.completion_tokens == total == sum(outcome.usage.completion_tokens for outcome in outcomes)
    assert player.usage.calls == sum(len(told) for told, fits in zip(expected, played, strict=True) if fits)
    assert player.capped == (not all(played))
    assert cap is None or total <= cap


def test_a_straggler_holds_back_outcomes_but_not_work_and_memory_stays_bounded(tmp_path: Path) -> None:
    class Straggling(Shuffled):
        """Answers request 0 only when nothing else is left to answer."""

        def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
            ready = [item for item in self.waiting if item[1].seed] or self.waiting
            self.waiting = [item for item in self.waiting if item not in ready]
            self.asked += [request.seed for _, request in ready]
            return [(number, said(request)) for number, request in ready]

    engine, taken = Straggling(Random(0)), []

    def flows() -> Iterator[tuple[int, Flow[Reply]]]:
        for number in range(10_000):
            taken.append(number)
            yield 7, ask(request(number))

    first, lead = next(outcomes := generator(engine, str(tmp_path)).run(flows())), len(taken)
    assert first.value == said(request(0))
    assert engine.asked.index(0) > 1000, "the others went on"
    assert lead < 6000, "no more than sixteen windows are kept"
    assert [outcome.value.text for outcome in outcomes if outcome.value] == [said(request(n)).text for n in range(1, 10_000)]


def test_a_flow_that_asks_much_at_once_keeps_the_others_from_being_opened(tmp_path: Path) -> None:
    engine, outstanding = Shuffled(Random(1)), []

    def flows() -> Iterator[tuple[int, Flow[list[Reply]]]]:
        for number in range(50):
            outstanding.append(len(engine.waiting))
            yield 10_000, ask_all([request(100 * number + k) for k in range(100)])

    assert sum(len(outcome.value or []) for outcome in generator(engine, str(tmp_path)).run(flows())) == 5000
    assert max(outstanding) <= 256


def test_a_source_may_wait_for_outcomes_that_it_has_been_given(tmp_path: Path) -> None:
    given: list[str] = []

    def rounds() -> Iterator[tuple[int, Flow[Reply]] | None]:
        for number in range(5):
            while len(given) < 2 * number:
                yield None
            yield 7, ask(request(10 * number))
            yield 7, ask(request(10 * number + 1))

    for outcome in generator(Shuffled(Random(2)), str(tmp_path)).run(rounds()):
        assert outcome.value is not None
        given.append(outcome.value.text)
    assert len(given) == 10


def test_equal_requests_are_drawn_once_wherever_they_meet(tmp_path: Path) -> None:
    engine = Shuffled(Random(3))

    def twice() -> Flow[list[str]]:
        one, two = yield [request(5), request(5)]
        three = yield from ask(request(5))
        return [one.text, two.text, three.text]

    player = generator(engine, str(tmp_path))
    values = [outcome.value for outcome in player.run((21, twice()) for _ in range(40))]
    assert values == [[said(request(5)).text] * 3] * 40
    assert engine.asked == [5]
    assert (player.drawn.calls, player.usage.calls) == (1, 120)


def test_an_exception_in_a_flow_keeps_the_replies_and_closes_the_other_flows(tmp_path: Path) -> None:
    closed: list[int] = []

    def flow(number: int) -> Flow[str]:
        try:
            reply = yield from ask(request(number))
            if number == 3:
                raise ValueError("a parser's defect")
            yield from ask(request(number + 100))
            return reply.text
        finally:
            closed.append(number)

    engine = Shuffled(Random(4))
    with pytest.raises(ValueError, match="a parser's defect"):
        list(generator(engine, str(tmp_path)).run((20, flow(number)) for number in range(8)))
    assert sorted(closed) == list(range(8))
    assert not engine.waiting, "what was outstanding is taken back"
    cache = ReplyCache(str(tmp_path), "test")
    assert all(cache.get(request(number).key("r")) for number in engine.asked)


def test_an_exception_in_the_source_keeps_the_replies(tmp_path: Path) -> None:
    def flows() -> Iterator[tuple[int, Flow[Reply]] | None]:
        yield 7, ask(request(1))
        while not engine.asked:
            yield None
        raise FileNotFoundError("part 7")

    engine = Shuffled(Random(5))
    with pytest.raises(FileNotFoundError, match="part 7"):
        list(generator(engine, str(tmp_path)).run(flows()))
    assert ReplyCache(str(tmp_path), "test").get(request(1).key("r")) == said(request(1))


def test_replies_are_stored_while_the_source_has_nothing_to_give(tmp_path: Path) -> None:
    """A kill in a pause of the stage before costs nothing."""
    began = time.monotonic()
    stored: list[Reply | None] = []

    def flows() -> Iterator[tuple[int, Flow[Reply]] | None]:
        yield 7, ask(request(1))
        while not stored and time.monotonic() - began < 20:
            found = ReplyCache(str(tmp_path), "other").get(request(1).key("r"))
            stored.extend([found] if found else [])
            yield None

    list(generator(Shuffled(Random(6)), str(tmp_path)).run(flows()))
    assert stored == [said(request(1))]


def test_cancelling_ends_the_run_while_the_engine_is_silent(tmp_path: Path) -> None:
    class Silent(Shuffled):
        def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
            cancelled.set()
            return []

    cancelled = threading.Event()
    engine = Silent(Random(7))
    with pytest.raises(Cancelled, match="1 replies outstanding"):
        generator(engine, str(tmp_path), cancelled=cancelled).ask([request(1)])
    assert not engine.waiting


def test_a_full_disk_is_an_error_and_the_replies_are_stored_when_there_is_room(tmp_path: Path) -> None:
    class Full(ReplyCache):
        room = False

        def put(self, replies: Any, sync: bool = True) -> None:
            if not self.room:
                self.room = True
                raise OSError(28, "No space left on device")
            super().put(replies, sync)

    engine = Shuffled(Random(8))
    player = Generator(lambda: engine, "r", Full(str(tmp_path), "test"))
    with pytest.raises(OSError, match="No space left"):
        player.ask([request(n) for n in range(400)])
    cache = ReplyCache(str(tmp_path), "test")
    assert len(cache) == len(engine.asked) >= 1, "closing found room for what memory held"


def test_a_flow_that_asks_for_more_than_it_announced_is_a_defect_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="asks for 2 tokens and was announced with 1"):
        list(generator(Shuffled(Random(9)), str(tmp_path)).run([(1, ask(request(1)))]))


def test_malformed_replies_are_drawn_again_and_counted(tmp_path: Path) -> None:
    class Clumsy(Shuffled):
        def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
            taken, self.waiting = self.waiting, []
            self.asked += [request.seed for _, request in taken]
            return [(number, Reply("{" if request.seed % 10 < 2 else "{}", "stop", 3, 2)) for number, request in taken]

    def render(number: int) -> Request:
        return Request((("user", "JSON"),), SamplingSettings(max_tokens=4), 10 + number)

    def parse(reply: Reply) -> str | Reject:
        return reply.text if reply.text == "{}" else Reject("malformed")

    def both() -> Flow[list[Any]]:
        one = yield from attempt(render, parse, 3)
        two = yield from attempt_all([lambda n: render(n + 10), lambda n: render(n + 2)], [parse, parse], 2)
        return [one, *two]

    engine = Clumsy(Random(10))
    player = generator(engine, str(tmp_path), keep_replies=True)
    (outcome,) = player.run([(100, both())])
    assert outcome.value == ["{}", Reject("malformed"), "{}"]
    assert outcome.usage == Usage(calls=6, prompt_tokens=18, completion_tokens=12, retried=3)
    assert [reply.text for reply in outcome.replies] == ["{", "{", "{}", "{", "{}", "{"]
    assert Usage.from_json(outcome.usage.to_json()) == outcome.usage
    again = generator(pytest.fail, str(tmp_path))
    (repeated,) = again.run([(100, both())])
    assert repeated.usage == outcome.usage
    assert repeated.value == outcome.value


def test_a_refusal_that_cost_nothing_is_asked_again_by_the_next_run_and_one_that_was_paid_is_not(tmp_path: Path) -> None:
    class Refusing(Shuffled):
        def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
            taken, self.waiting = self.waiting, []
            self.asked += [request.seed for _, request in taken]
            kinds = [Reply("misconfigured", REFUSED, 5, 0), Reply("filtered", REFUSED, 5, 4), Reply("", PROMPT_TOO_LONG, 9000, 0)]
            return [(number, kinds[request.seed]) for number, request in taken]

    engine = Refusing(Random(11))
    player = generator(engine, str(tmp_path))
    first = player.ask([request(n) for n in range(3)])
    assert player.usage == Usage(calls=3, prompt_tokens=10, completion_tokens=4, prompt_too_long=1, refused=2)
    assert sorted(engine.asked) == [0, 1, 2]
    assert generator(engine, str(tmp_path)).ask([request(n) for n in range(3)]) == first
    assert engine.asked[3:] == [0]


def test_a_raised_limit_of_the_model_draws_again_what_the_old_one_cut_or_refused(tmp_path: Path) -> None:
    requests = [
        Request((("user", text),), SamplingSettings(max_tokens=50), 0) for text in ("too long", "cut", "cut by itself", "说完")
    ]
    old = {
        "too long": Reply("", "prompt_too_long", 120, 0),
        "cut": Reply("so", "length", 90, 10),
        "cut by itself": Reply("words", "length", 20, 50),
        "说完": Reply("好", "stop", 5, 1),
    }
    requests = [Request((("user", text),), SamplingSettings(max_tokens=50), 0) for text in old]
    recording = Recording(lambda request: old[last(request)])
    Generator(lambda: recording, "r", ReplyCache(str(tmp_path), "t"), max_model_len=100).ask(requests)
    for limit, asked in ((100, []), (None, []), (200, ["too long", "cut"])):
        again = Recording(last)
        Generator(lambda again=again: again, "r", ReplyCache(str(tmp_path), "t"), max_model_len=limit).ask(requests)
        assert sorted(last(request) for request in again.asked) == sorted(asked)
