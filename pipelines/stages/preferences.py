"""The stage that makes preference pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from operators import tables
from operators.stage import StageContext
from operators.synthesis.flow import Flow
from operators.synthesis.heuristics import language_of
from operators.synthesis.preferences import PreferencePrompt, PreferenceSettings, pair_flow
from operators.synthesis.requests import Reject
from operators.synthesis.rows import Account
from pipelines.stages.generating import GeneratingStage, Row, follow_rows, listed


class PreferencesStage(GeneratingStage, PreferenceSettings):
    """Preference pairs: several samples for each prompt of the input, scored; the best and the worst if far enough apart."""

    kind: Literal["preferences"]
    input: str | list[str] = Field(description="stage(s) whose conversations give the prompts")

    def input_names(self) -> list[str]:
        return [*listed(self.input), *self.model_stages()]

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        settings: PreferenceSettings = self.method_settings(PreferenceSettings, context)
        generator = self.make_generator(context)
        seen: set[str] = set()

        def flow_of(row: Row) -> tuple[int, Flow[Account]]:
            messages = tuple((message["role"], message["content"]) for message in row["messages"])
            why = None
            if not messages or messages[-1][0] != "assistant" or len(messages) < 2 or messages[-2][0] != "user":
                why = Reject("no_prompt")
            elif (key := tables.content_hash(messages[:-1])) in seen:
                why = Reject("duplicate_prompt")
            elif context.limit is not None and len(seen) >= context.limit:
                why = Reject("left_over", detail="limit")
            if why is not None:
                return 0, _rejected(row, why)
            seen.add(key)
            prompt = PreferencePrompt(row["id"], messages[:-1], messages[-1][1], row["lang"] or language_of(messages[-2][1]))
            return pair_flow(prompt, settings, generator.revision, self.model_name, context.seed)

        def unasked(row: Row, account: Account) -> None:
            account.reject(row["id"], _text(row), Reject("token_cap"), created=False)

        rows: Iterator[Row | None] = follow_rows(context, listed(self.input), tables.CONVERSATIONS)
        self.run_rows(context, rows, flow_of, unasked, tables.PREFERENCES, generator)
        self.finish(context, generator, started)


def _text(row: Row) -> str:
    return "\n\n".join(message["content"] or "" for message in row["messages"])


def _rejected(row: Row, why: Reject) -> Flow[Account]:
    account = Account("preferences")
    account.reject(row["id"], _text(row), why, created=False)
    return account
    yield []  # makes this a generator that asks nothing
