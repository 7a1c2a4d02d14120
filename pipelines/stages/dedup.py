"""The `dedup` stage of a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cluster import storage
from operators.dedup import index
from operators.dedup.options import DedupOptions
from operators.dedup.stage import run_dedup
from operators.stage import Stage, StageContext


class DedupStage(DedupOptions, Stage):
    """Removes duplicate rows over all its inputs: exact copies, then near-duplicates by MinHash-LSH.

    Writes no rows: later stages read the inputs' parts through removal bitmaps. Every removed row is listed in
    `removed/*.parquet` with the row it matched, the row that stays for its cluster, and the similarity of row and match:
    an estimate, or with `verify` the exact Jaccard similarity of their shingles.

    With `index` the rows are also compared with all that earlier stages kept in that directory, whose text is not read
    again; the rows of this stage are then added as a generation of their own. Give it new rows only: a row that the index
    has already counts as its own copy. Stages that run at the same time do not see each other's generation.
    """

    version: ClassVar[int] = 2
    kind: Literal["dedup"] = "dedup"
    input: str | list[str] = Field(description="stage or stages whose rows are compared with each other, in this order")
    reference: str | list[str] = Field(
        [],
        description="stages whose rows are never removed but remove others; one that is not in `input` too is only compared with",
    )
    input_priority: bool = Field(
        False, description="rows of an earlier stage in `input` stay before those of a later one, before `priority` and `keep`"
    )
    index: str | None = Field(None, description="directory of a kept index: compare with what earlier stages put there too")
    grow_index: bool = Field(True, description="add the rows of this stage to `index` (not in a run with a limit)")

    @model_validator(mode="after")
    def _check_stages(self) -> DedupStage:
        if not self.input_names():
            raise ValueError("`input` names no stage")
        return self

    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def references(self) -> list[str]:
        return [self.reference] if isinstance(self.reference, str) else list(self.reference)

    def input_names(self) -> list[str]:
        return list(dict.fromkeys([*self.inputs(), *self.references()]))

    def preflight(self, base_directory: str) -> None:
        if self.index is not None:
            path = storage.absolute(self.index, base_directory)
            index.compare_settings(path, index.generations(path), self.options())

    def options(self) -> DedupOptions:
        return DedupOptions.model_validate(self.model_dump(include=set(DedupOptions.model_fields)))

    def run(self, context: StageContext) -> None:
        kept = None if self.index is None else context.path(self.index)
        run_dedup(context, self.options(), self.inputs(), self.references(), self.input_priority, kept, self.grow_index)
