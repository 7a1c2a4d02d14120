"""The units of work of a dedup stage. Each is a plain function of (plan, number) that commits files and a record.

map        part -> keys by partition, sketches, scores
index      one unit: where each partition starts in every key file; totals of the map
join       partition -> forest of pairs, duplicate ids
resolve    one unit: components, who stays, who goes; what each part must look up in others
cards      source -> ids and sketches that other parts asked for
remove     part -> removal bitmap and table of removed rows
examples   one unit: a few pairs with their texts

Further phases: `lookup` with an index, `confirming` to verify, `growing` to keep an index.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.dedup import components, exchange, removed
from operators.dedup.growing import keep_rows, known_cards, write_twins
from operators.dedup.join import join_records
from operators.dedup.keys import KINDS, document_keys, split
from operators.dedup.lookup import partition_records
from operators.dedup.plan import Plan
from operators.dedup.removed import part_of

_RUN_ROWS = 1 << 18  # documents whose keys are sorted together: 59 MB of records at 14 bands
_BATCH_ROWS = 2048
_SCORES, _SKETCH = "scores", "sketch"


def map_part(plan: Plan, number: int) -> None:
    """Keys of the surviving rows of a part."""
    part, options = plan.parts[number], plan.options
    files = {kind: exchange.RunFile(plan.directory, exchange.data_path(plan.directory, kind, number)) for kind in KINDS}
    runs: dict[str, list[tuple[int, list[int]]]] = {kind: [] for kind in KINDS}
    written = dict.fromkeys(KINDS, 0)
    pending: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    sketches = np.zeros((part.rows, options.permutations), np.uint8) if plan.sketches else None
    scores = np.full((part.rows, options.score_columns), -np.inf) if options.score_columns else None
    rows = signed = waiting = 0

    def flush() -> None:
        for kind, width in KINDS.items():
            records, starts = split(np.concatenate([np.empty((0, width), np.uint64), *pending[kind]]), plan.partitions)
            pending[kind] = []
            if len(records):
                files[kind].append(records)
                runs[kind].append((written[kind], starts.tolist()))
                written[kind] += len(records)

    try:
        for ordinals, batch in shards.read(part, ["id", *options.columns()], _BATCH_ROWS):
            numbers = ordinals.to_numpy()
            keys = document_keys(batch, numbers, options, with_ids=number >= plan.references)
            local = (numbers - np.uint64(part.first_ordinal)).astype(np.int64)
            for kind, records in keys.records.items():
                pending[kind].append(records)
            if sketches is not None and keys.sketch is not None:
                sketches[local] = keys.sketch
            if scores is not None and keys.scores is not None:
                scores[local] = keys.scores
            rows, signed, waiting = rows + len(numbers), signed + keys.signed, waiting + len(numbers)
            if waiting >= _RUN_ROWS:
                flush()
                waiting = 0
        flush()
        for kind, file in files.items():
            if written[kind]:
                file.publish()
            else:
                file.abandon()
    except BaseException:
        for file in files.values():
            file.abandon()
        raise
    if sketches is not None:
        exchange.write_array(plan.directory, exchange.data_path(plan.directory, _SKETCH, number), sketches)
    if scores is not None:
        exchange.write_array(plan.directory, exchange.data_path(plan.directory, _SCORES, number), scores)
    exchange.commit(plan.directory, "map", number, {"rows": rows, "signed": signed, "runs": runs})


def index_keys(plan: Plan, number: int) -> None:
    records = {kind: exchange.write_index(plan.directory, kind, len(plan.parts), plan.partitions) for kind in KINDS}
    exchanged = sum(count * KINDS[kind] * 8 for kind, count in records.items())
    rows = signed = 0
    for part in range(plan.references, len(plan.parts)):
        record = exchange.load_record(plan.directory, "map", part)
        rows, signed = rows + record["rows"], signed + record["signed"]
    exchange.commit(plan.directory, "index", number, {"rows": rows, "signed": signed, "exchanged_bytes": exchanged})


def join_partition(plan: Plan, number: int) -> None:
    """Pairs of a partition, contracted to a forest a kind; how many ids occur more than once."""
    record: dict[str, Any] = {"edges": {}}
    for kind in ("exact", "bands") if not plan.verifies else ("exact",):
        joined = join_records(partition_records(plan, kind, number), plan.base)
        record["edges"][kind] = joined.edges
        pairs = np.column_stack([joined.larger, joined.smaller])
        exchange.write_array(plan.directory, exchange.data_path(plan.directory, f"pairs-{kind}", number), pairs)
    records = exchange.read_partition(plan.directory, "ids", number, KINDS["ids"])
    repeated, _ = components.bucket_pairs([records[:, 0]], records[:, 1])
    record["duplicate_ids"] = len(repeated)
    exchange.commit(plan.directory, "join", number, record)


def resolve_clusters(plan: Plan, number: int) -> None:
    """The only unit that sees all pairs: 16 B for each, contracted as they come in; 24 B for every verified one."""
    exact = components.gather_forest(exchange.read_each(plan.directory, "pairs-exact", range(plan.partitions), 2))
    if plan.verifies:
        near = exchange.read_all(plan.directory, "pairs-bands", range(plan.references, len(plan.parts)), 3)
    else:
        near = components.gather_forest(exchange.read_each(plan.directory, "pairs-bands", range(plan.partitions), 2))
    pairs = (exact[:, 0], exact[:, 1]), (near[:, 0], near[:, 1])
    members = components.members_of(*pairs)
    similarity = near[:, 2].copy().view(np.float64) if plan.verifies else None
    found = components.resolve(*pairs, _member_scores(plan, members), _protected(plan, members), similarity)
    rows = np.column_stack(
        [found.ordinals, found.kept, found.match, found.kind.astype(np.uint64), found.similarity.view(np.uint64)]
    )
    exchange.write_array(plan.directory, plan.path("members.bin"), rows)
    requests, request_starts = removed.requests(found, plan.firsts)
    exchange.write_array(plan.directory, plan.path("requests.bin"), requests)
    if plan.generation is not None:
        write_twins(plan, found)
    record = {
        "starts": np.searchsorted(found.ordinals, plan.firsts).tolist(),
        "request_starts": request_starts.tolist(),
        "clusters": {str(size): count for size, count in found.cluster_sizes.items()},
        "exact": int((found.kind == components.EXACT).sum()),
        "near": int((found.kind == components.NEAR).sum()),
        "indexed": int((part_of(found.kept, plan.firsts) < len(plan.known)).sum()),
    }
    exchange.commit(plan.directory, "resolve", number, record)


def _protected(plan: Plan, members: np.ndarray) -> np.ndarray:
    """bool[members]: rows of the index and of references, which never go."""
    return np.array([*(True for _ in plan.known), *plan.protected, False])[part_of(members, plan.firsts)]


def _member_scores(plan: Plan, members: np.ndarray) -> np.ndarray | None:
    """float64[members, columns], or None when the first row stays. Holds one part's scores at a time."""
    columns = plan.options.score_columns
    if not columns and plan.ranks is None:
        return None
    scores, bounds = np.full((len(members), columns), np.inf), np.searchsorted(members, plan.firsts[len(plan.known) :])
    for number in np.flatnonzero(np.diff(bounds)).tolist() if columns else ():
        data = storage.read_bytes(exchange.data_path(plan.directory, _SCORES, number))
        known = np.frombuffer(data, np.float64).reshape(-1, columns)
        inside = slice(bounds[number], bounds[number + 1])
        scores[inside] = known[(members[inside] - np.uint64(plan.parts[number].first_ordinal)).astype(np.int64)]
    if plan.ranks is None:
        return scores
    ranks = np.array([*(0 for _ in plan.known), *plan.ranks, 0], float)[part_of(members, plan.firsts)]
    return np.column_stack([-ranks, scores])


