"""The whole of a `curate` stage: row-local units, then the set operators one after the other, then the rows.

Without set operators the units are the stage's own, and later stages follow them as they come. With them the units go to
`work/rows`, with the keys of the set operators as columns; each set operator is one task that reads the keys of the rows
still standing and writes a *view* (removal bitmaps and a table of what went, as `dedup` does), and at the end every unit is
written again without the rows that went, its rejects complete. Only then does the stage have units that others see.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import registry, shards, tables
from operators.dedup import exchange
from operators.dedup.schedule import Phase, run_phases
from operators.dedup.semantic import run_semantic
from operators.dedup.stage import run_dedup
from operators.dispatch import run_units
from operators.ledger import Ledger, merge_stats
from operators.stage import StageContext
from operators.supervise import Limits
from operators.synthesis.curate.repeats import NearRepeats, ReplyRepeats
from operators.synthesis.curate.set_operator import Keys, SetOperator
from operators.synthesis.curate.turns import Turns, whole_text
from operators.synthesis.curate.units import KEY_COLUMN, Entry, input_schema, key_column, split_entries
from operators.tokens.window import spans

UNIT_ROWS = 4096
_ROWS = "work/rows"
_DETAIL_OF = {"exact:duplicate": "duplicate", "minhash:near_duplicate": "near_repeat", "semantic:near_duplicate": "near_repeat"}


def run_curate(
    context: StageContext, inputs: Sequence[str], entries: Sequence[Entry], limits: Limits, batch_rows: int, num_gpus: float = 0
) -> None:
    """Curate the kept rows of finished stages (their directories) into `context.directory`. Goes on where it was left."""
    started = time.monotonic()
    local, whole = split_entries(entries)
    parts = shards.parts(inputs)
    schema = input_schema(parts)
    target = storage.join(context.directory, _ROWS) if whole else context.directory
    seconds = {"rows": _run_local(context, target, parts, schema, local, whole, limits, batch_rows, num_gpus)}
    names = [f"{place:02d}:{registry.load(registry.split(entry)[0]).name}" for place, entry in enumerate(entries)]
    funnel = {name: {"in": 0, "kept": 0, "rejected": {}} for name in names}
    if not whole:
        context.finish(stats={"funnel": funnel}, timings={"seconds": time.monotonic() - started, "phases": seconds})
        return
    rows_context = _sub_context(context, target, {}, "rows")
    if not storage.exists(storage.join(target, "manifest.json")):
        rows_context.finish()
    previous = target
    views: list[tuple[int, str, str]] = []
    for place, entry in whole:
        begun = time.monotonic()
        name = registry.load(registry.split(entry)[0]).name
        directory = storage.join(context.directory, f"work/{place:02d}-{name}")
        if not storage.exists(storage.join(directory, "manifest.json")):
            _run_set(_sub_context(context, directory, {"rows": previous}, name), place, entry, limits)
        views.append((place, name, directory))
        seconds[name] = round(time.monotonic() - begun, 3)
        previous = directory
    begun = time.monotonic()
    plan = WritePlan(context.directory, shards.parts([previous]), target, tuple(views))
    units = sorted(shards.committed_numbers(target))
    run_phases(context, plan, [Phase("write", write_unit, len(units))])
    seconds["write"] = round(time.monotonic() - begun, 3)
    sets = {name: shards.load_manifest(directory).stats for _, name, directory in views}
    told = {name: {key: value for key, value in stats.items() if key != "examples"} for name, stats in sets.items()}
    context.finish(stats={"funnel": funnel, "sets": told}, timings={"seconds": time.monotonic() - started, "phases": seconds})
    storage.delete(storage.join(context.directory, "work"))
    storage.delete(exchange.keys_directory(context.directory))


def _run_local(
    context: StageContext, target: str, parts: list[shards.Part], schema: pa.Schema, local: list[Entry],
    whole: list[tuple[int, Entry]], limits: Limits, batch_rows: int, num_gpus: float,
) -> float:  # fmt: skip
    begun = time.monotonic()
    done = shards.committed_numbers(target)
    units = spans(parts, UNIT_ROWS)
    arguments: dict[str, Any] = {"local": local, "whole": whole, "directory": target, "batch_rows": batch_rows}
    arguments["schema"] = schema.serialize().to_pybytes().hex()
    todo = [
        {"unit": {"index": index, "path": span.parts[0].path}, "span": asdict(span), **arguments}
        for index, span in enumerate(units)
        if index not in done
    ]
    run_units(
        context, "operators.synthesis.curate.units:curate_unit", todo, limits, already=len(units) - len(todo), num_gpus=num_gpus
    )
    return round(time.monotonic() - begun, 3)


def _sub_context(context: StageContext, directory: str, inputs: dict[str, str], name: str) -> StageContext:
    """A stage inside the stage: its run directory is the stage's own."""
    named = f"{context.stage}.{name}"
    return replace(context, stage=named, directory=directory, inputs=inputs, config={}, progress=lambda *_: None)


