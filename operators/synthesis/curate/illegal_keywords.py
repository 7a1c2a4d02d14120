"""Illegal keywords: phrases of sellers of drugs, weapons and papers, gambling and porn spam, a list of one's own, coarse words.

Packaged phrases: `patterns/LANG/illegal.txt`. They are meant for replies: a question about such matters that is refused
or answered soberly is worth keeping. Coarse words are those of the operator `bad_words` (LDNOOBW).
"""

from __future__ import annotations

import functools
import json
import os
import re
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cluster import storage
from operators.config import Settings, SettingsError
from operators.filters.badwords import BadWords
from operators.synthesis.curate import patterns
from operators.synthesis.curate.conversation_filter import ConversationFilter, first_reason, numbers, told
from operators.synthesis.curate.turns import REPLIES, Turns
from operators.text.analysis import Analysis

Kind = Literal["trade", "gambling", "adult"]
_UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


class IllegalKeywordsSettings(Settings):
    """Which lists apply, and where."""

    packaged: list[Kind] = Field(default=["trade", "gambling", "adult"], description="kinds of packaged phrases")
    words: list[str] = Field(default=[], description="words or phrases of one's own, taken literally")
    path: str | None = Field(
        default=None, description="a file of such words: one a line (`#` begins a remark), or JSON (a list, or lists by language)"
    )
    where: Literal["replies", "all"] = Field(default="replies", description="the messages that are searched")
    max_bad_words: int | None = Field(
        default=3, ge=0, description="most coarse words (LDNOOBW) there; the lists hold harmless ones too; null: not counted"
    )


class IllegalKeywords(ConversationFilter):
    """Drop conversations that hold illegal keywords (`illegal_keyword`) or too many coarse words (`bad_words`)."""

    name: ClassVar[str] = "illegal_keywords"
    settings = IllegalKeywordsSettings
    decide_options = frozenset({"max_bad_words"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        kinds = list(self.config.packaged)
        packaged = [item for kind in kinds for item in patterns.sections("illegal").get(kind, ())]
        self._patterns = patterns.Patterns([*packaged, *map(_literal, self.config.words)])
        self._coarse = BadWords(max_count=self.config.max_bad_words, max_fraction=None, always=["en", "zh"])

    def files(self) -> list[str]:
        own = [self.config.path] if self.config.path else []
        return [*patterns.files("illegal"), *self._coarse.files(), *own]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`keywords` int64, `bad_words` int64, `found` string (the first keyword)."""
        turns = Turns(table)
        said = turns.of(*REPLIES) if self.config.where == "replies" else turns.all
        listed = [self._patterns] + ([_listed(self.config.path, _stamp(self.config.path))] if self.config.path else [])
        counts = np.zeros(len(said), np.int64)
        found: Any = pa.nulls(len(said), pa.string())
        for known in listed:
            counts = counts + known.counts(said.text)
            found = pc.coalesce(found, known.found(said.text))
        coarse = np.zeros(table.num_rows, np.int64)
        if self.config.max_bad_words is not None:
            coarse = said.sum(self._coarse.measure(pa.table({"text": said.text}))["count"].to_numpy(zero_copy_only=False))
        return {"keywords": pa.array(said.sum(counts)), "bad_words": pa.array(coarse), "found": told(said, found)}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        keywords, coarse = numbers(scores, "keywords"), numbers(scores, "bad_words")
        limit = np.inf if self.config.max_bad_words is None else self.config.max_bad_words
        return first_reason([("illegal_keyword", keywords > 0, keywords), ("bad_words", coarse > limit, coarse)], table.num_rows)


def _literal(word: str) -> str:
    """A word as an expression: between non-letters where its script has spaces, else anywhere."""
    quoted = re.sub(r"([^\w\s])", r"\\\1", word, flags=re.ASCII) if word.isascii() else re.escape(word)
    return quoted if _UNSPACED.search(word) else rf"\b{quoted}\b" if word[:1].isalnum() and word[-1:].isalnum() else quoted


def _stamp(path: str) -> int:
    return storage.size(path) if storage.is_remote(path) else os.stat(storage.local_path(path)).st_mtime_ns


@functools.lru_cache(maxsize=8)
def _listed(path: str, stamp: int) -> patterns.Patterns:
    """The words of a file. Raises SettingsError for another shape of JSON or text that is no UTF-8."""
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
        if path.endswith(".json"):
            data = json.loads(text)
            lists = list(data.values()) if isinstance(data, dict) else [data]
            words = [word for words in lists for word in words]
        else:
            words = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path} is no word list (one word a line in UTF-8, or JSON lists): {error}") from error
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise SettingsError(f"{path} is no word list: every entry must be a text that is not empty")
    return patterns.Patterns([_literal(word.strip()) for word in words])
