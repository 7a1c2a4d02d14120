"""The stage that answers prompts anew."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from operators.stage import StageContext
from operators.synthesis.flow import Flow
from operators.synthesis.requests import Reject
from operators.synthesis.responses import RESPONSES, ResponseSettings, response_flow
from operators.synthesis.rows import Account
from pipelines.stages.answering import AnsweringStage, Duplicates, rejected
from pipelines.stages.generating import Row, listed


class ResponsesStage(AnsweringStage, ResponseSettings):
    """New replies to the prompts of conversations: all samples that pass, the best of them, or draws until one passes.

    A conversation that ends with the assistant is answered again from its last user turn; one that ends with the user is
    answered. Rows are written with their score.
    """

    kind: Literal["responses"]
    input: str | list[str] = Field(description="stage(s) whose conversations give the prompts")
    duplicates: Duplicates = Field(default="answer", description="what becomes of a prompt that came before")

    def input_names(self) -> list[str]:
        return list(dict.fromkeys([*listed(self.input), *self.model_stages()]))

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        generator, panel, end = self.make_panel(context)
        settings: ResponseSettings = self.method_settings(ResponseSettings, context)

        def flow_of(row: Row) -> tuple[int, Flow[Account]]:
            taken = row["taken"]
            if isinstance(taken, Reject):
                return 0, rejected(self.kind, row, taken)
            return response_flow(taken, settings, panel)

        try:
            rows = self.prompts_of(context, listed(self.input), self.duplicates)
            self.run_rows(context, rows, flow_of, self.unasked, RESPONSES, generator)
        finally:
            end()
        self.finish(context, generator, started, self.measures(context))
