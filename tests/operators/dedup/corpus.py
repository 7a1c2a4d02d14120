"""A small corpus with known duplicates, in English and Chinese, and the means to run the stage on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import shards
from operators.dedup import exchange, stage
from operators.dedup.plan import Plan
from operators.dedup.schedule import Phase
from operators.ledger import Ledger
from operators.stage import StageContext
from pipelines.stages.dedup import DedupStage


def documents(count: int = 40, seed: int = 0) -> pa.Table:
    """`count` families, half of them Chinese: a text, an exact copy, two near copies; and empty and short texts between them."""
    generator = np.random.default_rng(seed)
    rows: list[tuple[str, str]] = []
    for family in range(count):
        chinese = family % 2 == 1
        pieces = [_character(generator) if chinese else _word(generator) for _ in range(300)]
        glue = "" if chinese else " "
        rows.append((f"f{family}-a", glue.join(pieces)))
        rows.append((f"f{family}-copy", glue.join(pieces)))
        for variant, changes in (("b", 2), ("c", 4)):
            changed = list(pieces)
            for at in generator.choice(300, changes, replace=False):
                changed[at] = _character(generator) if chinese else _word(generator)
            rows.append((f"f{family}-{variant}", glue.join(changed) + ("。完" if chinese else " end.") * changes))
    rows += [("empty-1", ""), ("empty-2", ""), ("short-1", "too short"), ("short-2", "Too short!"), ("short-3", "too short")]
    order = generator.permutation(len(rows))
    ids, texts = zip(*(rows[i] for i in order), strict=True)
    columns = {"id": pa.array(ids), "text": pa.array(texts, pa.large_string()), "source": pa.array(["test"] * len(rows))}
    columns["quality"] = pa.array(np.round(generator.random(len(rows)), 3), mask=generator.random(len(rows)) < 0.1)
    return pa.table(columns)


def _word(generator: np.random.Generator) -> str:
    return "".join(chr(97 + letter) for letter in generator.integers(0, 26, generator.integers(2, 9)))


def _character(generator: np.random.Generator) -> str:
    return chr(0x4E00 + int(generator.integers(0, 3000)))


def write_corpus(run: Path, name: str, table: pa.Table, part_rows: int) -> str:
    """A finished corpus stage with parts of the given size; its directory."""
    directory = str(run / name / ("0" * 8))
    for unit, start in enumerate(range(0, len(table), part_rows)):
        piece, writer = table.slice(start, part_rows), shards.UnitWriter(directory, unit)
        writer.write(piece)
        writer.commit(Ledger(len(piece), 0, len(piece)))
    shards.finish(directory, stage=name, kind="corpus", fingerprint="0" * 8, config={}, inputs={})
    return directory


def context_of(run: Path, name: str, inputs: dict[str, str], workers: int = 2, fingerprint: str = "1" * 8) -> StageContext:
    return StageContext(name, "dedup", str(run / name / fingerprint), fingerprint, {}, inputs, seed=17, workers=workers)


def run_stage(run: Path, name: str, inputs: dict[str, str], workers: int = 2, **settings: Any) -> shards.Manifest:
    context = context_of(run, name, inputs, workers)
    DedupStage(input=list(inputs), **settings).run(context)
    return shards.load_manifest(context.directory)


def run_here(context: StageContext, plan: Plan, phases: list[Phase]) -> dict[str, float]:
    """The scheduler's work in this process, without Ray: what is not committed, last unit first."""
    for phase in phases:
        done = exchange.committed(plan.directory, phase.name)
        for number in reversed(range(phase.units)):
            if number not in done:
                phase.run(plan, number)
    return {}


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages do their units in this process."""
    monkeypatch.setattr(stage, "run_phases", run_here)


def directory_of(run: Path, name: str) -> Path:
    return run / name / ("1" * 8)


def kept_ids(directory: Path) -> list[str]:
    return [
        row for part in shards.parts([str(directory)]) for _, batch in shards.read(part, ["id"]) for row in batch["id"].to_pylist()
    ]


def removed_rows(directory: Path) -> list[dict[str, Any]]:
    tables = shards.load_manifest(str(directory)).files["removed"]
    return [row for name in tables for row in pq.read_table(directory / name).to_pylist()]


def bytes_below(directory: Path) -> dict[str, bytes]:
    """Everything a finished stage leaves but its timings."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }
