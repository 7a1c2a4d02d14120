"""The training loader: sample i of a packed corpus, as a pure function of (seed, i).

A pack stage leaves a flat memory-mapped twin of its TOKENS rows. The loader reads rows of it by position, through
`mixture.Mixture` where several corpora are mixed by tokens. Its whole state is a number of samples and a fingerprint:
a run resumes on any number of workers that divides the global batch, on the exact next sample.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from cluster import storage
from operators import shards, tables
from train import artifacts
from train.mixture import Draw, Mixture, weights_by_tokens

IGNORE = -100
"""The label of a position without loss, as torch's cross entropy has it."""

_GATHERED = 64  # rows that are copied at a time, which stay in the cache: plain copies wait less for memory than widening loops
_STRETCH = 4096  # positions whose places are remembered, 80 kB
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class Batch:
    """Rows ready for a model: int32 arrays [rows, length], which are widened where they are used, past the way to a GPU.

    `labels[t]` is the token after t of the same document, IGNORE where there is none (last token of a document,
    padding). `position_ids` restart at every document, which is what isolates packed documents from each other.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    valid_tokens: int  # labels that are not IGNORE


class PackedTokens:
    """The memory-mapped rows of one pack stage.

    Raises FileNotFoundError when the stage is unfinished, ValueError when the files disagree with their index.
    """

    def __init__(self, directory: str) -> None:
        files = shards.load_manifest(directory).files
        missing = {"tokens", "index"} - set(files)
        if missing:
            raise ValueError(f"{directory} is no pack stage: its manifest names no file {sorted(missing)}")
        self.directory = directory
        index_path = storage.join(directory, files["index"])
        self.index: dict[str, Any] = json.loads(storage.read_bytes(index_path))
        if self.index["dtype"] not in _DTYPES:
            raise ValueError(f"{index_path}: dtype {self.index['dtype']!r} is neither uint16 nor uint32")
        self.length, self.sequences = int(self.index["length"]), int(self.index["sequences"])
        self.vocab_size = int(self.index["vocab_size"])
        if self.sequences <= 0:
            raise ValueError(f"{directory} holds no sequences: nothing was packed, look at its ledger")
        base = files["index"].rpartition("/")[0]
        self._tokens = self._map(files["tokens"], _DTYPES[str(self.index["dtype"])], self.sequences * self.length)
        self._tokens = self._tokens.reshape(self.sequences, self.length)
        self._offsets = self._map(
            storage.join(base, self.index["boundary_offsets"]) if base else self.index["boundary_offsets"],
            np.dtype("<i8"),
            self.sequences + 1,
        )
        self._boundaries = self._map(
            storage.join(base, self.index["boundaries"]) if base else self.index["boundaries"],
            np.dtype("<i4"),
            int(self._offsets[-1]),
        )

    def _map(self, name: str, dtype: np.dtype, items: int) -> np.ndarray:
        checksums = self.index.get("sha256", {})
        path = artifacts.local_file(storage.join(self.directory, name), checksums.get(name.rpartition("/")[2]))
        if path.stat().st_size != items * dtype.itemsize:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, the index says {items} items of {dtype.itemsize} bytes")
        # A plain view: indexing a numpy.memmap makes another one each time, which costs more than a row's copy.
        return np.memmap(path, dtype, "r").view(np.ndarray) if items else np.zeros(0, dtype)

    def __len__(self) -> int:
        return self.sequences

    def row(self, sequence: int) -> np.ndarray:
        """The tokens of one row, padding included: [length]."""
        return self._tokens[sequence]

    def boundaries(self, sequence: int) -> np.ndarray:
        """cu_seqlens of one row: 0, end of piece 0, end of piece 1, ...; padding after the last."""
        return self._boundaries[self._offsets[sequence] : self._offsets[sequence + 1]]

    def valid_tokens(self, sequences: np.ndarray) -> np.ndarray:
        """Labels with loss in each of these rows, int64: tokens less one a piece (and less the padding)."""
        starts, ends = self._offsets[sequences], self._offsets[sequences + 1]
        return self._boundaries[ends - 1].astype(np.int64) - (ends - starts - 1)

    def mean_valid_tokens(self) -> float:
        """Labels with loss a row, over the whole corpus."""
        total = sum(
            int(self.valid_tokens(np.arange(start, min(start + (1 << 20), self.sequences))).sum())
            for start in range(0, self.sequences, 1 << 20)
        )
        return total / self.sequences

    def fill(self, sequences: np.ndarray, batch: Batch, rows: np.ndarray) -> int:
        """Write these rows of the corpus into the given rows of a batch; how many labels with loss they have."""
        valid = 0
        for start in range(0, len(sequences), _GATHERED):
            taken = sequences[start : start + _GATHERED]
            valid += _assemble(
                self._tokens[taken], self._boundaries, self._offsets, taken, rows[start : start + _GATHERED],
                batch.input_ids, batch.position_ids, batch.labels,
            )  # fmt: skip
        return int(valid)

    def fingerprint(self) -> str:
        """Names the content: the stage's own fingerprint and the index."""
        return tables.content_hash([shards.load_manifest(self.directory).fingerprint, self.index])


