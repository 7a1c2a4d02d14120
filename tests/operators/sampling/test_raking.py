"""Shares along several lines at once: all are met, as near to what is there as can be, or the contradiction is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.sampling.raking import SharesError, rake


def marginals(keys: list[tuple[str, ...]], found: np.ndarray, place: int) -> dict[str, float]:
    total: dict[str, float] = {}
    for key, share in zip(keys, found.tolist(), strict=True):
        total[key[place]] = total.get(key[place], 0.0) + share
    return total


def test_shares_of_turns_and_of_a_rehearsal_are_met_together() -> None:
    keys = [("multi", "chat"), ("single", "chat"), ("single", "general"), ("multi", "other"), ("single", "other")]
    found = rake(keys, [100, 5000, 900, 40, 10], {"turns": {"multi": 0.7, "single": 0.3}, "input": {"general": 0.08}})
    assert marginals(keys, found, 0) == pytest.approx({"multi": 0.7, "single": 0.3})
    assert marginals(keys, found, 1)["general"] == pytest.approx(0.08)


def test_what_is_not_named_keeps_its_proportions() -> None:
    found = rake([("a",), ("b",), ("c",)], [10, 30, 60], {"lang": {"c": 0.2}})
    assert found.tolist() == pytest.approx([0.2, 0.6, 0.2])


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"turns": {"multi": 0.9}, "input": {"general": 0.5}}, "no mixture of the groups"),  # general has no row of several turns
        ({"turns": {"multi": 0.7, "single": 0.2}, "input": {}}, r"add up to 0\.9"),
        ({"turns": {"multi": 0.7, "single": 0.4}, "input": {}}, r"add up to 1\.1"),
        ({"turns": {"multy": 0.7}, "input": {}}, r"name \['multy'\]"),
    ],
)
def test_shares_that_cannot_be_met_are_refused(shares: dict[str, dict[str, float]], told: str) -> None:
    keys = [("multi", "chat"), ("single", "chat"), ("single", "general")]
    with pytest.raises(SharesError, match=told):
        rake(keys, [100, 100, 100], shares)


@settings(deadline=None)
@given(st.data())
def test_any_feasible_shares_are_met_and_leave_the_interaction_as_it_was(data: Any) -> None:
    first, second = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 4))
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=first * second, max_size=first * second))
    keys = [(f"a{i}", f"b{j}") for i in range(first) for j in range(second)]
    wanted = {}
    for name, count in (("a", first), ("b", second)):
        weights = data.draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
        wanted[name] = {f"{name}{index}": weight / sum(weights) for index, weight in enumerate(weights)}
    found = rake(keys, sizes, wanted)
    for place, line in enumerate(wanted.values()):
        assert marginals(keys, found, place) == pytest.approx(line, abs=1e-6)
    table, before = found.reshape(first, second), np.array(sizes, float).reshape(first, second)
    odds = [np.log(t[0, 0] * t[1, 1] / (t[0, 1] * t[1, 0])) for t in (table, before)]
    assert odds[0] == pytest.approx(odds[1], abs=1e-4)  # what raking keeps: the association of the lines
