"""The settings of deduplication, shared by the recipe's stage and by the Dataset functions."""

from __future__ import annotations

from typing import Literal, cast

import pydantic
from pydantic import Field

from operators.config import Settings
from operators.dedup.bands import optimal_bands
from operators.dedup.normalise import AUTO, CHARACTERS, WORDS

_UNITS = {"auto": AUTO, "words": WORDS, "characters": CHARACTERS}


class ShingleOptions(Settings):
    """What a text is compared by."""

    column: str = Field("text", description="the string column that is compared")
    words: int = Field(5, ge=1, description="words in a shingle of spaced text; shorter documents have no near-duplicates")
    characters: int = Field(5, ge=1, description="characters in a shingle of text written without spaces (Chinese, Japanese, Thai)")
    shingles: Literal["auto", "words", "characters"] = Field(
        "auto", description="unit of the shingles; auto decides for each text by its scripts"
    )
    language_column: str | None = Field(
        None, description="column of language tags that decides the unit instead (null or und: as `shingles` says)"
    )
    digits: Literal["fold", "keep"] = Field("fold", description="fold: every run of digits counts as one 0")
    normalisation: Literal["folded", "plain"] = Field(
        "folded",
        description="folded: without accents and punctuation (FineWeb's definition); plain: lower case only, words are runs of "
        "letters, digits and _, characters are all but whitespace",
    )

    @property
    def unit(self) -> int:
        return _UNITS[self.shingles]


class DedupOptions(ShingleOptions):
    """How duplicates are found and which of them stays."""

    method: Literal["exact", "minhash"] | list[Literal["exact", "minhash"]] = Field(
        "minhash", description="exact, minhash or a list of both; minhash removes exact duplicates first unless `exact: false`"
    )
    exact: bool = Field(True, description="with minhash: remove exact duplicates first")
    exact_on: Literal["raw", "normalised", "url", "value"] = Field(
        "raw",
        description="exact duplicates agree in every byte of `column`; in normalised words; as addresses (see `dedup.url`); "
        "or in a value of any type. An address or value that is null matches nothing",
    )
    threshold: float = Field(0.8, gt=0, lt=1, description="Jaccard similarity of shingles from which documents are near-duplicates")
    permutations: int = Field(112, ge=1, le=4096, description="values in a MinHash signature")
    bands: int | None = Field(None, ge=1, description="bands of a signature; default: datasketch's optimum for the threshold")
    rows: int | None = Field(None, ge=1, description="values in a band; given together with `bands`")
    seed: int = Field(1, ge=0, lt=1 << 32, description="seed of the permutations, as in datasketch.MinHash(seed=...)")
    signature: Literal["fast", "datasketch"] = Field(
        "fast", description="hash of a shingle; datasketch: SHA-1, signatures bit-equal to datasketch.MinHash"
    )
    backend: Literal["kernel", "datasketch"] = Field(
        "kernel", description="who signs: compiled kernels, or datasketch itself (the slow reference; same signatures)"
    )
    keep: Literal["first", "longest", "best"] = Field(
        "first",
        description="who stays of a cluster: the first row, the longest text or the highest `keep_column`; ties: the first",
    )
    priority: list[str] | None = Field(
        None,
        min_length=1,
        description="sources in order of precedence, before `keep`: a row of an earlier one stays; sources not listed come last",
    )
    priority_column: str = Field("source", description="the column whose values `priority` lists")
    keep_column: str = Field("quality", description="numbers that `keep: best` compares, rounded to 6 decimals; null is lowest")
    verify: bool = Field(
        False, description="confirm every pair of a bucket by the exact Jaccard similarity of its shingles (reads candidates again)"
    )
    verify_pairs: int = Field(
        10_000,
        ge=1,
        description="pairs checked in one bucket at most, beside those with its first row; the rest is counted as unchecked",
    )
    similarity: bool = Field(
        True,
        description="estimate the similarity of each removed row and its match (1 byte a permutation); verified ones are exact",
    )
    partitions: int | None = Field(None, ge=1, le=65536, description="pieces of the key space; default: about 64 MB of keys each")

    @pydantic.model_validator(mode="after")
    def _check(self) -> DedupOptions:
        if (self.bands is None) != (self.rows is None):
            raise ValueError("give `bands` and `rows` together, or neither")
        if self.bands is not None and self.rows is not None and self.bands * self.rows > self.permutations:
            raise ValueError(f"bands x rows = {self.bands * self.rows} exceeds permutations = {self.permutations}")
        if self.exact_on in ("url", "value") and (self.column == "text" or self.finds_near):
            raise ValueError(f"`exact_on: {self.exact_on}` needs `method: exact` and the `column` of keys, such as `column: url`")
        if not self.methods:
            raise ValueError("`method` names no method: exact, minhash or both")
        return self

    @property
    def methods(self) -> set[str]:
        return {self.method} if isinstance(self.method, str) else set(cast(list[str], self.method))

    @property
    def finds_near(self) -> bool:
        return "minhash" in self.methods

    @property
    def finds_exact(self) -> bool:
        return "exact" in self.methods or self.exact

    @property
    def score_columns(self) -> int:
        """How many numbers decide who stays, before the order of the rows does."""
        return bool(self.priority) + (self.keep != "first")

    @property
    def shape(self) -> tuple[int, int]:
        """(bands, rows)."""
        if self.bands is not None and self.rows is not None:
            return self.bands, self.rows
        return optimal_bands(self.threshold, self.permutations)

    def with_shape(self) -> DedupOptions:
        """The same options with bands and rows spelled out."""
        bands, rows = self.shape
        return self.model_copy(update={"bands": bands, "rows": rows})

    def columns(self) -> list[str]:
        """The columns a document must have, without its id."""
        best, source = self.keep_column if self.keep == "best" else None, self.priority_column if self.priority else None
        wanted = [self.column, self.language_column, best, source]
        return list(dict.fromkeys(name for name in wanted if name))
