"""The stage that waits for people: its rows pass once enough of them were judged and found good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from cluster import storage
from operators import shards
from operators.config import SettingsError
from operators.ledger import Ledger
from operators.stage import Stage, StageContext
from pipelines.review import verdicts
from pipelines.review.findings import Findings, Requirement, findings
from pipelines.stages.generating import listed

_REMOVED = pa.schema([("ordinal", pa.uint64()), ("id", pa.string()), ("reason", pa.string()), ("value", pa.float64())])
_REASON = "reviewed:rejected_by_people"


class ReviewedStage(Stage):
    """Lets the rows of a stage pass once people have accepted enough of a sample (`danlu review`), and fails until then.

    Writes no rows: later stages read the input's parts. In a trial run with a limit nothing is asked.
    """

    operational: ClassVar[frozenset[str]] = frozenset()

    kind: Literal["reviewed"]
    input: str = Field(description="the stage whose rows people review")
    min_acceptance: float = Field(ge=0, le=1, description="least share of rows that reviewers accept (of pairs: prefer as chosen)")
    bound: Literal["lower", "point"] = Field(
        default="lower", description="what must reach it: the lower bound of the interval, or the point estimate"
    )
    per: Literal["total", "stratum"] = Field(default="total", description="asked of all rows together, or of each stratum as well")
    min_rows: int = Field(default=30, ge=1, description="least number of judged rows")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="of the interval")
    verdicts: str | list[str] | None = Field(
        default=None, description="files of verdicts to go by; default: those imported with `danlu review import`"
    )
    drop_rejected: bool = Field(
        default=False,
        description="leave out the rows that most of their reviewers reject; needs `verdicts`, on which the rows depend",
    )

    @model_validator(mode="after")
    def _named_verdicts(self) -> ReviewedStage:
        if self.drop_rejected and self.verdicts is None:
            raise ValueError("`drop_rejected` needs `verdicts`: the rows that stay then follow from the recipe and its files")
        return self

    def input_names(self) -> list[str]:
        return [self.input]

    def files_at(self, base_directory: str) -> list[str]:
        """Those that are there: before the first review there are none."""
        return [path for path in listed(self.verdicts or []) if _there(storage.absolute(path, base_directory))]

    def run(self, context: StageContext) -> None:
        directory = context.inputs[self.input]
        found = self._findings(context, directory)
        requirement = Requirement(**{name: getattr(self, name) for name in Requirement.model_fields})
        unmet = requirement.unmet(found)
        if context.limit is not None:
            context.log(f"{context.stage}: a trial run: nobody is asked to review")
        elif unmet:
            raise SettingsError(
                "\n".join(
                    [f"stage {context.stage}: the rows of {self.input!r} do not pass the review:", *unmet, self._how(context)]
                )
            )
        stats = {"review": found.to_json(), "asked": context.limit is None}
        _pass(context, shards.parts([directory]), found.rejected if self.drop_rejected else (), stats)

    def _findings(self, context: StageContext, directory: str) -> Findings:
        if self.verdicts is None:
            return findings(directory, confidence=self.confidence)
        paths = [context.path(path) for path in listed(self.verdicts) if _there(context.path(path))]
        given, _, problems = verdicts.read(directory, [entry.path for path in paths for entry in storage.list_files(path)], None)
        if problems:
            raise SettingsError("\n".join([f"stage {context.stage}: verdicts that cannot be used:", *problems[:20]]))
        return findings(directory, given, self.confidence)

    def _how(self, context: StageContext) -> str:
        run = shards.run_directory(context.directory)
        rows = max(100, self.min_rows)
        steps = [f"danlu review export {run} {self.input} --rows {rows} --out review"]
        if self.verdicts is None:
            steps += [f"danlu review import {run} {self.input} VERDICTS.jsonl"]
        else:
            steps += [f"save the verdicts as {listed(self.verdicts)[0]}"]
        return f"review a sample: {steps[0]} ; judge the rows in review/review.html ; {steps[1]} ; then run the recipe again"


def _there(pattern: str) -> bool:
    try:
        return bool(storage.list_files(pattern))
    except FileNotFoundError:
        return False


def _pass(context: StageContext, parts: Sequence[shards.Part], rejected: Sequence[int], stats: dict[str, object]) -> None:
    """Finish as a view of the parts without the rows of these ordinals."""
    gone = np.array(sorted(rejected), np.uint64)
    view, tables = [], []
    for index, part in enumerate(parts):
        removed = shards.load_bitmap(part)
        here = gone[(gone >= part.first_ordinal) & (gone < part.first_ordinal + part.rows)] - np.uint64(part.first_ordinal)
        removed[here.astype(np.int64)] = True
        bitmap = shards.save_bitmap(context.directory, index, removed) if removed.any() else None
        if len(here):
            tables.append(_removed_table(context.directory, index, part, here))
        entry = {"path": shards.relative_to_run(context.directory, part.path), "rows": part.rows}
        view.append({**entry, "removed": bitmap, "removed_rows": int(removed.sum())})
    rows_in = sum(part.kept_rows for part in parts)
    ledger = Ledger(rows_in=rows_in, kept=rows_in - len(gone))
    if len(gone):
        ledger.rejected[_REASON] = len(gone)
    context.finish(ledger=ledger, stats=stats, view=view, files={"removed": tables})


def _removed_table(directory: str, index: int, part: shards.Part, rows: np.ndarray) -> str:
    """The table of removed rows that `danlu trace` looks into."""
    from pipelines.review.sample import rows_at

    ordinals = rows.astype(np.uint64) + np.uint64(part.first_ordinal)
    found = [{"ordinal": ordinal, "id": str(row["id"]), "reason": _REASON} for ordinal, row in rows_at([part], ordinals, ["id"])]
    scratch = storage.scratch_file(directory)
    pq.write_table(pa.Table.from_pylist(found, schema=_REMOVED), scratch, compression="zstd")
    return shards.publish_by_content(scratch, directory, "removed", index)
