"""Documents in several languages: the share of each, by characters over windows of the text.

Every window is identified on its own by the model of `detect_language`. A long text is judged by windows spread evenly over
it. White space does not count; a window whose best language is less probable than the threshold counts as `und`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import analysis_of, base_language
from operators.operator import Filter
from operators.text import fasttext_model
from operators.text.analysis import Analysis
from operators.text.language import UNDETERMINED, predict_windows

SHARES = pa.list_(pa.struct([("lang", pa.string()), ("share", pa.float32())]))


class LanguageShareSettings(Settings):
    """Adds `lang_shares`, a list of {lang, share}, the greatest share first."""

    languages: list[str] | None = Field(
        default=None, description="languages that must together reach the least share; null keeps every document"
    )
    minimum: float = Field(default=0.8, ge=0, le=1, description="least share of the characters in these languages together")
    maximum: dict[str, float] = Field(default={}, description="greatest share by language (`und`: of undetermined windows)")
    threshold: float = Field(default=0.4, ge=0, le=1, description="a window less probable than that is `und`")
    window: int = Field(default=100, ge=20, description="characters of a window")
    windows: int = Field(default=64, ge=1, le=4096, description="windows per text; shorter texts are read whole")
    model: str | None = Field(default=None, description="path or URI of a fastText model; null is lid.176.ftz")


class LanguageShare(Filter):
    """Measure the share of each language in a document; drop documents with too little or too much of some."""

    name: ClassVar[str] = "language_share"
    settings = LanguageShareSettings
    adds = ("lang_shares",)
    reads = ()
    decide_options = frozenset({"languages", "minimum", "maximum"})

    def files(self) -> list[str]:
        return [self.config.model or fasttext_model.packaged_language_model()]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`lang_shares` list<struct<lang, share float32>>, shares rounded to 4 decimals; empty where there is no character."""
        found = analysis_of(table, analysis)
        each = predict_windows(found, self.config.window, self.config.windows, self.files()[0])
        windows, names = each.windows, [*each.labels, UNDETERMINED]
        unsure = (each.label < 0) | (np.round(each.probability.astype(np.float64), 4) < self.config.threshold)
        label = np.where(unsure, len(each.labels), each.label).astype(np.int64)
        weight = Analysis(found.data, windows.starts, windows.ends).scripts.sum(axis=1)
        text = np.repeat(np.arange(len(found)), np.diff(windows.offsets))
        pairs, inverse = np.unique(text * len(names) + label, return_inverse=True)
        characters = np.bincount(inverse, weight, len(pairs))
        row, code = pairs // len(names), pairs % len(names)
        total = np.bincount(row, characters, len(found))
        share = np.round(characters / np.maximum(total[row], 1), 4)
        # the greatest share first; of equals the one whose name comes first
        rank = np.argsort(np.argsort(names))
        order = np.lexsort((rank[code], -share, row))
        order = order[share[order] > 0]
        offsets = np.searchsorted(row[order], np.arange(len(found) + 1)).astype(np.int32)
        structs = pa.StructArray.from_arrays(
            [pa.array(names, pa.string()).take(pa.array(code[order])), pa.array(share[order].astype(np.float32))], ["lang", "share"]
        )
        return {"lang_shares": pa.ListArray.from_arrays(pa.array(offsets), structs).cast(SHARES)}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        """`too_little` of the wanted languages, else `too_much` of one; the value is that share."""
        shares: Any = scores["lang_shares"]
        shares = shares.combine_chunks() if isinstance(shares, pa.ChunkedArray) else shares
        row = np.asarray(pc.list_parent_indices(shares), np.int64)
        flat = shares.flatten()
        codes = np.array([base_language(code) for code in flat.field("lang").to_pylist()], object)
        share = flat.field("share").to_numpy().astype(np.float64)
        reason, value = np.full(len(shares), None, object), np.full(len(shares), np.nan)
        for code, greatest in sorted(self.config.maximum.items()):
            have = np.round(np.bincount(row, share * (codes == base_language(code)), len(shares)), 4)
            over = have > greatest
            reason[over], value[over] = "too_much", have[over]
        if self.config.languages is not None:
            wanted = np.isin(codes.astype(str), [base_language(code) for code in self.config.languages])
            have = np.round(np.bincount(row, share * wanted, len(shares)), 4)
            under = have < self.config.minimum
            reason[under], value[under] = "too_little", have[under]
        return pa.array(reason, pa.string()), pa.array(value, pa.float64(), mask=np.isnan(value))
