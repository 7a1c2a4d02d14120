"""Decontamination against benchmarks by shared n-grams (Brown et al. 2020, arXiv:2005.14165, appendix C), in any script.

GPT-3's rule: 13-grams of lower-cased words without punctuation; a match and 200 characters on either side of it go,
documents cut into more than ten pieces go whole. Here digits are part of the text, Chinese is compared by characters,
items shorter than an n-gram are looked for whole, and every match names its item.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cluster import storage
from operators.config import Settings
from operators.decontaminate.benchmarks import Benchmark, read_texts
from operators.decontaminate.index import Hits, Lengths, NgramIndex, build_index
from operators.operator import Filter, Verdict
from operators.text.analysis import Analysis
from operators.text.language import set_column
from operators.text.repair import put


class DecontaminateSettings(Settings):
    """Which benchmarks, how much overlap counts, and what happens then."""

    benchmarks: list[Benchmark] = Field(min_length=1, description="benchmark files and their fields")
    words: int = Field(default=13, ge=1, description="words of an n-gram")
    characters: int = Field(default=13, ge=1, description="characters of an n-gram of an item written without spaces (Chinese)")
    short_words: int = Field(default=8, ge=1, description="shorter items count only as a whole, from this many words on")
    short_characters: int = Field(default=10, ge=1, description="shorter unspaced items count only as a whole, from here on")
    template_items: int | None = Field(
        default=5, ge=1, description="n-grams shared by more items of a benchmark are its template and ignored; null keeps all"
    )
    min_overlap: float = Field(
        default=0, ge=0, le=1, description="share of an item's n-grams from which a document counts; 0: any n-gram, as for GPT-3"
    )
    action: Literal["drop", "cut", "mark"] = Field(
        default="drop", description="drop the document, cut the matches out of its text, or only add the columns"
    )
    window: int = Field(default=200, ge=0, description="cut: characters that go on either side of a match")
    min_piece: int = Field(default=200, ge=0, description="cut: shorter pieces between matches go as well (characters)")
    max_pieces: int = Field(default=10, ge=1, description="cut: documents left in more pieces are dropped")


class Decontaminate(Filter):
    """Drop, cut or mark documents that hold text of evaluation benchmarks; the reason names the benchmark.

    The detail of a reject (and the column `contaminated_by` of `cut` and `mark`) is JSON: benchmark, item, field, one
    matching n-gram, its position in characters, the share of the item's n-grams found and how many other items match.
    """

    name: ClassVar[str] = "decontaminate"
    settings = DecontaminateSettings
    uses_analysis: ClassVar[bool] = False
    reads: tuple[str, ...] = ()
    decide_options: ClassVar[frozenset[str]] = frozenset({"min_overlap", "action", "window", "min_piece", "max_pieces"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.config.action != "drop":
            self.adds = ("contamination", "contaminated_by")  # type: ignore[misc]
        self.changes_text = self.config.action == "cut"  # type: ignore[misc]

    def files(self) -> list[str]:
        return [benchmark.path for benchmark in self.config.benchmarks]

    @property
    def index(self) -> NgramIndex:
        """Built once a process. Raises FileNotFoundError, SettingsError (file, row, key)."""
        return _index(self.config.model_dump_json(include=_INDEXED), tuple(_stamp(path) for path in self.files()))

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`overlap` float64: share of the n-grams of the item that is found most, rounded to 4 decimals, 0 for none;
        `benchmark` string and `match` string (JSON) of that item, null for none."""
        return self._measure(table)[0]

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        found = self._contaminated(scores) if self.config.action != "mark" else pa.array(np.zeros(len(scores["overlap"]), bool))
        null = pa.scalar(None, pa.string())
        return pc.if_else(found, scores["benchmark"], null), pc.if_else(found, scores["overlap"], pa.scalar(None, pa.float64()))

    def _contaminated(self, scores: dict[str, pa.Array]) -> pa.Array:
        overlap = scores["overlap"].to_numpy(zero_copy_only=False)
        return pa.array((overlap > 0) & (overlap >= self.config.min_overlap))

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        scores, found = self._measure(table)
        reason, value = self.decide(table, scores)
        if self.config.action == "drop":
            return Verdict(table, reason, value, scores, scores["match"])
        contaminated = self._contaminated(scores)
        match = pc.if_else(contaminated, scores["match"], pa.scalar(None, pa.string()))
        table = set_column(set_column(table, "contamination", scores["overlap"]), "contaminated_by", match)
        if self.config.action == "mark":
            return Verdict(table, scores=scores)
        text, reason, value = self._cut(table, contaminated, found)
        return Verdict(set_column(table, "text", text), reason, value, scores, match)

    def _measure(self, table: pa.Table) -> tuple[dict[str, pa.Array], _Found]:
        index, rows = self.index, table.num_rows
        hits, data, offsets = index.find(table["text"])
        overlap = np.zeros(rows)
        best: list[str | None] = [None] * rows
        benchmarks: list[str | None] = [None] * rows
        for row, first, last in _groups(hits.rows):  # sparse: the contaminated rows
            own = Hits(*(column[first:last] for column in (hits.rows, hits.entries, hits.starts, hits.ends)))
            texts = index.texts[own.entries]
            numbers = np.unique(texts)
            distinct = np.array([len(np.unique(own.entries[texts == number])) for number in numbers])
            shares = np.round(distinct / index.totals[numbers], 4)
            top = int(np.argmax(shares))  # ties: the item that stands first in the benchmark files
            at = int(np.argmax(texts == numbers[top]))
            benchmark, item, field = index.ids[numbers[top]]
            begin = offsets[row]
            position = len(data[begin : begin + own.starts[at]].tobytes().decode("utf-8"))
            others = len({index.ids[number][:2] for number in numbers} - {(benchmark, item)})
            overlap[row], benchmarks[row] = shares[top], benchmark
            best[row] = json.dumps(
                {
                    "benchmark": benchmark, "item": item, "field": field, "ngram": index.ngram(int(own.entries[at])),
                    "position": position, "overlap": float(shares[top]), "other_items": others,
                },
                ensure_ascii=False,
            )  # fmt: skip
        scores = {
            "overlap": pa.array(overlap),
            "benchmark": pa.array(benchmarks, pa.string()),
            "match": pa.array(best, pa.string()),
        }
        return scores, _Found(hits, data, offsets)

    def _cut(self, table: pa.Table, cut: pa.Array, found: _Found) -> tuple[pa.Array, pa.Array, pa.Array]:
        """(text, reason, value) with the matches of the rows `cut` taken out; pieces are joined by an empty line."""
        column = table["text"].cast(pa.large_string())
        text: Any = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        text = pc.fill_null(text if isinstance(text, pa.Array) else pa.array([], pa.large_string()), "")
        wanted = cut.to_numpy(zero_copy_only=False)
        changed: list[str] = []
        reasons: list[str | None] = [None] * len(text)
        values: list[float | None] = [None] * len(text)
        for row, first, last in _groups(found.hits.rows):
            if not wanted[row]:
                continue
            raw = found.data[found.offsets[row] : found.offsets[row + 1]].tobytes()
            pieces = self._pieces(raw.decode("utf-8"), raw, found.hits.starts[first:last], found.hits.ends[first:last])
            if not pieces:
                reasons[row], values[row] = "nothing_left", 0.0
            elif len(pieces) > self.config.max_pieces:
                reasons[row], values[row] = "many_pieces", float(len(pieces))
            changed.append("\n\n".join(pieces))
        text = put(text, cut, pa.array(changed, pa.large_string()))
        return text, pa.array(reasons, pa.string()), pa.array(values, pa.float64())

    def _pieces(self, text: str, raw: bytes, starts: np.ndarray, ends: np.ndarray) -> list[str]:
        """What is left of a text, stripped, without pieces shorter than `min_piece`. Positions are bytes of `raw`."""
        lead = np.flatnonzero((np.frombuffer(raw, np.uint8) & 0xC0) != 0x80)
        first, last = np.searchsorted(lead, starts), np.searchsorted(lead, ends)  # in characters
        pieces, position = [], 0
        for begin, end in zip(first.tolist(), np.maximum.accumulate(last).tolist(), strict=True):
            pieces.append(text[position : max(begin - self.config.window, position)])
            position = max(position, end + self.config.window)
        pieces.append(text[position:])
        return [piece for piece in map(str.strip, pieces) if piece and len(piece) >= self.config.min_piece]


@dataclass(frozen=True)
class _Found:
    hits: Hits
    data: np.ndarray
    offsets: np.ndarray


def _groups(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, first hit, last hit) of each row with hits."""
    numbers, first = np.unique(rows, return_index=True)
    return zip(numbers.tolist(), first.tolist(), [*first.tolist(), len(rows)][1:], strict=True)


_INDEXED = {"benchmarks", "words", "characters", "short_words", "short_characters", "template_items"}


def _stamp(path: str) -> int:
    if storage.is_remote(path) or not storage.exists(path):
        return -1
    return os.stat(storage.local_path(path)).st_mtime_ns


@functools.lru_cache(maxsize=4)
def _index(settings: str, stamps: tuple[int, ...]) -> NgramIndex:
    config = DecontaminateSettings.model_validate_json(settings)
    items = ((benchmark.title, item, field, text) for benchmark in config.benchmarks for item, field, text in read_texts(benchmark))
    lengths = Lengths(config.words, config.characters, config.short_words, config.short_characters)
    return build_index(items, lengths, config.template_items)
