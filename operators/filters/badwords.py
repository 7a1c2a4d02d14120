"""Offensive words by the LDNOOBW lists (CC BY 4.0, see LDNOOBW-LICENSE.txt), as C4 uses them (Raffel et al. 2020, section 2.2).

In spaced languages a word counts between non-letters; in Chinese, Japanese and Thai anywhere. Single Chinese characters of
the list (`性`, `奶`, `幹`, ...) are ordinary parts of ordinary words, so they count only if `single_characters` is on.

Measured: documents that hold a listed word, and documents that the default limit (.5% of the characters) drops.

    data                                            documents   any word   dropped   any, with single characters
    Chinese encyclopaedia (CMRC2018, DRCD)                639       3.8%      0.5%      16.4%
    Chinese books (translated classics)                   407      27.3%      0.5%      51.8%
    Chinese documentation (LibreOffice, Paddle)         2,368       0.0%      0.0%       0.3%
    English documentation and C4 pages                  3,602       2.7%      0.0%
    offensive English dialogues (hh-rlhf, harmless)     1,200      13.4%     12.4%

So the lists find coarse language, not harm: six of seven of those dialogues hold no listed word.
"""

from __future__ import annotations

import functools
import json
import os
import re
from importlib import resources
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cluster import storage
from operators.config import Settings
from operators.filters.thresholds import analysis_of, base_language, languages
from operators.operator import Filter, Verdict
from operators.text.analysis import Analysis
from operators.text.language import set_column
from operators.text.repair import put

_UNSPACED = {"zh", "ja", "th"}
_PACKAGED = str(resources.files(__package__).joinpath("ldnoobw.json"))
_ORDINARY = {"ja": {"sm", "グロ", "女の子"}, "zh": {"性", "13."}}  # datatrove's exceptions, and a stray entry


class BadWordsSettings(Settings):
    """Which lists apply, and how much is too much."""

    action: Literal["drop", "mask"] = Field(default="drop", description="drop documents over a limit, or mask the words by `*`")
    max_fraction: float | None = Field(default=0.005, ge=0, description="highest share of characters in bad words; null disables")
    max_count: int | None = Field(default=None, ge=0, description="most bad words; 0 drops documents with any, as C4 does")
    always: list[str] = Field(default=[], description="languages whose lists apply to every document, besides its own")
    single_characters: bool = Field(default=False, description="count single Chinese characters of the list as well")
    path: str | None = Field(default=None, description="JSON file {language: [word, ...]} in place of the packaged lists")
    extra: dict[str, list[str]] = Field(default={}, description="more words by language")


