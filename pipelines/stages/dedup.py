"""The `dedup` stage of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from operators.dedup.options import DedupOptions
from operators.dedup.stage import run_dedup
from operators.stage import Stage, StageContext


class DedupStage(DedupOptions, Stage):
    """Removes duplicate rows over all its inputs: exact copies, then near-duplicates by MinHash-LSH.

    Writes no rows: later stages read the inputs' parts through removal bitmaps. Every removed row is listed in
    `removed/*.parquet` with the row it matched, the row that stays for its cluster, and an estimate of their similarity.
    """

    kind: Literal["dedup"] = "dedup"
    input: str | list[str] = Field(description="stage or stages whose rows are compared with each other, in this order")

    def input_names(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def run(self, context: StageContext) -> None:
        options = DedupOptions.model_validate(self.model_dump(include=set(DedupOptions.model_fields)))
        run_dedup(context, options, [context.inputs[name] for name in self.input_names()])
