"""What was taken down from a run: hashes of ids, so that a document does not come back when its file is read again.

`RUN/forgotten/NNNNNNNN.json` is one takedown, written once it is complete: when, why, how many rows, which models had seen
them, and the hashes of the ids. No text and no id stands in it; who has an id can tell whether it was forgotten.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import storage
from operators.tables import stable_id

FOLDER = "forgotten"
MARK = "forgotten:"  # before the hash, where an id stood that other rows refer to


def hashed(row_id: str) -> str:
    """32 hex digits that stand for an id."""
    return stable_id("forgotten", row_id)


def files(run_directory: str) -> list[str]:
    """The completed takedowns of a run in order; none as a rule."""
    return [entry.path for entry in storage.list_beside(storage.join(run_directory, FOLDER)) if _is_record(entry.relative)]


def _is_record(name: str) -> bool:
    stem, dot, ending = name.partition(".")
    return bool(dot) and ending == "json" and stem.isdecimal()


def records(run_directory: str) -> list[dict[str, Any]]:
    """The completed takedowns of a run, oldest first."""
    return [json.loads(data) for data in storage.read_each(files(run_directory))]


def of(run_directory: str, row_id: str) -> list[dict[str, Any]]:
    """The takedowns that an id was part of: asked for, or made from one that was."""
    wanted = hashed(row_id)
    return [record for record in records(run_directory) if wanted in record["ids"] or wanted in record["descendants"]]


@functools.lru_cache(maxsize=2)
def hashes(paths: tuple[str, ...]) -> frozenset[str]:
    """All hashes of the takedowns in these files. A record never changes, so it is read once a process."""
    found: set[str] = set()
    for data in storage.read_each(paths):
        record = json.loads(data)
        found.update(record["ids"], record["descendants"])
    return frozenset(found)


def mask(ids: Iterable[str], paths: Sequence[str]) -> np.ndarray:
    """bool[rows]: the ids that the takedowns in these files name."""
    known = hashes(tuple(paths))
    return np.fromiter((hashed(row_id) in known for row_id in ids), bool)


def without(table: pa.Table, paths: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """(the rows that may stay, bool[rows]: which those are)."""
    stays = ~mask(table["id"].to_pylist(), paths)
    return (table, stays) if stays.all() else (table.filter(pa.array(stays)), stays)