def write_source_cards(plan: Plan, number: int) -> None:
    """Ids (and sketches) of a source's rows for the parts that asked: one record batch for each of them."""
    starts = exchange.load_record(plan.directory, "resolve", 0)["request_starts"]
    asked = exchange.read_rows(plan.path("requests.bin"), starts[number], starts[number + 1], 2)
    if len(asked):
        ordinals = np.unique(asked[:, 1])
        if number < len(plan.known):
            cards = known_cards(plan.known[number], ordinals)
        else:
            part = plan.parts[number - len(plan.known)]
            local = (ordinals - np.uint64(part.first_ordinal)).astype(np.int64)
            sketches = _sketches(plan, number - len(plan.known))
            ids = _column(part, "id").take(pa.array(local))
            cards = removed.cards_table(ordinals, ids, None if sketches is None else sketches[local])
        removed.write_cards(plan.directory, plan.path("cards", f"{number:08d}.arrow"), asked, cards)
    exchange.commit(plan.directory, "cards", number, {})


def _column(part: shards.Part, name: str) -> pa.Array:
    """One column of all rows of a part, removed ones too."""
    with storage.open_input(part.path) as stream:
        return pq.ParquetFile(stream).read(columns=[name]).column(0).combine_chunks()


def _sketches(plan: Plan, number: int) -> np.ndarray | None:
    if not plan.sketches:
        return None
    data = storage.read_bytes(exchange.data_path(plan.directory, _SKETCH, number))
    return np.frombuffer(data, np.uint8).reshape(-1, plan.options.permutations)


