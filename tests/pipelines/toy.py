"""Stages small enough to follow by eye: the runner's tests use real recipes, real Ray and real kills on them."""

from __future__ import annotations

import time
from pathlib import Path
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
    ray: bool = True
    most: int | None = None
    operational = frozenset({"wait_s", "most"})

    def input_names(self) -> list[str]:
        return list(self.input)

    def needs_ray(self) -> bool:
        return self.ray

    def refusal(self, directory: str) -> str | None:
        rows = shards.load_manifest(directory).rows
        return f"{rows} rows are more than {self.most}" if self.most is not None and rows > self.most else None

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


class EchoStage(Stage):
    """Follows its inputs: copies their rows one unit at a time, and tells in a file how far it is."""

    kind: Literal["tests.pipelines.toy:EchoStage"]
    input: list[str]
    follows = True
    resource = "generate"

    def input_names(self) -> list[str]:
        return list(self.input)

    def needs_ray(self) -> bool:
        return False

    def run(self, context: StageContext) -> None:
        unit = 0
        for part in context.follow(self.input):
            if part is None:
                time.sleep(0.05)
                continue
            for _, batch in shards.read(part):
                writer = shards.UnitWriter(context.directory, unit)
                writer.write(pa.Table.from_batches([batch]))
                writer.commit(Ledger(rows_in=batch.num_rows, kept=batch.num_rows))
                unit += 1
        context.finish()


class GateStage(Stage):
    """Writes its second unit only when a file of another stage is there: without following, nobody would ever go on."""

    kind: Literal["tests.pipelines.toy:GateStage"]
    awaited: str
    then_fail: bool = False
    resource = "generate"

    def needs_ray(self) -> bool:
        return False

    def run(self, context: StageContext) -> None:
        for unit in range(2):
            writer = shards.UnitWriter(context.directory, unit)
            writer.write(pa.table({"id": [f"gate-{unit}"]}))
            writer.commit(Ledger(created=1, kept=1))
            deadline = time.monotonic() + 60
            while not list(Path(context.directory).parents[1].glob(self.awaited)):
                context.check_cancelled()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.awaited} never appeared")
                time.sleep(0.05)
            if self.then_fail:
                raise ValueError("the gate is broken")
        context.finish()
