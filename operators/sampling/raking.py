"""Shares of groups that meet several sets of shares at once: raking, or iterative proportional fitting.

A mixture may be told its shares along several lines: 70% of several turns, 8% from one source, half of it Chinese. Of all
mixtures that meet these the one nearest to what is there (least relative entropy) is found by scaling one line after the
other until all hold (W. E. Deming and F. F. Stephan 1940, "On a least squares adjustment of a sampled frequency table when
the expected marginal totals are known"; convergence: Csiszar 1975).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_ROUNDS = 5000
_CLOSE = 1e-9


class SharesError(ValueError):
    """Shares that name what is not there, or cannot be met together."""


def rake(keys: Sequence[tuple[str, ...]], sizes: Sequence[int], shares: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """float64[groups], summing to 1, rounded to 12 decimals.

    `keys` are the values of each group along the lines of `shares`, in their order. Values that a line does not name share
    what its shares leave of 1, in proportion to their sizes. Raises SharesError.
    """
    size = np.asarray(sizes, np.float64)
    lines = []
    for place, (line, wanted) in enumerate(shares.items()):
        values = [key[place] for key in keys]
        lines.append(_targets(line, wanted, values, size))
    found = size / size.sum()
    for _ in range(_ROUNDS):
        for index, target in lines:
            now = np.bincount(index, found, minlength=len(target))
            found = found * np.divide(target, now, out=np.zeros_like(target), where=now > 0)[index]
        if all(np.abs(np.bincount(index, found, minlength=len(target)) - target).max() < _CLOSE for index, target in lines):
            return np.round(found / found.sum(), 12)
    told = "; ".join(
        f"{line}: " + ", ".join(f"{value} {share:g}" for value, share in wanted.items()) for line, wanted in shares.items()
    )
    there = ", ".join("|".join(key) for key, rows in zip(keys, size, strict=True) if rows)
    raise SharesError(f"no mixture of the groups with rows ({there}) has all these shares at once: {told}")


def _targets(line: str, wanted: Mapping[str, float], values: Sequence[str], size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64[groups] place of each group's value, float64[values] share of each value)."""
    present = {value for value, rows in zip(values, size, strict=True) if rows}
    missing = [value for value, share in wanted.items() if share > 0 and value not in present]
    if missing:
        raise SharesError(f"shares of {line} name {missing}, but the values with rows are {sorted(present)}")
    others = sorted(present - wanted.keys())
    left = 1.0 - sum(wanted.values())
    if left < -1e-9 or (left > 1e-9 and not others):
        raise SharesError(f"shares of {line} add up to {1 - left:g}; they must make 1" + (" at most" if others else ""))
    order = [*wanted, *others, *sorted(set(values) - wanted.keys() - set(others))]
    index = np.array([order.index(value) for value in values], np.int64)
    total = np.bincount(index, size, minlength=len(order))
    target = np.zeros(len(order))
    target[: len(wanted)] = list(wanted.values())
    rest = slice(len(wanted), len(wanted) + len(others))
    if others and left > 1e-9:
        target[rest] = left * total[rest] / total[rest].sum()
    return index, target
