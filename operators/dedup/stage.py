"""Deduplicate shard directories: the phases of `phases` as Ray tasks, committed unit by unit, ending in a view.

Text is read once by the task that signs its part (and once more for candidates, to verify); between tasks go only key files
under `keys/`, which are deleted at the end. A kept index stands for rows of earlier stages, whose text is not read at all.
The driver holds the list of parts and nothing that grows with rows.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster import storage
from operators import shards
from operators.dedup import confirming, exchange, growing, index, lookup, phases
from operators.dedup.options import DedupOptions
from operators.dedup.plan import Plan, make_plan
from operators.dedup.schedule import Phase, run_phases
from operators.ledger import Ledger
from operators.stage import StageContext


def run_dedup(
    context: StageContext,
    options: DedupOptions,
    inputs: Sequence[str],
    references: Sequence[str] = (),
    input_priority: bool = False,
    kept: str | None = None,
    grow: bool = True,
) -> None:
    """Write a view of the input stages without their duplicates into `context.directory`.

    `inputs` and `references` name stages of `context.inputs`; `kept` is the directory of a kept index (see `index`).
    Raises SettingsError when the index was made with other settings.
    """
    started = time.time()
    known: list[index.Generation] = []
    generation = own = None
    if kept is not None:
        known = index.pin(kept, context.fingerprint, context.directory)
        index.compare_settings(kept, known, options)
        own = storage.join(kept, context.fingerprint)
        if grow and context.limit is None:
            generation = None if index.is_complete(own) else own
        elif grow:
            context.log(f"{context.stage}: a run with a limit does not grow the index {kept}")
    compared, others = ([(name, context.inputs[name]) for name in names] for names in (inputs, references))
    plan = make_plan(context.directory, options, compared, others, input_priority, known, generation)
    seconds = run_phases(context, plan, phases_of(plan))
    grown = index.load(own).size if grow and own and index.is_complete(own) else None
    _finish(context, plan, grown, {"phases": seconds, "seconds": round(time.time() - started, 3)})
    storage.delete(exchange.keys_directory(context.directory))


def phases_of(plan: Plan) -> list[Phase]:
    """The work of the stage in order; units of one phase may run in any order and at once."""
    parts, verifies, grows = len(plan.parts), plan.verifies, plan.generation is not None
    return [
        Phase("map", phases.map_part, parts, of_parts=True),
        Phase("index", phases.index_keys, 1),
        Phase("lookup", lookup.look_up, plan.partitions if plan.known else 0),
        Phase("candidates", confirming.list_candidates, plan.partitions if verifies else 0),
        Phase("shingles", confirming.collect_shingles, parts if verifies else 0, of_parts=True),
        Phase("pairs", confirming.list_pairs, plan.partitions if verifies else 0),
        Phase("verify", confirming.verify_pairs, parts if verifies else 0, of_parts=True),
        Phase("join", phases.join_partition, plan.partitions),
        Phase("resolve", phases.resolve_clusters, 1),
        Phase("cards", phases.write_source_cards, len(plan.known) + parts),
        Phase("remove", phases.remove_rows, parts, of_parts=True),
        Phase("examples", phases.pick_examples, 1),
        Phase("grow", growing.grow_partition, plan.partitions if grows else 0),
        Phase("publish", growing.publish_generation, 1 if grows else 0),
    ]


def _finish(context: StageContext, plan: Plan, grown: dict[str, int] | None, timings: dict[str, Any]) -> None:
    directory, options = plan.directory, plan.options
    mapped = exchange.load_record(directory, "index", 0)
    joined = [exchange.load_record(directory, "join", number) for number in range(plan.partitions)]
    resolved = exchange.load_record(directory, "resolve", 0)
    view, tables, own = [], [], 0
    for number, part in list(enumerate(plan.parts))[plan.references :]:
        entry = exchange.load_record(directory, "remove", number)
        view.append(
            {
                "path": shards.relative_to_run(directory, part.path),
                "rows": part.rows,
                "removed": entry["bitmap"],
                "removed_rows": entry["removed_rows"],
            }
        )
        own += entry.get("own_copies", 0)  # a run that an earlier version began has none
        if entry["table"]:
            tables.append(entry["table"])
    rows_in = sum(part.kept_rows for part in plan.parts[plan.references :])
    rejected = Counter({"exact:duplicate": resolved["exact"], "minhash:near_duplicate": resolved["near"]})
    ledger = Ledger(rows_in, 0, sum(part["rows"] - part["removed_rows"] for part in view), +rejected)
    stats: dict[str, Any] = {
        "documents": mapped["rows"],
        "exchanged_bytes": mapped["exchanged_bytes"],
        "duplicate_ids": sum(record["duplicate_ids"] for record in joined),
        "examples": json.loads(storage.read_bytes(plan.path("examples.json"))),
    }
    if options.finds_exact:
        stats["exact"] = {"removed": resolved["exact"]}
    if plan.known or grown:
        stats["index"] = {"against": plan.against, "matched": resolved["indexed"], "own_copies": own, "grown": grown}
        if own:
            context.log(
                f"{context.stage}: {own} rows are in the index already under their own id and were removed as their own copies: "
                "give a stage with `index` new rows only, a batch a stage"
            )
    if options.finds_near:
        verified = [exchange.load_record(directory, "verify", n) for n in range(len(plan.parts))] if plan.verifies else []
        bands, rows = options.shape
        stats["minhash"] = {
            "removed": resolved["near"],
            "clusters": resolved["clusters"],
            "edges": sum(record["edges"] for record in verified) if plan.verifies else sum(r["edges"]["bands"] for r in joined),
            "without_signature": mapped["rows"] - mapped["signed"],
            "bands": bands,
            "rows": rows,
        }
        if plan.verifies:
            listed = [exchange.load_record(directory, "pairs", number) for number in range(plan.partitions)]
            checked, unchecked = sum(record["checked"] for record in verified), sum(record["unchecked"] for record in listed)
            stats["minhash"]["pairs"] = {"checked": checked, "unchecked": unchecked}
    if stats["duplicate_ids"]:
        context.log(f"{context.stage}: {stats['duplicate_ids']} rows have an id that an earlier row has too")
    context.finish(ledger=ledger, stats=stats, view=view, files={"removed": tables}, timings=timings)