def _run_set(context: StageContext, place: int, entry: Entry, limits: Limits) -> None:
    """One set operator: a view of the rows that it leaves."""
    operator = registry.build(entry)
    assert isinstance(operator, SetOperator)
    if isinstance(operator, NearRepeats | ReplyRepeats):
        column = key_column(place, operator.key)
        if (options := operator.dedup_options(column)) is not None:
            run_dedup(context, options, list(context.inputs))
            return
        if (semantic := operator.semantic_options(column)) is not None:
            located = semantic.model_copy(update={"model": context.path(semantic.model)})
            run_semantic(context, located, list(context.inputs.values()), limits)
            return
    plan = SetPlan(context.directory, shards.parts(list(context.inputs.values())), json.dumps(entry), place, context.seed)
    run_phases(context, plan, [Phase("resolve", resolve_set, 1)])
    record = exchange.load_record(context.directory, "resolve", 0)
    rows = sum(part.kept_rows for part in plan.parts)
    ledger = Ledger(rows, 0, rows - sum(record["rejected"].values()))
    ledger.rejected.update(record["rejected"])
    context.finish(ledger=ledger, stats=record["stats"], view=record["view"], files={"removed": record["tables"]})
    storage.delete(exchange.keys_directory(context.directory))


@dataclass(frozen=True)
class SetPlan:
    """What the task of a set operator knows."""

    directory: str
    parts: list[shards.Part]
    entry: str
    place: int
    seed: int


def resolve_set(plan: SetPlan, number: int) -> None:
    """Decide over all rows and write the view: a bitmap a part, and a table of the rows that go."""
    operator = registry.build(json.loads(plan.entry))
    assert isinstance(operator, SetOperator)
    prefix = key_column(plan.place, "")

    def read() -> Iterator[Keys]:
        for part in plan.parts:
            with storage.open_input(part.path) as stream:
                names = [name for name in pq.read_schema(stream).names if name.startswith(prefix)]
            for ordinals, batch in shards.read(part, ["id", *names]):
                table = pa.Table.from_batches([batch]).rename_columns(["id", *(name.removeprefix(prefix) for name in names)])
                yield Keys(ordinals.to_numpy(zero_copy_only=False), table)

    removed = operator.resolve(read, plan.seed)
    view: list[dict[str, Any]] = []
    files: list[str] = []
    for index, part in enumerate(plan.parts):
        low, high = np.searchsorted(removed.ordinals, [part.first_ordinal, part.first_ordinal + part.rows])
        entry = {"path": shards.relative_to_run(plan.directory, part.path), "rows": part.rows, "removed": None, "removed_rows": 0}
        if part.removed or high > low:
            bitmap = shards.load_bitmap(part).copy()
            bitmap[(removed.ordinals[low:high] - np.uint64(part.first_ordinal)).astype(np.int64)] = True
            entry["removed"], entry["removed_rows"] = shards.save_bitmap(plan.directory, index, bitmap), int(bitmap.sum())
        view.append(entry)
        if high > low:
            columns = {"ordinal": pa.array(removed.ordinals[low:high].copy())}
            for name, values in (("reason", removed.reasons), ("value", removed.values), ("detail", removed.details)):
                columns[name] = values.slice(low, high - low)
            scratch = storage.scratch_file(plan.directory)
            pq.write_table(pa.table(columns), scratch, compression="zstd")
            files.append(shards.publish_by_content(scratch, plan.directory, "removed", index))
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(removed.reasons).to_pylist()}
    exchange.commit(plan.directory, "resolve", number, {"view": view, "tables": files, "rejected": counts, "stats": removed.stats})


@dataclass(frozen=True)
class WritePlan:
    """`parts` are those of the rows with the removals of all set operators; `views` are (place, name, directory)."""

    directory: str
    parts: list[shards.Part]
    rows: str
    views: tuple[tuple[int, str, str], ...]


