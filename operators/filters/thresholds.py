"""Thresholds per language, and the first rule that a row fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.config import Settings
from operators.text.analysis import Analysis

L = TypeVar("L", bound=Settings)

# what fastText, CLD and ISO 639-3 call the varieties of Chinese that share its thresholds
_ALIASES = {"cmn": "zh", "yue": "zh", "wuu": "zh", "lzh": "zh", "zho": "zh", "eng": "en", "jpn": "ja", "kor": "ko", "tha": "th"}

PRESET = "the limits that a language starts from: danlu, or fineweb2 (those that FineWeb-2 published for Chinese, word for word)"
UNSPACED_LANGUAGES = ("zh", "ja", "th", "lo", "km", "my", "bo")


def base_language(code: str) -> str:
    """`zh` of `zh-Hant`, `zh_CN`, `cmn` or `yue`."""
    primary = code.lower().replace("_", "-").split("-")[0]
    return _ALIASES.get(primary, primary)


def merged(defaults: Mapping[str, L], overrides: Mapping[str, L], language: str) -> L:
    """The limits of a language: its defaults (else those of `*`), with what `overrides` sets for `*` and for it."""
    limits = defaults.get(language, defaults["*"])
    for key in ("*", language):
        if key in overrides:
            limits = limits.model_copy(update={name: getattr(overrides[key], name) for name in overrides[key].model_fields_set})
    return limits


def languages(table: pa.Table, guess: pa.Array | None) -> pa.Array:
    """The language of each row: the column `lang`, where it is null or absent the guess by script, else `en`."""
    found: Any = pa.nulls(table.num_rows, pa.string())
    if "lang" in table.column_names:
        column = table["lang"].cast(pa.string())
        found = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        found = found if isinstance(found, pa.Array) else pa.array([], pa.string())
    if guess is not None:
        found = pc.coalesce(found, guess)
    return pc.fill_null(found, "en")


def limits_by_row(defaults: Mapping[str, L], overrides: Mapping[str, L], codes: pa.Array) -> tuple[np.ndarray, list[L]]:
    """(index int32[rows] into the list, the limits of each language that occurs)."""
    encoded = pc.dictionary_encode(codes)
    known = [merged(defaults, overrides, base_language(code)) for code in encoded.dictionary.to_pylist()]
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32), known


@dataclass(frozen=True)
class Rule:
    """`score` above (or below) the limit of that name rejects with `reason`."""

    reason: str
    score: str
    limit: str
    above: bool


def first_failing(
    rules: Sequence[Rule], scores: Mapping[str, np.ndarray], index: np.ndarray, limits: Sequence[Settings]
) -> tuple[pa.Array, pa.Array]:
    """(reason string[rows], value float64[rows]) of the first rule in order that a row fails; null where none does.

    A limit of None disables its rule.
    """
    reason, value = np.full(len(index), -1, np.int16), np.zeros(len(index))
    for number in range(len(rules) - 1, -1, -1):
        rule = rules[number]
        by_language = np.array([_number(getattr(item, rule.limit)) for item in limits], np.float64)
        limit = by_language[index] if len(limits) else np.zeros(0)
        score = scores[rule.score]
        fails = score > limit if rule.above else score < limit  # a comparison with nan is false
        reason[fails] = number
        value[fails] = score[fails]
    names = pa.array([rule.reason for rule in rules], pa.string())
    kept = reason < 0
    return (
        names.take(pa.array(reason, pa.int16(), mask=kept)),
        pa.array(value, pa.float64(), mask=kept),
    )


def _number(limit: Any) -> float:
    return np.nan if limit is None else float(limit)


def as_numpy(scores: Mapping[str, pa.Array], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Score columns as float64 arrays; a null is nan and fails no rule."""
    return {name: np.asarray(scores[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64) for name in names}


def analysis_of(table: pa.Table, analysis: Analysis | None) -> Analysis:
    """The shared analysis, or one of `table["text"]`."""
    return Analysis.of(table["text"]) if analysis is None else analysis
