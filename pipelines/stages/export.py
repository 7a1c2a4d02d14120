"""The `export` stage of a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from operators.sinks.export import ExportOptions, run_export
from operators.stage import Stage, StageContext
from operators.supervise import Limits


class ExportStage(ExportOptions, Stage):
    """Writes the rows that its inputs kept to files of one size: Parquet, JSON Lines, a Hugging Face folder, or chat formats.

    Rows keep the order of the inputs, and duplicates that a dedup stage removed stay out. The same rows go into the same
    files whatever the number of workers. Without `path`, Parquet files lie in the run's directory and later stages may
    name this one as their input: compaction of many small parts.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"unit_memory_bytes", "unit_deadline_s"})

    kind: Literal["export"] = "export"
    input: str | list[str] = Field(description="stage or stages whose rows are written, in this order")
    unit_memory_bytes: int = Field(4 << 30, ge=256 << 20, description="resident memory at which a file's process is ended")
    unit_deadline_s: float = Field(600, gt=0, description="seconds without progress after which a file's process is ended")

    def input_names(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def run(self, context: StageContext) -> None:
        options = ExportOptions.model_validate(self.model_dump(include=set(ExportOptions.model_fields)))
        limits = Limits(self.unit_memory_bytes, self.unit_deadline_s)
        run_export(context, options, [context.inputs[name] for name in self.input_names()], limits)
