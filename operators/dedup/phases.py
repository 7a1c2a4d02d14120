"""The units of work of a dedup stage. Each is a plain function of (plan, number) that commits files and a record.

map        part -> keys by partition, sketches, scores
index      one unit: where each partition starts in every key file; totals of the map
candidates partition -> ordinals that share a bucket        (only to verify)
shingles   part -> shingle sets of its candidates           (only to verify)
join       partition -> forest of pairs, duplicate ids
resolve    one unit: components, who stays, who goes; what each part must look up in others
cards      part -> ids and sketches that other parts asked for
remove     part -> removal bitmap and table of removed rows
examples   one unit: a few pairs with their texts
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.dedup import components, exchange, removed
from operators.dedup.join import join_records
from operators.dedup.keys import KINDS, document_keys, document_shingles, split
from operators.dedup.options import DedupOptions

_RUN_ROWS = 1 << 18  # documents whose keys are sorted together: 59 MB of records at 14 bands
_BATCH_ROWS = 2048
_SCORES, _SKETCH = "scores", "sketch"


@dataclass(frozen=True)
class Plan:
    """What every unit of one stage knows. `ends` is the number of rows up to and with each part."""

    directory: str
    parts: list[shards.Part]
    options: DedupOptions
    partitions: int

    @property
    def firsts(self) -> np.ndarray:
        """uint64[parts + 1]: the first ordinal of each part, and the number of all rows."""
        return np.array([*(part.first_ordinal for part in self.parts), sum(part.rows for part in self.parts)], np.uint64)

    def path(self, *names: str) -> str:
        return storage.join(exchange.keys_directory(self.directory), *names)


def map_part(plan: Plan, number: int) -> None:
    """Keys of the surviving rows of a part."""
    part, options = plan.parts[number], plan.options
    files = {kind: exchange.RunFile(plan.directory, exchange.data_path(plan.directory, kind, number)) for kind in KINDS}
    runs: dict[str, list[tuple[int, list[int]]]] = {kind: [] for kind in KINDS}
    written = dict.fromkeys(KINDS, 0)
    pending: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    sketches = np.zeros((part.rows, options.permutations), np.uint8) if options.finds_near and options.similarity else None
    scores = np.full(part.rows, -np.inf) if options.keep != "first" else None
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
            keys = document_keys(batch, numbers, options, with_ids=True)
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
    for kind in KINDS:
        exchange.write_index(plan.directory, kind, len(plan.parts), plan.partitions)
    rows = signed = 0
    for part in range(len(plan.parts)):
        record = exchange.load_record(plan.directory, "map", part)
        rows, signed = rows + record["rows"], signed + record["signed"]
    exchange.commit(plan.directory, "index", number, {"rows": rows, "signed": signed})


def list_candidates(plan: Plan, number: int) -> None:
    """The ordinals of a partition that share a bucket, sorted, and where those of each part begin."""
    records = exchange.read_partition(plan.directory, "bands", number, KINDS["bands"])
    members, _ = components.buckets([records[:, 0]], records[:, 1])
    ordinals = np.unique(members)
    exchange.write_array(plan.directory, plan.path("candidates", f"{number:08d}.bin"), ordinals)
    starts = np.searchsorted(ordinals, plan.firsts).astype(np.int64)
    exchange.write_array(plan.directory, plan.path("candidates", f"{number:08d}.starts.bin"), starts)
    exchange.commit(plan.directory, "candidates", number, {})


def collect_shingles(plan: Plan, number: int) -> None:
    """The shingle sets of a part's candidates: hashes, offsets and ordinals in three files."""
    part, pieces = plan.parts[number], [np.empty(0, np.uint64)]
    for partition in range(plan.partitions):
        starts = exchange.read_rows(plan.path("candidates", f"{partition:08d}.starts.bin"), number, number + 2, 1, np.int64)
        path = plan.path("candidates", f"{partition:08d}.bin")
        pieces.append(exchange.read_rows(path, int(starts[0, 0]), int(starts[1, 0]), 1)[:, 0])
    wanted = np.unique(np.concatenate(pieces))
    sets = exchange.RunFile(plan.directory, plan.path("shingles", f"{number:08d}.bin"))
    ends = [np.zeros(1, np.int64)]
    try:
        for ordinals, batch in shards.read(part, plan.options.columns(), _BATCH_ROWS) if len(wanted) else ():
            mask = np.isin(ordinals.to_numpy(), wanted, assume_unique=True)
            if mask.any():
                hashes, offsets = document_shingles(batch.filter(pa.array(mask)), plan.options)
                sets.append(hashes)
                ends.append(offsets[1:] + ends[-1][-1])
    except BaseException:
        sets.abandon()
        raise
    sets.publish()
    exchange.write_array(plan.directory, plan.path("shingles", f"{number:08d}.offsets.bin"), np.concatenate(ends))
    exchange.write_array(plan.directory, plan.path("shingles", f"{number:08d}.ordinals.bin"), wanted)
    exchange.commit(plan.directory, "shingles", number, {})


