"""The `semantic_dedup` stage of a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from operators.dedup.semantic import SemanticOptions, run_semantic
from operators.stage import Stage, StageContext
from operators.supervise import Limits


class SemanticDedupStage(SemanticOptions, Stage):
    """Removes rows that mean the same as another by their embeddings (SemDeDup), compared inside clusters.

    Writes no rows: later stages read the inputs' parts through removal bitmaps. Every removed row is listed in
    `removed/*.parquet` with its match, the row that stays and their cosine. Embeddings stay with the stage: another
    threshold embeds nothing again.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"unit_memory_bytes", "unit_deadline_s"})

    kind: Literal["semantic_dedup"] = "semantic_dedup"
    input: str | list[str] = Field(description="stage or stages whose rows are compared with each other, in this order")
    unit_memory_bytes: int = Field(8 << 30, ge=256 << 20, description="resident memory at which a unit's process is ended")
    unit_deadline_s: float = Field(900, gt=0, description="seconds without progress after which a unit's process is ended")

    def input_names(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def files(self) -> list[str]:
        return [self.model]

    def run(self, context: StageContext) -> None:
        options = SemanticOptions.model_validate(self.model_dump(include=set(SemanticOptions.model_fields)))
        options = options.model_copy(update={"model": context.path(options.model)})
        limits = Limits(self.unit_memory_bytes, self.unit_deadline_s)
        run_semantic(context, options, [context.inputs[name] for name in self.input_names()], limits)
