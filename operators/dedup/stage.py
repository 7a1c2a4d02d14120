"""Deduplicate shard directories: the phases of `phases` as Ray tasks, committed unit by unit, ending in a view.

Text is read once by the task that signs its part (and once more for candidates, to verify); between tasks go only key files
under `keys/`, which are deleted at the end. The driver holds the list of parts and nothing that grows with rows.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from cluster import storage
from operators import shards
from operators.dedup import exchange, phases
from operators.dedup.options import DedupOptions
from operators.dedup.schedule import Phase, run_phases
from operators.ledger import Ledger
from operators.stage import StageContext

_PARTITION_BYTES = 64 << 20


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
    verify = options.finds_near and options.verify
    seconds = run_phases(
        context,
        plan,
        [
            Phase("map", phases.map_part, units, of_parts=True),
            Phase("index", phases.index_keys, 1),
            Phase("candidates", phases.list_candidates, plan.partitions if verify else 0),
            Phase("shingles", phases.collect_shingles, units if verify else 0, of_parts=True),
            Phase("join", phases.join_partition, plan.partitions),
            Phase("resolve", phases.resolve_clusters, 1),
            Phase("cards", phases.write_cards, units, of_parts=True),
            Phase("remove", phases.remove_rows, units, of_parts=True),
            Phase("examples", phases.pick_examples, 1),
        ],
    )
    _finish(context, plan, {"phases": seconds, "seconds": round(time.time() - started, 3)})
    storage.delete(exchange.keys_directory(context.directory))


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
