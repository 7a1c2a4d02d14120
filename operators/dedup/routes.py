"""Fixed-width records sent from units to destinations (partitions, parts) through files, without a shuffle service.

Each unit of a sending phase writes one file a kind, sorted by destination in runs, and a list of its routes
(destination, first record, last record). `gather` sorts the routes of all units, 32 B for each that carries anything, so
that a destination reads its ranges and nothing else. Names are plain: a retried unit writes the same bytes under the same
name, and records come to a destination in order of unit and run, whatever the order of completion.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cluster import storage
from operators.dedup import exchange


class Sender:
    """Collects the records of one kind from one unit. `publish` makes them visible; without it nothing is left."""

    def __init__(self, directory: str, kind: str, unit: int, width: int) -> None:
        self._directory, self._kind, self._unit, self._width = directory, kind, unit, width
        self._file = exchange.RunFile(directory, exchange.data_path(directory, kind, unit))
        self._routes: list[np.ndarray] = []
        self._written = 0

    def send(self, records: np.ndarray, destinations: np.ndarray) -> None:
        """Append a run: records uint64[n, width], destinations int64[n]. The order within a destination is kept."""
        if not len(records):
            return
        if records.shape[1] != self._width:
            raise ValueError(f"records of {self._kind} are {self._width} wide, got {records.shape[1]}")
        order = np.argsort(destinations, kind="stable")
        numbers, first = np.unique(destinations[order], return_index=True)
        bounds = np.append(first, len(records)) + self._written
        self._routes.append(np.column_stack([numbers, bounds[:-1], bounds[1:]]).astype(np.int64))
        self._file.append(np.ascontiguousarray(records[order], np.uint64))
        self._written += len(records)

    def publish(self) -> None:
        routes = np.concatenate([np.empty((0, 3), np.int64), *self._routes])
        self._file.publish()
        exchange.write_array(self._directory, _routes_path(self._directory, self._kind, self._unit), routes)

    def abandon(self) -> None:
        self._file.abandon()


def gather(directory: str, kind: str, units: int, destinations: int) -> int:
    """Sort the routes of all units by destination; the number of records sent. One unit of work."""
    found = [np.empty((0, 4), np.int64)]
    for unit in range(units):
        data = storage.read_bytes(_routes_path(directory, kind, unit))
        routes = np.frombuffer(data, np.int64).reshape(-1, 3)
        found.append(np.column_stack([routes[:, 0], np.full(len(routes), unit), routes[:, 1:]]))
    table = np.concatenate(found)
    table = table[np.argsort(table[:, 0], kind="stable")]
    starts = np.searchsorted(table[:, 0], np.arange(destinations + 1)).astype(np.int64)
    exchange.write_array(directory, _index_path(directory, kind), table[:, 1:])
    exchange.write_array(directory, _index_path(directory, f"{kind}.starts"), starts)
    return int((table[:, 3] - table[:, 2]).sum())


def receive(directory: str, kind: str, destination: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(records uint64[n, width], the unit that sent each int64[n]) for one destination, in order of unit."""
    starts = exchange.read_rows(_index_path(directory, f"{kind}.starts"), destination, destination + 2, 1, np.int64)
    routes = exchange.read_rows(_index_path(directory, kind), int(starts[0, 0]), int(starts[1, 0]), 3, np.int64)
    pieces, senders = [np.empty((0, width), np.uint64)], [np.empty(0, np.int64)]
    for unit, begin, end in routes.tolist():
        pieces.append(exchange.read_rows(exchange.data_path(directory, kind, unit), begin, end, width))
        senders.append(np.full(end - begin, unit, np.int64))
    return np.concatenate(pieces), np.concatenate(senders)


def answer_ids(directory: str, unit: int, asked: np.ndarray, askers: np.ndarray, ids: pa.Array, first_ordinal: int) -> None:
    """Write the ids of rows of one part for the parts that asked: `asked` uint64[n] ordinals, `askers` int64[n]."""
    pairs = np.unique(np.column_stack([askers.astype(np.uint64), asked]), axis=0)
    numbers, first = np.unique(pairs[:, 0].astype(np.int64), return_index=True)
    schema = pa.schema([("ordinal", pa.uint64()), ("id", pa.string())])
    scratch = storage.scratch_file(directory)
    with pa.OSFile(scratch, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for begin, end in zip(first.tolist(), [*first.tolist(), len(pairs)][1:], strict=True):
            ordinals = pairs[begin:end, 1].copy()
            names = ids.take(pa.array((ordinals - np.uint64(first_ordinal)).astype(np.int64))).cast(pa.string())
            writer.write_batch(pa.record_batch([pa.array(ordinals), names], schema=schema))
    storage.publish(scratch, _ids_path(directory, unit))
    routes = np.column_stack([numbers, np.arange(len(numbers)), np.arange(len(numbers)) + 1]).astype(np.int64)
    exchange.write_array(directory, _routes_path(directory, "ids-told", unit), routes)


def told_ids(directory: str, asker: int) -> tuple[np.ndarray, pa.Array]:
    """(ordinals uint64[n] sorted, their ids) that other parts told this one; after `gather(..., "ids-told", ...)`."""
    starts = exchange.read_rows(_index_path(directory, "ids-told.starts"), asker, asker + 2, 1, np.int64)
    routes = exchange.read_rows(_index_path(directory, "ids-told"), int(starts[0, 0]), int(starts[1, 0]), 3, np.int64)
    ordinals, ids = [np.empty(0, np.uint64)], [pa.array([], pa.string())]
    for unit, batch, _ in routes.tolist():
        with storage.open_input(_ids_path(directory, unit)) as stream:
            found = pa.ipc.open_file(stream).get_batch(batch)
        ordinals.append(found["ordinal"].to_numpy())
        ids.append(found["id"])
    return np.concatenate(ordinals), pa.concat_arrays(ids)


def _routes_path(directory: str, kind: str, unit: int) -> str:
    return storage.join(exchange.keys_directory(directory), kind, f"{unit:08d}.routes")


def _index_path(directory: str, kind: str) -> str:
    return storage.join(exchange.keys_directory(directory), "routes", f"{kind}.bin")


def _ids_path(directory: str, unit: int) -> str:
    return storage.join(exchange.keys_directory(directory), "ids-told", f"{unit:08d}.arrow")
