"""The quantile without sorting: equal to the quantile with sorting."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.sampling.keys import combined, ranks
from operators.sampling.radix import digits, select

ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1)), st.integers(0, 5)),
    min_size=1,
    max_size=60,
)


def _by_sorting(groups: np.ndarray, keys: np.ndarray, sizes: np.ndarray, targets: list[int]) -> np.ndarray:
    """Rows in key order are taken while all of that key still fit."""
    taken = np.zeros(len(keys), bool)
    for group, target in enumerate(targets):
        left = target
        for key in sorted(set(keys[groups == group].tolist())):
            rows = (groups == group) & (keys == key)
            if sizes[rows].sum() > left:
                break
            left -= int(sizes[rows].sum())
            taken |= rows
    return taken


@settings(max_examples=150, deadline=None)
@given(ROWS, st.lists(st.integers(0, 120), min_size=3, max_size=3), st.integers(1, 4))
def test_the_same_rows_are_taken_as_by_sorting_in_any_number_of_parts(rows, targets, parts) -> None:  # type: ignore[no-untyped-def]
    groups = np.array([row[0] for row in rows], np.int64)
    keys = np.array([row[1] for row in rows], np.uint64)
    sizes = np.array([row[2] for row in rows], np.int64)
    pieces = np.array_split(np.arange(len(rows)), parts)
    search = select(np.array(targets), lambda s: [digits(s, groups[p], keys[p], sizes[p]) for p in pieces if len(p)])
    expected = _by_sorting(groups, keys, sizes, targets)
    # a key of size 0 at the very limit may be left out or taken: it changes no sum
    differ = search.taken(groups, keys) != expected
    assert sizes[differ].sum() == 0


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=30), st.booleans())
def test_ranks_order_rows_as_their_scores_do(values, highest) -> None:  # type: ignore[no-untyped-def]
    scores = np.array(values)
    found = ranks(scores, highest).astype(np.int64)
    order = np.sign(scores[:, None] - scores[None, :]) * (-1 if highest else 1)
    assert (np.sign(found[:, None] - found[None, :]) == order).all()


def test_rows_without_a_score_come_last_either_way() -> None:
    scores = np.array([0.5, np.nan, -1e30, 1e30])
    assert ranks(scores, True).argmax() == 1
    assert ranks(scores, False).argmax() == 1


def test_scores_combine_by_weight() -> None:
    a, b = np.array([0.2, 0.8]), np.array([0.4, np.nan])
    assert combined([a, b], [1, 3], "mean")[0] == 0.35
    assert np.isnan(combined([a, b], [1, 3], "mean")[1])
    assert combined([a, b], [1, 1], "geometric")[0] == round(0.08**0.5, 6)
    assert combined([a, b], [1, 3], "max")[0] == 1.2
