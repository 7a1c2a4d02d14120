"""The input in pieces: files, their identity, and the plan of work units made from them.

A unit is a bounded piece of input that can be read alone, again, and anywhere: a byte range of a JSONL or text file
(a line belongs to the range that holds its first byte), a run of Parquet row groups, a byte range of a Wikipedia dump,
one compressed, CSV, Arrow or WARC file, or a handful of small files. Ids and row order do not depend on where the cuts fall.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators.sources import huggingface
from operators.sources.batches import RowRange, SourceBatch
from operators.sources.settings import WHOLE_FILES, ReadSettings, format_by_name, format_of, is_compressed
from operators.tables import content_hash, stable_id

__all__ = ["ReadSettings", "Unit", "file_identities", "find_files", "format_of", "is_compressed", "plan_units", "read_unit"]

HASHED_FILE_BYTES = 64 << 20  # of larger files only samples are hashed: the whole would be read twice
_SAMPLE_BYTES = 64 << 10
_IDENTITIES_AT_ONCE = 16
_MAX_FILES_A_UNIT = 512
_CLOSING = 16
"""A unit of whole small files that is an eighth full ends with a file whose name's hash this divides. So where units end depends
on names near by, and a file that comes, goes or changes its size changes the unit that it is in and hardly ever one after that."""

_READERS = {
    "warc": "operators.sources.warc:read_warc",
    "wet": "operators.sources.warc:read_warc",
    "jsonl": "operators.sources.lines:read_jsonl",
    "text": "operators.sources.lines:read_text_lines",
    "parquet": "operators.sources.parquet:read_parquet",
    "arrow": "operators.sources.arrow:read_arrow",
    "csv": "operators.sources.csv:read_csv",
    "tsv": "operators.sources.csv:read_csv",
    "html": "operators.sources.files:read_html_files",
    "markdown": "operators.sources.files:read_text_files",
    "text_files": "operators.sources.files:read_text_files",
    "pdf": "operators.sources.pdf:read_pdf_files",
    "wikipedia": "operators.sources.wikipedia:read_wikipedia",
}
_FILES_CHECKED = 16


@dataclass(frozen=True)
class Unit:
    """One piece of work. `start` and `stop` are bytes (JSONL, text), row groups (Parquet), or 0 and the file's size.

    `relative` is the path below the root that was asked for, the same on every machine; `files` is used instead of
    `path` by units of several small files, as paths (in `path` and `relative` stands the first). `limit` caps the
    unit's rows in a trial run. `key` changes whenever the unit's result could.
    """

    index: int
    path: str
    relative: str
    format: str
    start: int
    stop: int
    size: int  # bytes
    key: str = ""
    files: tuple[tuple[str, str], ...] = ()  # (path, relative)
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Unit:
        return cls(**{**data, "files": tuple((path, relative) for path, relative in data["files"])})


@dataclass(frozen=True)
class InputFile:
    """A file to read: full path, the name it is known by in ids, size, content identity (see `file_identities`)."""

    path: str
    relative: str
    size: int
    mtime_ns: int

    def identity(self) -> dict[str, Any]:
        known: dict[str, Any] = {"relative": self.relative, "size": self.size}
        if self.size <= HASHED_FILE_BYTES:
            return {**known, "sha256": storage.sha256_of(self.path)}
        return {**known, "mtime_ns": self.mtime_ns, "samples": self._samples()}

    def _samples(self) -> str:
        """A hash over the head, the middle and the tail: tells a file that was replaced and given its old size and time."""
        digest = hashlib.sha256()
        with storage.open_input(self.path) as stream:
            for start in (0, (self.size - _SAMPLE_BYTES) // 2, self.size - _SAMPLE_BYTES):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _identities(files: Sequence[InputFile]) -> Iterator[dict[str, Any]]:
    """Of each file in order; several are looked at at once, since a remote one takes a few round trips."""
    with ThreadPoolExecutor(_IDENTITIES_AT_ONCE) as pool:
        yield from pool.map(InputFile.identity, files)


def find_files(
    patterns: str | Sequence[str], base_directory: str, format_: str = "auto", split: str | None = None
) -> list[InputFile]:
    """The files that the patterns name, pattern by pattern, each once, in order of relative path.

    A file is known by its path below the root of its pattern; where two would be known by one name, as many of their
    parent folders are put before it as tell them apart. Of a directory, only files whose name fits `format_` are taken
    (`auto`: any known format; `any`: all; `huggingface`: see huggingface.data_files).
    Raises FileNotFoundError, naming the pattern, when one matches nothing.
    """
    found: dict[str, storage.FileEntry] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        full = storage.absolute(pattern, base_directory)
        try:
            entries = storage.list_files(full)
        except FileNotFoundError:
            raise FileNotFoundError(f"no file matches {pattern!r} (below {base_directory})") from None
        is_directory = [entry.path for entry in entries] != [full] and not any(mark in pattern for mark in "*?[")
        if format_ == "huggingface":
            entries = huggingface.data_files(entries, split, pattern)
        elif is_directory:
            entries = [entry for entry in entries if _fits(entry.relative, format_)]
            if not entries:
                kind = "readable" if format_ == "auto" else format_
                raise FileNotFoundError(f"directory {pattern!r} (below {base_directory}) holds no {kind} file")
        for entry in entries:
            found.setdefault(_place(entry), entry)
    names = _distinct({place: entry.relative for place, entry in found.items()})
    return [InputFile(entry.path, names[place], entry.size, entry.mtime_ns) for place, entry in found.items()]


def _place(entry: storage.FileEntry) -> str:
    """One spelling for one file, however its pattern was written."""
    return entry.path if storage.is_remote(entry.path) else storage.resolve(entry.path)[1]


def _fits(name: str, format_: str) -> bool:
    found = format_by_name(name)
    return format_ == "any" or (found is not None if format_ == "auto" else found == format_)


def _distinct(names: dict[str, str]) -> dict[str, str]:
    """{place: name} with parent folders put before names that occur twice."""
    while len(set(names.values())) < len(names):
        count = Counter(names.values())
        for place, name in names.items():
            if count[name] > 1:
                names[place] = "/".join(place.split("/")[-(name.count("/") + 2) :])
    return names


def file_identities(patterns: str | Sequence[str], base_directory: str) -> list[dict[str, Any]]:
    """For a stage's fingerprint: relative path, size and sha256 of each file (above 64 MiB: time and hashed samples).

    Of a directory every file counts, whatever its format. Raises FileNotFoundError when a pattern matches nothing.
    """
    entries = [patterns] if isinstance(patterns, str) else list(patterns)
    return list(_identities(find_files(entries, base_directory, "any")))


def plan_units(read: ReadSettings, base_directory: str, limit_rows: int | None = None, keyed: bool = True) -> list[Unit]:
    """Cut the input into units, in a fixed order.

    With `limit_rows` the plan ends where that many rows (readable or not) have been planned. Without `keyed` no file's
    content is looked at for identity and units have no key, which is enough to count them.
    Raises FileNotFoundError when a pattern matches nothing and SettingsError when a Parquet file lacks a named column.
    """
    planned = (dataclasses.replace(unit, index=index) for index, unit in enumerate(_plan(read, base_directory, keyed)))
    if limit_rows is None:
        return list(planned)
    units: list[Unit] = []
    left = limit_rows
    for unit in planned:
        if left <= 0:
            break
        rows = sum(len(batch.rows) + len(batch.bad) for batch in read_unit(unit, read, stop_row=left))
        if rows >= left:
            unit = dataclasses.replace(unit, limit=left, key=content_hash([unit.key, "limit", left]))
        units.append(unit)
        left -= rows
    return units


def _plan(read: ReadSettings, base_directory: str, keyed: bool = True) -> Iterator[Unit]:
    """All units, numbered later."""

    def make(file: InputFile, kind: str, cut: tuple[int, int, int], identity: Any, files: Sequence[InputFile] = ()) -> Unit:
        start, stop, size = cut
        key = content_hash({"start": start, "stop": stop, "format": kind, "file": identity}) if keyed else ""
        return Unit(0, file.path, file.relative, kind, start, stop, size, key, tuple((item.path, item.relative) for item in files))

    def together(files: list[InputFile]) -> Unit:
        kind = format_of(files[0].relative, read)
        cut = (0, len(files), sum(file.size for file in files))
        return make(files[0], "text_files" if kind == "text" else kind, cut, [identities[file] for file in files], files)

    small: list[InputFile] = []  # whole files as documents: many make a unit
    found = find_files(read.patterns(), base_directory, read.format, read.split)
    identities: dict[InputFile, Any] = dict(zip(found, _identities(found), strict=True)) if keyed else dict.fromkeys(found)
    for file in found:
        kind = format_of(file.relative, read)
        one_document = kind in WHOLE_FILES or (kind == "text" and read.one_document_per == "file")
        if small:
            size = sum(item.size for item in small) + file.size
            full = size > read.max_unit_bytes or len(small) >= _MAX_FILES_A_UNIT
            if full or not one_document or format_of(small[0].relative, read) != kind:
                yield together(small)
                small = []
        if one_document:
            small.append(file)
            if _closes(small, read.max_unit_bytes):
                yield together(small)
                small = []
            continue
        for cut in _cuts(file, kind, read):
            yield make(file, kind, cut, identities[file])
    if small:
        yield together(small)


def _closes(small: Sequence[InputFile], max_bytes: int) -> bool:
    """Whether a unit of whole files ends here, full or not."""
    filled = 8 * len(small) >= _MAX_FILES_A_UNIT or 8 * sum(file.size for file in small) >= max_bytes
    return filled and int(stable_id(small[-1].relative)[:8], 16) % _CLOSING == 0


def check_files(read: ReadSettings, base_directory: str) -> None:
    """Look at the first files before a run starts. Raises FileNotFoundError and SettingsError as `plan_units` would."""
    for file in find_files(read.patterns(), base_directory, read.format, read.split)[:_FILES_CHECKED]:
        kind = format_of(file.relative, read)
        if kind == "parquet":
            _row_group_cuts(file, read)
        elif kind in ("csv", "tsv"):
            from operators.sources.csv import check_header

            check_header(Unit(0, file.path, file.relative, kind, 0, file.size, file.size), read)


def _cuts(file: InputFile, kind: str, read: ReadSettings) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the units of one file."""
    if kind == "parquet":
        return _row_group_cuts(file, read)
    whole = [(0, file.size, file.size)]
    if kind in ("warc", "wet", "arrow") or file.size <= read.max_unit_bytes:
        return whole
    if kind == "wikipedia":
        from operators.sources.wikipedia import can_be_cut

        if not can_be_cut(file.path):
            return whole
    elif is_compressed(file.path):
        return whole
    elif kind in ("csv", "tsv", "text"):
        from operators.sources.charset import file_encoding, is_wide

        if (kind != "text" and read.csv.quoted_newlines) or is_wide(file_encoding(file.path, read)):
            return whole
    edges = [*range(0, file.size, read.max_unit_bytes), file.size]
    return [(start, stop, stop - start) for start, stop in itertools.pairwise(edges)]


