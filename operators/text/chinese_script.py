"""Simplified or traditional: which script a Chinese text is written in, by the characters that only one of them has.

A character tells simplified if OpenCC turns it into another traditional one, it is no traditional one itself and Big5 lacks it;
it tells traditional if OpenCC turns it into another simplified one and GB 2312 lacks it. That leaves some 2,600 and 4,200 of
28,096 characters; those of both scripts (后, 里, 台) tell nothing. The majority of the telling characters decides.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import numba
import numpy as np
import opencc
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import analysis_of, base_language, languages
from operators.operator import Filter
from operators.text.analysis import Analysis
from operators.text.language import set_column
from operators.text.words import decode_one

SIMPLIFIED, TRADITIONAL, MODERN = 1, 2, 4
_FIRST, _LAST = 0x3400, 0xFB00
_MODERN = "的了们們这這吗嗎呢么麼"


class ChineseScriptSettings(Settings):
    """Adds `script` (Hans, Hant; null where the text is not Chinese or no character tells), `script_share`, `modern_particles`."""

    keep: list[Literal["Hans", "Hant"]] | None = Field(
        default=None, description="scripts to keep; null keeps all. Texts that are not Chinese are kept in any case"
    )
    min_share: float = Field(default=0.0, ge=0, le=1, description="lowest share of the majority among the telling characters")
    min_modern_particles: float | None = Field(
        default=None,
        ge=0,
        description="lowest share of `的了们这吗呢么` among Han characters; .005 rejects 98% of classical poems and 5% of terse "
        "encyclopaedia articles",
    )
    codes: bool = Field(default=False, description="write zh-Hans or zh-Hant into `lang` in place of zh")


class ChineseScript(Filter):
    """Tell simplified and traditional Chinese apart; keep one of them, or write it into the language code."""

    name: ClassVar[str] = "chinese_script"
    settings = ChineseScriptSettings
    adds = ("script", "script_share", "modern_particles")
    reads = ()
    decide_options = frozenset({"keep", "min_share", "min_modern_particles"})  # `codes` changes what later filters see

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`script` string, `script_share` and `modern_particles` float64; null where the text is not Chinese."""
        found = analysis_of(table, analysis)
        known = "lang" in table.column_names and not table["lang"].null_count
        codes = languages(table, None if known else found.language_guess).to_pylist()
        chinese = np.array([base_language(code) == "zh" for code in codes], np.bool_)
        counts = np.zeros((len(found), 3), np.int64)
        _count(found.data, found.starts, found.ends, chinese, _table(), counts)
        simplified, traditional, modern = counts[:, 0], counts[:, 1], counts[:, 2]
        telling, han = simplified + traditional, found.scripts[:, 0]
        undecided = ~chinese | (simplified == traditional)
        script = pa.array(["Hans", "Hant"]).take(pa.array((traditional > simplified).astype(np.int8), mask=undecided))
        share = np.maximum(simplified, traditional) / np.maximum(telling, 1)
        return {
            "script": script,
            "script_share": pa.array(np.round(share, 6), mask=~chinese | (telling == 0)),
            "modern_particles": pa.array(np.round(modern / np.maximum(han, 1), 6), mask=~chinese | (han == 0)),
        }

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        """`script` where another script, or none, is told; `mixed_script` below the share; `classical` below the particles."""
        config, nothing = self.config, pa.scalar(None, pa.string())
        chinese: Any = pc.is_valid(scores["modern_particles"])
        none = pa.array(np.zeros(len(chinese), np.bool_))
        other = none if config.keep is None else pc.invert(pc.is_in(scores["script"], value_set=pa.array(config.keep, pa.string())))
        mixed = pc.less(pc.fill_null(scores["script_share"], 1.0), config.min_share)
        lowest = config.min_modern_particles
        classical = none if lowest is None else pc.less(pc.fill_null(scores["modern_particles"], 1.0), lowest)
        reason = pc.if_else(other, "script", pc.if_else(mixed, "mixed_script", pc.if_else(classical, "classical", nothing)))
        reason = pc.if_else(chinese, reason, nothing)
        value = pc.if_else(pc.equal(reason, "classical"), scores["modern_particles"], scores["script_share"])
        return reason, pc.if_else(pc.is_valid(reason), value, pa.scalar(None, pa.float64()))

    def annotate(self, table: pa.Table, scores: dict[str, pa.Array]) -> pa.Table:
        table = super().annotate(table, scores)
        if not self.config.codes:
            return table
        had = table["lang"].cast(pa.string()) if "lang" in table.column_names else pa.nulls(table.num_rows, pa.string())
        return set_column(table, "lang", pc.coalesce(pc.binary_join_element_wise("zh", scores["script"], "-"), had))


@functools.cache
def _table() -> np.ndarray:
    """uint8[_LAST - _FIRST] of SIMPLIFIED, TRADITIONAL, MODERN. Built once a process."""
    points = [*range(_FIRST, 0x4DC0), *range(0x4E00, 0xA000), *range(0xF900, _LAST)]
    listed = "\n".join(map(chr, points))
    traditional, simplified = (opencc.OpenCC(name).convert(listed).split("\n") for name in ("s2t", "t2s"))
    table = np.zeros(_LAST - _FIRST, np.uint8)
    for point, to_traditional, to_simplified in zip(points, traditional, simplified, strict=True):
        character = chr(point)
        if to_simplified != character:
            if not _encodes(character, "gb2312"):
                table[point - _FIRST] = TRADITIONAL
        elif to_traditional != character and not _encodes(character, "big5"):
            table[point - _FIRST] = SIMPLIFIED
    for character in _MODERN:
        table[ord(character) - _FIRST] |= MODERN
    table.setflags(write=False)
    return table


def _encodes(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


@numba.njit(cache=True, nogil=True)
def _count(data, starts, ends, wanted, table, out):  # type: ignore[no-untyped-def]
    """Characters of each text that tell simplified or traditional, and modern particles."""
    for text in range(len(starts)):
        if not wanted[text]:
            continue
        i = starts[text]
        while i < ends[text]:
            if data[i] < 0x80:
                i += 1
                continue
            point, step = decode_one(data, i)
            i += step
            if _FIRST <= point < _LAST:
                bits = table[point - _FIRST]
                if bits:
                    out[text, 0] += (bits & SIMPLIFIED) != 0
                    out[text, 1] += (bits & TRADITIONAL) != 0
                    out[text, 2] += (bits & MODERN) != 0
