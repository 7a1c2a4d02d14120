"""Deduplicate shard directories: the phases of `phases` as Ray tasks, committed unit by unit, ending in a view.

Text is read once by the task that signs its part (and once more for candidates, to verify); between tasks go only key files
under `keys/`, which are deleted at the end. The driver holds the list of parts and nothing that grows with rows.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray

from cluster import storage
from operators import shards
from operators.dedup import exchange, phases
from operators.dedup.options import DedupOptions
from operators.ledger import Ledger
from operators.stage import StageContext

Unit = Callable[[phases.Plan, int], None]

_PARTITION_BYTES = 64 << 20
_IN_FLIGHT = 2  # tasks handed out for each worker, so that none waits for the driver


def partitions_for(rows: int, options: DedupOptions) -> int:
    """Pieces of the key space; depends on the inputs and settings alone, never on the cluster."""
    record_bytes = 16 * options.shape[0] if options.finds_near else 24
    return options.partitions or min(4096, max(1, -(-rows * record_bytes // _PARTITION_BYTES)))


def run_dedup(context: StageContext, options: DedupOptions, inputs: list[str]) -> None:
    """Write a view of the input directories without their duplicates into `context.directory`."""
    started = time.time()
    parts, options = shards.parts(inputs), options.with_shape()
    plan = phases.Plan(context.directory, parts, options, partitions_for(sum(part.rows for part in parts), options))
    units = len(plan.parts)
    steps: list[tuple[str, Unit, int]] = [
        ("map", phases.map_part, units),
        ("index", phases.index_keys, 1),
        ("candidates", phases.list_candidates, plan.partitions if options.finds_near and options.verify else 0),
        ("shingles", phases.collect_shingles, units if options.finds_near and options.verify else 0),
        ("join", phases.join_partition, plan.partitions),
        ("resolve", phases.resolve_clusters, 1),
        ("cards", phases.write_cards, units),
        ("remove", phases.remove_rows, units),
        ("examples", phases.pick_examples, 1),
    ]
    total, done, seconds = sum(count for _, _, count in steps), 0, {}
    for name, function, count in steps:
        begun = time.time()
        _run_phase(context, plan, name, function, count, done, total)
        done += count
        seconds[name] = round(time.time() - begun, 3)
    _finish(context, plan, {"phases": seconds, "seconds": round(time.time() - started, 3)})
    storage.delete(exchange.keys_directory(context.directory))


def _run_phase(
    context: StageContext,
    plan: phases.Plan,
    name: str,
    function: Callable[[phases.Plan, int], None],
    count: int,
    done: int,
    total: int,
) -> None:
    """Run the missing units of a phase, a bounded number at a time."""
    finished = exchange.committed(plan.directory, name)
    missing = [number for number in range(count) if number not in finished]
    context.progress(done + count - len(missing), total, "units")
    if not missing:
        return
    task = ray.remote(function).options(num_cpus=1, max_retries=5, scheduling_strategy="SPREAD", name=f"{context.stage}:{name}")
    shared = ray.put(plan)
    running: dict[Any, int] = {}
    left = iter(missing)
    completed = count - len(missing)
    try:
        while True:
            context.check_cancelled()
            while len(running) < _IN_FLIGHT * max(1, context.workers):
                number = next(left, None)
                if number is None:
                    break
                running[task.remote(shared, number)] = number
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for reference in ready:
                number = running.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise RuntimeError(
                        f"dedup stage {context.stage}: {_where(plan, name, number)} failed: {error.cause}"
                    ) from error
                completed += 1
                context.progress(done + completed, total, "units")
    finally:
        for reference in running:
            ray.cancel(reference)


def _where(plan: phases.Plan, name: str, number: int) -> str:
    if name in ("map", "shingles", "cards", "remove"):
        return f"{name} of {plan.parts[number].path}"
    return f"{name} {number}"


def _finish(context: StageContext, plan: phases.Plan, timings: dict[str, Any]) -> None:
    directory, options = plan.directory, plan.options
    mapped = exchange.load_record(directory, "index", 0)
    joined = [exchange.load_record(directory, "join", number) for number in range(plan.partitions)]
    resolved = exchange.load_record(directory, "resolve", 0)
    view, tables = [], []
    for number, part in enumerate(plan.parts):
        entry = exchange.load_record(directory, "remove", number)
        view.append(
            {
                "path": shards.relative_to_run(directory, part.path),
                "rows": part.rows,
                "removed": entry["bitmap"],
                "removed_rows": entry["removed_rows"],
            }
        )
        if entry["table"]:
            tables.append(entry["table"])
    rows_in = sum(part.kept_rows for part in plan.parts)
    rejected = Counter({"exact:duplicate": resolved["exact"], "minhash:near_duplicate": resolved["near"]})
    ledger = Ledger(rows_in, 0, sum(part["rows"] - part["removed_rows"] for part in view), +rejected)
    stats: dict[str, Any] = {
        "documents": mapped["rows"],
        "duplicate_ids": sum(record["duplicate_ids"] for record in joined),
        "examples": json.loads(storage.read_bytes(plan.path("examples.json"))),
    }
    if options.finds_exact:
        stats["exact"] = {"removed": resolved["exact"]}
    if options.finds_near:
        bands, rows = options.shape
        stats["minhash"] = {
            "removed": resolved["near"],
            "clusters": resolved["clusters"],
            "edges": sum(record["edges"]["bands"] for record in joined),
            "without_signature": mapped["rows"] - mapped["signed"],
            "bands": bands,
            "rows": rows,
        }
        if options.verify:
            checked = {name: sum(record[name] for record in joined) for name in ("checked", "unchecked")}
            stats["minhash"]["pairs"] = checked
    if stats["duplicate_ids"]:
        context.log(f"{context.stage}: {stats['duplicate_ids']} rows have an id that an earlier row has too")
    context.finish(ledger=ledger, stats=stats, view=view, files={"removed": tables}, timings=timings)
