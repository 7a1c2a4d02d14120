"""A kept index: what earlier dedup stages compared, so that later ones can compare with it without reading that text again.

An index is a directory of generations, one for each stage that grew it, named by the stage's fingerprint:

    GENERATION/exact/PPPPPPPP.{keys,rows,fences}    content hashes of piece P of the key space, sorted, and their rows
    GENERATION/bands/...                            band hashes, likewise
    GENERATION/rows/NNNNNNNN.parquet                the rows of part N: row, id, sketch; for a row that was removed, its kept row
    GENERATION/shingles/NNNNNNNN.*                  shingle sets, where pairs are verified
    GENERATION/generation.json                      settings, parts, counts; written last, a directory without it does not count

It holds the rows that stayed and the near-duplicates that went (a new document may resemble only one of those), but no
exact copies, whose keys are the same. Nothing is ever overwritten: a stage reads the generations it found when it first
started, and writes its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cluster import storage
from operators.config import SettingsError
from operators.dedup import exchange
from operators.dedup.options import DedupOptions

FORMAT = 1
_BLOCK = 1024  # records between two fences
_RUN_BLOCKS = 512  # blocks read at once: 8 MB of band hashes and rows


class KnownPart(NamedTuple):
    """A part of a generation: `rows` numbers from `first_row`, whose ordinals here start at `first_ordinal`."""

    directory: str
    generation: str
    number: int
    rows: int
    first_row: int
    first_ordinal: int

    def file(self, kind: str, ending: str) -> str:
        return storage.join(self.directory, kind, f"{self.number:08d}.{ending}")


@dataclass(frozen=True)
class Generation:
    """A complete generation and its record."""

    name: str
    directory: str
    record: dict[str, Any]

    @property
    def size(self) -> dict[str, int]:
        """Rows, and bytes of all its files but the record."""
        return {"rows": self.record["rows"], "bytes": sum(self.record["bytes"].values())}

    def parts(self, first_ordinal: int) -> list[KnownPart]:
        found, first_row = [], 0
        for number, rows in enumerate(self.record["part_rows"]):
            found.append(KnownPart(self.directory, self.name, number, rows, first_row, first_ordinal + first_row))
            first_row += rows
        return found


def settings_of(options: DedupOptions) -> dict[str, Any]:
    """The settings by which keys are made: two stages that share an index agree in all of them."""
    names = ["words", "characters", "shingles", "digits", "normalisation"]
    if options.finds_exact:
        names.append("exact_on")
    if options.finds_near:
        names += ["permutations", "bands", "rows", "seed", "signature"]
    chosen = options.with_shape().model_dump(include=set(names))
    return {
        **chosen,
        "exact": options.finds_exact,
        "minhash": options.finds_near,
        "by_language": options.language_column is not None,
    }


def generations(index: str) -> list[Generation]:
    """The complete generations of an index, those that were compared with others after them; none if it does not exist yet."""
    found = [load(directory) for directory in storage.list_directories(index) if is_complete(directory)]
    return sorted(found, key=lambda each: (len(each.record["against"]), each.name))


def is_complete(directory: str) -> bool:
    """Whether a generation was published."""
    return storage.exists(storage.join(directory, "generation.json"))


def load(directory: str) -> Generation:
    """A complete generation. Raises FileNotFoundError for another."""
    record = json.loads(storage.read_bytes(storage.join(directory, "generation.json")))
    return Generation(directory.rsplit("/", 1)[-1], directory, record)


def compare_settings(index: str, found: list[Generation], options: DedupOptions) -> None:
    """Raises SettingsError, naming generation and setting, when a generation was made otherwise or lacks what is needed."""
    wanted, names = settings_of(options), {each.name for each in found}
    for each in found:
        where = f"index {index}: generation {each.name}"
        if each.record["format"] != FORMAT:
            raise SettingsError(f"{where} has format {each.record['format']}, this version reads {FORMAT}: build the index anew")
        for key, value in wanted.items():
            kept = each.record["settings"].get(key)
            if kept != value:
                raise SettingsError(f"{where} was made with `{key}: {kept}`, this stage has `{key}: {value}`; they must agree")
        if options.finds_near and options.verify and not each.record["sets"]:
            raise SettingsError(f"{where} keeps no shingle sets to verify against: it was made without `verify: true`")
        if missing := sorted(set(each.record["against"]) - names):
            raise SettingsError(f"{where} was compared with {missing}, which the index no longer holds")


def pin(index: str, fingerprint: str, stage_directory: str) -> list[Generation]:
    """The generations that the stage compares with: those there when it first started, or when it grew the index before.

    Raises SettingsError when one of them is gone.
    """
    found = {each.name: each for each in generations(index)}
    own = found.pop(fingerprint, None)
    path = storage.join(exchange.keys_directory(stage_directory), "against.json")
    names = list(found) if own is None else list(own.record["against"])
    storage.create_if_absent(path, json.dumps(names).encode())
    pinned = json.loads(storage.read_bytes(path))
    if missing := sorted(set(pinned) - set(found)):
        raise SettingsError(f"index {index} no longer holds generations {missing}, with which this stage was compared")
    return [found[name] for name in pinned]


def write_records(generation: str, kind: str, partition: int, scratch: str, records: np.ndarray) -> None:
    """The records (hashes..., row) of one piece of the key space, sorted; rows as four bytes while they fit."""
    order = np.lexsort([records[:, -1], *(records[:, i] for i in range(records.shape[1] - 2, -1, -1))])
    ordered = records[order]
    wide = len(ordered) > 0 and int(ordered[:, -1].max()) >= 1 << 32
    base = storage.join(generation, kind, f"{partition:08d}")
    exchange.write_array(scratch, f"{base}.keys", ordered[:, :-1])
    exchange.write_array(scratch, f"{base}.rows", ordered[:, -1].astype(np.uint64 if wide else np.uint32))
    exchange.write_array(scratch, f"{base}.fences", ordered[::_BLOCK, 0])


def lookup(generation: Generation, kind: str, width: int, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """The records uint64[n, width] (hashes..., row) whose first hash is among `wanted` (sorted, distinct), piece by piece.

    Reads only blocks that may hold one; memory is bounded by a run of blocks, whatever the size of the index.
    """
    if not len(wanted):
        return
    pieces = generation.record["partitions"]
    first, last = (int(hash_ >> np.uint64(32)) * pieces >> 32 for hash_ in (wanted[0], wanted[-1]))
    for piece in range(first, last + 1):
        base = storage.join(generation.directory, kind, f"{piece:08d}")
        fences = np.frombuffer(storage.read_bytes(f"{base}.fences"), np.uint64)
        if not len(fences):
            continue
        count = storage.size(f"{base}.keys") // (8 * (width - 1))
        row_type = np.dtype(np.uint64 if storage.size(f"{base}.rows") == 8 * count else np.uint32)
        begin = np.maximum(np.searchsorted(fences, wanted, side="left") - 1, 0)  # equal hashes may begin in the block before
        end = np.searchsorted(fences, wanted, side="right")
        edges = np.zeros(len(fences) + 1, np.int64)
        np.add.at(edges, begin, 1)
        np.add.at(edges, np.maximum(end, begin), -1)
        needed = np.flatnonzero(np.cumsum(edges)[:-1] > 0)
        if not len(needed):
            continue
        breaks = np.flatnonzero((np.diff(needed) != 1) | (needed[1:] // _RUN_BLOCKS != needed[:-1] // _RUN_BLOCKS)) + 1
        with storage.open_input(f"{base}.keys") as keys, storage.open_input(f"{base}.rows") as rows:
            for run in np.split(needed, breaks):
                start, stop = int(run[0]) * _BLOCK, min(int(run[-1] + 1) * _BLOCK, count)
                size = 8 * (width - 1)
                hashes = np.frombuffer(keys.read_at((stop - start) * size, start * size), np.uint64).reshape(-1, width - 1)
                numbers = np.frombuffer(rows.read_at((stop - start) * row_type.itemsize, start * row_type.itemsize), row_type)
                at = np.minimum(np.searchsorted(wanted, hashes[:, 0]), len(wanted) - 1)
                hit = wanted[at] == hashes[:, 0]
                if hit.any():
                    yield np.column_stack([hashes[hit], numbers[hit].astype(np.uint64)])
