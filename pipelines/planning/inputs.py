"""How much an input holds, from sizes and footers of its files and the first megabyte of a few: nothing is read whole."""

from __future__ import annotations

import bz2
import json
import lzma
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators.sources.units import ReadSettings, Unit, find_files, format_of, is_compressed, plan_units, read_unit

_HEAD_BYTES = 1 << 20
_SAMPLED_FILES = 4
_SAMPLED_ROWS = 64
_SMALL_UNIT_BYTES = 8 << 20  # read whole: files often begin with one language
_FOOTERS = 256
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\u3000-\u303f\uff00-\uffef]")

#: What begins a row in the decompressed bytes of a format whose rows can be counted without parsing.
_ROW_MARKS = {
    "jsonl": b"\n", "text": b"\n", "csv": b"\n", "tsv": b"\n", "warc": b"\r\nWARC-Type: response",
    "wet": b"\r\nWARC-Type: conversion", "wikipedia": b"<page>",
}  # fmt: skip


@dataclass(frozen=True)
class InputSize:
    """`raw_bytes` are decompressed. `text_bytes` are of the text column, or of HTML where rows are pages (`html`).

    `rows` and `text_bytes` are None where the format does not let them be told from the beginning of a file.
    `formats`: raw bytes by format. `sampled`: rows and bytes come from a sample, not from footers.
    """

    units: int
    files: int
    file_bytes: float
    raw_bytes: float
    rows: float | None
    text_bytes: float | None
    chinese: float
    html: bool
    formats: dict[str, float]
    sampled: bool


def input_size(read: ReadSettings, base_directory: str, limit: int | None) -> InputSize:
    """Of a corpus stage's `read`. Raises FileNotFoundError when a pattern matches nothing, SettingsError."""
    units = plan_units(read, base_directory, limit, keyed=False)
    files = find_files(read.patterns(), base_directory, read.format, read.split)
    by_format: dict[str, list[tuple[str, int]]] = {}
    for file in files:
        by_format.setdefault(format_of(file.relative, read), []).append((file.path, file.size))
    raw = rows = text = 0.0
    known, sampled, html, chinese_bytes, seen_bytes = True, False, False, 0.0, 0.0
    formats: dict[str, float] = {}
    for kind, entries in by_format.items():
        size = float(sum(size for _, size in entries))
        rows_here: float | None
        text_here: float | None
        if kind == "parquet":
            raw_here, rows_here, text_here = _parquet([path for path, _ in entries], read.text_column)
        else:
            ratio, each = _heads(entries, kind)
            raw_here, rows_here, text_here = size * ratio, None if each is None else size * ratio * each, None
            sampled = True
        sample = _sample([unit for unit in units if _kind(unit) == kind], read)
        if kind in ("html", "markdown", "text_files", "pdf") or (kind == "text" and read.one_document_per == "file"):
            rows_here = float(len(entries))
        if sample is not None:
            html = html or sample.html
            chinese_bytes, seen_bytes = chinese_bytes + sample.chinese_bytes, seen_bytes + sample.bytes
            if text_here is None and rows_here is not None and sample.rows:
                text_here = rows_here * sample.bytes / sample.rows
        formats[kind] = raw_here
        raw += raw_here
        if rows_here is None or text_here is None:
            known = False
        else:
            rows, text = rows + rows_here, text + text_here
    chinese = chinese_bytes / seen_bytes if seen_bytes else 0.0
    file_bytes = float(sum(file.size for file in files))
    if limit is not None and known and rows > limit:
        share = limit / rows
        rows, text, raw = float(limit), text * share, raw * share
        formats = {name: size * share for name, size in formats.items()}
        file_bytes *= share
    return InputSize(
        len(units), len(files), file_bytes, raw, rows if known else None, text if known else None, chinese, html, formats, sampled
    )


def _kind(unit: Unit) -> str:
    return "text" if unit.format == "text_files" else unit.format


def _parquet(paths: Sequence[str], column: str) -> tuple[float, float, float]:
    """(bytes of all columns, rows, bytes of the text column), decompressed, from footers; of many files some are looked at.

    A file whose footer cannot be read counts as nothing: the run sets it aside as one unreadable row.
    """
    chosen = paths if len(paths) <= _FOOTERS else [paths[int(i)] for i in np.linspace(0, len(paths) - 1, _FOOTERS)]
    raw = rows = text = 0.0
    for path in chosen:
        try:
            with storage.open_input(path) as stream:
                metadata = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError):
            continue
        rows += metadata.num_rows
        for group in range(metadata.num_row_groups):
            described = metadata.row_group(group)
            raw += described.total_byte_size
            text += sum(
                described.column(index).total_uncompressed_size
                for index in range(described.num_columns)
                if described.column(index).path_in_schema == column
            )
    scale = len(paths) / len(chosen)
    return raw * scale, rows * scale, text * scale


