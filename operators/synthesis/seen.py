"""Which of many texts have come before, in 8 bytes a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

_RECENT = 1 << 16


class SeenHashes:
    """A set of 64-bit hashes: a sorted array, and the recent ones beside it until they are merged into it.

    8 bytes an entry (and 64 bytes for each recent one, at most 65,536 or an eighth of all). Two of n different texts are
    taken for one with a probability of about n^2 / 2^65: 3e-6 for ten million.
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, pieces: Iterable[str]) -> bool:
        """True when these pieces, in this order, had not been added before."""
        digest = hashlib.blake2b(digest_size=8)
        for piece in pieces:
            data = piece.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        value = int.from_bytes(digest.digest(), "little")
        place = int(np.searchsorted(self._sorted, np.uint64(value)))
        if value in self._recent or (place < len(self._sorted) and int(self._sorted[place]) == value):
            return False
        self._recent.add(value)
        if len(self._recent) >= max(_RECENT, len(self._sorted) // 8):
            self._sorted = np.sort(np.concatenate([self._sorted, np.fromiter(self._recent, np.uint64, len(self._recent))]))
            self._recent = set()
        return True
