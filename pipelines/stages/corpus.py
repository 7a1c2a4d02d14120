"""The `corpus` stage of a recipe."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from operators import registry
from operators.config import SettingsError
from operators.corpus import run_corpus
from operators.filters.expression import FilterExpression
from operators.measures import Measure
from operators.sources.batches import CONTENT_SCHEMA, TEXT_SCHEMA
from operators.sources.units import ReadSettings, check_files
from operators.stage import Stage, StageContext
from operators.supervise import Limits


class CorpusStage(Stage):
    """Read files and run row-local operators over them.

    Operators run in the given order, fused over one batch; each rejected row is kept with operator, reason and measured
    value, each unreadable one is set aside. An operator option `"@stage"` stands for the model of that stage.
    """

    version: ClassVar[int] = 2
    operational: ClassVar[frozenset[str]] = frozenset({"unit_memory_bytes", "unit_deadline_s"})

    kind: Literal["corpus"]
    read: ReadSettings = Field(description="what to read: format, path, columns")
    operators: list[str | dict[str, Any]] = Field(
        default_factory=list, description="operator names, `{name: {option: value}}`, or import paths `package.module:Class`"
    )
    batch_rows: int = Field(2048, ge=1, description="rows of one batch; memory grows with it, the result does not depend on it")
    measure: Measure = Field(
        "seen",
        description="scores to keep for `danlu decide`: of the rows that a filter `seen`, of `all` rows that come to a run of "
        "filters, rejected ones too, or `none`; what is kept does not depend on it",
    )
    unit_memory_bytes: int = Field(4 << 30, ge=256 << 20, description="resident memory at which a unit's process is ended")
    unit_deadline_s: float = Field(600, gt=0, description="seconds without progress after which a unit's process is ended")

    def validate_deep(self) -> None:
        columns = [*TEXT_SCHEMA.names, *CONTENT_SCHEMA.names, *(name for name, _ in self.read.carried())]
        for entry in self.operators:
            operator = registry.build(entry)
            if "messages" in operator.needs:
                raise SettingsError(f"operator {operator.name} works on conversations: use it in a stage of kind `curate`")
            if isinstance(operator, FilterExpression):
                operator.check_spelling(columns)
            columns += operator.adds

    def preflight(self, base_directory: str) -> None:
        check_files(self.read, base_directory)

    def input_names(self) -> list[str]:
        return sorted({value[1:] for entry in self.operators for value in _values(entry) if value.startswith("@")})

    def files(self) -> list[str]:
        paths = [self.read.path] if isinstance(self.read.path, str) else list(self.read.path)
        for entry in self.operators:
            name, options = registry.split(entry)
            if not any(isinstance(value, str) and value.startswith("@") for value in options.values()):
                paths += registry.load(name)(**options).files()
        return paths

    def run(self, context: StageContext) -> None:
        run_corpus(
            context,
            self.read,
            [self._resolve(entry, context) for entry in self.operators],
            Limits(self.unit_memory_bytes, self.unit_deadline_s),
            self.batch_rows,
            self.measure,
            self.version,
        )

    @staticmethod
    def _resolve(entry: str | dict[str, Any], context: StageContext) -> str | dict[str, Any]:
        name, options = registry.split(entry)
        resolved = {
            key: context.model_of(value[1:]) if isinstance(value, str) and value.startswith("@") else value
            for key, value in options.items()
        }
        return {name: resolved} if resolved else name


def _values(entry: str | dict[str, Any]) -> list[str]:
    return [value for value in registry.split(entry)[1].values() if isinstance(value, str)]
