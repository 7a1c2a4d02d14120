"""Conversations written down for tests, and the `curate` stage run over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from operators import registry, shards, tables
from operators.config import parse
from operators.ledger import Ledger
from operators.operator import Verdict
from operators.stage import StageContext
from operators.synthesis.curate.turns import Turns, whole_text
from operators.synthesis.rows import INSTRUCTIONS, instruction_row, table_of
from pipelines.stages.curate import CurateStage


def row(question: str, reply: str, given: str = "", lang: str | None = None, identity: str = "") -> dict[str, Any]:
    return instruction_row(identity or tables.stable_id(question, given, reply), question, given, reply, lang, None)


def talk(*turns: tuple[str, str], identity: str = "t", tools: str | None = None) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"id": identity, "messages": messages, "lang": None, "tools": tools, "provenance": None, "input_start": None}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    found = table_of(rows, INSTRUCTIONS)
    return found.append_column("text", whole_text(Turns(found)))


def judge(name: str, rows: list[dict[str, Any]], **options: Any) -> Verdict:
    """What one operator says of rows."""
    return registry.build({name: options} if options else name).process(table(rows))


def reasons(name: str, rows: list[dict[str, Any]], **options: Any) -> list[str | None]:
    verdict = judge(name, rows, **options)
    assert verdict.reason is not None
    return list(verdict.reason.to_pylist())


def write_input(root: Path, name: str, rows: list[dict[str, Any]], part_rows: int = 1000, schema: pa.Schema = INSTRUCTIONS) -> str:
    """A finished stage that holds the rows, in units of `part_rows`."""
    directory = str(root / "runs" / "test" / name / "f0")
    for unit, start in enumerate(range(0, max(1, len(rows)), part_rows)):
        some = rows[start : start + part_rows]
        writer = shards.UnitWriter(directory, unit)
        writer.write(table_of(some, schema))
        writer.commit(Ledger(rows_in=len(some), kept=len(some)))
    shards.finish(directory, stage=name, kind="conversations", fingerprint="f0", config={}, inputs={})
    return directory


def curate(
    root: Path, inputs: dict[str, str], operators: list[Any], name: str = "clean", seed: int = 17, workers: int = 2
) -> shards.Manifest:
    built = parse(CurateStage, {"kind": "curate", "input": list(inputs), "operators": operators}, name)
    built.validate_deep()
    directory = str(root / "runs" / "test" / name / "f0")
    context = StageContext(name, "curate", directory, "f0", built.model_dump(mode="json"), inputs, seed, workers=workers)
    built.run(context)
    return shards.load_manifest(directory)


def kept(root: Path, name: str = "clean") -> list[dict[str, Any]]:
    directory = str(root / "runs" / "test" / name / "f0")
    return [found for part in shards.parts([directory]) for _, batch in shards.read(part) for found in batch.to_pylist()]


def rejects(root: Path, name: str = "clean") -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    directory = root / "runs" / "test" / name / "f0" / "rejects"
    return [found for path in sorted(directory.glob("*.parquet")) for found in pq.read_table(path).to_pylist()]
