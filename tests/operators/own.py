"""Operators as a user would write them, named in recipes by import path."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from operators.config import Settings
from operators.operator import Filter, Operator, Verdict
from operators.text.analysis import Analysis


class ShortSettings(Settings):
    minimum: int = 5


class DropShort(Filter):
    """Drops texts of fewer than `minimum` characters."""

    name: ClassVar[str] = "drop_short"
    settings = ShortSettings

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        return {"characters": pc.utf8_length(table["text"]).combine_chunks()}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        short = pc.less(scores["characters"], self.config.minimum)
        return pc.if_else(short, "too_short", pa.scalar(None, pa.string())), scores["characters"].cast(pa.float64())


class NoSettings(Settings):
    pass


class Crash(Operator):
    """Crashes like a native library does on a document that says so; otherwise writes the text in capitals."""

    name: ClassVar[str] = "crash"
    settings = NoSettings
    changes_text: ClassVar[bool] = True

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        if pc.any(pc.match_substring(table["text"], "SEGFAULT")).as_py():
            ctypes.string_at(0)
        return Verdict(table.set_column(table.column_names.index("text"), "text", pc.utf8_upper(table["text"])))


class LosesRows(Operator):
    """What an operator must never do: leave rows out without a reason."""

    name: ClassVar[str] = "loses_rows"
    settings = NoSettings

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        return Verdict(table.slice(1))


class DropBySource(Filter):
    """Looks at a column in its decision without saying so in `reads`."""

    name: ClassVar[str] = "drop_by_source"
    settings = NoSettings

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        return {"characters": pc.utf8_length(table["text"]).combine_chunks()}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        bad = pc.equal(table["source"], "bad").combine_chunks()
        return pc.if_else(bad, "source", pa.scalar(None, pa.string())), pa.nulls(len(bad), pa.float64())
