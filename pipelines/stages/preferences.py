"""The stage that makes preference pairs, or labelled replies."""

from __future__ import annotations

import time
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from operators.ledger import merge_stats
from operators.stage import StageContext
from operators.synthesis.flow import Flow
from operators.synthesis.length_bias import bound_length
from operators.synthesis.preferences import PreferenceSettings, pair_statistics, preference_flow
from operators.synthesis.requests import Reject
from operators.synthesis.rows import Account
from pipelines.stages.answering import AnsweringStage, Duplicates, rejected
from pipelines.stages.generating import Row, listed


class PreferencesStage(AnsweringStage, PreferenceSettings):
    """Preferences: several samples for each prompt of the input, scored and paired; or labelled good and bad (`unpaired`).

    Replies are scored by form and agreement, by a judge (points by a rubric, or pairs in both orders) or by a reward model.
    `generator: {model: "@STAGE"}` draws them from a model that this run trained: on-policy pairs.
    """

    kind: Literal["preferences"]
    input: str | list[str] = Field(description="stage(s) whose conversations give the prompts")
    duplicates: Duplicates = Field(default="reject", description="what becomes of a prompt that came before")

    def input_names(self) -> list[str]:
        return list(dict.fromkeys([*listed(self.input), *self.model_stages()]))

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        generator, panel, end = self.make_panel(context)
        settings: PreferenceSettings = self.method_settings(PreferenceSettings, context)

        def flow_of(row: Row) -> tuple[int, Flow[Account]]:
            taken = row["taken"]
            if isinstance(taken, Reject):
                return 0, rejected(self.kind, row, taken)
            return preference_flow(taken, settings, panel)

        try:
            rows = self.prompts_of(context, listed(self.input), self.duplicates)
            self.run_rows(context, rows, flow_of, self.unasked, settings.schema, generator)
        finally:
            end()
        self.finish(context, generator, started, self.measures(context))

    def commit(
        self,
        context: StageContext,
        unit: int,
        account: Account,
        schema: pa.Schema,
        stats: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> None:
        """A unit's pairs are bound in their share of longer replies when all of them are known."""
        if self.unpaired is None:
            bound_length(account, self.max_chosen_longer, self.max_chosen_shorter)
            stats = merge_stats({**account.stats(), "usage": stats["usage"]}, pair_statistics(account))
        super().commit(context, unit, account, schema, stats, extra)
