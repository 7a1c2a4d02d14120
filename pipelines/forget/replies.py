"""Cached replies that quote what is to be forgotten.

A reply is kept by the hash of its request, and rows do not say which requests they were made by; so replies are found by their
words: one that shares a run of 47 bytes (8 English words or 16 Chinese characters, about) with a forgotten row, or is a
shorter text of one. A paraphrase is not found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow.parquet as pq

from cluster import storage
from pipelines.forget.rewrite import Staging
from pipelines.forget.search import Found, StageDirectory

FOLDER = ".replies"
_GRAM, _STRIDE = 32, 16  # bytes: of the forgotten text every 16th gram is held, of a reply each is looked up
SHARED_BYTES = _GRAM + _STRIDE - 1
_BLOCK = 8 << 20
_NOT_TEXT = ("id", "source_id", "source", "provenance", "operator", "reason", "lang", "url")
_WITH_TEXT = ("parts", "rejects", "tasks", "rewrites", "data", "cut")


class Quotes:
    """The words of rows that are to be forgotten. Memory grows with their text, about 6 bytes a byte."""

    def __init__(self) -> None:
        self._grams: set[bytes] = set()
        self._short: set[str] = set()

    def add(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        if len(data) < SHARED_BYTES:
            self._short.add(text.strip())
        self._grams.update(data[start : start + _GRAM] for start in range(0, len(data) - _GRAM + 1, _STRIDE))

    def quoted_in(self, text: str) -> bool:
        if text.strip() in self._short and text.strip():
            return True
        data = text.encode("utf-8", "surrogatepass")
        return any(data[start : start + _GRAM] in self._grams for start in range(len(data) - _GRAM + 1))


def forget_replies(staging: Staging, stages: list[StageDirectory], found: Found, asking: set[str]) -> tuple[int, int]:
    """Stage the reply files of the stages named in `asking` without replies that quote a forgotten row: (removed, left).

    Reads nothing where there are no such replies.
    """
    folder = storage.join(staging.run, FOLDER)
    files = [entry for entry in storage.list_beside(folder) if any(_of_stage(entry.relative, name) for name in asking)]
    if not files:
        return 0, 0
    quotes = Quotes()
    for stage in stages:
        for hit in found.hits.get(stage.relative, []):
            if hit.folder in _WITH_TEXT and stage.kind != "pack":
                for text in _texts_of(storage.join(stage.path, hit.relative), hit.gone.tolist()):
                    quotes.add(text)
    removed = left = 0
    for entry in files:
        gone, kept = _rewrite(staging, entry.path, f"{FOLDER}/{entry.relative}", quotes)
        removed, left = removed + gone, left + kept
    return removed, left


def _of_stage(file: str, stage: str) -> bool:
    return bool(re.fullmatch(re.escape(stage) + r"(-[0-9a-f]{32})?\.jsonl", file))


def _rewrite(staging: Staging, path: str, relative: str, quotes: Quotes) -> tuple[int, int]:
    """(replies removed, replies left) of one file; it is staged anew only where one is removed."""
    scratch = storage.scratch_file(storage.join(staging.run, staging.folder))
    removed = left = 0
    with open(scratch, "wb") as target:
        for line in _lines(path):
            if quotes.quoted_in(_reply(line)):
                removed += 1
                continue
            left += bool(line.strip())
            target.write(line)
    if removed:
        staging.replace_by(relative, scratch)
    else:
        storage.delete(scratch)
    return removed, left


def _reply(line: bytes) -> str:
    """The reply's text; a torn line as it is, for it may quote as well."""
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        return line.decode("utf-8", "replace")


def _lines(path: str) -> Iterator[bytes]:
    rest = b""
    with storage.open_input(path) as stream:
        while block := stream.read(_BLOCK):
            *whole, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in whole)
    if rest:
        yield rest


def _texts_of(path: str, rows: list[int]) -> Iterator[str]:
    """The texts in these rows of a file, row group by row group."""
    with storage.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        names = [name for name in file.schema_arrow.names if name not in _NOT_TEXT]
        start = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            own = [row - start for row in rows if start <= row < start + count]
            start += count
            if own:
                for row in file.read_row_group(group, columns=names).take(own).to_pylist():
                    yield from _strings(row.values())


def _strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _strings(item for key, item in value.items() if key not in ("role", *_NOT_TEXT))
        elif isinstance(value, list):
            yield from _strings(value)
