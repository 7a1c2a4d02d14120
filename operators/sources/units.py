"""What to read and in which pieces: the `read` settings of a recipe, and the plan of work units made from them.

A unit is a bounded piece of input that can be read alone, again, and anywhere: a byte range of a JSONL or text file
(a line belongs to the range that holds its first byte), a run of Parquet row groups, one compressed or WARC file, or a
handful of small files. Ids and row order do not depend on where the cuts fall.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from pydantic import Field

from cluster import storage
from operators.config import Settings, SettingsError
from operators.sources.batches import RowRange, SourceBatch
from operators.tables import content_hash

Format = Literal["auto", "warc", "wet", "jsonl", "parquet", "html", "text"]

HASHED_FILE_BYTES = 64 << 20  # larger files are identified by size and modification time: hashing them would read them twice
_MAX_FILES_A_UNIT = 512

_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
_FORMATS = {
    ".warc": "warc", ".wet": "wet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".html": "html", ".htm": "html", ".xhtml": "html", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
_READERS = {
    "warc": "operators.sources.warc:read_warc",
    "wet": "operators.sources.warc:read_warc",
    "jsonl": "operators.sources.lines:read_jsonl",
    "text": "operators.sources.lines:read_text_lines",
    "parquet": "operators.sources.parquet:read_parquet",
    "html": "operators.sources.files:read_html_files",
    "text_files": "operators.sources.files:read_text_files",
}
_COLUMN_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
_FILES_CHECKED = 16


class ReadSettings(Settings):
    """What a corpus stage reads."""

    format: Format = Field("auto", description="How the files are written; auto decides by file name")
    path: str | list[str] = Field(description="A file, directory, glob (`*`, `**`) or URI, or a list of them")
    text_column: str = Field("text", description="Column (Parquet) or key (JSONL) of the text")
    id_column: str | None = Field(
        "id",
        description="Column or key of the document's id; a row without one gets an id made from its file's path and its place",
    )
    url_column: str | None = Field("url", description="Column or key of the document's address, if there is one")
    source: str | None = Field(None, description="Name of the source; default: the source column, else the top folder or file stem")
    source_column: str | None = Field("source", description="Column or key of the source's name, used where `source` is not given")
    columns: list[str] = Field(
        default_factory=list,
        description="Further columns to carry along, as `name` or `name:type` (string, int64, float64, bool); "
        "without a type, Parquet keeps its own and JSONL makes strings",
    )
    one_document_per: Literal["line", "file"] = Field("line", description="For plain text: is a line a document, or a file?")
    max_text_bytes: int = Field(16 << 20, ge=1, description="A longer text (in UTF-8) or page is set aside as too_long")
    max_unit_bytes: int = Field(64 << 20, ge=1, description="Size of a work unit in bytes, where a file can be cut")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ReadSettings:
        for entry in self.columns:
            name, _, kind = entry.partition(":")
            if kind and kind not in _COLUMN_TYPES:
                raise ValueError(f"column {entry!r}: unknown type {kind!r}; valid: {', '.join(_COLUMN_TYPES)}")
            if name in ("id", "text", "source", "url", "content", "content_type", "charset"):
                raise ValueError(f"column {name!r} is one that every document has; name it in text_column, id_column, ... instead")
        if self.one_document_per == "file" and self.format not in ("text", "auto"):
            raise ValueError(f"one_document_per: file is for plain text, the format is {self.format}")
        if self.format in ("warc", "wet", "html", "text"):
            fields = type(self).model_fields
            named = ("text_column", "id_column", "url_column", "source_column")
            given = [name for name in named if getattr(self, name) != fields[name].default] + ["columns"] * bool(self.columns)
            if given:
                raise ValueError(f"{given[0]}: files of format {self.format} have no named columns")
        return self

    def patterns(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    def carried(self) -> list[tuple[str, pa.DataType | None]]:
        """(name, declared type or None) of `columns`."""
        pairs = (entry.partition(":") for entry in self.columns)
        return [(name, _COLUMN_TYPES[kind] if kind else None) for name, _, kind in pairs]


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
        return {**known, "mtime_ns": self.mtime_ns}


def find_files(patterns: str | Sequence[str], base_directory: str, format_: str = "auto") -> list[InputFile]:
    """The files that the patterns name, pattern by pattern, each once, in order of relative path.

    A file is known by its path below the root of its pattern; where two would be known by one name, as many of their
    parent folders are put before it as tell them apart. Of a directory, only files whose name fits `format_` are taken
    (`auto`: any known format; `any`: all).
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
        if is_directory:
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
    found = _format_by_name(name)
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
    """For a stage's fingerprint: relative path, size and sha256 of each file (mtime_ns instead above 64 MiB).

    Of a directory every file counts, whatever its format. Raises FileNotFoundError when a pattern matches nothing.
    """
    entries = [patterns] if isinstance(patterns, str) else list(patterns)
    return [file.identity() for file in find_files(entries, base_directory, "any")]


