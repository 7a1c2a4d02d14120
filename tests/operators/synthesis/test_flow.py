"""Flows by themselves: what they ask, what they make of the replies, and when they ask again."""

from __future__ import annotations

from typing import Any

import pytest

from operators.synthesis.flow import MALFORMED, Flow, Watched, ask, ask_all, asks_nothing, attempt, attempt_all
from operators.synthesis.requests import PROMPT_TOO_LONG, REFUSED, Reject, Reply, Request, SamplingSettings


def request(number: int) -> Request:
    return Request((("user", "问"),), SamplingSettings(), number)


def parse(reply: Reply) -> str | Reject:
    return Reject(reply.text) if reply.text in {*MALFORMED, "too_short"} else reply.text


def hand(flow: Flow[Any], *steps: list[Reply]) -> tuple[Any, list[list[Request]]]:
    """Play a flow by hand: its value, and what it asked in each step."""
    asked = []
    try:
        wanted = next(flow)
        for replies in steps:
            asked.append(list(wanted))
            wanted = flow.send(replies)
    except StopIteration as end:
        return end.value, asked
    raise AssertionError(f"the flow asks for more: {wanted}")


def said(*texts: str) -> list[Reply]:
    return [Reply(text, "stop", 1, 1) for text in texts]


@pytest.mark.parametrize("reason", sorted(MALFORMED))
def test_what_is_malformed_is_asked_again_until_it_is_sound_or_the_attempts_are_spent(reason: str) -> None:
    value, asked = hand(attempt(request, parse, 3), said(reason), said("好"))
    assert value == "好"
    assert asked == [[request(0)], [request(1)]]
    assert [step[0].redraw for step in asked] == [False, True]
    assert hand(attempt(request, parse, 2), said(reason), said(reason))[0] == Reject(reason)


def test_what_is_sound_but_set_aside_is_not_asked_again() -> None:
    assert hand(attempt(request, parse, 5), said("too_short")) == (Reject("too_short"), [[request(0)]])


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply("", PROMPT_TOO_LONG, 9000, 0), Reject(PROMPT_TOO_LONG, 9000)),
        (Reply("no", REFUSED, 0, 0), Reject(REFUSED, detail="no")),
    ],
)
def test_what_the_model_has_not_answered_is_neither_parsed_nor_asked_again(reply: Reply, why: Reject) -> None:
    def never(reply: Reply) -> str:
        raise AssertionError("there is nothing to parse")

    assert hand(attempt(request, never, 5), [reply])[0] == why
    assert hand(attempt_all([request], [never], 5), [reply])[0] == [why]


def test_of_several_only_the_malformed_are_asked_again_together_and_keep_their_places() -> None:
    renders = [lambda n, place=place: request(10 * place + n) for place in range(4)]
    value, asked = hand(
        attempt_all(renders, [parse] * 4, 3), said("a", "empty", "c", "truncated"), said("b", "malformed"), said("truncated")
    )
    assert value == ["a", "b", "c", Reject("truncated")]
    assert [[wanted.seed for wanted in step] for step in asked] == [[0, 10, 20, 30], [11, 31], [32]]
    assert [[wanted.redraw for wanted in step] for step in asked] == [[False] * 4, [True] * 2, [True]]


def test_no_attempt_is_a_defect_and_no_request_is_no_step() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        next(attempt(request, parse, 0))
    with pytest.raises(ValueError, match="at least 1"):
        next(attempt_all([request], [parse], 0))
    assert hand(ask_all([])) == ([], [])
    assert hand(attempt_all([], [])) == ([], [])
    assert hand(asks_nothing(7)) == (7, [])


def test_a_redraw_is_the_same_request_to_the_cache_as_if_it_were_not_one() -> None:
    _, asked = hand(attempt(request, parse, 2), said("empty"), said("x"))
    assert asked[1][0].redraw
    assert asked[1][0].key("r") == request(1).key("r")
    assert asked[1][0] == request(1)


def test_a_watched_flow_tells_its_value_when_it_ends_and_that_it_was_left_out() -> None:
    watched = Watched(ask(request(1)))
    flow = watched.play()
    next(flow)
    assert not watched.ended
    with pytest.raises(StopIteration):
        flow.send(said("x"))
    assert watched.ended
    assert watched.value == said("x")[0]
    unasked = Watched(ask(request(2)))
    unasked.settle()
    assert (unasked.ended, unasked.value) == (True, None)
