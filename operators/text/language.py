"""Language identification with fastText's lid.176 (Joulin et al. 2016, arXiv:1607.01759).

Long texts are judged by windows spread over them, which bounds the cost and keeps one odd passage from deciding. Measured
on 3,000 English, Chinese and other documents of 5.4 kB on average, agreement with the label for the whole text:

    windows x characters   1 x 1000   2 x 500   3 x 350   1 x 2000   2 x 1000   3 x 800   whole
    agreement              98.3%      98.5%     99.0%     99.2%      99.5%      99.7%     100%
    documents/s, one core  3,900      3,300     3,000     2,450      2,430      2,330     810

A text that the model calls Japanese although it has Han characters and no kana is Chinese: that lifts accuracy on short
sentences from 95.8 to 99.0% (simplified, 500 of them) and from 97.8 to 99.6% (traditional).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import analysis_of
from operators.operator import Filter
from operators.text import characters, fasttext_model
from operators.text.analysis import Analysis
from operators.text.characters import ALPHA
from operators.text.words import class_of

UNDETERMINED = "und"
_CANDIDATES = 4


class DetectLanguageSettings(Settings):
    """Adds `lang` (the model's code; `und` where there is no letter) and `lang_score`."""

    keep: list[str] | None = Field(default=None, description="language codes to keep; null keeps all")
    threshold: float | dict[str, float] = Field(
        default=0.5, description="lowest score, a number or one by language (`*` for the others)"
    )
    model: str | None = Field(default=None, description="path or URI of a fastText model; null is lid.176.ftz")
    window: int = Field(default=800, ge=50, description="characters of a window")
    windows: int = Field(default=3, ge=1, le=16, description="windows per text; shorter texts are read whole")


class DetectLanguage(Filter):
    """Identify each document's language; drop other languages and uncertain ones."""

    name: ClassVar[str] = "detect_language"
    settings = DetectLanguageSettings
    adds = ("lang", "lang_score")
    reads = ()
    decide_options = frozenset({"keep", "threshold"})

    def files(self) -> list[str]:
        return [self.config.model or fasttext_model.packaged_language_model()]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`lang` string and `lang_score` float32, rounded to 4 decimals."""
        found = analysis_of(table, analysis)
        model = fasttext_model.load(self.files()[0])
        lines, letters = sample(found, self.config.window, self.config.windows)
        labels, scores = fasttext_model.predict(model, lines.to_pylist(), _CANDIDATES)
        no_kana = (found.scripts[:, 0] > 0) & (found.scripts[:, 1] == 0)
        lang, score = [UNDETERMINED] * len(found), np.zeros(len(found), np.float64)
        for row in np.flatnonzero(letters):
            if labels[row]:
                lang[row], score[row] = _best(labels[row], scores[row], bool(no_kana[row]))
        return {"lang": pa.array(lang, pa.string()), "lang_score": pa.array(np.round(score, 4), pa.float32())}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        lang, value = scores["lang"], np.round(scores["lang_score"].to_numpy().astype(np.float64), 4)
        threshold = self.config.threshold
        if isinstance(threshold, dict):
            other = threshold.get("*", 0.0)
            limit = np.array([threshold.get(code, other) for code in lang.to_pylist()], np.float64)
        else:
            limit = np.full(len(lang), threshold, np.float64)
        low = pa.array(value < limit)
        foreign: Any = pc.equal(lang, UNDETERMINED) if self.config.keep is None else _not_in(lang, self.config.keep)
        reason = pc.if_else(foreign, "language", pc.if_else(low, "low_score", pa.scalar(None, pa.string())))
        return reason, pc.if_else(pc.is_valid(reason), pa.array(value), pa.scalar(None, pa.float64()))


def _best(labels: list[str], scores: np.ndarray, han_without_kana: bool) -> tuple[str, float]:
    """The likeliest language and its probability."""
    if han_without_kana and labels[0] == "ja":
        return "zh", min(sum(float(score) for label, score in zip(labels, scores, strict=True) if label in ("ja", "zh")), 1.0)
    return labels[0], min(float(scores[0]), 1.0)


def _not_in(lang: pa.Array, keep: list[str]) -> pa.Array:
    return pc.invert(pc.is_in(lang, value_set=pa.array(keep, pa.string())))


def set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with a column added at its end, or replaced in its place."""
    position = table.schema.get_field_index(name)
    return table.append_column(name, values) if position < 0 else table.set_column(position, name, values)


def sample(analysis: Analysis, window: int, windows: int) -> tuple[pa.Array, np.ndarray]:
    """(large_string[texts], bool[texts] whether it has a letter): `windows` pieces of `window` characters spread evenly
    over each text, or the whole text where it is no longer; white space and control characters become spaces."""
    sizes = np.minimum(analysis.ends - analysis.starts, 4 * (window + 1) * windows)
    out, offsets = np.empty(int(sizes.sum()), np.uint8), np.zeros(len(analysis) + 1, np.int64)
    letters = np.zeros(len(analysis), bool)
    _sample(
        analysis.data,
        analysis.starts,
        analysis.ends,
        analysis.characters,
        window,
        windows,
        characters.table(),
        out,
        offsets,
        letters,
    )
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(out[: offsets[-1]])]
    return pa.Array.from_buffers(pa.large_string(), len(analysis), buffers), letters


@numba.njit(cache=True, nogil=True)
def _sample(data, starts, ends, sizes, window, windows, table, out, offsets, letters):  # type: ignore[no-untyped-def]
    used = 0
    for row in range(len(starts)):
        whole = sizes[row] <= window * windows
        gap = 0 if whole else (sizes[row] - window * windows) // (windows + 1)
        position, taken, piece = 0, 0, 0  # character of the text, characters taken of the current window
        begin = gap
        i, end = starts[row], ends[row]
        while i < end:
            step = 1
            while i + step < end and (data[i + step] & 0xC0) == 0x80:
                step += 1
            if whole or (position >= begin and taken < window):
                byte = np.int32(data[i])
                if step == 1:
                    point = byte
                elif step == 2:
                    point = ((byte & 0x1F) << 6) | (np.int32(data[i + 1]) & 0x3F)
                elif step == 3:
                    point = ((byte & 0x0F) << 12) | ((np.int32(data[i + 1]) & 0x3F) << 6) | (np.int32(data[i + 2]) & 0x3F)
                else:
                    point = (
                        ((byte & 0x07) << 18)
                        | ((np.int32(data[i + 1]) & 0x3F) << 12)
                        | ((np.int32(data[i + 2]) & 0x3F) << 6)
                        | (np.int32(data[i + 3]) & 0x3F)
                    )
                if class_of(table, point) & ALPHA:
                    letters[row] = True
                if point <= 32:
                    out[used] = 32
                    used += 1
                else:
                    for k in range(step):
                        out[used + k] = data[i + k]
                    used += step
                taken += 1
                if not whole and taken == window:
                    out[used] = 32
                    used += 1
                    piece += 1
                    if piece == windows:
                        break
                    begin = gap * (piece + 1) + window * piece
                    taken = 0
            position += 1
            i += step
        offsets[row + 1] = used