def format_of(name: str, read: ReadSettings) -> str:
    """The format of a file. Raises SettingsError when `auto` cannot tell."""
    if read.format != "auto":
        return read.format
    found = _format_by_name(name)
    if found is None:
        raise SettingsError(
            f"read.format: auto cannot tell the format of {name!r} from its name "
            f"(known: {', '.join(_FORMATS)}, with or without {', '.join(_COMPRESSED)}); give read.format"
        )
    return found


def _format_by_name(name: str) -> str | None:
    lowered = name.lower()
    while lowered.endswith(_COMPRESSED):
        lowered = lowered[: lowered.rindex(".")]
    return next((kind for suffix, kind in _FORMATS.items() if lowered.endswith(suffix)), None)


def is_compressed(name: str) -> bool:
    return name.lower().endswith(_COMPRESSED)


def plan_units(read: ReadSettings, base_directory: str, limit_rows: int | None = None) -> list[Unit]:
    """Cut the input into units, in a fixed order.

    With `limit_rows` the plan ends where that many rows (readable or not) have been planned.
    Raises FileNotFoundError when a pattern matches nothing and SettingsError when a Parquet file lacks a named column.
    """
    planned = (dataclasses.replace(unit, index=index) for index, unit in enumerate(_plan(read, base_directory)))
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


def _plan(read: ReadSettings, base_directory: str) -> Iterator[Unit]:
    """All units, numbered later."""

    def make(file: InputFile, kind: str, cut: tuple[int, int, int], identity: Any, files: Sequence[InputFile] = ()) -> Unit:
        start, stop, size = cut
        key = content_hash({"start": start, "stop": stop, "format": kind, "file": identity})
        return Unit(0, file.path, file.relative, kind, start, stop, size, key, tuple((item.path, item.relative) for item in files))

    def together(files: list[InputFile]) -> Unit:
        kind = "html" if format_of(files[0].relative, read) == "html" else "text_files"
        cut = (0, len(files), sum(file.size for file in files))
        return make(files[0], kind, cut, [file.identity() for file in files], files)

    small: list[InputFile] = []  # whole files as documents: many make a unit
    for file in find_files(read.patterns(), base_directory, read.format):
        kind = format_of(file.relative, read)
        one_document = kind == "html" or (kind == "text" and read.one_document_per == "file")
        if small:
            size = sum(item.size for item in small) + file.size
            full = size > read.max_unit_bytes or len(small) >= _MAX_FILES_A_UNIT
            if full or not one_document or format_of(small[0].relative, read) != kind:
                yield together(small)
                small = []
        if one_document:
            small.append(file)
            continue
        identity = file.identity()
        for cut in _cuts(file, kind, read):
            yield make(file, kind, cut, identity)
    if small:
        yield together(small)


def check_files(read: ReadSettings, base_directory: str) -> None:
    """Look at the first files before a run starts. Raises FileNotFoundError and SettingsError as `plan_units` would."""
    for file in find_files(read.patterns(), base_directory, read.format)[:_FILES_CHECKED]:
        if format_of(file.relative, read) == "parquet":
            _row_group_cuts(file, read)


def _cuts(file: InputFile, kind: str, read: ReadSettings) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the units of one file."""
    if kind == "parquet":
        return _row_group_cuts(file, read)
    if kind in ("warc", "wet") or is_compressed(file.path) or not file.size:
        return [(0, file.size, file.size)]
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
