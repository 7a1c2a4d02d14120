"""The `quality_classifier` stage of a recipe."""

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
from operators.sources.units import ReadSettings, plan_units, read_unit
from operators.stage import Stage, StageContext

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
