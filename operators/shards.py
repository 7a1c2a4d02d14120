"""Shard directories: Parquet parts, rejects and a manifest, committed unit by unit.

A stage's directory holds

    parts/NNNNNNNN-KKK-HHHHHHHHHHHH.parquet      rows of unit N, part K; H is the start of the file's SHA-256
    rejects/NNNNNNNN-KKK-HHHHHHHHHHHH.parquet    rejected and quarantined rows of unit N (tables.REJECTS)
    measures/NNNNNNNN-KKK-HHHHHHHHHHHH.parquet   what the filters of a corpus stage measured (operators.measures), if it was kept
    units/NNNNNNNN.json                          the record that commits unit N: names, checksums, ledger, statistics
    timings/NNNNNNNN.json                        seconds, peak memory, attempts; never compared
    manifest.json                                the finished stage; a directory without one is unfinished
    timings.json

File names are addressed by content, so a retried unit writes the same names with the same bytes, and two directories
made from one plan can be compared with `diff -r parts`. A dedup stage writes no rows: it is a *view*, whose manifest
lists the parts of its inputs with a removal bitmap each; `parts()` resolves views, `read()` applies the bitmaps.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import disk, storage
from operators import tables
from operators.config import SettingsError
from operators.ledger import Equation, Ledger, merge_stats

MAX_PART_BYTES = 256 << 20
_ROW_GROUP_BYTES = 8 << 20  # bounds what a reader of one record batch must hold


@dataclass(frozen=True)
class Part:
    """One Parquet file of a stage's rows, read through a removal bitmap if there is one.

    `first_ordinal` numbers the file's rows (before removal) among all rows of the inputs that the list was asked for.
    """

    path: str
    rows: int
    first_ordinal: int
    removed: str | None = None  # path of the bitmap: numpy.packbits, little bit order, 1 = removed
    removed_rows: int = 0

    @property
    def kept_rows(self) -> int:
        return self.rows - self.removed_rows


@dataclass
class Manifest:
    """A finished stage. Everything the report shows comes from here (and timings.json)."""

    stage: str
    kind: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]  # input stage name -> its directory relative to the run's directory
    parts: Sequence[dict[str, Any]]  # name (relative to the directory), rows, bytes, sha256
    rejects: Sequence[dict[str, Any]]
    ledger: Ledger
    stats: dict[str, Any] = field(default_factory=dict)
    equations: list[dict[str, Any]] = field(default_factory=list)
    view: Sequence[dict[str, Any]] | None = None  # for a view: path (relative to the run's directory), rows, removed, removed_rows
    files: dict[str, Any] = field(default_factory=dict)  # other outputs, e.g. {"tokenizer": "tokenizer.json"}
    schema: list[list[str]] = field(default_factory=list)  # [column, Arrow type] of the parts
    versions: dict[str, str] = field(default_factory=dict)
    measures: Sequence[dict[str, Any]] = field(default_factory=list)  # as `parts`

    @property
    def rows(self) -> int:
        if self.view is not None:
            return sum(part["rows"] - part["removed_rows"] for part in self.view)
        return sum(part["rows"] for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "ledger": self.ledger.to_json(), "rows": self.rows}


def load_manifest(directory: str) -> Manifest:
    """Raises FileNotFoundError when the stage is unfinished."""
    path = storage.join(directory, "manifest.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"{directory} has no manifest.json: the stage is not finished")
    data = json.loads(storage.read_bytes(path))
    _check_version(path, data)
    data.pop("rows", None)
    data |= {name: _load_entries(directory, data[name]) for name in _LISTS if name in data}
    return Manifest(**{**data, "ledger": Ledger.from_json(data["ledger"])})


def _check_version(path: str, data: dict[str, Any]) -> None:
    """Raises SettingsError for a manifest that this version cannot read."""
    written = (data.get("versions") or {}).get("tables", str(tables.SCHEMA_VERSION))
    unknown = sorted(set(data) - {item.name for item in fields(Manifest)} - {"rows"})
    needed = {item.name for item in fields(Manifest) if item.default is MISSING and item.default_factory is MISSING}
    missing = sorted(needed - set(data))
    reads = f"this Danlu reads version {tables.SCHEMA_VERSION}"
    if not str(written).isdigit() or not int(written) >= 1:
        raise SettingsError(f"{path}: the manifest is of an unknown version ({written!r}); {reads}: run the stage again")
    if int(written) > tables.SCHEMA_VERSION:
        raise SettingsError(f"{path}: the manifest is of version {written}, newer than this Danlu; {reads}: update Danlu")
    if int(written) < tables.SCHEMA_VERSION:
        raise SettingsError(f"{path}: the manifest is of the older version {written}; {reads}: run the recipe again")
    if unknown:
        raise SettingsError(f"{path}: the manifest has {', '.join(unknown)}, which only a newer Danlu knows: update Danlu")
    if missing:
        raise SettingsError(f"{path}: the manifest lacks {', '.join(missing)}; {reads}: restore it, or run the stage again")


def load_timings(directory: str) -> dict[str, Any]:
    path = storage.join(directory, "timings.json")
    return json.loads(storage.read_bytes(path)) if storage.exists(path) else {}


class UnitWriter:
    """Writes the parts and rejects of one work unit and commits them together.

    Nothing is visible as committed before `commit`; an abandoned writer leaves only scratch files, which
    `finish` clears. Memory is bounded by one row group (8 MiB of Arrow data) a stream, or one batch if that is larger.
    """

    def __init__(self, directory: str, unit: int, max_part_bytes: int = MAX_PART_BYTES) -> None:
        self.directory, self.unit = directory, unit
        self._streams = {
            "parts": _PartStream(directory, "parts", unit, max_part_bytes),
            "rejects": _PartStream(directory, "rejects", unit, max_part_bytes),
            "measures": _PartStream(directory, "measures", unit, max_part_bytes),
        }
        self._started, self._cpu = time.time(), _cpu_seconds()

    def write(self, table: pa.Table) -> None:
        """Append rows to the unit's parts. All tables of one unit have one schema."""
        with self._or_abandon():
            self._streams["parts"].write(table)

    def reject(self, table: pa.Table) -> None:
        """Append rows of schema tables.REJECTS."""
        with self._or_abandon():
            self._streams["rejects"].write(table)

    def measure(self, table: pa.Table) -> None:
        """Append rows of measures (see operators.measures). All tables of one unit have one schema."""
        with self._or_abandon():
            self._streams["measures"].write(table)

    def commit(self, ledger: Ledger, stats: dict[str, Any] | None = None, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Publish the files, then the unit's record. Returns the record that is in force (an earlier one, if any).

        Raises LedgerError when the account does not balance or disagrees with the rows written.
        """
        ledger.check(f"{self.directory}, unit {self.unit}")
        with self._or_abandon():
            parts, rejects, measures = (self._streams[kind].close() for kind in ("parts", "rejects", "measures"))
        written = sum(part["rows"] for part in parts)
        if written != ledger.kept:
            raise RuntimeError(f"{self.directory}, unit {self.unit}: ledger keeps {ledger.kept} rows, {written} were written")
        record = {
            "unit": self.unit,
            "parts": parts,
            "rejects": rejects,
            "ledger": ledger.to_json(),
            "stats": stats or {},
            **({"measures": measures} if measures else {}),
            **(extra or {}),
        }
        storage.write_bytes(
            storage.join(self.directory, "timings", f"{self.unit:08d}.json"),
            _json(
                {
                    "seconds": time.time() - self._started,
                    "cpu_seconds": _cpu_seconds() - self._cpu,
                    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            ),
        )
        path = storage.join(self.directory, "units", f"{self.unit:08d}.json")
        if not storage.create_if_absent(path, _json(record)):
            return dict(json.loads(storage.read_bytes(path)))
        return record

    def close_rejects(self) -> list[dict[str, Any]]:
        """Publish the rejects alone, for a stage whose rows lie elsewhere; their entries for the unit's record."""
        with self._or_abandon():
            return self._streams["rejects"].close()

    def abandon(self) -> None:
        """Remove the scratch files."""
        for stream in self._streams.values():
            stream.abandon()

    @contextmanager
    def _or_abandon(self) -> Iterator[None]:
        """What a full disk or a store that is gone ends must not stay and take room, least of all in a folder of the system's."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise


class _PartStream:
    """Parquet files of bounded size, named by content when closed."""

    def __init__(self, directory: str, kind: str, unit: int, max_bytes: int) -> None:
        self._directory, self._kind, self._unit, self._max_bytes = directory, kind, unit, max_bytes
        self._writer: pq.ParquetWriter | None = None
        self._scratch = ""
        self._rows = 0
        self._done: list[dict[str, Any]] = []
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0

    def write(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        self._pending.append(table)
        self._pending_bytes += table.nbytes
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        table = pa.concat_tables(self._pending).combine_chunks()
        self._pending, self._pending_bytes = [], 0
        if self._writer is None:
            self._scratch = storage.scratch_file(self._directory)
            encoded: Any = True
            if self._kind == "measures":  # numbers that hardly repeat: a dictionary would cost more than it saves
                encoded = [item.name for item in table.schema if not pa.types.is_floating(item.type)]
            with disk.writing(self._scratch):
                self._writer = pq.ParquetWriter(
                    self._scratch, table.schema, compression="zstd", store_schema=True, use_dictionary=encoded
                )
        with disk.writing(self._scratch):
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._rows += table.num_rows
        if os.path.getsize(self._scratch) >= self._max_bytes:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._writer is None:
            return
        with disk.writing(self._scratch):
            self._writer.close()
        self._writer = None
        digest = storage.sha256_of(self._scratch)
        name = f"{self._kind}/{self._unit:08d}-{len(self._done):03d}-{digest[:12]}.parquet"
        entry = {"name": name, "rows": self._rows, "bytes": os.path.getsize(self._scratch), "sha256": digest}
        storage.publish(self._scratch, storage.join(self._directory, name))
        self._done.append(entry)
        self._rows, self._scratch = 0, ""

    def close(self) -> list[dict[str, Any]]:
        self._flush()
        self._finish_file()
        return self._done

    def abandon(self) -> None:
        if self._writer is not None:
            with suppress(OSError):  # a full disk takes no footer either
                self._writer.close()
            self._writer = None
        if self._scratch and os.path.exists(self._scratch):
            os.unlink(self._scratch)


def committed_numbers(directory: str) -> set[int]:
    """The numbers of the units committed so far, by their records' names: nothing is read."""
    return {_number(entry) for entry in _list(storage.join(directory, "units"))}


def committed_units(directory: str) -> dict[int, dict[str, Any]]:
    """The records of the units committed so far, all in memory: for stages of few units."""
    return dict(unit_records(directory))


def unit_records(directory: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of the units committed so far, in order of their numbers, a bounded number of them in memory."""
    entries = _list(storage.join(directory, "units"))
    yield from zip(map(_number, entries), map(json.loads, storage.read_each(entry.path for entry in entries)), strict=True)


def unit_record(directory: str, number: int) -> dict[str, Any]:
    """The record of one committed unit. Raises FileNotFoundError."""
    return dict(json.loads(storage.read_bytes(storage.join(directory, "units", f"{number:08d}.json"))))


def _number(entry: storage.FileEntry) -> int:
    return int(entry.relative.removesuffix(".json"))


def copy_unit(source: str, record: dict[str, Any], directory: str, unit: int) -> None:
    """Take over a committed unit of another directory under the number `unit` (names carry the number, so they change)."""
    renamed: dict[str, list[dict[str, Any]]] = {}
    for kind in ("parts", "rejects", "measures"):
        if kind not in record:
            continue
        renamed[kind] = []
        for part in record[kind]:
            name = f"{kind}/{unit:08d}-{part['name'].split('-', 1)[1]}"
            storage.copy(storage.join(source, part["name"]), storage.join(directory, name))
            renamed[kind].append({**part, "name": name})
    storage.create_if_absent(storage.join(directory, "units", f"{unit:08d}.json"), _json({**record, **renamed, "unit": unit}))


def _list(directory: str) -> list[storage.FileEntry]:
    try:
        return storage.list_files(directory)
    except FileNotFoundError:
        return []


def finish(
    directory: str,
    *,
    stage: str,
    kind: str,
    fingerprint: str,
    config: dict[str, Any],
    inputs: dict[str, str],
    ledger: Ledger | None = None,
    stats: dict[str, Any] | None = None,
    equations: Sequence[Equation] = (),
    view: list[dict[str, Any]] | None = None,
    files: dict[str, Any] | None = None,
    timings: dict[str, Any] | None = None,
) -> Manifest:
    """Fold the unit records into the manifest, which makes the stage finished.

    `ledger` replaces the sum of the units' ledgers for stages that have no units. Raises LedgerError when an account
    or an equation does not balance.
    """
    total, merged = Ledger(), dict(stats or {})
    found: dict[str, list[dict[str, Any]]] = {"parts": [], "rejects": [], "measures": []}
    for _, record in unit_records(directory):
        total.add(Ledger.from_json(record["ledger"]))
        merge_stats(merged, record["stats"])
        for of_kind, entries in found.items():
            entries += record.get(of_kind, ())
    if ledger is not None:
        total = ledger
    total.check(f"stage {stage}")
    for equation in equations:
        equation.check(f"stage {stage}")
    parts, rejects, measures = found.values()
    schema: list[list[str]] = []
    if parts:
        with storage.open_input(storage.join(directory, parts[0]["name"])) as stream:
            schema = [[f.name, str(f.type)] for f in pq.read_schema(stream)]
    manifest = Manifest(
        stage, kind, fingerprint, config, inputs, parts, rejects, total, merged,
        [equation.__dict__ for equation in equations], view, files or {}, schema, _versions(), measures,
    )  # fmt: skip
    spent = {"units": 0, "unit_seconds": 0.0, "cpu_seconds": 0.0, "peak_rss_bytes": 0}
    for text in storage.read_each(entry.path for entry in _list(storage.join(directory, "timings"))):
        item = json.loads(text)
        spent["units"] += 1
        spent["unit_seconds"] += item["seconds"]
        spent["cpu_seconds"] += item["cpu_seconds"]
        spent["peak_rss_bytes"] = max(spent["peak_rss_bytes"], item["peak_rss_bytes"])
    storage.write_bytes(storage.join(directory, "timings.json"), _json({**spent, **(timings or {})}))
    save_manifest(directory, manifest)
    storage.delete(storage.join(directory, ".scratch"))
    return manifest


_LISTS = ("parts", "rejects", "measures", "view")
_MOST_LISTED = 10_000  # entries of one kind that stand in manifest.json itself; more are a Parquet file beside it


class Entries(Sequence[dict[str, Any]]):
    """Many entries of a manifest as an Arrow table: a seventh of what the dictionaries take, each made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.table.take(list(range(len(self))[index])).to_pylist()
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=8192):
            yield from batch.to_pylist()


def save_manifest(directory: str, manifest: Manifest) -> None:
    """Write manifest.json, after the lists of it that are too long to stand in it."""
    storage.write_bytes(storage.join(directory, "manifest.json"), manifest_bytes(directory, manifest))


def manifest_bytes(directory: str, manifest: Manifest) -> bytes:
    """What is to stand in manifest.json; lists that are too long for it are written beside it, under the name of their content."""
    data = manifest.to_json()
    for name in _LISTS:
        entries = data[name]
        if entries is None or len(entries) <= _MOST_LISTED:
            data[name] = None if entries is None else list(entries)
            continue
        table = entries.table if isinstance(entries, Entries) else pa.Table.from_pylist(list(entries))
        scratch = storage.scratch_file(directory)
        pq.write_table(table, scratch, compression="zstd")
        digest = storage.sha256_of(scratch)
        data[name] = {"parquet": f"manifest.{name}-{digest[:12]}.parquet", "sha256": digest, "entries": len(entries)}
        storage.publish(scratch, storage.join(directory, data[name]["parquet"]))
    return _json(data)


def listed_beside(directory: str, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of a manifest (as JSON) that stand in files beside it."""
    for name in _LISTS:
        if isinstance(record.get(name), dict):
            yield from _load_entries(directory, record[name])


def _load_entries(directory: str, listed: Any) -> Any:
    """A list of a manifest as it stands, or from the Parquet file that it names. Raises OSError for a file that was changed."""
    if not isinstance(listed, dict):
        return listed
    path = storage.join(directory, listed["parquet"])
    data = storage.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != listed["sha256"]:
        raise OSError(f"{path} is not the file that manifest.json names: restore it, or run the stage again")
    return Entries(pq.read_table(pa.BufferReader(data)))


def parts(directories: Sequence[str]) -> list[Part]:
    """All parts of finished stages in order, views resolved, with ordinals that run on from one to the next."""
    found: list[Part] = []
    ordinal = 0
    for directory in directories:
        for path, rows, removed, removed_rows in _resolve(directory):
            found.append(Part(path, rows, ordinal, removed, removed_rows))
            ordinal += rows
    return found


def columns(directory: str) -> set[str]:
    """The columns of a finished stage's rows, of a view too; empty where there are no rows."""
    for part in parts([directory])[:1]:
        with storage.open_input(part.path) as stream:
            return set(pq.read_schema(stream).names)
    return set()


def follow(directory: str, waiting: Callable[[], None], first_ordinal: int = 0) -> Iterator[Part | None]:
    """The parts of a stage in the order of its units, each as soon as it and all before it are committed.

    None means that nothing is there yet; `waiting` is called before each, and raises when nothing will come any more.
    A finished stage gives its parts at once. Raises SettingsError as `parts` does.
    """
    ordinal, unit = first_ordinal, 0
    given: set[str] = set()
    while not storage.exists(storage.join(directory, "manifest.json")):
        record = storage.join(directory, "units", f"{unit:08d}.json")
        if not storage.exists(record):
            waiting()
            yield None
            continue
        for part in json.loads(storage.read_bytes(record))["parts"]:
            given.add(storage.join(directory, part["name"]))
            yield Part(storage.join(directory, part["name"]), part["rows"], ordinal)
            ordinal += part["rows"]
        unit += 1
    for left in parts([directory]):
        if left.path not in given:
            yield replace(left, first_ordinal=first_ordinal + left.first_ordinal)


def _resolve(directory: str) -> Iterator[tuple[str, int, str | None, int]]:
    manifest = load_manifest(directory)
    if manifest.view is None:
        if manifest.kind == "export" and manifest.ledger.kept and not manifest.parts:
            where = manifest.files.get("export", {}).get("path")
            raise SettingsError(
                f"stage {manifest.stage} cannot be an input: its rows lie in {where!r} or are JSON Lines; "
                "an export without `path`, as Parquet, can be"
            )
        for part in manifest.parts:
            yield storage.join(directory, part["name"]), part["rows"], None, 0
        return
    run = run_directory(directory)
    for part in manifest.view:
        bitmap = storage.join(directory, part["removed"]) if part["removed"] else None
        yield storage.join(run, part["path"]), part["rows"], bitmap, part["removed_rows"]


_FINGERPRINT = re.compile(r"[0-9a-f]{16}\Z")


def stage_directories(run: str) -> list[str]:
    """Every `RUN/STAGE/FINGERPRINT`, in order: those of the recipe as it is, and those that it has left behind."""
    return [
        directory
        for stage in storage.list_directories(run)
        for directory in storage.list_directories(stage)
        if _FINGERPRINT.match(directory.rsplit("/", 1)[1])
    ]


def run_directory(stage_directory: str) -> str:
    """`runs/NAME` of `runs/NAME/STAGE/FINGERPRINT`."""
    return stage_directory.rstrip("/").rsplit("/", 2)[0]


_LINK = "run:"


def linked(stage_directory: str, path: str) -> str:
    """An entry of `files` that stands for what another stage of the run made; nothing is copied."""
    return _LINK + relative_to_run(stage_directory, path)


def output(directory: str, entry: str) -> str:
    """The path of an entry of a manifest's `files`: below the stage's directory, or what it is linked to."""
    if entry.startswith(_LINK):
        return storage.join(run_directory(directory), entry.removeprefix(_LINK))
    return storage.join(directory, entry)


def relative_to_run(stage_directory: str, path: str) -> str:
    """`path` (of a part or a stage) as manifests name it: relative to the run's directory."""
    run = run_directory(stage_directory)
    if not path.startswith(run + "/"):
        raise ValueError(f"{path} is not below the run {run}")
    return path[len(run) + 1 :]


def read(part: Part, columns: Sequence[str] | None = None, batch_rows: int = 8192) -> Iterator[tuple[pa.Array, pa.RecordBatch]]:
    """The surviving rows of a part in order, as (ordinals uint64, rows), batch by batch.

    Memory is bounded by a row group. `columns` that the file lacks raise KeyError naming file and column.
    """
    keep = ~load_bitmap(part) if part.removed else None
    with storage.open_input(part.path) as stream:
        file = pq.ParquetFile(stream)
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise KeyError(f"{part.path} has no column {sorted(missing)}; it has {file.schema_arrow.names}")
        position = 0
        for batch in file.iter_batches(batch_size=batch_rows, columns=list(columns) if columns is not None else None):
            ordinals = np.arange(position, position + batch.num_rows, dtype=np.uint64)
            position += batch.num_rows
            if keep is not None:
                mask = keep[ordinals]
                if not mask.any():
                    continue
                ordinals, batch = ordinals[mask], batch.filter(pa.array(mask))
            yield pa.array(ordinals + np.uint64(part.first_ordinal)), batch


def publish_by_content(scratch: str, directory: str, folder: str, number: int) -> str:
    """Move a finished Parquet file to `folder/NNNNNNNN-HHHHHHHHHHHH.parquet`; its name relative to the directory."""
    name = f"{folder}/{number:08d}-{storage.sha256_of(scratch)[:12]}.parquet"
    storage.publish(scratch, storage.join(directory, name))
    return name


def load_bitmap(part: Part) -> np.ndarray:
    """bool[rows], True = removed."""
    if part.removed is None:
        return np.zeros(part.rows, bool)
    packed = np.frombuffer(storage.read_bytes(part.removed), np.uint8)
    return np.unpackbits(packed, count=part.rows, bitorder="little").view(bool)


def save_bitmap(directory: str, index: int, removed: np.ndarray) -> str:
    """Write bool[rows] and return the file's name relative to the directory."""
    data = np.packbits(removed, bitorder="little").tobytes()
    name = f"removed/{index:08d}-{hashlib.sha256(data).hexdigest()[:12]}.bits"
    storage.write_bytes(storage.join(directory, name), data)
    return name


def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    found = {"python": platform.python_version(), "tables": str(tables.SCHEMA_VERSION)}
    for name in ("ray", "pyarrow", "numpy"):
        with suppress(metadata.PackageNotFoundError):  # what writes a stage by itself needs no Ray
            found[name] = metadata.version(name)
    return found


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
