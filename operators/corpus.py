"""The corpus stage: read work units, run the fused chain over their batches, commit each unit with its ledger."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import storage
from operators import shards, tables, tombstones
from operators.chain import Chain, describe
from operators.config import parse
from operators.dispatch import run_units
from operators.ledger import Ledger, merge_stats
from operators.measures import Measure, placed
from operators.sources.batches import BadRow
from operators.sources.units import ReadSettings, Unit, plan_units, read_unit
from operators.stage import StageContext
from operators.supervise import READING, Limits, Report, Task


def run_corpus(
    context: StageContext,
    read: ReadSettings,
    operators: list[str | dict[str, Any]],
    limits: Limits,
    batch_rows: int,
    measure: Measure = "seen",
    version: int = 1,
) -> None:
    """Do every unit of the input that is not committed yet, then write the manifest.

    Units of an earlier run of this stage with the same settings, code `version` and file content are taken over by copying, so
    that new input files are processed alone. Rows that were taken down from the run (operators.tombstones) are not read again.
    """
    units = plan_units(read, context.base_directory, context.limit)
    work = tables.content_hash([operators, read.model_dump(mode="json", exclude={"path"}), version, batch_rows, measure])
    keys = {unit.index: tables.content_hash([unit.key, work]) for unit in units}
    done = shards.committed_numbers(context.directory)
    adopted = _adopt(context.directory, {index: key for index, key in keys.items() if index not in done})
    forgotten = tombstones.files(shards.run_directory(context.directory))
    todo = [
        {
            "unit": unit.to_json(),
            "read": read.model_dump(mode="json"),
            "operators": operators,
            "directory": context.directory,
            "key": keys[unit.index],
            "batch_rows": batch_rows,
            "measure": measure,
            "forgotten": forgotten,
        }
        for unit in units
        if unit.index not in done and unit.index not in adopted
    ]
    run_units(context, "operators.corpus:run_unit", todo, limits, already=len(units) - len(todo))
    funnel = {
        f"{position:02d}:{operator.name}": {"in": 0, "kept": 0, "rejected": {}}
        for position, operator in enumerate(Chain(operators).operators)
    }
    context.finish(stats={"funnel": funnel, "units": len(units)}, timings={"adopted_units": len(adopted)})


def _adopt(directory: str, wanted: dict[int, str]) -> set[int]:
    """Copy units that another fingerprint of this stage has committed under the same key. Returns their indices."""
    if not wanted:
        return set()
    parent = directory.rstrip("/").rsplit("/", 1)[0]
    available: dict[str, tuple[str, int]] = {}
    for sibling in storage.list_directories(parent):
        if sibling != directory:
            for number, record in shards.unit_records(sibling):
                available.setdefault(record.get("key", ""), (sibling, number))
    adopted = set()
    for index, key in wanted.items():
        if key in available:
            sibling, number = available[key]
            shards.copy_unit(sibling, shards.unit_record(sibling, number), directory, index)
            adopted.add(index)
    return adopted


@functools.lru_cache(maxsize=4)
def _chain(operators: str, measure: Measure) -> Chain:
    return Chain(json.loads(operators), measure)


def run_unit(task: Task, report: Report) -> dict[str, Any]:
    """One unit in the supervised child: read, run the chain, write, commit. A probe only runs the chain."""
    given = task.arguments
    unit, read = Unit.from_json(given["unit"]), parse(ReadSettings, given["read"], "read")
    if task.unreadable is not None:
        return _set_aside_whole(given, unit, task.unreadable)
    writer = shards.UnitWriter(given["directory"], unit.index) if task.probe is None else None
    try:
        return _work(task, report, unit, read, writer)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise


def _work(task: Task, report: Report, unit: Unit, read: ReadSettings, writer: shards.UnitWriter | None) -> dict[str, Any]:
    given = task.arguments
    chain = _chain(json.dumps(given["operators"]), given["measure"] if task.probe is None else "none")
    ledger, stats = Ledger(), dict[str, Any]()
    report.alive()
    aside = np.array(sorted(task.set_aside), np.int64)
    unread = {row: how.removeprefix(READING) for row, how in task.set_aside.items() if how.startswith(READING)}
    first, last = task.probe or (0, None)
    batches = read_unit(
        unit, read, start_row=first, stop_row=last, batch_rows=given["batch_rows"], crashed=unread, reading=report.reading
    )
    for batch in batches:
        report.alive()
        table, rows, bad = batch.table, batch.rows, batch.bad
        if given.get("forgotten"):  # absent where a unit is run by itself
            table, stays = tombstones.without(table, given["forgotten"])
            left = [
                row for row, gone in zip(bad, tombstones.mask([row.id for row in bad], given["forgotten"]), strict=True) if not gone
            ]
            gone = int((~stays).sum()) + len(bad) - len(left)
            rows, bad = rows[stays], left
            ledger.rows_in += gone
            ledger.forgotten += gone
        guilty = np.isin(rows, aside)
        healthy, healthy_rows = (table.filter(pa.array(~guilty)), rows[~guilty]) if guilty.any() else (table, rows)
        if healthy.num_rows:
            with report.rows(int(healthy_rows[0]), int(healthy_rows[-1]) + 1):
                result = chain.run(healthy)
        if writer is None:
            continue
        ledger.rows_in += len(rows) + len(bad)
        if healthy.num_rows:
            if result.measures is not None:
                writer.measure(placed(result.measures, ledger.kept, ledger.rejected.total() + ledger.quarantined))
            writer.write(result.kept)
            ledger.kept += result.kept.num_rows
            ledger.rejected.update(result.rejected)
            merge_stats(stats, {"funnel": result.funnel, **describe(result.kept)})
            for rejects in result.rejects:
                writer.reject(rejects)
        unwanted = _unreadable([row for row in bad if row.unwanted], read)
        if unwanted:
            ledger.rejected.update(_reasons(unwanted))
            writer.reject(tables.rejects_table(unwanted))
        unhealthy = _unreadable([row for row in bad if not row.unwanted], read) + _crashed(
            table.filter(pa.array(guilty)), rows[guilty], task.set_aside
        )
        if unhealthy:
            ledger.quarantined += len(unhealthy)
            writer.reject(tables.rejects_table(unhealthy))
            merge_stats(stats, {"quarantine": _reasons(unhealthy)})
    if writer is None:
        return {}
    writer.commit(ledger, stats, {"key": given["key"], "input": unit.relative})
    return {"unit": unit.index, "rows": ledger.kept}


def _set_aside_whole(given: dict[str, Any], unit: Unit, how: str) -> dict[str, Any]:
    """A unit whose reader ends its process: one quarantined row stands for it."""
    writer = shards.UnitWriter(given["directory"], unit.index)
    row = {
        "id": tables.stable_id(unit.relative, str(unit.start)),
        "operator": "read",
        "reason": f"crash: {how}",
        "detail": f"{unit.relative} [{unit.start}, {unit.stop})",
        "quarantined": True,
    }
    writer.reject(tables.rejects_table([row]))
    writer.commit(Ledger(rows_in=1, quarantined=1), {"quarantine": _reasons([row])}, {"key": given["key"], "input": unit.relative})
    return {"unit": unit.index, "rows": 0}


def _unreadable(bad: list[BadRow], read: ReadSettings) -> list[dict[str, Any]]:
    return [
        {
            "id": row.id,
            "text": row.raw,
            "source": read.source,
            "operator": "read",
            "reason": row.reason,
            "detail": f"{row.where}: {row.detail}",
            "quarantined": not row.unwanted,
        }
        for row in bad
    ]


def _crashed(table: pa.Table, rows: np.ndarray, reasons: dict[int, str]) -> list[dict[str, Any]]:
    if not table.num_rows:
        return []
    texts = table["text"].to_pylist() if "text" in table.column_names else [None] * table.num_rows
    found = tables.crashed(table["id"].to_pylist(), rows.tolist(), reasons, "chain")
    return [
        {**row, "text": text, "source": source} for row, text, source in zip(found, texts, table["source"].to_pylist(), strict=True)
    ]


def _reasons(rows: list[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        key = f"{row['operator']}:{row['reason']}"
        counts[key] = counts.get(key, 0) + 1
    return counts