def write_unit(plan: WritePlan, number: int) -> None:
    """One unit as it stays: its rows without those that set operators removed, and all its rejects."""
    units = shards.committed_units(plan.rows)
    unit = sorted(units)[number]
    record = units[unit]
    places = {part.path: index for index, part in enumerate(plan.parts)}
    numbers = [places[storage.join(plan.rows, item["name"])] for item in record["parts"]]
    writer = shards.UnitWriter(plan.directory, unit)
    ledger = Ledger.from_json(record["ledger"])
    stats = json.loads(json.dumps(record["stats"]))
    try:
        for item in record["rejects"]:
            with storage.open_input(storage.join(plan.rows, item["name"])) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(1024):
                    writer.reject(pa.Table.from_batches([batch]).cast(tables.REJECTS))
        standing = ledger.kept
        told: list[pa.Table] = []
        for place, name, directory in plan.views:
            gone = _removed(directory, numbers, name)
            counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(gone["reason"]).to_pylist()}
            funnel = {"in": standing, "kept": standing - gone.num_rows, "rejected": counts}
            merge_stats(stats, {"funnel": {f"{place:02d}:{name}": funnel}})
            ledger.rejected.update({f"{name}:{reason}": count for reason, count in counts.items()})
            standing -= gone.num_rows
            told.append(gone)
        ledger.kept = standing
        everything = pa.concat_tables(told).sort_by("ordinal") if told else None
        for index in numbers:
            part = plan.parts[index]
            for _, batch in shards.read(part, _own_columns(part)):
                writer.write(pa.Table.from_batches([batch]).replace_schema_metadata(None))
            if everything is not None:
                _write_rejects(writer, part, everything)
        writer.commit(ledger, stats)
    except BaseException:
        writer.abandon()
        raise
    exchange.commit(plan.directory, "write", number, {})


def _own_columns(part: shards.Part) -> list[str]:
    """The columns of the rows, without the keys of set operators."""
    with storage.open_input(part.path) as stream:
        return [name for name in pq.read_schema(stream).names if not KEY_COLUMN.match(name)]


def _removed(directory: str, numbers: Sequence[int], name: str) -> pa.Table:
    """What a view removed of some parts: ordinal, operator, reason, value, detail."""
    named = ((re.match(r"removed/(\d+)-", item), item) for item in shards.load_manifest(directory).files["removed"])
    files = {int(match[1]): item for match, item in named if match}
    found = []
    for number in numbers:
        if number not in files:
            continue
        with storage.open_input(storage.join(directory, files[number])) as stream:
            table = pq.read_table(stream)
        if "similarity" in table.column_names:  # of the dedup machinery
            reasons = pa.array([_DETAIL_OF[reason] for reason in table["reason"].to_pylist()], pa.string())
            table = pa.table([table["ordinal"], reasons, table["similarity"], table["kept_id"]], names=_GONE.names)
        found.append(table.cast(_GONE))
    whole = pa.concat_tables(found) if found else _GONE.empty_table()
    return whole.append_column("operator", pa.array([name] * whole.num_rows, pa.string()))


_GONE = pa.schema([("ordinal", pa.uint64()), ("reason", pa.string()), ("value", pa.float64()), ("detail", pa.string())])


def _write_rejects(writer: shards.UnitWriter, part: shards.Part, everything: pa.Table) -> None:
    """The rows of a part that set operators removed, with their texts."""
    ordinals = everything["ordinal"].to_numpy()
    for found, batch in shards.read(replace(part, removed=None, removed_rows=0), ["id", "messages"]):
        own = found.to_numpy(zero_copy_only=False)
        low, high = np.searchsorted(ordinals, [own[0], own[-1] + 1]) if len(own) else (0, 0)
        if high == low:
            continue
        some = everything.slice(low, high - low)
        rows = pa.Table.from_batches([batch]).take(pa.array((some["ordinal"].to_numpy() - own[0]).astype(np.int64)))
        columns = {
            "id": rows["id"],
            "text": whole_text(Turns(rows)),
            "source": pa.nulls(rows.num_rows, pa.string()),
            **{name: some[name] for name in ("operator", "reason", "value", "detail")},
            "quarantined": pa.array(np.zeros(rows.num_rows, bool)),
        }
        writer.reject(pa.table(columns).cast(tables.REJECTS))