@njit(cache=True, nogil=True)
def _assemble(tokens, boundaries, offsets, sequences, rows, input_ids, position_ids, labels):  # type: ignore[no-untyped-def]
    # One plain loop from 0 an array, without a branch: the compiler makes wide loads and stores of it, not of slices.
    length, valid = tokens.shape[1], 0
    for n in range(sequences.size):
        source, ids, targets, places = tokens[n], input_ids[rows[n]], labels[rows[n]], position_ids[rows[n]]
        for t in range(length):
            ids[t] = source[t]
        for t in range(length - 1):
            targets[t] = source[t + 1]
        first, last = offsets[sequences[n]], offsets[sequences[n] + 1] - 1
        start = np.int64(0)
        for k in range(first + 1, last + 1):
            end = np.int64(boundaries[k])
            piece = places[start:end]
            for t in range(piece.size):
                piece[t] = t
            if end > start:
                targets[end - 1] = -100
            start = end
        # Padding is a piece of its own, without labels.
        rest, aside = places[start:], targets[start:]
        for t in range(rest.size):
            rest[t] = t
        for t in range(aside.size):
            aside[t] = -100
        targets[length - 1] = -100
        valid += boundaries[last] - (last - first)
    return valid


class TokenLoader:
    """Batches of a weighted mixture of packed corpora by position.

    `weights` are shares of tokens with loss. All corpora must agree in length and vocabulary.
    """

    def __init__(self, corpora: Sequence[PackedTokens], weights: Sequence[float], seed: int, names: Sequence[str]) -> None:
        for corpus in corpora:
            for key in ("length", "vocab_size", "eos_token_id"):
                if corpus.index.get(key) != corpora[0].index.get(key):
                    raise ValueError(
                        f"packed inputs cannot be mixed: {key} is {corpora[0].index.get(key)} in {corpora[0].directory} "
                        f"and {corpus.index.get(key)} in {corpus.directory}; pack them with one tokenizer and length"
                    )
        self.corpora, self.names, self.seed = list(corpora), list(names), seed
        rows = list(weights) if len(corpora) == 1 else weights_by_tokens(weights, [c.mean_valid_tokens() for c in corpora])
        self.mixture = Mixture([len(corpus) for corpus in corpora], rows, seed, names)
        self.length = corpora[0].length
        self._stretches: dict[int, Draw] = {}
        self.fingerprint = tables.content_hash(
            [[corpus.fingerprint() for corpus in corpora], [float(weight) for weight in weights], seed, 1]
        )

    def locate(self, positions: np.ndarray) -> Draw:
        """Which row of which corpus the samples at these positions are."""
        positions = np.asarray(positions, np.int64)
        if not positions.size or (positions != np.arange(positions[0], positions[0] + positions.size)).any():
            return self.mixture.locate(positions)
        # A batch is a run of positions: whole stretches of the stream are worked out at a time.
        first, last = int(positions[0]), int(positions[-1])
        draws = [self._stretch(number) for number in range(first // _STRETCH, last // _STRETCH + 1)]
        taken = slice(first % _STRETCH, first % _STRETCH + positions.size)
        if len(draws) == 1:
            return Draw(draws[0].source[taken], draws[0].row[taken], draws[0].epoch[taken])
        return Draw(*(np.concatenate([getattr(draw, name) for draw in draws])[taken] for name in ("source", "row", "epoch")))

    def _stretch(self, number: int) -> Draw:
        if number not in self._stretches:
            while len(self._stretches) >= 4:
                self._stretches.pop(next(iter(self._stretches)))
            self._stretches[number] = self.mixture.locate(np.arange(number * _STRETCH, (number + 1) * _STRETCH))
        return self._stretches[number]

    def valid_tokens(self, positions: np.ndarray) -> np.ndarray:
        """Labels with loss of each sample, int64, without reading its tokens."""
        draw = self.locate(positions)
        counts = np.zeros(len(draw.row), np.int64)
        for index, corpus in enumerate(self.corpora):
            chosen = np.flatnonzero(draw.source == index)
            if chosen.size:
                counts[chosen] = corpus.valid_tokens(draw.row[chosen])
        return counts

    def batch(self, positions: np.ndarray) -> Batch:
        """The samples at these positions, in order."""
        draw = self.locate(positions)
        ids, places, labels = np.empty((3, len(draw.row), self.length), np.int32)
        batch = Batch(ids, places, labels, 0)
        if len(self.corpora) == 1:
            return replace(batch, valid_tokens=self.corpora[0].fill(draw.row, batch, np.arange(len(draw.row))))
        valid = 0
        for index, corpus in enumerate(self.corpora):
            chosen = np.flatnonzero(draw.source == index)
            if chosen.size:
                valid += corpus.fill(draw.row[chosen], batch, chosen)
        return replace(batch, valid_tokens=valid)

    def state(self, samples: int, tokens: int) -> dict[str, Any]:
        """All there is to remember of a loader that has given out `samples` samples."""
        return {"samples": samples, "tokens": tokens, "fingerprint": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """The position to go on from. Raises ValueError when the state is of other data, weights or another seed."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint's loader read other data (fingerprint {state['fingerprint']}, now {self.fingerprint}): "
                "inputs, weights or seed have changed; start this stage in a new directory"
            )
        return int(state["samples"])


def rank_positions(step: int, batch: int, rank: int, world: int) -> np.ndarray:
    """The positions that one of `world` workers takes of global batch `step`: a contiguous share of it.

    Raises ValueError when `world` does not divide `batch`.
    """
    if batch % world:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        raise ValueError(f"a global batch of {batch} does not divide among {world} workers; use one of {divisors}")
    share = batch // world
    return np.arange(step * batch + rank * share, step * batch + (rank + 1) * share)


def micro_batches(rows: int, largest: int | None) -> list[slice]:
    """Cut a worker's rows into pieces of at most `largest`, all of about equal size."""
    pieces = 1 if largest is None else math.ceil(rows / largest)
    edges = [rows * piece // pieces for piece in range(pieces + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def tokenizer_file(directory: str) -> Path:
    """The tokenizer.json that a pack (or tokenizer) stage names."""
    files = shards.load_manifest(directory).files
    if "tokenizer" not in files:
        raise ValueError(f"{directory}: the manifest names no tokenizer file")
    return artifacts.local_file(storage.join(directory, files["tokenizer"]))
