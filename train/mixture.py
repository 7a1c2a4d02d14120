"""Which row of which input the i-th training sample is: a pure function of (seed, weights, sizes, i).

Nothing is drawn in advance and nothing is remembered, so any position of an endless stream can be asked for, in any
order, by any worker. Positions are cut into blocks of 256. How many samples of each input a block holds follows from
exact cumulative quotas, so that after any number of blocks every input is within one sample of its share, also at
shares far below 1/256; inside a block the inputs are interleaved evenly with a seeded jitter. The n-th sample of an
input is row `permutation_e(n mod size)` of its epoch e = n // size, every row once an epoch, in another order each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

BLOCK = 256
_STEP = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = np.arange(1, 5, dtype=np.uint64) * _STEP


@dataclass(frozen=True)
class Draw:
    """Where samples come from, arrays of equal length: index of the input, row inside it, and the input's epoch."""

    source: np.ndarray  # int32
    row: np.ndarray  # int64
    epoch: np.ndarray  # int64


class Mixture:
    """An endless weighted interleaving of finite inputs.

    `sizes` are rows an input, `weights` shares of samples (any positive scale). Raises ValueError for an empty input
    or a weight that is not positive and finite.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, names: Sequence[str] | None = None) -> None:
        self.names = list(names or [f"input {index}" for index in range(len(sizes))])
        if not sizes or len(sizes) != len(weights):
            raise ValueError(f"a mixture needs one weight for each of its inputs: {len(sizes)} inputs, {len(weights)} weights")
        for name, size, weight in zip(self.names, sizes, weights, strict=True):
            if size <= 0:
                raise ValueError(f"input {name!r} has no rows: take it out of the mixture or look at why its stage kept nothing")
            if not (np.isfinite(weight) and weight > 0):
                raise ValueError(f"input {name!r} has weight {weight}: a weight is a positive number")
        total = float(sum(weights))
        self.sizes = np.array(sizes, np.int64)
        self.shares = np.array([weight / total for weight in weights], np.float64)
        self.seed = seed
        self._largest = int(np.argmax(self.shares))

    def _quota(self, blocks: np.ndarray) -> np.ndarray:
        """int64[len(blocks), inputs]: samples of each input before each block."""
        quota = np.floor((blocks[:, None] * BLOCK) * self.shares[None, :]).astype(np.int64)
        quota[:, self._largest] = 0
        quota[:, self._largest] = blocks * BLOCK - quota.sum(axis=1)
        return quota

    def locate(self, positions: np.ndarray) -> Draw:
        """Where the samples at `positions` (int64, from 0) come from."""
        positions = np.asarray(positions, np.int64)
        blocks, which = np.unique(positions // BLOCK, return_inverse=True)
        before = self._quota(blocks)
        counts = self._quota(blocks + 1) - before
        sources, ranks = self._arrange(blocks, counts)
        inside = positions % BLOCK
        source = sources[which, inside]
        number = before[which, source] + ranks[which, inside]
        size = self.sizes[source]
        epoch, offset = number // size, number % size
        row = np.empty_like(number)
        for index in range(len(self.sizes)):
            chosen = source == index
            if chosen.any():
                row[chosen] = permuted(offset[chosen], int(self.sizes[index]), _mix(self.seed, index, epoch[chosen]))
        return Draw(source.astype(np.int32), row, epoch)

    def _arrange(self, blocks: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The input of each of the 256 places of each block, and which of the input's samples in the block it is."""
        places = np.arange(BLOCK)
        if counts.shape[1] == 1:
            shape = (len(blocks), BLOCK)
            return np.zeros(shape, np.int64), np.broadcast_to(places, shape)
        ends = counts.cumsum(axis=1)
        label = (places[None, :, None] >= ends[:, None, :]).sum(axis=2)
        rank = places[None, :] - np.take_along_axis(ends - counts, label, axis=1)
        jitter = _mix(self.seed ^ 0x5EED, places[None, :], blocks[:, None]) / np.float64(2**64)
        when = (rank + jitter) / np.take_along_axis(counts, label, axis=1)
        order = np.argsort(when, axis=1, kind="stable")
        label = np.take_along_axis(label, order, axis=1)
        # Ranks are renumbered in the order of appearance, so that an input's own samples come in its epoch's order.
        rank = np.zeros_like(label)
        for index in range(counts.shape[1]):
            chosen = label == index
            rank[chosen] = (chosen.cumsum(axis=1) - 1)[chosen]
        return label, rank


def permuted(values: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The images of `values` (each in [0, size)) under the pseudo-random permutation of [0, size) named by `key`.

    A balanced Feistel network over the next even power of two, walked until it falls inside the domain (Black and
    Rogaway 2002, section 3, "cycle walking"): random access in constant memory.
    """
    half = max(1, (max(2, size) - 1).bit_length() + 1 >> 1)
    given = np.asarray(values, np.int64)
    return _walk(given, np.broadcast_to(np.asarray(key, np.uint64), given.shape), np.uint64(size), np.uint64(half))


@njit(cache=True, nogil=True)
def _walk(values, keys, size, half):  # type: ignore[no-untyped-def]
    mask = (np.uint64(1) << half) - np.uint64(1)
    images = np.empty(values.size, np.int64)
    for n in range(values.size):
        value = np.uint64(values[n])
        while True:
            left, right = value >> half, value & mask
            for round_key in _ROUND_KEYS:
                left, right = right, left ^ (_scramble_one(right + keys[n] + round_key) & mask)
            value = (left << half) | right
            if value < size:
                break
        images[n] = np.int64(value)
    return images


def _scramble(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


_scramble_one = njit(_scramble)


def _mix(*pieces: int | np.ndarray) -> np.ndarray:
    """uint64 hash of integers and integer arrays, broadcast together."""
    state = np.zeros(1, np.uint64)
    for piece in pieces:
        value = np.array([piece % 2**64], np.uint64) if isinstance(piece, int) else piece.astype(np.uint64)
        state = _scramble((state ^ value) + _STEP)
    return state


def weights_by_tokens(weights: Sequence[float], tokens_per_row: Sequence[float]) -> list[float]:
    """Shares of rows that give shares of tokens in proportion to `weights`. Raises ValueError for rows without tokens."""
    for index, mean in enumerate(tokens_per_row):
        if not mean > 0:
            raise ValueError(f"input {index} of the mixture has no tokens with loss")
    return [weight / mean for weight, mean in zip(weights, tokens_per_row, strict=True)]