def _row_group_cuts(file: InputFile, read: ReadSettings) -> list[tuple[int, int, int]]:
    from operators.sources.parquet import check_columns

    try:
        with storage.open_input(file.path) as stream:
            footer = pq.ParquetFile(stream)
            metadata, schema = footer.metadata, footer.schema_arrow
    except (pa.ArrowException, OSError):
        return [(0, 0, file.size)]  # the reader meets the same error and accounts for the file as one unreadable row
    check_columns(schema, read, file.path)
    cuts: list[tuple[int, int, int]] = []
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        group_bytes = metadata.row_group(group).total_byte_size
        if size and size + group_bytes > read.max_unit_bytes:
            cuts.append((start, group, size))
            start, size = group, 0
        size += group_bytes
    if metadata.num_row_groups > start:
        cuts.append((start, metadata.num_row_groups, size))
    return cuts


def read_unit(
    unit: Unit,
    read: ReadSettings,
    skip_rows: frozenset[int] = frozenset(),
    start_row: int = 0,
    stop_row: int | None = None,
    batch_rows: int = 2048,
    batch_bytes: int = 16 << 20,
    crashed: Mapping[int, str] | None = None,
    reading: Callable[[int], contextlib.AbstractContextManager[None]] = lambda row: contextlib.nullcontext(),
) -> Iterator[SourceBatch]:
    """Read rows `start_row` up to `stop_row` of a unit, without `skip_rows`, in order and in batches of bounded size.

    Every row of that range is in a batch's table or among its bad rows. Row numbers count from 0 inside the unit and do
    not depend on the arguments. Memory is bounded by a batch and one text of `max_text_bytes`. For `crashed` and
    `reading` see RowRange.
    """
    if unit.limit is not None:
        stop_row = unit.limit if stop_row is None else min(stop_row, unit.limit)
    module, _, function = _READERS[unit.format].partition(":")
    reader: Callable[..., Iterator[SourceBatch]] = getattr(importlib.import_module(module), function)
    rows = RowRange(start_row, stop_row, skip_rows, crashed or {}, reading)
    yield from reader(unit, read, rows, batch_rows, batch_bytes)


def default_source(relative: str) -> str:
    """The top folder of a relative path, else the file's stem."""
    top, slash, _ = relative.partition("/")
    return top if slash else relative.split(".")[0] or relative
