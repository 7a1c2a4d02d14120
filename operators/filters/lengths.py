"""Limits on the length of documents and on the shares of kinds of characters, each by language.

What is measured stands in operators/text/counts.py. Without a limit nothing is measured and nothing dropped, so at least
one must be set; the name of the limit that a document fails is the reason.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyarrow as pa
import pydantic
from pydantic import Field

from operators.config import Settings, SettingsError
from operators.filters.thresholds import Rule, analysis_of, as_numpy, first_failing, languages, limits_by_row
from operators.operator import Filter
from operators.text import counts
from operators.text.analysis import Analysis


class LengthLimits(Settings):
    """Limits of length; null is no limit."""

    min_characters: int | None = Field(default=None, ge=0, description="fewest characters")
    max_characters: int | None = Field(default=None, ge=0, description="most characters")
    min_bytes: int | None = Field(default=None, ge=0, description="fewest bytes of UTF-8")
    max_bytes: int | None = Field(default=None, ge=0, description="most bytes of UTF-8")
    min_words: int | None = Field(default=None, ge=0, description="fewest words that hold more than punctuation")
    max_words: int | None = Field(default=None, ge=0, description="most words that hold more than punctuation")
    min_mean_word_length: float | None = Field(default=None, ge=0, description="lowest mean length of words, characters")
    max_mean_word_length: float | None = Field(default=None, ge=0, description="highest mean length of words, characters")
    max_longest_word: int | None = Field(default=None, ge=0, description="most characters of one word")
    min_lines: int | None = Field(default=None, ge=0, description="fewest lines that hold more than white space")
    max_lines: int | None = Field(default=None, ge=0, description="most lines that hold more than white space")
    min_mean_line_length: float | None = Field(default=None, ge=0, description="lowest mean length of such lines, characters")
    max_mean_line_length: float | None = Field(default=None, ge=0, description="highest mean length of such lines, characters")
    max_longest_line: int | None = Field(default=None, ge=0, description="most characters of one line")
    min_tokens: int | None = Field(default=None, ge=0, description="fewest tokens, as estimated")
    max_tokens: int | None = Field(default=None, ge=0, description="most tokens, as estimated")


class RatioLimits(Settings):
    """Limits of shares, 0 to 1; null is no limit."""

    min_alpha_ratio: float | None = Field(default=None, description="lowest share of letters, Han included")
    max_alpha_ratio: float | None = Field(default=None, description="highest share of letters, Han included")
    min_digit_ratio: float | None = Field(default=None, description="lowest share of decimal digits")
    max_digit_ratio: float | None = Field(default=None, description="highest share of decimal digits")
    min_upper_ratio: float | None = Field(default=None, description="lowest share of upper case among letters with case")
    max_upper_ratio: float | None = Field(default=None, description="highest share of upper case among letters with case")
    min_punctuation_ratio: float | None = Field(default=None, description="lowest share of punctuation")
    max_punctuation_ratio: float | None = Field(default=None, description="highest share of punctuation")
    min_symbol_ratio: float | None = Field(default=None, description="lowest share of symbols")
    max_symbol_ratio: float | None = Field(default=None, description="highest share of symbols")
    min_space_ratio: float | None = Field(default=None, description="lowest share of white space")
    max_space_ratio: float | None = Field(default=None, description="highest share of white space")
    min_han_ratio: float | None = Field(default=None, description="lowest share of Han characters")
    max_han_ratio: float | None = Field(default=None, description="highest share of Han characters")

    @pydantic.model_validator(mode="after")
    def _are_shares(self) -> RatioLimits:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name.endswith("_ratio") and value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a share of 0 to 1, got {value}")
        return self


class FilterLengthsSettings(LengthLimits):
    """Limits for all languages, and those by language that replace them."""

    thresholds: dict[str, LengthLimits] = Field(default={}, description="limits by language code, in place of those for all")


class FilterRatiosSettings(RatioLimits):
    """Limits for all languages, and those by language that replace them."""

    thresholds: dict[str, RatioLimits] = Field(default={}, description="limits by language code, in place of those for all")


class _Limited(Filter):
    """Measures that limits ask for, and the first limit that fails."""

    limits: ClassVar[type[Settings]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        every = {name: getattr(self.config, name) for name in self.limits.model_fields}
        self._defaults = {"*": self.limits(**every)}
        self._rules = [Rule(name, name[4:], name, name.startswith("max_")) for name in self.limits.model_fields]
        all_limits = [self._defaults["*"], *self.config.thresholds.values()]
        asked = {rule.score for rule in self._rules for item in all_limits if getattr(item, rule.limit) is not None}
        if not asked:
            raise SettingsError(f"{self.name}: set at least one limit, e.g. {next(iter(self.limits.model_fields))}")
        measures = counts.found_with(asked)  # more than asked, so that `danlu decide` can try limits on the others
        self._measured = [name for name in dict.fromkeys(rule.score for rule in self._rules) if name in measures]

    @property
    def decide_options(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(type(self.config).model_fields)

    def measured_as(self) -> dict[str, Any]:
        return dict.fromkeys(self._measured, True)

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """The measures (operators.text.counts) that some limit needs and those found along with them; `language_guess`."""
        found = analysis_of(table, analysis)
        scores = {name: pa.array(values) for name, values in counts.count(found, self._measured).items()}
        return {**scores, "language_guess": found.language_guess}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        codes = languages(table, scores.get("language_guess"))
        index, limits = limits_by_row(self._defaults, self.config.thresholds, codes)
        rules = [rule for rule in self._rules if rule.score in scores]
        return first_failing(rules, as_numpy(scores, list({rule.score for rule in rules})), index, limits)


class FilterLengths(_Limited):
    """Drop documents that are too short or too long in characters, bytes, words, lines or estimated tokens."""

    name: ClassVar[str] = "filter_lengths"
    settings = FilterLengthsSettings
    limits = LengthLimits


class FilterRatios(_Limited):
    """Drop documents by their shares of letters, digits, upper case, punctuation, symbols, white space or Han characters."""

    name: ClassVar[str] = "filter_ratios"
    settings = FilterRatiosSettings
    limits = RatioLimits