def remove_rows(plan: Plan, number: int) -> None:
    """The removal bitmap of a part (earlier removals stay), the table of the rows that go now, and what the index keeps of it."""
    if number < plan.references:  # only compared with: no part of the result
        exchange.commit(plan.directory, "remove", number, {})
        return
    part, record, source = plan.parts[number], exchange.load_record(plan.directory, "resolve", 0), plan.source(number)
    gone = exchange.read_rows(plan.path("members.bin"), record["starts"][source], record["starts"][source + 1], 5)
    entry: dict[str, Any] = {"bitmap": None, "removed_rows": part.removed_rows, "table": None, "own_copies": 0}
    if len(gone) or part.removed:
        bitmap = shards.load_bitmap(part).copy()
        bitmap[(gone[:, 0] - np.uint64(part.first_ordinal)).astype(np.int64)] = True
        entry["bitmap"] = shards.save_bitmap(plan.directory, number, bitmap)
        entry["removed_rows"] = int(bitmap.sum())
    table, sketches, ids = removed.SCHEMA.empty_table(), None, None
    if len(gone) or plan.generation is not None:
        sketches, ids = _sketches(plan, number), _column(part, "id")
    if len(gone):
        cards = removed.read_cards([plan.path("cards", f"{q:08d}.arrow") for q in removed.sources(gone, plan.firsts)], source)
        table = removed.removed_table(gone, part.first_ordinal, ids, sketches, cards, plan.numbering)
        entry["table"] = removed.write_table(plan.directory, number, table)
        entry["own_copies"] = removed.own_copies(table, plan.against)
    if plan.generation is not None:
        entry["indexed_rows"] = keep_rows(plan, number, ids, sketches, gone, table)
    exchange.commit(plan.directory, "remove", number, entry)


def pick_examples(plan: Plan, number: int) -> None:
    """Up to five near-duplicates with both texts, cut to 2000 characters; those that differ visibly come first."""
    chosen = removed.SCHEMA.empty_table()
    for part_number in range(plan.references, len(plan.parts)):
        name = exchange.load_record(plan.directory, "remove", part_number)["table"]
        if name is not None:
            chosen = pa.concat_tables([chosen, removed.telling_rows(storage.join(plan.directory, name), 5 - chosen.num_rows)])
        if chosen.num_rows >= 5:
            break
    examples = []
    for row in chosen.to_pylist():
        kept_text, removed_text = (_text_at(plan, row[key] + plan.base) for key in ("kept_ordinal", "ordinal"))
        examples.append(
            {
                "kept": row["kept_id"],
                "kept_text": kept_text[:2000],
                "removed": row["id"],
                "removed_text": removed_text[:2000],
                "similarity": None if row["similarity"] is None else round(row["similarity"], 4),
            }
        )
    path = plan.path("examples.json")
    storage.write_bytes(path, json.dumps(examples, ensure_ascii=False).encode())
    exchange.commit(plan.directory, "examples", number, {})


def _text_at(plan: Plan, ordinal: int) -> str:
    """The text of one row: reads its row group."""
    number = int(part_of(np.array([ordinal], np.uint64), plan.firsts)[0]) - len(plan.known)
    row = ordinal - plan.parts[number].first_ordinal
    with storage.open_input(plan.parts[number].path) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                return file.read_row_group(group, columns=[plan.options.column]).column(0)[row].as_py() or ""
            row -= rows
    raise IndexError(f"{plan.parts[number].path} has no row {ordinal - plan.parts[number].first_ordinal}")
