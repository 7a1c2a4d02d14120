"""Near-repeats inside a set: questions that ask the same, replies that say the same.

    rouge_l      ROUGE-L F with every row kept before (Self-Instruct's novelty); exact, rows in order, one task
    minhash      Jaccard similarity of shingles by MinHash-LSH, verified (the machinery of the `dedup` stage)
    embeddings   cosine of sentence embeddings (SemDeDup, the machinery of `semantic_dedup`)

ROUGE-L's task holds 0.2 kB a question of ten words; the other two exchange keys through files and grow with neither.
Rows that stay are the first ones, whatever the method.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from operators.config import Settings
from operators.dedup.options import DedupOptions
from operators.dedup.semantic import SemanticOptions
from operators.synthesis.curate.set_operator import ReadKeys, Removed, SetOperator, ids_of
from operators.synthesis.curate.turns import ASKING, REPLIES, Turns, instructions, sizes
from operators.synthesis.novelty import NoveltyPool

THRESHOLDS = {"rouge_l": 0.7, "minhash": 0.7, "embeddings": 0.93}


class RepeatSettings(Settings):
    """How rows are compared."""

    by: Literal["rouge_l", "minhash", "embeddings"] = Field(
        default="minhash", description="rouge_l, minhash or embeddings, see the module"
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="similarity from which a row repeats another; default .7 (ROUGE-L, MinHash), .93 (cosine)",
    )
    words: int = Field(default=2, ge=1, description="minhash: words in a shingle; a shorter text repeats nothing")
    characters: int = Field(default=3, ge=1, description="minhash: characters in a shingle of Chinese")
    model: str | None = Field(default=None, description="embeddings: directory of the embedding model (safetensors), or `@stage`")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="embeddings: where the model runs")

    @model_validator(mode="after")
    def _model_with_embeddings(self) -> RepeatSettings:
        if (self.by == "embeddings") != (self.model is not None):
            raise ValueError("give a `model` with `by: embeddings`, and only then")
        return self

    @property
    def limit(self) -> float:
        return self.threshold if self.threshold is not None else THRESHOLDS[self.by]


class NearRepeatSettings(RepeatSettings):
    """How questions are compared."""

    of: Literal["question", "instruction"] = Field(
        default="question",
        description="the first question with its input, or its instruction alone (rows of one task then repeat it)",
    )


class ReplyRepeatSettings(RepeatSettings):
    """How replies are compared."""

    min_characters: int = Field(
        default=80, ge=0, description="shorter replies repeat nothing; Chinese characters count three times"
    )


class _Repeats(SetOperator):
    """What both share. The key is the text itself: it is read from the rows where they lie."""

    key: ClassVar[str] = "text"

    def files(self) -> list[str]:
        return [self.config.model] if self.config.model else []

    def dedup_options(self, column: str) -> DedupOptions | None:
        """The options of the `dedup` machinery, when it is to be used."""
        if self.config.by != "minhash":
            return None
        values = {
            "column": column,
            "threshold": self.config.limit,
            "words": self.config.words,
            "characters": self.config.characters,
        }
        return DedupOptions.model_validate({**values, "exact": False, "digits": "keep", "verify": True})

    def semantic_options(self, column: str) -> SemanticOptions | None:
        """The options of the `semantic_dedup` machinery, when it is to be used."""
        if self.config.by != "embeddings" or self.config.model is None:
            return None
        values = {"model": self.config.model, "device": self.config.device, "threshold": self.config.limit}
        return SemanticOptions.model_validate({**values, "column": column, "keep": "first"})

    def resolve(self, read: ReadKeys, seed: int) -> Removed:
        """By ROUGE-L: a row goes if it is too near to one that was kept before it."""
        pool = NoveltyPool(self.config.limit, floor=min(0.5, self.config.limit))
        kept: list[np.ndarray] = []
        gone: list[np.ndarray] = []
        values: list[np.ndarray] = []
        nearest: list[np.ndarray] = []
        for keys in read():
            column = keys.table[self.key]
            known = column.is_valid().to_numpy()
            ordinals = keys.ordinals[known]
            found = pool.admit(column.filter(pa.array(known)).to_pylist())
            kept.append(ordinals[found.accepted])
            gone.append(ordinals[~found.accepted])
            values.append(found.similarity[~found.accepted])
            nearest.append(found.nearest[~found.accepted])
        if not gone or not sum(map(len, gone)):
            return Removed.of(np.zeros(0, np.uint64), "near_repeat", np.zeros(0))
        against = np.concatenate(kept)[np.concatenate(nearest)]
        return Removed.of(np.concatenate(gone), "near_repeat", np.round(np.concatenate(values), 6), ids_of(read, against))


class NearRepeats(_Repeats):
    """Drop rows whose question nearly repeats that of an earlier row (`near_repeat`).

    The value is the similarity, the detail the id of the row that stays.
    """

    name: ClassVar[str] = "near_repeats"
    settings = NearRepeatSettings

    def keys(self, table: pa.Table) -> dict[str, pa.Array]:
        turns = Turns(table)
        if self.config.of == "instruction":
            return {self.key: instructions(table, turns)}
        return {self.key: turns.of(*ASKING).first().by_row()}


class ReplyRepeats(_Repeats):
    """Drop rows whose replies nearly repeat those of an earlier row (`near_repeat`).

    Replies below `min_characters` are left alone: short answers are alike without being repeats.
    """

    name: ClassVar[str] = "reply_repeats"

    settings = ReplyRepeatSettings

    def keys(self, table: pa.Table) -> dict[str, pa.Array]:
        replies = Turns(table).of(*REPLIES).by_row()
        short = sizes(pc.fill_null(replies, "")) < self.config.min_characters
        return {self.key: pc.if_else(pa.array(short), pa.scalar(None, pa.large_string()), replies)}
