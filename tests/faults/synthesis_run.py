"""A generate stage in a process of its own, against a server: what the faults are done to."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from operators import shards
from operators.config import parse
from operators.ledger import Ledger
from operators.stage import StageContext
from operators.synthesis.engine import start_engine
from operators.synthesis.reply_index import scan
from pipelines.stages.generate import GenerateStage

scan(np.frombuffer(b"\n", np.uint8), True)  # numba starts once, in the process that the others are forked from

UNIT_ROWS = 16
CONCURRENCY = 8
SETTINGS: dict[str, Any] = {
    "kind": "generate",
    "input": "docs",
    "prompt": {"system": "Describe what you are given. 描述给你的内容。", "user": "$text"},
    "sampling": {"max_tokens": 64, "temperature": 0.8},
    "keep_replies": True,
}


class SmallUnits(GenerateStage):
    """Commits every few rows, so that a short run has many units."""

    def run_rows(self, *arguments: Any, **options: Any) -> None:
        super().run_rows(*arguments, unit_rows=UNIT_ROWS, **options)


def write_documents(directory: Path, texts: list[str]) -> None:
    """A finished stage `docs` without ids, so that equal texts are equal requests."""
    folder = str(directory / "docs" / "f0")
    writer = shards.UnitWriter(folder, 0)
    writer.write(pa.table({"text": pa.array(texts, pa.large_string())}))
    writer.commit(Ledger(rows_in=len(texts), kept=len(texts)))
    shards.finish(folder, stage="docs", kind="corpus", fingerprint="f0", config={}, inputs={})


def run(directory: str, url: str, told: str, cap: int | None) -> None:
    """Run the stage to its end; what it says in failing goes to the file `told`, and the process ends with 1."""
    endpoint = {"url": url, "concurrency": CONCURRENCY, "revision": "m1", "backoff_s": 0.01, "give_up_s": 5.0, "timeout_s": 5.0}
    stage = parse(SmallUnits, {**SETTINGS, "generator": {"model": "m", "endpoint": endpoint}, "max_generated_tokens": cap}, "made")
    folder = os.path.join(directory, "made", "f0")
    engine: Any = None

    def shared(settings: Any) -> Any:
        nonlocal engine
        engine = engine or start_engine(settings, directory)
        return engine

    context = StageContext(
        "made", stage.kind, folder, "f0", {}, {"docs": os.path.join(directory, "docs", "f0")}, 17, services={"engine": shared}
    )
    try:
        stage.run(context)
    except Exception as error:  # noqa: BLE001 - told to the test that waits for this process
        Path(told).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        sys.exit(1)