def _heads(entries: Sequence[tuple[str, int]], kind: str) -> tuple[float, float | None]:
    """(decompressed bytes of a byte of the files, rows of a decompressed byte) from the heads of a few files."""
    mark = _ROW_MARKS.get(kind)
    held = read = made = found = 0.0
    for index in np.unique(np.linspace(0, len(entries) - 1, min(_SAMPLED_FILES, len(entries))).astype(int)):
        path, size = entries[index]
        with storage.open_input(path) as stream:
            head = bytes(stream.read(min(size, _HEAD_BYTES)))
        data = decompressed(path, head) if is_compressed(path) else head
        held, read, made = held + size, read + len(head), made + len(data)
        if mark is not None:
            found += data.count(mark)
    if not read or not made:
        return 1.0, None
    return made / read, found / made if mark is not None and found else None


def decompressed(path: str, head: bytes) -> bytes:
    """What the first bytes of a compressed file hold, as far as they go."""
    lowered, made = path.lower(), list[bytes]()
    try:
        if lowered.endswith((".zst", ".lz4")):
            codec = "zstd" if lowered.endswith(".zst") else "lz4"
            with pa.CompressedInputStream(pa.BufferReader(head), codec) as stream:
                while block := stream.read(1 << 16):
                    made.append(block)
            return b"".join(made)
        while head:  # one member after the other
            decoder: Any = zlib.decompressobj(wbits=31)
            if not lowered.endswith(".gz"):
                decoder = bz2.BZ2Decompressor() if lowered.endswith(".bz2") else lzma.LZMADecompressor()
            made.append(decoder.decompress(head))
            head = decoder.unused_data if decoder.eof else b""
    except (pa.ArrowException, OSError, zlib.error, lzma.LZMAError):
        return b"".join(made)  # the head ends in the middle of a block: what came until then counts
    return b"".join(made)


@dataclass
class _Sample:
    rows: int = 0
    bytes: float = 0.0
    chinese_bytes: float = 0.0
    html: bool = False


def _sample(units: Sequence[Unit], read: ReadSettings) -> _Sample | None:
    """The first rows of a few units, all of small ones. PDF is left out: parsing it takes seconds a file."""
    if not units or units[0].format == "pdf":
        return None
    found = _Sample()
    for index in np.unique(np.linspace(0, len(units) - 1, min(_SAMPLED_FILES, len(units))).astype(int)):
        whole = units[index].size <= _SMALL_UNIT_BYTES and not is_compressed(units[index].path)
        for batch in read_unit(units[index], read, stop_row=None if whole else _SAMPLED_ROWS):
            names = batch.table.column_names
            column = next((name for name in ("text", "content", "html") if name in names), None)
            if column is None:
                continue
            found.html = found.html or column != "text"
            for value in batch.table[column].to_pylist():
                if value is None:
                    continue
                text = value if isinstance(value, str) else bytes(value).decode("utf-8", "ignore")
                found.rows += 1
                found.bytes += len(value.encode() if isinstance(value, str) else value)
                found.chinese_bytes += 3.0 * len(_HAN.findall(text))
    return found


def lines_and_bytes(paths: Sequence[str]) -> tuple[float, float]:
    """(rows, decompressed bytes) of JSON Lines, JSON or Parquet files with conversations, from their heads and footers."""
    rows = size = 0.0
    for path in paths:
        if path.endswith(".parquet"):
            raw, count, _ = _parquet([path], "messages")
            rows, size = rows + count, size + raw
            continue
        held = storage.size(path)
        with storage.open_input(path) as stream:
            head = bytes(stream.read(min(held, _HEAD_BYTES)))
        data = decompressed(path, head) if is_compressed(path) else head
        if not head:
            continue
        ratio = len(data) / len(head)
        whole = held <= _HEAD_BYTES
        if path.endswith(".json") and whole:
            content = json.loads(data)
            count = float(len(content)) if isinstance(content, list) else 1.0
        else:
            count = float(data.count(b"\n") + (whole and not data.endswith(b"\n")))
        rows, size = rows + (count if whole else count * held / len(head)), size + held * ratio
    return rows, size
