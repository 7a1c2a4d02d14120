"""Bringing together prompts that begin alike: inside an engine, and between engines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.synthesis.prefixes import PrefixRouter, Sweep, token_key

TOKENS = st.lists(st.integers(0, 3), max_size=4)


def test_keys_are_ordered_as_their_tokens_are() -> None:
    rows = [[1, 2], [1, 300], [1, 300, 0], [65536], [255, 1], [256], []]
    assert sorted(rows) == sorted(rows, key=token_key)


def test_interleaved_documents_are_handed_out_document_by_document() -> None:
    sweep: Sweep[str] = Sweep()
    for question in range(3):
        for document in (7, 2, 5):
            sweep.add(token_key([document] * 50 + [question]), f"{document}.{question}")
    assert [sweep.take() for _ in range(9)] == ["2.0", "2.1", "2.2", "5.0", "5.1", "5.2", "7.0", "7.1", "7.2"]


def test_a_sweep_begins_where_the_last_one_ended() -> None:
    sweep: Sweep[int] = Sweep()
    for value in (3, 1, 5):
        sweep.add(token_key([value]), value)
    assert [sweep.take() for _ in range(3)] == [1, 3, 5]
    for value in (1, 5, 6):
        sweep.add(token_key([value]), value)
    assert [sweep.take() for _ in range(3)] == [6, 1, 5]


@given(st.lists(TOKENS, min_size=1, max_size=30), st.data())
def test_everything_is_handed_out_once_and_late_arrivals_wait_for_the_next_sweep(
    first: list[list[int]], data: st.DataObject
) -> None:
    sweep: Sweep[tuple[str, int]] = Sweep()
    for number, tokens in enumerate(first):
        sweep.add(token_key(tokens), ("early", number))
    taken = [sweep.take()]
    late = data.draw(st.lists(TOKENS, max_size=30))
    for number, tokens in enumerate(late):
        sweep.add(token_key(tokens), ("late", number))
    taken += [sweep.take() for _ in range(len(sweep))]
    assert [kind for kind, _ in taken] == ["early"] * len(first) + ["late"] * len(late)
    assert sorted(taken) == sorted([("early", n) for n in range(len(first))] + [("late", n) for n in range(len(late))])
    with pytest.raises(IndexError):
        sweep.take()


def test_equal_prompts_and_an_unordered_sweep_keep_the_order_of_arrival() -> None:
    for sweep, keys in ((Sweep[int](), [4, 4, 4]), (Sweep[int](ordered=False), [9, 1, 4])):
        for number, key in enumerate(keys):
            sweep.add(token_key([key]), number)
        assert [sweep.take() for _ in range(3)] == [0, 1, 2]


def test_what_is_dropped_is_not_handed_out() -> None:
    sweep: Sweep[int] = Sweep()
    for value in range(6):
        sweep.add(token_key([value]), value)
    assert sweep.take() == 0
    sweep.add(token_key([6]), 6)
    sweep.drop(lambda value: value % 2 == 0)
    assert [sweep.take() for _ in range(len(sweep))] == [1, 3, 5]


@pytest.mark.parametrize("text", ["The river begins in the hills and ends in the sea. ", "这条河从山里流出来，最后流进大海。"])
def test_questions_about_one_document_go_to_one_replica(text: str) -> None:
    router = PrefixRouter(slack=8)
    load = [0, 0, 0]
    chosen: dict[int, set[int]] = {}
    for question in range(4):
        for document in range(6):
            slot = router.choose((("system", "Answer."), ("user", f"{document} " + text * 40 + f"? {question}")), load)
            load[slot] += 1
            chosen.setdefault(document, set()).add(slot)
    assert all(len(slots) == 1 for slots in chosen.values())
    assert sorted(load) == [8, 8, 8], "documents that have been nowhere go where there is least to do"


def test_an_overloaded_replica_gives_its_prompts_to_others() -> None:
    router, load = PrefixRouter(slack=4), [0, 0]
    prompt = (("user", "one and the same prompt " * 40),)
    for _ in range(40):
        load[router.choose(prompt, load)] += 1
    assert max(load) - min(load) <= 4


def test_short_prompts_are_spread() -> None:
    router, load = PrefixRouter(slack=64), [0, 0]
    for number in range(40):
        load[router.choose((("user", f"Count to {number}."),), load)] += 1
    assert load == [20, 20]
