"""The stages of a recipe that learn and give quality scores."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pyarrow.compute as pc
from pydantic import Field

from cluster import storage
from operators.config import parse
from operators.ledger import Ledger
from operators.quality.classifier import ClassifierSettings, train_classifier
from operators.quality.model_scorer import Activation, Scoring, score_stage
from operators.sources.units import ReadSettings, plan_units, read_unit
from operators.stage import Stage, StageContext
from operators.supervise import Limits

_EXAMPLES = 5


class QualityClassifierStage(Stage):
    """Train a fastText quality classifier on named good and bad documents (JSONL, Parquet, text, plain or compressed).

    `score_quality: {model: "@this_stage"}` scores by it. Statistics hold the held-out accuracy, in all and by language.
    """

    version: ClassVar[int] = 1

    kind: Literal["quality_classifier"]
    good: list[str] = Field(min_length=1, description="files, directories or globs of documents to be like")
    bad: list[str] = Field(min_length=1, description="files, directories or globs of documents to be unlike")
    text_column: str = Field(default="text", description="column or key of the text")
    classifier: ClassifierSettings = Field(default=ClassifierSettings(), description="how documents are read and how it trains")

    def files(self) -> list[str]:
        return [*self.good, *self.bad]

    def run(self, context: StageContext) -> None:
        ledger = Ledger()
        unreadable: list[dict[str, Any]] = []
        good, bad = (self._texts(patterns, context, ledger, unreadable) for patterns in (self.good, self.bad))
        with tempfile.TemporaryDirectory() as directory:
            local = os.path.join(directory, "model.bin")
            stats = train_classifier(good, bad, local, context.seed, self.classifier)
            with open(local, "rb") as stream:
                storage.write_bytes(storage.join(context.directory, "model.bin"), stream.read())
        if unreadable:
            stats["examples"] = unreadable
        context.finish(ledger=ledger, stats=stats, files={"model": "model.bin"})

    def _texts(self, patterns: list[str], context: StageContext, ledger: Ledger, unreadable: list[dict[str, Any]]) -> Iterator[str]:
        """The texts of one side, streamed; every row is accounted for in `ledger`."""
        read = parse(ReadSettings, {"path": patterns, "text_column": self.text_column}, f"stages.{context.stage}")
        units = plan_units(read, context.base_directory, context.limit)
        for done, unit in enumerate(units):
            context.progress(done, len(units), "units")
            for batch in read_unit(unit, read):
                context.check_cancelled()
                ledger.rows_in += len(batch.rows) + len(batch.bad)
                ledger.quarantined += len(batch.bad)
                unreadable += [{"where": row.where, "reason": row.reason} for row in batch.bad[: _EXAMPLES - len(unreadable)]]
                blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(batch.table["text"])), 0)
                ledger.rejected["quality_classifier:empty"] += pc.sum(blank).as_py() or 0
                texts = batch.table["text"].filter(pc.invert(blank)).to_pylist()
                ledger.kept += len(texts)
                yield from texts


class ScoreStage(Stage):
    """Adds a column of scores by a Hugging Face sequence classifier, on a pool of CPU or GPU actors.

    Any classifier directory with safetensors weights will do (a FineWeb-Edu style regressor, a toxicity model). The rows
    are written again with the new column; `select` then keeps the best share.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"unit_memory_bytes", "unit_deadline_s"})

    kind: Literal["score"]
    input: str | list[str] = Field(description="the stages whose kept rows are scored")
    model: str = Field(description="directory of the classifier (config.json, safetensors, tokenizer)")
    column: str = Field("quality", pattern=r"^[a-z][a-z0-9_]*$", description="name of the score column")
    label: str | None = Field(None, description="the label whose score is taken; needed unless the model has one output")
    activation: Activation = Field("auto", description="auto: softmax, sigmoid for multi-label models, none for one output")
    max_tokens: int = Field(512, ge=8, description="tokens of each text that are read, from its start")
    batch_tokens: int = Field(16384, ge=8, description="tokens of a batch, padding included")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cuda gives each worker one GPU and computes in bfloat16")
    minimum: float | None = Field(None, description="rows with a lower score are rejected (`low`)")
    unit_memory_bytes: int = Field(8 << 30, ge=256 << 20, description="resident memory at which a worker's process is ended")
    unit_deadline_s: float = Field(900, gt=0, description="seconds without progress after which a worker's process is ended")

    def input_names(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def files(self) -> list[str]:
        return [self.model]

    def run(self, context: StageContext) -> None:
        scoring = Scoring(
            context.path(self.model), self.column, self.label, self.activation, self.max_tokens, self.batch_tokens,
            self.device, self.minimum,
        )  # fmt: skip
        inputs = [context.inputs[name] for name in self.input_names()]
        limits = Limits(self.unit_memory_bytes, self.unit_deadline_s)
        score_stage(context, inputs, scoring, limits, num_gpus=1 if self.device == "cuda" else 0)
