"""Perplexity of documents: by KenLM n-gram models as CCNet does it (arXiv:1911.00359), or by a small causal language model.

Low perplexity is text that the model expects, high perplexity text unlike what it was trained on; very low perplexity is
often boilerplate. The limits belong to one model: they have to be found on data (`danlu stats` shows the distribution of
the column `perplexity`, `danlu decide` tries limits without scoring again).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import (
    UNSPACED_LANGUAGES,
    Rule,
    analysis_of,
    as_numpy,
    base_language,
    first_failing,
    languages,
    limits_by_row,
)
from operators.operator import Filter
from operators.text.analysis import Analysis

Bucket = Literal["head", "middle", "tail"]
_BUCKETS: tuple[Bucket, ...] = ("head", "middle", "tail")
_RULES = (
    Rule("low_perplexity", "perplexity", "min_perplexity", False),
    Rule("high_perplexity", "perplexity", "max_perplexity", True),
)


class PerplexityLimits(Settings):
    """Limits of perplexity; null is no limit."""

    min_perplexity: float | None = Field(default=None, ge=0, description="lowest perplexity")
    max_perplexity: float | None = Field(default=None, ge=0, description="highest perplexity")


class FilterPerplexitySettings(PerplexityLimits):
    """Adds `perplexity` (and `perplexity_bucket`, if cutoffs are given). Give `kenlm` or `model`."""

    kenlm: str | dict[str, str] | None = Field(
        default=None, description="path or URI of a KenLM model (ARPA or binary), or one by language (`*` for the others)"
    )
    tokens: str | dict[str, str] | None = Field(
        default=None,
        description="what the n-gram model's tokens are, for all or by language: words, characters, spaces, or the path of a "
        "SentencePiece .model or a tokenizer .json; null is characters for Chinese, Japanese and Thai, else words",
    )
    normalise: bool = Field(default=True, description="CCNet's form before KenLM: lower case, no accents, digits as 0, ASCII marks")
    unit: Literal["line", "document"] = Field(
        default="line",
        description="KenLM's sentence: each line, or the whole document as one line (CCNet's own models and cutoffs)",
    )
    model: str | None = Field(
        default=None, description="directory of a causal language model (safetensors), or `@stage` for that of a stage"
    )
    context: int | None = Field(default=None, ge=2, description="tokens the causal model sees at once; null is 1024, or all it can")
    stride: int | None = Field(default=None, ge=1, description="tokens between its windows; null is half the context")
    max_tokens: int | None = Field(default=4096, ge=1, description="tokens of a document the causal model reads, null is all")
    batch_tokens: int = Field(
        default=2048, ge=1, description="tokens the causal model works on at once: memory is this x its vocabulary x 4 bytes"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the causal model runs")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="precision of the causal model")
    thresholds: dict[str, PerplexityLimits] = Field(default={}, description="limits by language code, in place of those for all")
    cutoffs: dict[str, tuple[float, float]] = Field(
        default={},
        description="by language (`*` for the others): perplexity below the first is head, below the second middle, else tail",
    )
    keep: list[Bucket] | None = Field(default=None, description="buckets to keep; documents without one are kept; null keeps all")

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> FilterPerplexitySettings:
        if (self.kenlm is None) == (self.model is None):
            raise ValueError("give `kenlm` (an n-gram model) or `model` (a causal language model), and only one of them")
        for code, (head, middle) in self.cutoffs.items():
            if not 0 < head <= middle:
                raise ValueError(f"cutoffs of {code}: the first must be positive and not above the second, got {head}, {middle}")
        if self.keep is not None and not self.cutoffs:
            raise ValueError("`keep` needs `cutoffs`")
        return self


class FilterPerplexity(Filter):
    """Score documents by the perplexity of a language model, and drop those out of limits or buckets.

    Reasons: `low_perplexity`, `high_perplexity`, or the bucket. A document has no perplexity (null, and is kept) where its
    language has no model or it has no text.
    """

    name: ClassVar[str] = "filter_perplexity"
    settings = FilterPerplexitySettings
    adds: tuple[str, ...] = ("perplexity",)  # type: ignore[misc]
    decide_options = frozenset({"min_perplexity", "max_perplexity", "thresholds", "keep"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.config.cutoffs:
            self.adds = ("perplexity", "perplexity_bucket")  # type: ignore[misc]
        self._limits = {"*": PerplexityLimits(min_perplexity=self.config.min_perplexity, max_perplexity=self.config.max_perplexity)}
        if self.config.kenlm is not None:
            from operators.text import ngram_model

            for name in _by_language(self.config.tokens).values():
                if not ngram_model.is_tokens_file(name):
                    ngram_model.tokens_of(name)
            ngram_model.require_kenlm(self.name)

    def files(self) -> list[str]:
        from operators.text import ngram_model

        found = [*_by_language(self.config.kenlm).values(), *_by_language(self.config.model).values()]
        return found + [name for name in _by_language(self.config.tokens).values() if ngram_model.is_tokens_file(name)]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`perplexity` float64 (null where there is none), `perplexity_bucket` if there are cutoffs, `language_guess`."""
        guess = analysis_of(table, analysis).language_guess
        text = pc.fill_null(table["text"].cast(pa.large_string()), "")
        texts = text.combine_chunks() if table.num_rows else pa.array([], pa.large_string())
        texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
        codes = np.array([base_language(code) for code in languages(table, guess).to_pylist()], object)
        found = self._by_ngrams(texts, codes) if self.config.kenlm is not None else self._by_model(texts)
        scores = {"perplexity": pa.array(found, mask=np.isnan(found)), "language_guess": guess}
        if self.config.cutoffs:
            scores["perplexity_bucket"] = self._buckets(found, codes)
        return scores

    def _by_ngrams(self, texts: pa.Array, codes: np.ndarray) -> np.ndarray:
        from operators.text import ngram_model

        models, tokens = _by_language(self.config.kenlm), _by_language(self.config.tokens)
        found = np.full(len(texts), np.nan)
        for code in sorted(set(codes.tolist())):
            path = models.get(code, models.get("*"))
            if path is None:
                continue
            default = "characters" if code in UNSPACED_LANGUAGES else "words"
            rows = np.flatnonzero(codes == code)
            found[rows] = ngram_model.perplexities(
                ngram_model.load(path),
                texts.take(pa.array(rows)).to_pylist(),
                ngram_model.tokens_of(tokens.get(code, tokens.get("*", default))),
                self.config.unit == "line",
                self.config.normalise,
            )
        return found

    def _by_model(self, texts: pa.Array) -> np.ndarray:
        from operators.quality import causal_model

        config = self.config
        loaded = causal_model.load(config.model, config.device, config.dtype)
        nats, tokens = causal_model.losses(
            loaded,
            texts,
            context=config.context,
            stride=config.stride,
            max_tokens=config.max_tokens,
            batch_tokens=config.batch_tokens,
        )
        # rounded before the exponential: what differs between machines is a few units of the sixth decimal of the loss
        loss = np.round(np.divide(nats, tokens, out=np.full(len(nats), np.nan), where=tokens > 0), 4)
        return np.round(np.exp(loss), 3)

    def _buckets(self, perplexity: np.ndarray, codes: np.ndarray) -> pa.Array:
        cutoffs = {base_language(code): pair for code, pair in self.config.cutoffs.items()}
        none = (np.nan, np.nan)
        pairs = np.array([cutoffs.get(code, cutoffs.get("*", none)) for code in codes.tolist()], np.float64).reshape(-1, 2)
        bucket = (perplexity >= pairs[:, 0]).astype(np.int64) + (perplexity >= pairs[:, 1])
        return pa.array(_BUCKETS, pa.string()).take(pa.array(bucket, mask=np.isnan(perplexity) | np.isnan(pairs[:, 0])))

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        codes = languages(table, scores.get("language_guess"))
        index, limits = limits_by_row(self._limits, self.config.thresholds, codes)
        reason, value = first_failing(_RULES, as_numpy(scores, ["perplexity"]), index, limits)
        if self.config.keep is not None:
            bucket = scores["perplexity_bucket"]
            outside = pc.and_(pc.is_valid(bucket), pc.invert(pc.is_in(bucket, value_set=pa.array(self.config.keep, pa.string()))))
            value = pc.if_else(pc.and_(pc.is_null(reason), outside), scores["perplexity"], value)
            reason = pc.if_else(pc.and_(pc.is_null(reason), outside), bucket, reason)
        return reason, value


def _by_language(option: str | dict[str, str] | None) -> dict[str, str]:
    if option is None:
        return {}
    return (
        {"*": option}
        if isinstance(option, str)
        else {base_language(code) if code != "*" else code: path for code, path in option.items()}
    )
