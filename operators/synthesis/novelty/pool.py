"""A pool of accepted texts that says how near a candidate comes to any of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from operators.synthesis.novelty import index, kernel
from operators.synthesis.novelty.index import NODES, TEXTS, TOKENS, Postings, Scratch, Store, Tail
from operators.synthesis.novelty.tokens import Vocabulary, doubled

_CHUNK = 4096  # candidates that meet the pool at once and then each other
_TAIL = 2048  # texts that linked lists hold at least before the postings are built anew
_QUERIES = np.iinfo(np.int32).max - 1


@dataclass(frozen=True)
class Admissions:
    """What became of each candidate of a batch, in order. Arrays of one length."""

    accepted: np.ndarray  # bool
    similarity: np.ndarray  # float64: the highest similarity with any text accepted before; 0 where it is below the floor
    nearest: np.ndarray  # int64: the first accepted text that has it, by its index in the pool; -1 below the floor

    def __len__(self) -> int:
        return len(self.accepted)


class NoveltyPool:
    """Accepted texts, and the ROUGE-L F of candidates with the nearest of them: exact, ties to the text added first.

    threshold: a candidate is new while its highest F is below. floor: matches from here on are found by the index; the
        lower, the longer the posting lists. `nearest` is exact below as well, at the price of reading the pool.
    workers: threads that look candidates of a batch up beside each other (results are the same with any number).

    Memory: about 6 bytes a token and 20 for each distinct token in the indexed prefix of a text, 0.3 to 0.5 kB for an
    instruction of ten words.
    """

    def __init__(self, threshold: float = 0.7, floor: float = 0.5, workers: int = 1) -> None:
        if not 0 < floor <= threshold <= 1 or workers < 1:
            raise ValueError(f"0 < floor <= threshold <= 1 and workers >= 1 must hold: {floor}, {threshold}, {workers}")
        self.threshold, self.floor, self.workers = threshold, floor, workers
        self._vocabulary = Vocabulary()
        self._store = Store(np.zeros(256, np.int32), np.zeros(33, np.int64), np.zeros((32, 4), np.uint64), np.zeros(3, np.int64))
        empty = np.zeros(0, np.int32)
        self._postings = Postings(empty, np.zeros(1, np.int64), empty, empty, empty, np.zeros(0, np.uint64))
        self._tail = Tail(np.full(32, -1, np.int32), *(np.zeros(64, np.int32) for _ in range(4)))
        self._scratch = [_scratch() for _ in range(workers)]
        self._built = 0  # texts in the postings

    def __len__(self) -> int:
        return int(self._store.counts[TEXTS])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, what they keep free for more texts included."""
        arrays = [*self._store, *self._postings, *self._tail, *(array for scratch in self._scratch for array in scratch)]
        return sum(array.nbytes for array in arrays) + self._vocabulary.nbytes

    def add(self, text: str) -> None:
        """Pool a text; its index is the number of texts before it."""
        self.extend([text])

    def extend(self, texts: Sequence[str]) -> None:
        """Pool texts without asking whether they are new."""
        for begin in range(0, len(texts), _CHUNK):
            tokens, offsets = self._vocabulary.encode(texts[begin : begin + _CHUNK])
            self._make_room(tokens, offsets)
            index.append_all(tokens, offsets, self._store, self._postings.ranks, self._tail, self.floor)
            self._rebuild()

    def nearest(self, text: str) -> tuple[float, int]:
        """(highest F, index of the first text that has it); (0.0, -1) when nothing in the pool shares a token."""
        tokens, offsets = self._vocabulary.encode([text], add=False)
        best, number = self._search(tokens, offsets)
        if number[0] >= 0:
            return float(best[0]), int(number[0])
        score, other = index.scan(tokens, self._store, self._scratch[0].rows)
        return float(score), int(other)

    def matches(self, texts: Sequence[str]) -> Admissions:
        """What `admit` would say of each text alone; nothing joins the pool."""
        best, number = self._search(*self._vocabulary.encode(texts, add=False))
        return Admissions(best < self.threshold, best, number)

    def admit(self, texts: Sequence[str]) -> Admissions:
        """Decide on candidates in order; each one that is new joins the pool at once, so that later ones are held against it.

        Exactly as `nearest` and `add` one by one.
        """
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for begin in range(0, len(texts), _CHUNK):
            tokens, offsets = self._vocabulary.encode(texts[begin : begin + _CHUNK])
            self._make_room(tokens, offsets)
            best, number = self._search(tokens, offsets)
            index.admit_all(
                tokens,
                offsets,
                self._store,
                self._postings,
                self._tail,
                self._scratch[0],
                self.floor,
                self.threshold,
                best,
                number,
            )
            found.append((best, number))
            self._rebuild()
        best = np.concatenate([np.zeros(0), *(best for best, _ in found)])
        number = np.concatenate([np.zeros(0, np.int64), *(number for _, number in found)])
        return Admissions(best < self.threshold, best, number)

    def scores(self, text: str) -> np.ndarray:
        """float64[len(pool)]: F with each pooled text."""
        tokens, _ = self._vocabulary.encode([text], add=False)
        found = np.zeros(len(self))
        kernel.one_with_all(tokens, self._store.tokens, self._store.offsets, self._scratch[0].rows, found)
        return found

    def _search(self, tokens: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(offsets) - 1
        best, number = np.zeros(count), np.full(count, -1, np.int64)

        workers = self.workers if count >= 4 * self.workers else 1

        def part(worker: int) -> None:
            scratch = self._scratch[worker]
            if scratch.clock[0] + 2 * count > _QUERIES:
                scratch.seen[:] = 0
                scratch.clock[0] = 0
            first, last = count * worker // workers, count * (worker + 1) // workers
            given = (self._store, self._postings, self._tail, scratch, self.floor, best, number)
            index.search_all(tokens, offsets, first, last, *given)

        if workers == 1:
            part(0)
        else:
            with ThreadPoolExecutor(workers) as threads:
                list(threads.map(part, range(workers)))
        return best, number

    def _make_room(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        """Grow the arrays so that all texts of a batch may join."""
        store, tail = self._store, self._tail
        texts, held, nodes = (int(store.counts[what]) for what in (TEXTS, TOKENS, NODES))
        texts += len(offsets) - 1
        if held + len(tokens) > len(store.tokens):
            store = store._replace(tokens=doubled(store.tokens, held + len(tokens)))
        if texts > len(store.sketches):
            store = store._replace(offsets=doubled(store.offsets, texts + 1), sketches=doubled(store.sketches, texts))
        if nodes + len(tokens) > len(tail.nexts):
            tail = Tail(tail.heads, *(doubled(array, nodes + len(tokens)) for array in tail[1:]))
        self._store, self._tail = store, tail
        words = len(self._vocabulary)
        if words > len(tail.heads):
            heads = np.full(max(words, 2 * len(tail.heads)), -1, np.int32)
            heads[: len(tail.heads)] = tail.heads
            self._tail = tail._replace(heads=heads)
        for worker, scratch in enumerate(self._scratch):
            if words > len(scratch.rows):
                scratch = scratch._replace(rows=doubled(scratch.rows, words))
            if texts > len(scratch.seen):
                scratch = scratch._replace(seen=doubled(scratch.seen, texts))
            self._scratch[worker] = scratch

    def _rebuild(self) -> None:
        """Put the tail into the postings where it has grown long, with the order of tokens as their frequencies now are."""
        store, count = self._store, len(self)
        if count - self._built < max(_TAIL, self._built // 16):
            return
        common = index.frequencies(store.tokens[: store.counts[TOKENS]], len(self._vocabulary))
        ranks = np.empty(len(common), np.int32)
        ranks[np.argsort(common, kind="stable")] = np.arange(len(common), dtype=np.int32)
        order = np.argsort(np.diff(store.offsets[: count + 1]), kind="stable")
        self._postings = index.build(store, order, ranks, self.floor)
        self._tail.heads[:] = -1
        store.counts[NODES] = 0
        self._built = count


def _scratch() -> Scratch:
    return Scratch(np.zeros(32, np.int32), np.zeros(32, np.int32), np.zeros(2, np.int64))
