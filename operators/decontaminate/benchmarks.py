"""Benchmark files: items of JSON lines, and the texts of each that a corpus must not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa
from pydantic import Field

from cluster import storage
from operators.config import Settings, SettingsError


class Benchmark(Settings):
    """One benchmark: a JSONL file (plain, gz or zst) and the fields of an item that count as its text."""

    path: str = Field(description="JSON lines, one item a line; .gz and .zst are decompressed")
    fields: list[str | list[str]] = Field(
        min_length=1, description="keys whose texts are looked for, each by itself; keys in an inner list are joined by a line feed"
    )
    name: str | None = Field(default=None, description="how matches name it; default: the file's name up to its first dot")
    id_field: str | None = Field(default=None, description="key of an item's id; default: its row number, from 0")

    @property
    def title(self) -> str:
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]


def read_texts(benchmark: Benchmark) -> Iterator[tuple[str, str, str]]:
    """(item id, field, text) of every field of every item; a list value is joined by line feeds, a null is left out.

    Raises FileNotFoundError, and SettingsError that names file, row and key for what is no JSON object, lacks a
    key of `fields`, or holds something that is no text there.
    """
    filesystem, inner = storage.resolve(benchmark.path)
    if not storage.exists(benchmark.path):
        raise FileNotFoundError(f"no benchmark file at {benchmark.path}")
    with filesystem.open_input_stream(inner, compression="detect") as stream, pa.PythonFile(stream, mode="r") as lines:
        for row, line in enumerate(_lines(lines)):
            if not line.strip():
                continue
            where = f"{benchmark.path}, row {row}"
            try:
                item = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise SettingsError(f"{where}: not JSON: {error}") from error
            if not isinstance(item, dict):
                raise SettingsError(f"{where}: an item must be a JSON object, got {type(item).__name__}")
            name = str(_get(item, benchmark.id_field, where)) if benchmark.id_field is not None else str(row)
            for field in benchmark.fields:
                keys = [field] if isinstance(field, str) else field
                text = "\n".join(piece for key in keys for piece in _texts(_get(item, key, where), f"{where}, key {key!r}"))
                yield name, "+".join(keys), text


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _get(item: dict[str, Any], key: str, where: str) -> Any:
    if key not in item:
        raise SettingsError(f"{where}: no key {key!r}; the item has {sorted(item)}")
    return item[key]


def _texts(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry, where)]
    if isinstance(value, str | int | float):
        return [str(value)]
    raise SettingsError(f"{where}: a text or a list of texts is needed, got {type(value).__name__}")
