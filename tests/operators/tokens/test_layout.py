from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.tokens.layout import Layout, Method, place

LENGTHS = st.lists(st.integers(1, 300), max_size=80)


def rebuilt(layout: Layout, documents: int) -> list[list[tuple[int, int]]]:
    spans: list[list[tuple[int, int]]] = [[] for _ in range(documents)]
    for document, offset, tokens in zip(layout.document, layout.offset, layout.tokens, strict=True):
        spans[document].append((int(offset), int(tokens)))
    return spans


@pytest.mark.parametrize("method", ["best_fit", "concatenate"])
@given(lengths=LENGTHS, length=st.integers(1, 130))
@settings(deadline=None)
def test_every_token_is_placed_once_and_no_sequence_overflows(method: Method, lengths: list[int], length: int) -> None:
    layout = place(np.array(lengths, np.int64), length, method)
    for document, spans in enumerate(rebuilt(layout, len(lengths))):
        covered = [token for offset, tokens in sorted(spans) for token in range(offset, offset + tokens)]
        assert covered == list(range(lengths[document]))
    filled = np.add.reduceat(layout.tokens, layout.start[:-1]) if layout.sequences else np.zeros(0)
    assert (filled <= length).all()
    assert layout.start[-1] == len(layout.document)
    firsts = list(zip(layout.document[layout.start[:-1]], layout.offset[layout.start[:-1]], strict=True))
    assert firsts == sorted(firsts)
    for first, last in zip(layout.start[:-1], layout.start[1:], strict=True):
        assert list(layout.document[first:last]) == sorted(set(layout.document[first:last]))


@given(lengths=LENGTHS, length=st.integers(1, 130))
@settings(deadline=None)
def test_best_fit_cuts_only_documents_longer_than_a_sequence(lengths: list[int], length: int) -> None:
    layout = place(np.array(lengths, np.int64), length, "best_fit")
    for document, spans in enumerate(rebuilt(layout, len(lengths))):
        assert len(spans) == -(-lengths[document] // length)


@given(lengths=LENGTHS, length=st.integers(1, 130))
@settings(deadline=None)
def test_best_fit_places_as_the_textbook_does(lengths: list[int], length: int) -> None:
    rooms: list[int] = []
    for size in sorted((tokens % length for tokens in lengths), reverse=True):
        fitting = [(room, index) for index, room in enumerate(rooms) if room >= size]
        if size and fitting:
            rooms[min(fitting)[1]] -= size
        elif size:
            rooms.append(length - size)
    expected = len(rooms) + sum(tokens // length for tokens in lengths)
    assert place(np.array(lengths, np.int64), length, "best_fit").sequences == expected


@given(lengths=LENGTHS, length=st.integers(1, 130))
@settings(deadline=None)
def test_concatenation_pads_only_the_last_sequence(lengths: list[int], length: int) -> None:
    assert place(np.array(lengths, np.int64), length, "concatenate").sequences == -(-sum(lengths) // length)