def _load_sets(plan: Plan, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The collected shingle sets of sorted ordinals (see verify.LoadSets)."""
    pieces, sizes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    bounds = np.searchsorted(ordinals, plan.firsts)
    for number in np.flatnonzero(np.diff(bounds)):
        wanted = ordinals[bounds[number] : bounds[number + 1]]
        known = np.frombuffer(storage.read_bytes(plan.path("shingles", f"{number:08d}.ordinals.bin")), np.uint64)
        offsets = np.frombuffer(storage.read_bytes(plan.path("shingles", f"{number:08d}.offsets.bin")), np.int64)
        rows = np.searchsorted(known, wanted)
        with storage.open_input(plan.path("shingles", f"{number:08d}.bin")) as stream:
            for begin, end in zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True):
                pieces.append(np.frombuffer(stream.read_at((end - begin) * 8, begin * 8), np.uint64))
        sizes.append(np.diff(offsets)[rows])
    offsets = np.zeros(len(ordinals) + 1, np.int64)
    np.cumsum(np.concatenate(sizes), out=offsets[1:])
    return np.concatenate(pieces), offsets


def join_partition(plan: Plan, number: int) -> None:
    """Pairs of a partition, contracted to a forest a kind; how many ids occur more than once."""
    record: dict[str, Any] = {"edges": {}, "checked": 0, "unchecked": 0}
    for kind in ("exact", "bands"):
        records = exchange.read_partition(plan.directory, kind, number, KINDS[kind])
        joined = join_records(kind, records, plan.options, lambda wanted: _load_sets(plan, wanted))
        record["edges"][kind] = joined.edges
        record["checked"], record["unchecked"] = record["checked"] + joined.checked, record["unchecked"] + joined.unchecked
        pairs = np.column_stack([joined.larger, joined.smaller])
        exchange.write_array(plan.directory, exchange.data_path(plan.directory, f"pairs-{kind}", number), pairs)
    records = exchange.read_partition(plan.directory, "ids", number, KINDS["ids"])
    repeated, _ = components.bucket_pairs([records[:, 0]], records[:, 1])
    record["duplicate_ids"] = len(repeated)
    exchange.commit(plan.directory, "join", number, record)


def resolve_clusters(plan: Plan, number: int) -> None:
    """The only unit that sees all pairs: 16 B for each, at most two for an ordinal and partition."""
    pairs = {kind: exchange.read_all(plan.directory, f"pairs-{kind}", range(plan.partitions), 2) for kind in ("exact", "bands")}
    exact, near = ((pairs[kind][:, 0], pairs[kind][:, 1]) for kind in ("exact", "bands"))
    found = components.resolve(exact, near, _member_scores(plan, components.members_of(exact, near)))
    rows = np.column_stack([found.ordinals, found.kept, found.match, found.kind.astype(np.uint64)])
    exchange.write_array(plan.directory, plan.path("members.bin"), rows)
    requests, request_starts = removed.requests(found, plan.firsts)
    exchange.write_array(plan.directory, plan.path("requests.bin"), requests)
    record = {
        "starts": np.searchsorted(found.ordinals, plan.firsts).tolist(),
        "request_starts": request_starts.tolist(),
        "clusters": {str(size): count for size, count in found.cluster_sizes.items()},
        "exact": int((found.kind == components.EXACT).sum()),
        "near": int((found.kind == components.NEAR).sum()),
    }
    exchange.commit(plan.directory, "resolve", number, record)


def _member_scores(plan: Plan, members: np.ndarray) -> np.ndarray | None:
    """float64[members], or None when the first row stays. Holds one part's scores at a time."""
    if plan.options.keep == "first":
        return None
    scores, bounds = np.empty(len(members)), np.searchsorted(members, plan.firsts)
    for number in np.flatnonzero(np.diff(bounds)).tolist():
        known = np.frombuffer(storage.read_bytes(exchange.data_path(plan.directory, _SCORES, number)), np.float64)
        inside = slice(bounds[number], bounds[number + 1])
        scores[inside] = known[(members[inside] - np.uint64(plan.parts[number].first_ordinal)).astype(np.int64)]
    return scores


def write_cards(plan: Plan, number: int) -> None:
    """Ids (and sketches) of a part's rows for the parts that asked: one record batch for each of them."""
    starts = exchange.load_record(plan.directory, "resolve", 0)["request_starts"]
    asked = exchange.read_rows(plan.path("requests.bin"), starts[number], starts[number + 1], 2)
    if len(asked):
        ids = _column(plan.parts[number], "id")
        sketches = _sketches(plan, number)
        removed.write_cards(
            plan.directory, plan.path("cards", f"{number:08d}.arrow"), asked, plan.parts[number].first_ordinal, ids, sketches
        )
    exchange.commit(plan.directory, "cards", number, {})


def _column(part: shards.Part, name: str) -> pa.Array:
    """One column of all rows of a part, removed ones too."""
    with storage.open_input(part.path) as stream:
        return pq.ParquetFile(stream).read(columns=[name]).column(0).combine_chunks()


def _sketches(plan: Plan, number: int) -> np.ndarray | None:
    if not (plan.options.finds_near and plan.options.similarity):
        return None
    data = storage.read_bytes(exchange.data_path(plan.directory, _SKETCH, number))
    return np.frombuffer(data, np.uint8).reshape(-1, plan.options.permutations)


def remove_rows(plan: Plan, number: int) -> None:
    """The removal bitmap of a part (earlier removals stay) and the table of the rows that go now."""
    part, record = plan.parts[number], exchange.load_record(plan.directory, "resolve", 0)
    gone = exchange.read_rows(plan.path("members.bin"), record["starts"][number], record["starts"][number + 1], 4)
    entry: dict[str, Any] = {"bitmap": None, "removed_rows": part.removed_rows, "table": None}
    if len(gone) or part.removed:
        bitmap = shards.load_bitmap(part).copy()
        bitmap[(gone[:, 0] - np.uint64(part.first_ordinal)).astype(np.int64)] = True
        entry["bitmap"] = shards.save_bitmap(plan.directory, number, bitmap)
        entry["removed_rows"] = int(bitmap.sum())
    if len(gone):
        cards = removed.read_cards([plan.path("cards", f"{q:08d}.arrow") for q in removed.sources(gone, plan.firsts)], number)
        table = removed.removed_table(gone, part.first_ordinal, _column(part, "id"), _sketches(plan, number), cards)
        entry["table"] = removed.write_table(plan.directory, number, table)
    exchange.commit(plan.directory, "remove", number, entry)


def pick_examples(plan: Plan, number: int) -> None:
    """Up to five near-duplicates with both texts, cut to 2000 characters; those that differ visibly come first."""
    chosen = removed.SCHEMA.empty_table()
    for part_number in range(len(plan.parts)):
        name = exchange.load_record(plan.directory, "remove", part_number)["table"]
        if name is not None:
            chosen = pa.concat_tables([chosen, removed.telling_rows(storage.join(plan.directory, name), 5 - chosen.num_rows)])
        if chosen.num_rows >= 5:
            break
    examples = []
    for row in chosen.to_pylist():
        kept_text = _text_at(plan, row["kept_ordinal"])
        removed_text = _text_at(plan, row["ordinal"])
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
    number = int(removed.part_of(np.array([ordinal], np.uint64), plan.firsts)[0])
    row = ordinal - plan.parts[number].first_ordinal
    with storage.open_input(plan.parts[number].path) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                return file.read_row_group(group, columns=[plan.options.column]).column(0)[row].as_py() or ""
            row -= rows
    raise IndexError(f"{plan.parts[number].path} has no row {ordinal - plan.parts[number].first_ordinal}")
