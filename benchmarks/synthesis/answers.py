"""The stage that the throughput benchmark times: rows in, answers out."""

from __future__ import annotations

import time
from typing import Literal

import pyarrow.parquet as pq

from operators.stage import StageContext
from operators.synthesis.flow import Flow, ask_all
from operators.synthesis.requests import Reject, Request, SamplingSettings
from operators.synthesis.rows import INSTRUCTIONS, Account, instruction_row
from pipelines.stages.generating import GeneratingStage, Row


class AnswersStage(GeneratingStage):
    """Rows in, `samples` answers to each, rows out: the least that a stage with a model does."""

    kind: Literal["answers"] = "answers"
    samples: int
    temperature: float
    prompts_file: str

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        generator = self.make_generator(context)

        def flow_of(row: Row) -> tuple[int, Flow[Account]]:
            return self.samples * row["max_tokens"], self._answers(row)

        def unasked(row: Row, account: Account) -> None:
            account.reject(row["id"], row["prompt"], Reject("token_cap"), created=False)

        rows = (row for batch in pq.ParquetFile(self.prompts_file).iter_batches(256) for row in batch.to_pylist())
        self.run_rows(context, rows, flow_of, unasked, INSTRUCTIONS, generator)
        self.finish(context, generator, started, {"generator": generator.timings()})

    def _answers(self, row: Row) -> Flow[Account]:
        sampling = SamplingSettings(temperature=self.temperature, max_tokens=row["max_tokens"])
        requests = [Request((("user", row["prompt"]),), sampling, row["seed"] + sample, sample) for sample in range(self.samples)]
        account = Account("answers")
        for number, reply in enumerate((yield from ask_all(requests))):
            account.keep(instruction_row(f"{row['id']}.{number}", row["prompt"], "", reply.text, "en", None), "answer")
        return account
