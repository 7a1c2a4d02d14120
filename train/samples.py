"""What a training stage leaves beside its model: which sample was taken in which step, and its result on file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from operators import shards
from operators.ledger import Ledger
from train.loader import TokenLoader
from train.mixture import Mixture

SAMPLES = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),  # from 0
        pa.field("position", pa.int64(), nullable=False),  # in the endless stream; step = position // batch
        pa.field("input", pa.string(), nullable=False),  # which input of the mixture
        pa.field("row", pa.int64(), nullable=False),  # row in that input; for packed corpora the TOKENS `sequence`
        pa.field("epoch", pa.int64(), nullable=False),  # of that input
        pa.field("id", pa.string(), nullable=False),  # the row's id; for packed corpora the sequence number
    ]
)

_ROWS = 65_536
_CURVE_POINTS = 500


def pretraining(loader: TokenLoader, steps: int, batch: int) -> Iterator[pa.Table]:
    """SAMPLES of a pretraining run, in blocks."""
    return _tables(loader.mixture, loader.names, None, steps, batch)


def finetuning(mixture: Mixture, ids: Sequence[pa.Array], steps: int, batch: int) -> Iterator[pa.Table]:
    """SAMPLES of a fine-tuning run; `ids` are the ids of each input's rows."""
    return _tables(mixture, mixture.names, ids, steps, batch)


def one_by_one(mixture: Mixture, count: int) -> Iterator[pa.Table]:
    """SAMPLES of a job that takes one row of its inputs a step."""
    return _tables(mixture, mixture.names, None, count, 1)


def _tables(mixture: Mixture, names: Sequence[str], ids: Sequence[pa.Array] | None, steps: int, batch: int) -> Iterator[pa.Table]:
    labels = pa.array(names, pa.string())
    for start in range(0, steps * batch, _ROWS):
        positions = np.arange(start, min(start + _ROWS, steps * batch))
        draw = mixture.locate(positions)
        if ids is None:
            keys = pc.cast(pa.array(draw.row), pa.string())
        else:
            edges = np.concatenate([[0], np.cumsum([len(part) for part in ids])])
            keys = pa.chunked_array(ids, pa.string()).take(pa.array(draw.row + edges[draw.source])).combine_chunks()
        columns = [positions // batch, positions, labels.take(pa.array(draw.source)), draw.row, draw.epoch, keys]
        yield pa.table([pa.array(c) if isinstance(c, np.ndarray) else c for c in columns], schema=SAMPLES)


def write(directory: str, tables: Iterator[pa.Table]) -> None:
    """Commit the rows as unit 0 of the stage, unless that was done."""
    if 0 in shards.committed_units(directory):
        return
    writer = shards.UnitWriter(directory, 0)
    rows = 0
    for table in tables:
        writer.write(table)
        rows += table.num_rows
    writer.commit(Ledger(created=rows, kept=rows))


def shares(names: Sequence[str], source: np.ndarray, tokens: np.ndarray | None = None) -> dict[str, dict[str, int]]:
    """Samples (and tokens with loss) that each input gave."""
    report = {name: {"samples": int(n)} for name, n in zip(names, np.bincount(source, minlength=len(names)), strict=True)}
    if tokens is not None:
        for name, total in zip(names, np.bincount(source, weights=tokens, minlength=len(names)), strict=True):
            report[name]["tokens"] = int(total)
    return report


class Given:
    """What the inputs have given in this process so far: for curves, beside what is compared."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._tokens = np.zeros(len(names), np.int64)

    def add(self, source: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
        """Count samples of these inputs with so many tokens with loss; the metrics so far.

        `given_tokens`, and with several inputs `mixture/NAME`, the share of each.
        """
        self._tokens += np.bincount(source, weights=tokens, minlength=len(self._names)).astype(np.int64)
        total = int(self._tokens.sum())
        found: dict[str, Any] = {"given_tokens": total}
        if len(self._names) > 1 and total:
            found |= {f"mixture/{name}": round(int(n) / total, 6) for name, n in zip(self._names, self._tokens, strict=True)}
        return found


def thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 500 points of a curve, the first and the last among them."""
    if len(curve) <= _CURVE_POINTS:
        return curve
    chosen = np.unique(np.linspace(0, len(curve) - 1, _CURVE_POINTS).round().astype(int))
    return [curve[index] for index in chosen]


def read_result(directory: str) -> dict[str, Any] | None:
    """The result of a job that was finished earlier."""
    path = storage.join(directory, "result.json")
    return dict(json.loads(storage.read_bytes(path))) if storage.exists(path) else None


def write_result(directory: str, result: dict[str, Any]) -> dict[str, Any]:
    """Put a finished job's result on file; from then on the job is done."""
    storage.write_bytes(storage.join(directory, "result.json"), json.dumps(result, indent=1, sort_keys=True).encode())
    return result
