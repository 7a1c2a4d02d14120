"""Stages that cut text, run unit by unit in this process, and their account read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators import shards
from operators.dedup import cutting
from operators.dedup.cutting import CutPlan
from operators.dedup.schedule import Phase
from operators.ledger import Ledger
from tests.operators.dedup.corpus import bytes_below, context_of, write_corpus


def documents(rows: list[str], **columns: list[Any]) -> pa.Table:
    count = len(rows)
    return pa.table(
        {"id": [f"d{i}" for i in range(count)], "text": pa.array(rows, pa.large_string()), "source": ["t"] * count, **columns}
    )


def run_cut(
    run: Path,
    name: str,
    table: pa.Table | str,
    phases: Callable[[CutPlan], list[Phase]],
    options: Any,
    part_rows: int = 3,
    seed: int = 0,
    stats_of: Callable[[CutPlan], dict[str, Any]] = lambda plan: {},
) -> tuple[list[str], shards.Manifest]:
    """The texts that are left (with their ids before a colon) and the manifest. Units run in an order drawn by `seed`, twice."""
    source = table if isinstance(table, str) else write_corpus(run, f"{name}-in", table, part_rows)
    context = context_of(run, name, {"in": source})
    plan = CutPlan(context.directory, "line_dedup", shards.parts([source]), options, options.partitions or 1)
    rng = np.random.default_rng(seed)
    with mock.patch("os.fsync"):  # thousands of small files
        for phase in phases(plan):
            for number in [*rng.permutation(phase.units), *rng.permutation(phase.units)[:1]]:
                phase.run(plan, int(number))
        cutting.finish(context, plan, stats_of(plan), {})
    return kept_texts(context.directory), shards.load_manifest(context.directory)


def view_without(run: Path, source: str, gone: set[str]) -> str:
    """A dedup stage's view of a stage, without the rows of these ids; its directory."""
    directory = str(run / "view" / ("3" * 8))
    view, removed = [], 0
    for number, part in enumerate(shards.parts([source])):
        ids = pq.read_table(part.path)["id"].to_pylist()
        bitmap = np.array([name in gone for name in ids])
        place = {"path": shards.relative_to_run(directory, part.path), "rows": part.rows}
        view.append({**place, "removed": shards.save_bitmap(directory, number, bitmap), "removed_rows": int(bitmap.sum())})
        removed += int(bitmap.sum())
    rows = sum(part["rows"] for part in view)
    ledger = Ledger(rows, 0, rows - removed, Counter({"exact:duplicate": removed}))
    shards.finish(directory, stage="view", kind="dedup", fingerprint="3" * 8, config={}, inputs={}, ledger=ledger, view=view)
    return directory


def kept_texts(directory: str) -> list[str]:
    return [
        f"{row['id']}:{row['text']}"
        for part in shards.parts([directory])
        for _, batch in shards.read(part, ["id", "text"])
        for row in batch.to_pylist()
    ]


def cut_spans(directory: str) -> list[dict[str, Any]]:
    names = shards.load_manifest(directory).files["cut"]
    return [row for name in names for row in pq.read_table(f"{directory}/{name}").to_pylist()]


def same_bytes(directory: Path) -> dict[str, bytes]:
    """What must not depend on the cluster or the partitions: everything but times and the settings in the manifest."""
    files = bytes_below(directory)
    return {name: data for name, data in files.items() if not name.startswith("timings") and name != "manifest.json"}
