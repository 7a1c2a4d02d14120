"""Counts and distributions of any table of rows, batch by batch, in memory that does not grow with the rows.

Distributions are histograms of relative width 1/16 (a number's exponent and the first four bits of its mantissa), so
quantiles read from them (the start of a bin) are at most 6.25% nearer to zero than the exact ones, whole numbers below 32
are exact, and any two histograms add up.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.text.analysis import Analysis
from operators.tokens.encode import Encoder

_GROUP_COLUMNS = ("lang", "script", "source", "license")
MOST_VALUES = 1000  # distinct values that are counted one by one in a group column; the rest is one count


@dataclass
class Distribution:
    """A histogram of numbers with its count, sum, least and greatest value. NaN and null are missing."""

    bins: Counter[int] = field(default_factory=Counter)
    count: int = 0
    missing: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def take(self, values: np.ndarray) -> None:
        """Add float64[n]."""
        known = values[np.isfinite(values)]
        self.missing += len(values) - len(known)
        if not len(known):
            return
        # a key that is ordered as the values are: sign, exponent, four bits of mantissa
        bits = np.abs(known).view(np.int64) >> 48
        keys, counts = np.unique(np.where(known < 0, -bits, bits), return_counts=True)
        self.bins.update(dict(zip(keys.tolist(), counts.tolist(), strict=True)))
        self.count += len(known)
        self.total += math.fsum(known.tolist()) if len(known) < 1 << 16 else float(known.sum())
        self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))

    def add(self, other: Distribution) -> None:
        self.bins.update(other.bins)
        self.count, self.missing, self.total = self.count + other.count, self.missing + other.missing, self.total + other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def quantile(self, share: float) -> float | None:
        """The value up to which `share` of the numbers lie (see the module for its error); None when there are none."""
        if not self.count:
            return None
        wanted, seen = share * self.count, 0
        for key in sorted(self.bins):
            seen += self.bins[key]
            if seen >= wanted:
                start = math.copysign(float(np.int64(abs(key) << 48).view(np.float64)), key)
                return min(max(start, self.low), self.high)
        return self.high

    def to_json(self) -> dict[str, Any]:
        if not self.count:
            return {"count": 0, "missing": self.missing}
        shares = {f"p{round(share * 100)}": self.quantile(share) for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)}
        return {
            "count": self.count,
            "missing": self.missing,
            "mean": self.total / self.count,
            "min": self.low,
            **shares,
            "max": self.high,
        }


@dataclass
class Statistics:
    """What is known of the rows seen so far. `groups` counts the values of lang, script, source and license."""

    rows: int = 0
    sums: Counter[str] = field(default_factory=Counter)  # bytes, characters, words, tokens
    groups: dict[str, Counter[str]] = field(default_factory=dict)
    by_language: dict[str, Counter[str]] = field(default_factory=dict)  # language -> rows, bytes, characters, words, tokens
    numbers: dict[str, Distribution] = field(default_factory=dict)
    unreadable: Counter[str] = field(default_factory=Counter)

    def take(self, table: pa.Table, encoder: Encoder | None = None) -> None:
        """Add rows. Every numeric column gets a distribution; `text` gets lengths; `messages` get turns and roles."""
        self.rows += table.num_rows
        if not table.num_rows:
            return
        for name in table.column_names:
            column = table[name]
            if name in _GROUP_COLUMNS and _is_string(column.type):
                self._count(name, column)
            elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
                values = column.cast(pa.float64()).to_numpy()
                self.numbers.setdefault(name, Distribution()).take(values)
        if "text" in table.column_names and _is_string(table["text"].type):
            self._take_text(table, encoder)
        if "messages" in table.column_names:
            self._take_messages(table["messages"])

    def _count(self, name: str, column: pa.ChunkedArray) -> None:
        known = self.groups.setdefault(name, Counter())
        for entry in pc.value_counts(pc.fill_null(column.cast(pa.string()), "")).to_pylist():
            value = entry["values"] if entry["values"] in known or len(known) < MOST_VALUES else "(others)"
            known[value] += entry["counts"]

    def _take_text(self, table: pa.Table, encoder: Encoder | None) -> None:
        text = pc.fill_null(table["text"].cast(pa.large_string()), "")
        analysis = Analysis.of(text)
        words = analysis.words
        measures = {
            "bytes": (analysis.ends - analysis.starts),
            "characters": analysis.characters,
            "words": words.last - words.first,
        }
        if encoder is not None:
            measures["tokens"] = np.diff(encoder.encode(text)[1])
        langs = (
            pc.fill_null(table["lang"].cast(pa.string()), "")
            if "lang" in table.column_names
            else pa.chunked_array([analysis.language_guess])
        )
        for name, values in measures.items():
            self.numbers.setdefault(name, Distribution()).take(values.astype(np.float64))
            self.sums[name] += int(values.sum())
        grouped = pa.table({"lang": langs, **{name: pa.array(values) for name, values in measures.items()}}).group_by("lang")
        found = grouped.aggregate([([], "count_all"), *((name, "sum") for name in measures)])
        for entry in found.to_pylist():
            counts = self.by_language.setdefault(entry["lang"], Counter())
            counts["rows"] += entry["count_all"]
            counts.update({name: entry[f"{name}_sum"] for name in measures})

    def _take_messages(self, column: pa.ChunkedArray) -> None:
        turns = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.float64)
        self.numbers.setdefault("turns", Distribution()).take(turns)
        flat = column.combine_chunks().flatten() if column.num_chunks else column.chunk(0).flatten()
        if pa.types.is_struct(flat.type) and {"role", "content"} <= {f.name for f in flat.type}:
            self._count("role", pa.chunked_array([pc.struct_field(flat, "role")]))
            lengths = pc.fill_null(pc.utf8_length(pc.struct_field(flat, "content")), 0).to_numpy(zero_copy_only=False)
            self.numbers.setdefault("message_characters", Distribution()).take(lengths.astype(np.float64))
            self.sums["characters"] += int(lengths.sum())

    def add(self, other: Statistics) -> None:
        """Add what another process has seen."""
        self.rows += other.rows
        self.sums.update(other.sums)
        self.unreadable.update(other.unreadable)
        for mine, theirs in ((self.groups, other.groups), (self.by_language, other.by_language)):
            for name, counts in theirs.items():
                mine.setdefault(name, Counter()).update(counts)
        for name, distribution in other.numbers.items():
            self.numbers.setdefault(name, Distribution()).add(distribution)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "unreadable": dict(sorted(self.unreadable.items())),
            **dict(sorted(self.sums.items())),
            "languages": {name: dict(counts) for name, counts in _largest(self.by_language, lambda counts: counts["rows"])},
            "values": {name: dict(counts.most_common()) for name, counts in sorted(self.groups.items())},
            "numbers": {name: found.to_json() for name, found in sorted(self.numbers.items())},
        }


def _largest(groups: dict[str, Counter[str]], size: Any) -> list[tuple[str, Counter[str]]]:
    return sorted(groups.items(), key=lambda item: (-size(item[1]), item[0]))


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
