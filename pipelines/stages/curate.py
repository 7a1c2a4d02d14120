"""The `curate` stage of a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from operators import registry
from operators.filters.expression import FilterExpression
from operators.stage import Stage, StageContext
from operators.supervise import Limits
from operators.synthesis.curate.run import run_curate
from operators.synthesis.curate.units import Entry, check_local, split_entries
from operators.synthesis.rows import INSTRUCTIONS
from pipelines.stages.corpus import CorpusStage


class CurateStage(Stage):
    """Curate conversations, generated or read: operators set rows aside, each with operator, reason and measured value.

    Row-local operators run first, fused over batches; set operators (`refusal_share`, `opening_diversity`,
    `contradictions`, `near_repeats`, `reply_repeats`) then decide over all rows that are left, in the given order.
    Operators for documents that drop (`bad_words`, `decontaminate`, `filter_perplexity`) see all that was said as `text`.
    An operator option `"@stage"` stands for the model of that stage.
    """

    operational: ClassVar[frozenset[str]] = frozenset({"unit_memory_bytes", "unit_deadline_s"})

    kind: Literal["curate"]
    input: str | list[str] = Field(description="stage(s) whose conversations are curated together, in this order")
    operators: list[Entry] = Field(
        min_length=1, description="operator names, `{name: {option: value}}`, or import paths `package.module:Class`"
    )
    batch_rows: int = Field(1024, ge=1, description="rows of one batch; memory grows with it, the result does not depend on it")
    unit_memory_bytes: int = Field(4 << 30, ge=256 << 20, description="resident memory at which a unit's process is ended")
    unit_deadline_s: float = Field(900, gt=0, description="seconds without progress after which a unit's process is ended")

    def validate_deep(self) -> None:
        local, whole = split_entries(self.operators)
        columns = [*INSTRUCTIONS.names, "text"]
        for entry in local:
            operator = registry.build(entry)
            check_local(operator)
            if isinstance(operator, FilterExpression):
                operator.check_spelling(columns)
            columns += operator.adds
        for _, entry in whole:
            registry.build(entry)

    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def models(self) -> list[str]:
        """The stages whose models operators name."""
        values = [value for entry in self.operators for value in registry.split(entry)[1].values()]
        return sorted({value[1:] for value in values if isinstance(value, str) and value.startswith("@")})

    def input_names(self) -> list[str]:
        return list(dict.fromkeys([*self.inputs(), *self.models()]))

    def files(self) -> list[str]:
        paths: list[str] = []
        for entry in self.operators:
            found = registry.build(entry).files()
            paths += [path for path in found if not path.startswith("@")]
        return paths

    def run(self, context: StageContext) -> None:
        entries = [CorpusStage._resolve(entry, context) for entry in self.operators]
        on_gpu = any(registry.split(entry)[1].get("device") == "cuda" for entry in entries)
        limits = Limits(self.unit_memory_bytes, self.unit_deadline_s)
        inputs = [context.inputs[name] for name in self.inputs()]
        run_curate(context, inputs, entries, limits, self.batch_rows, num_gpus=1 if on_gpu else 0)
