"""`danlu diff`: what differs between two runs: settings, counts and statistics, and which rows changed sides and why.

Rows of a stage are joined by the hashes of their ids: each run's rows are written to a temporary folder as fixed records in
partitions by hash (28 bytes a row), and the partitions are joined one by one, so memory is bounded by `memory_rows` and the
disk takes the rest. An id that several rows share is joined row by row, in their order. Text is read for the examples alone.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import registry, shards
from operators.config import SettingsError, nearest
from operators.ledger import Ledger

ABSENT, KEPT = "absent", "kept"
EXCERPT_CHARACTERS = 160
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("side", "<u4"), ("file", "<u4"), ("row", "<u4")])
_SEEDS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
_MOST_PARTITIONS = 4096
_BUFFERED_ROWS = 1 << 18  # records gathered before they go to their partitions' files
_NO_STATISTICS = {"examples", "curve", "funnel"}  # told otherwise, or too long to tell: curves by their last point


@dataclass
class Example:
    """A row that changed sides: the number and the words that decided in each run, and the start of its text."""

    id: str
    before: str
    after: str
    text: str


@dataclass
class StageDiff:
    """One stage in two runs. `changes` maps (side in the first, side in the second) to rows; a side is `kept`, `absent`,
    `rejected OPERATOR: REASON`, `quarantined OPERATOR: REASON` or `removed REASON`."""

    stage: str
    only_in: str | None = None  # "first" or "second" where the other run has no such finished stage
    same: bool = False  # one fingerprint: the same rows by construction
    settings: list[tuple[str, Any, Any]] = field(default_factory=list)
    counts: list[tuple[str, float, float]] = field(default_factory=list)
    unchanged: int = 0
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[Example]] = field(default_factory=dict)
    note: str = ""


@dataclass
class RunDiff:
    first: str
    second: str
    settings: list[tuple[str, Any, Any]]
    stages: list[StageDiff]

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "second": self.second,
            "settings": [_pair(*item) for item in self.settings],
            "stages": [
                {
                    "stage": stage.stage,
                    "only_in": stage.only_in,
                    "same": stage.same,
                    "settings": [_pair(*item) for item in stage.settings],
                    "counts": [_pair(*item) for item in stage.counts],
                    "rows": {
                        "unchanged": stage.unchanged,
                        "changed": [
                            {
                                "from": before, "to": after, "rows": count,
                                "examples": [example.__dict__ for example in stage.examples.get((before, after), [])],
                            }
                            for (before, after), count in stage.changes.most_common()
                        ],
                    },
                    "note": stage.note,
                }
                for stage in self.stages
            ],
        }  # fmt: skip


def _pair(key: str, first: Any, second: Any) -> dict[str, Any]:
    return {"key": key, "first": first, "second": second}


def diff(
    first: str,
    second: str,
    *,
    stage: str | None = None,
    examples: int = 3,
    memory_rows: int = 4_000_000,
    scratch: str | None = None,
) -> RunDiff:
    """Compare two runs (their directories). `memory_rows` bounds how many rows are joined in memory at once, about 100 bytes
    each; `scratch` is the local folder for the partitions (default: the system's for temporary files).

    Raises FileNotFoundError when a directory is no run, SettingsError for a stage that neither run has finished.
    """
    records = [_record(run) for run in (first, second)]
    finished = [_finished(run, record) for run, record in zip((first, second), records, strict=True)]
    names = list(dict.fromkeys([*records[0]["order"], *records[1]["order"]]))
    if stage is not None:
        if stage not in names:
            raise SettingsError(f"neither run has a stage {stage!r}{nearest(stage, names)}")
        names = [stage]
    of_the_run = [
        _flat({"seed": record["seed"], "limit": record["limit"], "versions": _versions(places), "order": record["order"]})
        for record, places in zip(records, finished, strict=True)
    ]
    found = RunDiff(first, second, _differing(*of_the_run), [])
    for name in names:
        places = [stages.get(name) for stages in finished]
        if places[0] is None and places[1] is None:
            found.stages.append(StageDiff(name, note="not finished in either run"))
        elif places[0] is None or places[1] is None:
            found.stages.append(StageDiff(name, only_in="second" if places[0] is None else "first"))
        else:
            found.stages.append(_stage(name, places[0], places[1], examples, memory_rows, scratch))
    return found


def _record(run: str) -> dict[str, Any]:
    path = storage.join(run, "run.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"{run} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    return dict(json.loads(storage.read_bytes(path)))


def _finished(run: str, record: dict[str, Any]) -> dict[str, str]:
    """Stage -> directory of those that are done."""
    places = {name: storage.join(run, entry["directory"]) for name, entry in record["stages"].items()}
    return {name: place for name, place in places.items() if storage.exists(storage.join(place, "manifest.json"))}


def _versions(places: dict[str, str]) -> dict[str, str]:
    for place in places.values():
        return shards.load_manifest(place).versions
    return {}


def _stage(name: str, first: str, second: str, examples: int, memory_rows: int, scratch: str | None) -> StageDiff:
    manifests = [shards.load_manifest(place) for place in (first, second)]
    found = StageDiff(name, same=manifests[0].fingerprint == manifests[1].fingerprint)
    found.settings = _differing(*(_flat({"kind": one.kind, **one.config}) for one in manifests))
    counts = [_counts(one) for one in manifests]
    found.counts = [(key, one or 0, two or 0) for key, one, two in _differing(*counts)]
    if found.same and manifests[0].ledger == manifests[1].ledger:
        found.unchanged = manifests[0].rows
        return found
    if "export" in (manifests[0].kind, manifests[1].kind):
        found.note = "an export holds the rows of its input: compare that stage"
        return found
    sources = [list(_sources(place, manifest)) for place, manifest in zip((first, second), manifests, strict=True)]
    if any(not _has_ids(side) for side in sources):
        found.note = "its rows have no id: they are counted, not compared"
        return found
    with tempfile.TemporaryDirectory(prefix="danlu-diff-", dir=scratch) as folder:
        _Join(found, sources, Path(folder), examples, memory_rows).run()
    return found


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """`a.b.00.c` -> plain value; lists without mappings in them stay whole. An operator of a chain goes by its name, so that one
    more does not make all behind it differ."""
    named: dict[str, Any] = {}
    if isinstance(value, dict):
        named = {str(name): inner for name, inner in value.items()}
    elif isinstance(value, list) and path.rpartition(".")[2] == "operators" and all(map(_is_entry, value)):
        for entry in value:
            operator, options = registry.split(entry)
            number = sum(name.partition("#")[0] == operator for name in named)
            named[operator + (f"#{number + 1}" if number else "")] = options or "as it is"
        named["order"] = list(named)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        named = {f"{number:02d}": inner for number, inner in enumerate(value)}
    if named:
        start = f"{path}." if path else ""
        return {key: item for name, inner in named.items() for key, item in _flat(inner, f"{start}{name}").items()}
    return {path: value}


def _is_entry(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and len(value) == 1)


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = list(dict.fromkeys([*first, *second]))
    return [(key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)]


def _counts(manifest: shards.Manifest) -> dict[str, Any]:
    """The ledger and every number of the statistics; of a training curve its last point."""
    ledger: Ledger = manifest.ledger
    found: dict[str, Any] = {"rows": manifest.rows, **_flat(ledger.to_json())}
    stats = {key: value for key, value in manifest.stats.items() if key not in _NO_STATISTICS}
    curve = manifest.stats.get("curve")
    if isinstance(curve, list) and curve:
        stats["curve.last"] = curve[-1]
    found |= {key: value for key, value in _flat(_named_rows(stats)).items() if isinstance(value, int | float)}
    return found


def _named_rows(value: Any) -> Any:
    """Lists of scores as mappings by what each is of (model, set, language, source), so that one more shifts no other."""
    if isinstance(value, dict):
        return {key: _named_rows(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        named = {" ".join(str(text) for text in item.values() if isinstance(text, str)): item for item in value}
        if len(named) == len(value):
            return {name or "0": _named_rows(item) for name, item in named.items()}
    return value


@dataclass(frozen=True)
class _Source:
    """One file that tells sides of rows."""

    path: str
    what: str  # kept, rejects or removed
    part: shards.Part | None = None


def _sources(directory: str, manifest: shards.Manifest) -> Iterator[_Source]:
    for part in shards.parts([directory]):
        yield _Source(part.path, "kept", part)
    for entry in manifest.rejects:
        yield _Source(storage.join(directory, entry["name"]), "rejects")
    tables = manifest.files.get("removed") or []
    for name in [tables] if isinstance(tables, str) else tables:
        yield _Source(storage.join(directory, name), "removed")


def _has_ids(sources: list[_Source]) -> bool:
    kept = [source for source in sources if source.what == "kept"][:1]
    for source in kept or sources[:1]:
        with storage.open_input(source.path) as stream:
            return "id" in pq.read_schema(stream).names
    return True


class _Join:
    """The sides of the rows of one stage in two runs."""

    def __init__(self, found: StageDiff, sources: list[list[_Source]], folder: Path, examples: int, memory_rows: int) -> None:
        self._found, self._sources, self._folder, self._examples = found, sources, folder, examples
        self._memory_rows = memory_rows
        self._sides: dict[str, int] = {ABSENT: 0, KEPT: 1}
        self.largest = 0
        """Rows of the largest pair of partitions that was in memory."""

    def run(self) -> None:
        rows = max(sum(self._rows(source) for source in side) for side in self._sources)
        self._partitions = min(_MOST_PARTITIONS, max(1, -(-2 * rows * 5 // 4 // self._memory_rows)))  # a quarter for uneven ones
        for run in (0, 1):
            self._spill(run)
        names = {number: name for name, number in self._sides.items()}
        wanted: dict[tuple[int, int], list[tuple[np.void | None, np.void | None]]] = {}
        for partition in range(self._partitions):
            self._join(partition, names, wanted)
        for (before, after), rows_of in wanted.items():
            shown = [self._show(one, two) for one, two in rows_of]
            self._found.examples[names[before], names[after]] = shown

    @staticmethod
    def _rows(source: _Source) -> int:
        if source.part is not None:
            return source.part.kept_rows
        with storage.open_input(source.path) as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)

    def _spill(self, run: int) -> None:
        """Write (hash of the id, side, place) of every row of a run to the files of its partitions."""
        gathered: list[np.ndarray] = []
        count = 0
        for number, source in enumerate(self._sources[run]):
            for ids, sides, rows in self._read(source):
                records = np.empty(len(ids), _RECORD)
                series = pl.Series(pl.from_arrow(ids.cast(pa.large_string())))
                records["high"], records["low"] = (series.hash(seed).to_numpy() for seed in _SEEDS)
                records["side"], records["file"], records["row"] = sides, number, rows
                gathered.append(records)
                count += len(records)
                if count >= min(_BUFFERED_ROWS, self._memory_rows):
                    self._flush(run, gathered)
                    gathered, count = [], 0
        self._flush(run, gathered)

    def _flush(self, run: int, gathered: list[np.ndarray]) -> None:
        if not gathered:
            return
        records = np.concatenate(gathered)
        places = (records["high"] % np.uint64(self._partitions)).astype(np.int64)
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.arange(self._partitions + 1))
        for partition in range(self._partitions):
            begin, end = bounds[partition : partition + 2]
            if end > begin:
                with open(self._path(run, partition), "ab") as stream:
                    stream.write(records[order[begin:end]].tobytes())

    def _path(self, run: int, partition: int) -> Path:
        return self._folder / f"{run}-{partition:04d}"

    def _read(self, source: _Source) -> Iterator[tuple[pa.Array, np.ndarray, np.ndarray]]:
        """(ids, number of each row's side, row in the file)."""
        if source.part is not None:
            for ordinals, batch in shards.read(source.part, ["id"]):
                rows = ordinals.to_numpy().astype(np.int64) - source.part.first_ordinal
                yield batch.column("id"), np.full(batch.num_rows, 1, np.uint32), rows
            return
        start = 0
        with storage.open_input(source.path) as stream:
            file = pq.ParquetFile(stream)
            wanted = [name for name in ("id", "operator", "reason", "quarantined") if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=8192, columns=wanted):
                yield batch.column("id"), self._numbered(source.what, batch), np.arange(start, start + batch.num_rows)
                start += batch.num_rows

    def _numbered(self, what: str, batch: pa.RecordBatch) -> np.ndarray:
        reason = pc.fill_null(batch.column("reason").cast(pa.string()), "")
        if what == "removed":
            sides = pc.binary_join_element_wise(pa.scalar("removed"), reason, " ")
        else:
            fate = pc.if_else(batch.column("quarantined"), "quarantined", "rejected")
            sides = pc.binary_join_element_wise(fate, pc.binary_join_element_wise(batch.column("operator"), reason, ": "), " ")
        encoded = sides.dictionary_encode()
        numbers = [self._sides.setdefault(name, len(self._sides)) for name in encoded.dictionary.to_pylist()]
        return np.array(numbers, np.uint32)[encoded.indices.to_numpy()]

    def _join(self, partition: int, names: dict[int, str], wanted: dict[tuple[int, int], list[Any]]) -> None:
        loaded = [self._load(run, partition) for run in (0, 1)]
        self.largest = max(self.largest, len(loaded[0]) + len(loaded[1]))
        both = np.concatenate(loaded)
        if not len(both):
            return
        run = np.repeat(np.array([0, 1], np.uint8), [len(side) for side in loaded])
        occurrence = np.concatenate([_occurrences(side) for side in loaded])
        order = np.lexsort((run, occurrence, both["low"], both["high"]))
        both, run, occurrence = both[order], run[order], occurrence[order]
        pairs = (run[:-1] == 0) & (run[1:] == 1) & (occurrence[:-1] == occurrence[1:])
        pairs &= (both["high"][:-1] == both["high"][1:]) & (both["low"][:-1] == both["low"][1:])
        first = np.flatnonzero(pairs)
        alone = np.ones(len(both), bool)
        alone[first] = alone[first + 1] = False
        sides = [(both["side"][first], both["side"][first + 1], first, first + 1)]
        for number in (0, 1):
            at = np.flatnonzero(alone & (run == number))
            nothing = np.zeros(len(at), np.uint32), np.full(len(at), -1)
            side = both["side"][at]
            sides.append((side, nothing[0], at, nothing[1]) if number == 0 else (nothing[0], side, nothing[1], at))
        for before, after, one, two in sides:
            changed = before != after
            self._found.unchanged += int((~changed).sum())
            codes = before[changed].astype(np.uint64) << np.uint64(32) | after[changed].astype(np.uint64)
            one, two = one[changed], two[changed]
            for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
                key = int(code) >> 32, int(code) & 0xFFFFFFFF
                self._found.changes[names[key[0]], names[key[1]]] += int(count)
                kept = wanted.setdefault(key, [])
                for place in np.flatnonzero(codes == code)[: self._examples - len(kept)]:
                    kept.append(tuple(both[at[place]].copy() if at[place] >= 0 else None for at in (one, two)))

    def _load(self, run: int, partition: int) -> np.ndarray:
        path = self._path(run, partition)
        return np.fromfile(path, _RECORD) if path.exists() else np.empty(0, _RECORD)

    def _show(self, one: np.void | None, two: np.void | None) -> Example:
        told = [None if record is None else self._row(run, record) for run, record in enumerate((one, two))]
        known = [row for row in told if row is not None]
        text = next((str(row["text"]) for row in known if row.get("text")), "")
        return Example(known[0]["id"], _why(told[0]), _why(told[1]), re.sub(r"\s+", " ", text)[:EXCERPT_CHARACTERS])

    def _row(self, run: int, record: np.void) -> dict[str, Any]:
        source, position = self._sources[run][int(record["file"])], int(record["row"])
        with storage.open_input(source.path) as stream:
            file = pq.ParquetFile(stream)
            names = ("id", "text", "value", "similarity", "detail", "kept_id")
            columns = [name for name in names if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if position < rows:
                    found = dict(file.read_row_group(group, columns=columns).slice(position, 1).to_pylist()[0])
                    return {**found, "what": source.what}
                position -= rows
        raise FileNotFoundError(f"{source.path} has fewer rows than were read a moment ago; was it replaced meanwhile?")


def _occurrences(records: np.ndarray) -> np.ndarray:
    """For each row the number of earlier rows of the same id."""
    order = np.lexsort((records["low"], records["high"]))
    ordered = records[order]
    fresh = np.ones(len(records), bool)
    fresh[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (ordered["low"][1:] != ordered["low"][:-1])
    starts = np.flatnonzero(fresh)
    counts = np.arange(len(records)) - np.repeat(starts, np.diff([*starts, len(records)]))
    found = np.empty(len(records), np.int64)
    found[order] = counts
    return found


def _why(row: dict[str, Any] | None) -> str:
    """The number and the words behind a side."""
    if row is None:
        return ""
    measured = row.get("value") if row.get("value") is not None else row.get("similarity")
    words = [f"{measured:.4g}"] if measured is not None else []
    words += [str(row["detail"])] if row.get("detail") else []
    words += [f"kept instead: {row['kept_id']}"] if row.get("kept_id") else []
    return ", ".join(words)


def lines(found: RunDiff) -> list[str]:
    """What `danlu diff` prints."""
    told = [f"first: {found.first}", f"second: {found.second}", *_settings(found.settings, "")]
    for stage in found.stages:
        told.append("")
        if stage.only_in is not None:
            told.append(f"{stage.stage}: finished in the {stage.only_in} run alone")
            continue
        changed = sum(stage.changes.values())
        same = stage.same and not stage.counts and not changed
        told.append(f"{stage.stage}: {'the same' if same else f'{changed:,} rows changed sides, {stage.unchanged:,} did not'}")
        told += _settings(stage.settings, "  ")
        told += [f"  {key}: {_number(one)} -> {_number(two)}{_delta(one, two)}" for key, one, two in stage.counts]
        for (before, after), count in stage.changes.most_common():
            told.append(f"  {count:>9,}  {before} -> {after}")
            for example in stage.examples.get((before, after), []):
                known = example.before or example.after
                why = f"{example.before or '-'} -> {example.after or '-'}" if known else ""
                told.append(f"             {example.id}{why and f' ({why})'}: {example.text}")
        if stage.note:
            told.append(f"  {stage.note}")
    return told


def _settings(differing: Iterable[tuple[str, Any, Any]], indent: str) -> list[str]:
    return [f"{indent}{key}: {_plain(one)} -> {_plain(two)}" for key, one, two in differing]


def _plain(value: Any) -> str:
    return "(unset)" if value is None else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _delta(one: float, two: float) -> str:
    return f" ({(two - one) / abs(one):+.1%})" if one else ""
