"""Stages small enough to follow by eye: the runner's tests use real recipes, real Ray and real kills on them."""

from __future__ import annotations

import time
from typing import Literal

import pyarrow as pa
from pydantic import Field

from operators import shards
from operators.ledger import Ledger
from operators.stage import Stage, StageContext


class NumberStage(Stage):
    """Writes one row a unit; waits a while before each, so that a test can stop it half way."""

    kind: Literal["tests.pipelines.toy:NumberStage"]
    input: list[str] = Field(default_factory=list)
    units: int = 3
    wait_s: float = 0.0
    fail: str = ""
    operational = frozenset({"wait_s"})

    def input_names(self) -> list[str]:
        return list(self.input)

    def run(self, context: StageContext) -> None:
        if self.fail:
            raise ValueError(self.fail)
        done = shards.committed_units(context.directory)
        before = sum(shards.load_manifest(directory).rows for directory in context.inputs.values())
        for unit in range(self.units):
            context.check_cancelled()
            if unit in done:
                continue
            time.sleep(self.wait_s)
            writer = shards.UnitWriter(context.directory, unit)
            writer.write(pa.table({"id": [f"{context.stage}-{unit}"], "number": [before + unit]}))
            writer.commit(Ledger(created=1, kept=1))
            context.progress(unit + 1, self.units, "units")
        context.finish()
