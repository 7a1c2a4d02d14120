"""The exact weighted quantile of 64-bit keys, group by group, without collecting or sorting them.

A radix selection from the most significant digit: each pass adds up the sizes of the rows by the next 11 bits of their
key, among the rows that share the digits found so far; the digit in which a group's target is reached is fixed and the
next pass looks inside it. After at most six passes the first key that no longer fits is known exactly. A billion rows
need three or four; a pass reads 20 bytes a row, and what travels to the driver is at most 2,048 sums a group and part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

DIGIT_BITS = 11
BINS = 1 << DIGIT_BITS
_KEY_BITS = 64


@dataclass
class Search:
    """Where each of n groups stands: digits fixed so far, what lies below them, and how much may be taken in all."""

    targets: np.ndarray  # int64[n] sizes
    prefix: np.ndarray = field(init=False)  # uint64[n], the digits found, right-aligned
    below: np.ndarray = field(init=False)  # int64[n], size of the rows below the prefix
    open: np.ndarray = field(init=False)  # bool[n]
    limits: np.ndarray = field(init=False)  # uint64[n]: rows with a smaller key are taken
    all_taken: np.ndarray = field(init=False)  # bool[n]: everything fits, the limit does not count
    bits: int = 0  # of the prefixes

    def __post_init__(self) -> None:
        count = len(self.targets)
        self.prefix, self.limits = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        self.below, self.open, self.all_taken = np.zeros(count, np.int64), np.ones(count, bool), np.zeros(count, bool)

    @property
    def width(self) -> int:
        """Bits of the next digit: 11, and 9 in the last pass."""
        return min(DIGIT_BITS, _KEY_BITS - self.bits)

    def take(self, sizes: np.ndarray, counts: np.ndarray) -> None:
        """One pass's sums: int64[n, 2**width] sizes and rows by digit."""
        shift = np.uint64(_KEY_BITS - self.bits - self.width)
        for group in np.flatnonzero(self.open):
            ends = self.below[group] + np.cumsum(sizes[group])
            digit = int(np.searchsorted(ends, self.targets[group], side="right"))
            if digit == sizes.shape[1]:  # all that share the prefix fit, which happens in the first pass alone
                self.all_taken[group], self.open[group] = True, False
                continue
            self.prefix[group] = (self.prefix[group] << np.uint64(self.width)) | np.uint64(digit)
            self.below[group] = ends[digit] - sizes[group, digit]
            self.limits[group] = self.prefix[group] << shift
            self.open[group] = shift > 0 and counts[group, digit] > 1
        self.bits += self.width

    def taken(self, groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """bool[rows]: whether each row is taken, by group number and key."""
        return self.all_taken[groups] | (keys < self.limits[groups])


def digits(search: Search, groups: np.ndarray, keys: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sparse sums of one part for the pass that `search` waits for: cells (group * 2**width + digit), sizes, rows."""
    width = np.uint64(search.width)
    shift = np.uint64(_KEY_BITS - search.bits) - width
    inside = search.open[groups]
    if search.bits:
        inside &= (keys >> np.uint64(_KEY_BITS - search.bits)) == search.prefix[groups]
    digit = (keys[inside] >> shift) & np.uint64((1 << search.width) - 1)
    cells, place = np.unique((groups[inside].astype(np.uint64) << width) | digit, return_inverse=True)
    total = np.zeros(len(cells), np.int64)
    np.add.at(total, place, sizes[inside])
    return cells, total, np.bincount(place, minlength=len(cells)).astype(np.int64)


def select(targets: np.ndarray, one_pass: Callable[[Search], Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]]) -> Search:
    """The largest run of smallest keys of each group whose sizes sum to at most its target (int64[n]).

    `one_pass(search)` yields the `digits` of every part.
    """
    search = Search(np.asarray(targets, np.int64))
    while search.open.any():
        shape = (len(search.targets), 1 << search.width)
        sizes, counts = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for cells, size, count in one_pass(search):
            np.add.at(sizes.reshape(-1), cells.astype(np.int64), size)
            np.add.at(counts.reshape(-1), cells.astype(np.int64), count)
        search.take(sizes, counts)
    return search
