"""Statistics add up however the rows are cut, and their quantiles are near the exact ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from operators.statistics import Distribution, Statistics

NUMBERS = st.lists(
    st.one_of(st.just(float("nan")), st.floats(-1e12, 1e12), st.integers(-40, 40).map(float)), min_size=1, max_size=80
)


@given(NUMBERS, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_a_quantile_is_within_a_bin_of_the_exact_one(values, share) -> None:  # type: ignore[no-untyped-def]
    found = Distribution()
    found.take(np.array(values))
    known = np.sort(np.array(values)[~np.isnan(values)])
    assert found.count == len(known)
    assert found.missing == len(values) - len(known)
    if len(known):
        exact = known[max(0, int(np.ceil(share * len(known))) - 1)]
        mine = found.quantile(share)
        assert mine is not None
        assert abs(mine - exact) <= abs(exact) / 16 + 1e-300
        assert mine == exact or not (exact.is_integer() and abs(exact) < 32)


@given(NUMBERS, st.integers(0, 80))
def test_two_halves_add_up_to_the_whole(values, cut) -> None:  # type: ignore[no-untyped-def]
    whole, first, second = Distribution(), Distribution(), Distribution()
    whole.take(np.array(values))
    first.take(np.array(values[:cut], np.float64))
    second.take(np.array(values[cut:], np.float64))
    first.add(second)
    assert (first.bins, first.count, first.low, first.high) == (whole.bins, whole.count, whole.low, whole.high)


def test_text_is_counted_by_language_in_characters_and_words() -> None:
    table = pa.table(
        {
            "text": pa.array(["two words", "丹炉炼丹", None, "x" * 3000], pa.large_string()),
            "lang": ["en", "zh", "zh", "en"],
            "quality": [0.5, None, 1.0, float("nan")],
        }
    )
    whole, halves = Statistics(), Statistics()
    whole.take(table)
    for start in (0, 2):
        piece = Statistics()
        piece.take(table.slice(start, 2))
        halves.add(piece)
    assert whole.to_json() == halves.to_json()
    assert whole.by_language["zh"]["characters"] == 4
    assert whole.by_language["en"] == {"rows": 2, "bytes": 3009, "characters": 3009, "words": 3}
    assert whole.sums["bytes"] == 3009 + 12
    assert whole.to_json()["numbers"]["quality"]["missing"] == 2
    assert whole.groups["lang"] == {"en": 2, "zh": 2}


def test_conversations_are_counted_by_role_and_turn() -> None:
    messages = [[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}], []]
    found = Statistics()
    found.take(pa.table({"messages": messages}))
    assert found.groups["role"] == {"user": 1, "assistant": 1}
    assert found.numbers["turns"].high == 2
    assert found.sums["characters"] == 7