class BadWords(Filter):
    """Drop documents with too many offensive words (`bad_words`), or mask the words; masking adds their number as `bad_words`."""

    name: ClassVar[str] = "bad_words"
    settings = BadWordsSettings
    reads = ()
    decide_options = frozenset({"max_fraction", "max_count"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.config.action == "mask":
            self.changes_text = True  # type: ignore[misc]
            self.adds = ("bad_words",)  # type: ignore[misc]

    def files(self) -> list[str]:
        return [self.config.path or _PACKAGED]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`count` int64 and `fraction` float64 (characters in bad words over characters, rounded to 6 decimals)."""
        count, characters, _ = self._search(table, analysis_of(table, analysis), mask=False)
        return self._scores(count, characters, analysis_of(table, analysis))

    @staticmethod
    def _scores(count: np.ndarray, characters: np.ndarray, analysis: Analysis) -> dict[str, pa.Array]:
        fraction = np.round(characters / np.maximum(analysis.characters, 1), 6)
        return {"count": pa.array(count), "fraction": pa.array(fraction)}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        count, fraction = scores["count"].to_numpy(), scores["fraction"].to_numpy()
        over = np.zeros(len(count), bool)
        value = fraction
        if self.config.action == "drop":
            if self.config.max_count is not None:
                over |= count > self.config.max_count
                value = np.where(over, count.astype(np.float64), fraction)
            if self.config.max_fraction is not None:
                over |= fraction > self.config.max_fraction
        reason = pc.if_else(pa.array(over), "bad_words", pa.scalar(None, pa.string()))
        return reason, pa.array(value, pa.float64(), mask=~over)

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        if self.config.action == "drop":
            return super().process(table, analysis)
        count, _, text = self._search(table, analysis_of(table, analysis), mask=True)
        return Verdict(set_column(set_column(table, "text", text), "bad_words", pa.array(count, pa.int32())))

    def _search(self, table: pa.Table, analysis: Analysis, mask: bool) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        """(words found, characters in them, the text, masked if asked), row by row."""
        column = table["text"].cast(pa.large_string())
        text: Any = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        text = pc.fill_null(text if isinstance(text, pa.Array) else pa.array([], pa.large_string()), "")
        count, characters = np.zeros(len(text), np.int64), np.zeros(len(text), np.int64)
        guess = None
        if "lang" not in table.column_names or table["lang"].null_count:
            guess = analysis.language_guess
        codes = np.array([base_language(code) for code in languages(table, guess).to_pylist()], object)
        everywhere = {base_language(code) for code in self.config.always}
        for code in sorted({*codes.tolist(), *everywhere}):
            words = self._words(code)
            rows = np.flatnonzero(codes == code) if code not in everywhere else np.arange(len(text))
            if not words or not len(rows):
                continue
            hint, pattern = _patterns(words, code in _UNSPACED)
            candidates = text.take(pa.array(rows))
            hits = pc.match_substring_regex(candidates, hint).to_numpy(zero_copy_only=False)
            if not hits.any():
                continue
            changed = []
            for row, item in zip(rows[hits], candidates.filter(pa.array(hits)).to_pylist(), strict=True):  # sparse: the hits
                found = [match.span() for match in pattern.finditer(item)]
                count[row] += len(found)
                characters[row] += sum(end - start for start, end in found)
                changed.append(pattern.sub(lambda match: "*" * len(match[0]), item) if mask else item)
            if mask:
                flags = np.zeros(len(text), bool)
                flags[rows[hits]] = True
                text = put(text, pa.array(flags), pa.array(changed, pa.large_string()))
        return count, characters, text

    def _words(self, code: str) -> tuple[str, ...]:
        words = set(_lists(self.files()[0]).get(code, ())) - _ORDINARY.get(code, set())
        if code in _UNSPACED and not self.config.single_characters:
            words = {word for word in words if len(word) > 1}
        return tuple(sorted({word for word in words | set(self.config.extra.get(code, ())) if word}))


def _lists(path: str) -> dict[str, tuple[str, ...]]:
    """The words by language, cached for the process until the file changes. Raises ValueError for another shape of JSON."""
    stamp = storage.size(path) if storage.is_remote(path) else os.stat(storage.local_path(path)).st_mtime_ns
    return _read_lists(path, stamp)


@functools.lru_cache(maxsize=8)
def _read_lists(path: str, stamp: int) -> dict[str, tuple[str, ...]]:
    try:
        data = json.loads(storage.read_bytes(path))
        return {base_language(code): tuple(str(word) for word in words) for code, words in data.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON object {{language: [word, ...]}}: {error}") from error


@functools.lru_cache(maxsize=64)
def _patterns(words: tuple[str, ...], unspaced: bool) -> tuple[str, re.Pattern[str]]:
    """An RE2 pattern that matches where any word may be, and the exact pattern for `re`."""
    alternatives = "|".join(re.escape(word).replace(r"\ ", " ") for word in words)
    if unspaced:
        return f"(?i)(?:{alternatives})", re.compile(_trie(words), re.IGNORECASE)
    hint = rf"(?i)(?:^|[^\pL\pN_])(?:{alternatives})(?:$|[^\pL\pN_])"
    return hint, re.compile(rf"(?<!\w)(?:{_trie(words)})(?!\w)", re.IGNORECASE)


def _trie(words: tuple[str, ...]) -> str:
    """A regular expression of the words with their common beginnings shared, longest first."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word.lower():
            node = node.setdefault(character, {})
        node[""] = {}
    return _render(root)


def _render(node: dict[str, Any]) -> str:
    branches = [re.escape(character) + _render(child) for character, child in sorted(node.items()) if character]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if "" in node else joined
