"""What a data card counts: rows, bytes of text, languages, sources and licences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_COUNTED = {"lang": "languages", "source": "sources", "license": "licenses", "licence": "licenses"}
_MOST_VALUES = 10_000
OTHER = "(other)"


def count(table: pa.Table) -> dict[str, Any]:
    """Counts of one batch: `rows`, `text_bytes` (UTF-8), and the rows of each value of lang, source and license."""
    found: dict[str, Any] = {"rows": table.num_rows, "bytes": table.nbytes}
    if "text" in table.column_names and pa.types.is_large_string(table.schema.field("text").type):
        found["text_bytes"] = pc.sum(pc.binary_length(table["text"])).as_py() or 0
    for column, name in _COUNTED.items():
        if column in table.column_names and pa.types.is_string(table.schema.field(column).type):
            values = pc.value_counts(pc.fill_null(table[column], "").combine_chunks()).to_pylist()
            merged = found.setdefault(name, {})
            for entry in values:
                merged[entry["values"]] = merged.get(entry["values"], 0) + entry["counts"]
    return found


def merge_counts(into: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Add counts up. Of more than 10,000 values the rarest become `(other)`, so that a source a row stays bounded."""
    for key, value in other.items():
        if isinstance(value, Mapping):
            merged = into.setdefault(key, {})
            for name, rows in value.items():
                merged[name] = merged.get(name, 0) + rows
            if len(merged) > 2 * _MOST_VALUES:
                into[key] = _most(merged)
        else:
            into[key] = into.get(key, 0) + value
    return into


def _most(values: dict[str, int]) -> dict[str, int]:
    other = values.pop(OTHER, 0)
    ranked = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    return {**dict(ranked[:_MOST_VALUES]), OTHER: other + sum(rows for _, rows in ranked[_MOST_VALUES:])}
