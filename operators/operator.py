"""What a row-local operator is: an object built from typed settings that turns one Arrow table into another.

An operator works in two ways. Under Danlu's chain, `process` sees every row and returns every row with a verdict, so
that rejects are kept and counted. Under plain Ray Data, the operator itself is the callable:
`ds.map_batches(DetectLanguage(keep=["zh", "en"]), batch_format="pyarrow")` drops what the verdict rejects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from operators.config import Settings, parse

if TYPE_CHECKING:
    from operators.text.analysis import Analysis


@dataclass(frozen=True)
class Verdict:
    """All rows of the input in their order, with changed or added columns; `reason` is null where the row is kept.

    `value` is the measured number that decided (null where there is none). `scores` is what a filter measured;
    `detail` tells in the account of a rejected row what was found where (null: its URL, if it has one).
    """

    table: pa.Table
    reason: pa.Array | None = None  # string[rows]
    value: pa.Array | None = None  # float64[rows]
    scores: dict[str, pa.Array] | None = None
    detail: pa.Array | None = None  # string[rows]
    counts: dict[str, int] | None = None  # things found in the rows, summed over a stage in its funnel

    def kept(self) -> pa.Table:
        if self.reason is None or self.reason.null_count == len(self.reason):
            return self.table
        return self.table.filter(pc.is_null(self.reason))


class Operator:
    """Base of row-local operators. Subclasses set the class variables and implement `process`."""

    name: ClassVar[str]
    settings: ClassVar[type[Settings]]
    needs: ClassVar[tuple[str, ...]] = ("text",)
    adds: ClassVar[tuple[str, ...]] = ()
    uses_analysis: ClassVar[bool] = False  # True: `process` wants the shared analysis of the text
    changes_text: ClassVar[bool] = False  # True: the shared analysis of the text is stale afterwards

    def __init__(self, **options: Any) -> None:
        self.config: Any = parse(self.settings, options, self.name)

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        """Judge and change one batch. `analysis`, when given, is the analysis of exactly `table["text"]`."""
        raise NotImplementedError

    def __call__(self, table: pa.Table) -> pa.Table:
        """For `ray.data.Dataset.map_batches(..., batch_format="pyarrow")`: the kept rows."""
        self.check_columns(table.column_names)
        return self.process(table).kept()

    def check_columns(self, columns: list[str]) -> None:
        """Raises KeyError naming the operator, the missing column and what there is."""
        missing = [column for column in self.needs if column not in columns]
        if missing:
            raise KeyError(f"operator {self.name} needs column {missing}; the table has {columns}")

    def may_reject(self) -> bool:
        """False where these settings let every row pass, which a replay of decisions has to know."""
        return True

    def files(self) -> list[str]:
        """Files that the result depends on (a model, a word list): their content enters the stage's fingerprint."""
        return []


class Filter(Operator):
    """An operator in two pure functions: `measure` makes columns of scores, `decide` turns scores into reasons.

    Decisions can be replayed with other thresholds from stored scores without measuring again (`danlu decide`). For that,
    `reads` names the columns besides its scores that `decide` looks at, and `decide_options` the options that `measure`
    does not depend on. Scores named in `adds` become columns of the table.
    """

    uses_analysis: ClassVar[bool] = True
    reads: tuple[str, ...] = ("lang",)
    decide_options: ClassVar[frozenset[str]] = frozenset({"thresholds"})

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """Score columns, one value a row."""
        raise NotImplementedError

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        """(reason string[rows], null = keep; value float64[rows]). `table` has the columns of `reads` that there are."""
        raise NotImplementedError

    def measured_as(self) -> dict[str, Any]:
        """What the scores depend on. Scores of one configuration serve another if all of its entries are equal there."""
        return dict(self.config.model_dump(mode="json", exclude=set(self.decide_options)))

    def annotate(self, table: pa.Table, scores: dict[str, pa.Array]) -> pa.Table:
        """The table with the scores named in `adds` as columns: replaced in their place, or at the end."""
        for name in self.adds:
            place = table.schema.get_field_index(name)
            table = table.append_column(name, scores[name]) if place < 0 else table.set_column(place, name, scores[name])
        return table

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        scores = self.measure(table, analysis)
        reason, value = self.decide(table, scores)
        return Verdict(self.annotate(table, scores), reason, value, scores=scores)
