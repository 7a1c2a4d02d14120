"""Key files: how map units hand fixed-width records to partitions without a shuffle service.

Every map unit writes one file a kind, its records sorted by partition, and a record of where each partition starts.
An index gathers those starts, so that a partition reads its range of every file and nothing else. Names are plain: a
retried unit writes the same bytes under the same name, and a unit counts only once its record exists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from cluster import disk, storage


def keys_directory(directory: str) -> str:
    return storage.join(directory, "keys")


def record_path(directory: str, phase: str, unit: int) -> str:
    return storage.join(keys_directory(directory), "records", phase, f"{unit:08d}.json")


def commit(directory: str, phase: str, unit: int, record: dict[str, Any]) -> None:
    """Make a unit of a phase count; its files are complete by now."""
    storage.create_if_absent(record_path(directory, phase, unit), json.dumps(record, sort_keys=True).encode())


def committed(directory: str, phase: str) -> set[int]:
    """The units of a phase that are done."""
    try:
        found = storage.list_files(storage.join(keys_directory(directory), "records", phase))
    except FileNotFoundError:
        return set()
    return {int(entry.relative.removesuffix(".json")) for entry in found if entry.relative.endswith(".json")}


def load_record(directory: str, phase: str, unit: int) -> dict[str, Any]:
    return dict(json.loads(storage.read_bytes(record_path(directory, phase, unit))))


def data_path(directory: str, kind: str, unit: int) -> str:
    return storage.join(keys_directory(directory), kind, f"{unit:08d}.bin")


class RunFile:
    """Appends arrays to a scratch file that `publish` makes visible."""

    def __init__(self, directory: str, destination: str) -> None:
        self._scratch, self._destination = storage.scratch_file(directory), destination
        with disk.writing(self._scratch):
            self._stream = open(self._scratch, "wb")  # noqa: SIM115 - closed by publish or abandon

    def append(self, array: np.ndarray) -> None:
        with disk.writing(self._scratch):
            self._stream.write(np.ascontiguousarray(array).data)

    def publish(self) -> None:
        with disk.writing(self._scratch):
            self._stream.close()
        storage.publish(self._scratch, self._destination)

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk does not take what is still buffered
            self._stream.close()
        if os.path.exists(self._scratch):
            os.unlink(self._scratch)


def write_array(directory: str, path: str, array: np.ndarray) -> None:
    file = RunFile(directory, path)
    try:
        file.append(array)
        file.publish()
    except BaseException:
        file.abandon()
        raise


def read_rows(path: str, start: int, stop: int, width: int, dtype: type = np.uint64) -> np.ndarray:
    """Rows start..stop of a file of records of `width` values: array[stop - start, width]."""
    if stop <= start:
        return np.empty((0, width), dtype)
    size = np.dtype(dtype).itemsize * width
    with storage.open_input(path) as stream:
        data = stream.read_at((stop - start) * size, start * size)
    if len(data) != (stop - start) * size:
        raise OSError(f"{path} is shorter than its record says: rows {start}..{stop} of {size} bytes are missing")
    return np.frombuffer(data, dtype).reshape(-1, width)


def write_index(directory: str, kind: str, units: int, partitions: int) -> int:
    """Gather the partition starts of all map units: int64[partitions + 1, runs], so that a partition reads two rows.

    Returns the number of records of the kind.
    """
    runs, starts = [], []
    for unit in range(units):
        for begin, offsets in load_record(directory, "map", unit)["runs"].get(kind, []):
            runs.append(unit)
            starts.append(np.asarray(offsets, np.int64) + begin)
    table = np.stack(starts, axis=1) if starts else np.zeros((partitions + 1, 0), np.int64)
    write_array(directory, storage.join(keys_directory(directory), "index", f"{kind}.bin"), table)
    write_array(directory, storage.join(keys_directory(directory), "index", f"{kind}.runs.bin"), np.asarray(runs, np.int64))
    return int((table[-1] - table[0]).sum())


def read_partition(directory: str, kind: str, partition: int, width: int) -> np.ndarray:
    """All records of one partition, in order of unit: uint64[records, width]."""
    index = storage.join(keys_directory(directory), "index")
    runs = np.frombuffer(storage.read_bytes(storage.join(index, f"{kind}.runs.bin")), np.int64)
    if not len(runs):
        return np.empty((0, width), np.uint64)
    starts = read_rows(storage.join(index, f"{kind}.bin"), partition, partition + 2, len(runs), np.int64)
    pieces = [
        read_rows(data_path(directory, kind, int(unit)), int(start), int(stop), width)
        for unit, start, stop in zip(runs, starts[0], starts[1], strict=True)
    ]
    return np.concatenate(pieces)


def read_each(directory: str, kind: str, units: Sequence[int], width: int) -> Iterator[np.ndarray]:
    """The records of each unit's file of a kind: uint64[records, width]."""
    for unit in units:
        yield np.frombuffer(storage.read_bytes(data_path(directory, kind, unit)), np.uint64).reshape(-1, width)


def read_all(directory: str, kind: str, units: Sequence[int], width: int) -> np.ndarray:
    """The whole files of a kind, one after another."""
    return np.concatenate([np.empty((0, width), np.uint64), *read_each(directory, kind, units, width)])
