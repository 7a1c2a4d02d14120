"""Score documents by a quality classifier."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import base_language, languages
from operators.operator import Filter
from operators.quality.classifier import GOOD, normalise
from operators.text import fasttext_model
from operators.text.analysis import Analysis


class ScoreQualitySettings(Settings):
    """Adds `quality`, the classifier's probability that a document is good, in [0, 1]."""

    model: str = Field(description="path or URI of a model by `train_classifier`; `@stage` in a recipe is that stage's")
    minimum: float | dict[str, float] = Field(
        default=0.0, description="lowest quality to keep, a number or one by language (`*` for the others)"
    )
    label: str = Field(default=GOOD, description="the model's label for good documents")
    unit: Literal["words", "characters"] = Field(default="words", description="as the model was trained")
    max_characters: int = Field(default=5000, ge=100, description="as the model was trained")


class ScoreQuality(Filter):
    """Score quality with a fastText classifier and drop documents below a minimum (`low_quality`)."""

    name: ClassVar[str] = "score_quality"
    settings = ScoreQualitySettings
    adds = ("quality",)
    decide_options = frozenset({"minimum"})

    def files(self) -> list[str]:
        return [self.config.model]

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """`quality` float32, rounded to 4 decimals, and `language_guess`."""
        model = fasttext_model.load(self.config.model)
        names = {label.removeprefix(fasttext_model.LABEL) for label in model.get_labels()}
        if self.config.label not in names:
            raise ValueError(f"{self.config.model} has no label {self.config.label!r}; it has {sorted(names)}")
        lines = normalise(table["text"], self.config.unit, self.config.max_characters).to_pylist()
        labels, scores = fasttext_model.predict(model, lines, -1)
        quality = np.zeros(len(lines), np.float64)
        for row, (found, probabilities) in enumerate(zip(labels, scores, strict=True)):
            if lines[row] and self.config.label in found:  # fastText has an opinion on nothing as well
                quality[row] = min(float(probabilities[found.index(self.config.label)]), 1.0)
        found_analysis = Analysis.of(table["text"]) if analysis is None else analysis
        return {"quality": pa.array(np.round(quality, 4), pa.float32()), "language_guess": found_analysis.language_guess}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        quality = np.round(scores["quality"].to_numpy().astype(np.float64), 4)
        minimum = self.config.minimum
        if isinstance(minimum, dict):
            other = minimum.get("*", 0.0)
            codes = languages(table, scores.get("language_guess")).to_pylist()
            limit = np.array([minimum.get(code, minimum.get(base_language(code), other)) for code in codes], np.float64)
        else:
            limit = np.full(len(quality), minimum, np.float64)
        low = quality < limit
        reason = pc.if_else(pa.array(low), "low_quality", pa.scalar(None, pa.string()))
        return reason, pa.array(quality, pa.float64(), mask=~low)
