"""Semantic dedup (SemDeDup, Abbas et al. 2023, arXiv:2303.09540): documents that mean the same, by embeddings in clusters.

embed      part -> float16 embeddings, kept with the stage (see `embed`)
sample     part -> the embeddings of the rows drawn for training
train      one unit: spherical k-means on the sample
assign     part -> (cluster, ordinal, precedence, embedding) by cluster
compare    partition -> rows that are too close to one before them in their cluster
tell       part -> ids for the parts that asked
remove     part -> removal bitmap and table of removed rows

Pairs in different clusters are not compared: that is the method's own loss. What counts as the same is the model's
judgement; a model for English tells little about Chinese. Memory: the sample for one task, one cluster for another.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
from pydantic import Field

from cluster import storage
from operators import shards
from operators.config import Settings
from operators.dedup import embed, exchange, removed, routes
from operators.dedup.cutting import CutPlan
from operators.dedup.embed import Embedding
from operators.dedup.lines import read_ids
from operators.dedup.schedule import Phase, run_phases
from operators.dedup.spherical import assign, duplicates, train_centroids
from operators.ledger import Ledger
from operators.stage import StageContext
from operators.supervise import Limits

REASON = "semantic:near_duplicate"
_PARTITION_BYTES = 64 << 20
_CLUSTER_ROWS = 5000  # rows of a cluster by default: 25 million cosines


class SemanticOptions(Settings):
    """Which model, how close is a duplicate, and who stays."""

    model: str = Field(description="directory of an embedding model in Hugging Face layout with safetensors weights")
    column: str = Field("text", description="the string column that is compared")
    pooling: Literal["mean", "cls"] = Field("mean", description="mean of the token states, or that of the first token")
    prefix: str = Field("", description="put before each text, for models that want it (`passage: `)")
    max_tokens: int = Field(256, ge=1, description="a text is judged by so many tokens from its beginning")
    batch_tokens: int = Field(8192, ge=1, description="tokens that go through the model at once, with padding")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the model runs; cuda takes one GPU an actor")
    threshold: float = Field(0.95, gt=0, le=1, description="cosine from which a row is a duplicate: 1 - epsilon of SemDeDup")
    clusters: int | None = Field(None, ge=1, description="clusters of k-means; default: one for 5,000 rows")
    sample: int | None = Field(
        None, ge=1, description="rows that train the clusters, about; default: 64 a cluster, at least 50,000"
    )
    iterations: int = Field(20, ge=1, description="rounds of k-means at most")
    keep: Literal["far", "near", "first", "longest", "best"] = Field(
        "far", description="who stays: far from the cluster's centre (SemDeDup), near, first, longest, or the highest `keep_column`"
    )
    keep_column: str = Field("quality", description="numbers that `keep: best` compares, rounded to 6 decimals; null is lowest")
    partitions: int | None = Field(None, ge=1, le=65536, description="pieces of the cluster space; default: about 64 MB each")
    seed: int = Field(17, ge=0, lt=1 << 32, description="seed of the sample and of the first centres")

    @pydantic.model_validator(mode="after")
    def _check(self) -> SemanticOptions:
        if self.max_tokens > self.batch_tokens:
            raise ValueError(f"batch_tokens = {self.batch_tokens} must hold a text of max_tokens = {self.max_tokens}")
        return self

    @property
    def embedding(self) -> Embedding:
        return Embedding(self.model, self.column, self.pooling, self.prefix, self.max_tokens, self.batch_tokens, self.device)


@dataclass(frozen=True)
class SemanticPlan(CutPlan):
    """`rows` are the surviving ones of all parts, `clusters` and `sample` the numbers in force."""

    rows: int = 0
    clusters: int = 1
    sample: int = 1
    dimensions: int = 0

    @property
    def width(self) -> int:
        """Words of 64 bits of a record: cluster, ordinal, precedence, embedding."""
        return 3 + -(-self.dimensions // 4)


def run_semantic(context: StageContext, options: SemanticOptions, inputs: list[str], limits: Limits) -> None:
    """Write a view of the inputs without rows that mean the same into `context.directory`."""
    started = time.time()
    parts = shards.parts(inputs)
    embed.embed_parts(context, parts, options.embedding, limits, 1 if options.device == "cuda" else 0)
    embedded = time.time()
    plan = plan_of(context.directory, context.kind, parts, options)
    seconds = run_phases(context, plan, phases_of(plan))
    timings = {"phases": {"embed": round(embedded - started, 3), **seconds}, "seconds": round(time.time() - started, 3)}
    finish(context, plan, timings)


def plan_of(directory: str, kind: str, parts: list[shards.Part], options: SemanticOptions) -> SemanticPlan:
    """After the parts are embedded. Clusters and sample depend on the rows, partitions on both; the result not on partitions."""
    rows = sum(part.kept_rows for part in parts)
    clusters = options.clusters or max(1, -(-rows // _CLUSTER_ROWS))
    sample = options.sample or max(50_000, 64 * clusters)
    dimensions = embed.load_record(directory, 0)["dimensions"] if parts else 0
    record_bytes = 8 * (3 + -(-dimensions // 4))
    partitions = options.partitions or min(4096, max(1, -(-rows * record_bytes // _PARTITION_BYTES)))
    return SemanticPlan(directory, kind, parts, options, min(partitions, clusters), rows, clusters, sample, dimensions)


def phases_of(plan: SemanticPlan) -> list[Phase]:
    """The phases after the embedding, in order; each may run its units in any order and on any worker."""
    units = len(plan.parts)
    return [
        Phase("sample", sample_part, units, of_parts=True),
        Phase("train", train, 1),
        Phase("assign", assign_part, units, of_parts=True),
        Phase("index", index_clusters, 1),
        Phase("compare", compare_partition, plan.partitions),
        Phase("address", index_removals, 1),
        Phase("tell", tell_ids, units, of_parts=True),
        Phase("told", index_ids, 1),
        Phase("remove", remove_rows, units, of_parts=True),
    ]


def _rows_of(part: shards.Part) -> np.ndarray:
    """uint64: the ordinals of a part's surviving rows, in order; those of its embeddings."""
    return np.flatnonzero(~shards.load_bitmap(part)).astype(np.uint64) + np.uint64(part.first_ordinal)


def sample_part(plan: SemanticPlan, number: int) -> None:
    """Rows whose hash under the seed is low enough: the same rows however the corpus is cut into parts."""
    vectors = embed.load_vectors(plan.directory, number)
    drawn = _hash(_rows_of(plan.parts[number]), plan.options.seed) < int(min(1.0, plan.sample / max(1, plan.rows)) * 2.0**53)
    chosen = vectors[drawn & vectors.any(axis=1)]
    exchange.write_array(plan.directory, exchange.data_path(plan.directory, "sample", number), chosen)
    exchange.commit(plan.directory, "sample", number, {"rows": len(chosen)})


def _hash(ordinals: np.ndarray, seed: int) -> np.ndarray:
    """53 bits of SplitMix64."""
    h = ordinals + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (h ^ (h >> np.uint64(31))) >> np.uint64(11)


def train(plan: SemanticPlan, number: int) -> None:
    pieces = [storage.read_bytes(exchange.data_path(plan.directory, "sample", part)) for part in range(len(plan.parts))]
    width = max(1, plan.dimensions)
    vectors = np.concatenate([np.empty((0, width), np.float16), *(np.frombuffer(p, np.float16).reshape(-1, width) for p in pieces)])
    centroids = train_centroids(vectors, plan.clusters, plan.options.iterations, plan.options.seed)
    exchange.write_array(plan.directory, exchange.data_path(plan.directory, "centroids", 0), centroids)
    exchange.commit(plan.directory, "train", number, {"sample": len(vectors), "clusters": len(centroids)})


def assign_part(plan: SemanticPlan, number: int) -> None:
    """Send each embedded row to the partition of its cluster."""
    part = plan.parts[number]
    centroids = np.frombuffer(storage.read_bytes(exchange.data_path(plan.directory, "centroids", 0)), np.float32)
    centroids = centroids.reshape(-1, max(1, plan.dimensions))
    vectors, ordinals = embed.load_vectors(plan.directory, number), _rows_of(part)
    known = np.asarray(vectors.any(axis=1))
    sender = routes.Sender(plan.directory, "members", number, plan.width)
    try:
        if known.any() and len(centroids):
            cluster, similarity = assign(vectors[known], centroids)
            records = np.zeros((int(known.sum()), plan.width), np.uint64)
            records[:, 0], records[:, 1] = cluster, ordinals[known]
            records[:, 2] = _precedence(part, plan.options, similarity, known).view(np.uint64)
            records[:, 3:].view(np.float16)[:, : plan.dimensions] = vectors[known]
            sender.send(records, cluster * plan.partitions // plan.clusters)
        sender.publish()
    except BaseException:
        sender.abandon()
        raise
    exchange.commit(plan.directory, "assign", number, {"without": int((~known).sum())})


def _precedence(part: shards.Part, options: SemanticOptions, similarity: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float64 of the embedded rows, the highest stays; ties go to the first row."""
    if options.keep in ("far", "near"):
        return similarity if options.keep == "near" else -similarity
    if options.keep == "first":
        return np.zeros(len(similarity))
    column = options.column if options.keep == "longest" else options.keep_column
    values = pa.chunked_array([batch.column(column) for _, batch in shards.read(part, [column])])
    if options.keep == "longest":
        found = pc.fill_null(pc.utf8_length(values), 0).to_numpy().astype(np.float64)
    else:
        found = np.round(pc.fill_null(values.cast(pa.float64()), -np.inf).to_numpy(), 6)
        found[np.isnan(found)] = -np.inf
    return np.asarray(found[known])


def index_clusters(plan: SemanticPlan, number: int) -> None:
    routes.gather(plan.directory, "members", len(plan.parts), plan.partitions)
    exchange.commit(plan.directory, "index", number, {})


def compare_partition(plan: SemanticPlan, number: int) -> None:
    """The duplicates of a partition's clusters, sent to their parts: (ordinal, match, who stays, cosine)."""
    records, _ = routes.receive(plan.directory, "members", number, plan.width)
    records = records[np.lexsort([records[:, 1], -records[:, 2].view(np.float64), records[:, 0]])]
    numbers, first = np.unique(records[:, 0], return_index=True)
    found, sizes = [np.empty((0, 4), np.uint64)], Counter[int]()
    for begin, end in zip(first.tolist(), [*first.tolist(), len(records)][1:], strict=True):
        vectors = np.ascontiguousarray(records[begin:end, 3:]).view(np.float16)[:, : plan.dimensions]
        gone, match, stays, cosine = duplicates(vectors, plan.options.threshold)
        ordinals = records[begin:end, 1]
        found.append(np.column_stack([ordinals[gone], ordinals[match], ordinals[stays], cosine.view(np.uint64)]))
        sizes[1 << (end - begin - 1).bit_length()] += 1
    rows = np.concatenate(found)
    part = plan.part_of(rows[:, 0])
    wanted = np.unique(np.column_stack([np.tile(part.astype(np.uint64), 2), np.concatenate([rows[:, 1], rows[:, 2]])]), axis=0)
    senders = [routes.Sender(plan.directory, "gone", number, 4), routes.Sender(plan.directory, "asks", number, 2)]
    try:
        senders[0].send(rows, part)
        senders[1].send(wanted, plan.part_of(wanted[:, 1]))
        for sender in senders:
            sender.publish()
    except BaseException:
        for sender in senders:
            sender.abandon()
        raise
    exchange.commit(plan.directory, "compare", number, {"sizes": sizes, "clusters": len(numbers)})


def index_removals(plan: SemanticPlan, number: int) -> None:
    for kind in ("gone", "asks"):
        routes.gather(plan.directory, kind, plan.partitions, len(plan.parts))
    exchange.commit(plan.directory, "address", number, {})


def tell_ids(plan: SemanticPlan, number: int) -> None:
    asked, _ = routes.receive(plan.directory, "asks", number, 2)
    part, askers = plan.parts[number], asked[:, 0].astype(np.int64)
    routes.answer_ids(plan.directory, number, asked[:, 1], askers, read_ids(part), part.first_ordinal)
    exchange.commit(plan.directory, "tell", number, {})


def index_ids(plan: SemanticPlan, number: int) -> None:
    routes.gather(plan.directory, "ids-told", len(plan.parts), len(plan.parts))
    exchange.commit(plan.directory, "told", number, {})


def remove_rows(plan: SemanticPlan, number: int) -> None:
    """The removal bitmap of a part (earlier removals stay) and the table of the rows that go now."""
    part = plan.parts[number]
    gone, _ = routes.receive(plan.directory, "gone", number, 4)
    gone = gone[np.argsort(gone[:, 0])]
    entry: dict[str, Any] = {"bitmap": None, "removed_rows": part.removed_rows, "table": None, "examples": []}
    if len(gone) or part.removed:
        bitmap = shards.load_bitmap(part).copy()
        bitmap[(gone[:, 0] - np.uint64(part.first_ordinal)).astype(np.int64)] = True
        entry["bitmap"] = shards.save_bitmap(plan.directory, number, bitmap)
        entry["removed_rows"] = int(bitmap.sum())
    if len(gone):
        known, ids = routes.told_ids(plan.directory, number)
        order = np.argsort(known)
        known, ids = known[order], ids.take(pa.array(order))
        own = read_ids(part).take(pa.array((gone[:, 0] - np.uint64(part.first_ordinal)).astype(np.int64)))
        columns = {
            "ordinal": pa.array(gone[:, 0].copy()),
            "id": own.cast(pa.string()),
            "reason": pa.array([REASON] * len(gone)),
            "match_ordinal": pa.array(gone[:, 1].copy()),
            "match_id": ids.take(pa.array(np.searchsorted(known, gone[:, 1]))),
            "kept_ordinal": pa.array(gone[:, 2].copy()),
            "kept_id": ids.take(pa.array(np.searchsorted(known, gone[:, 2]))),
            "similarity": pa.array(gone[:, 3].copy().view(np.float64).astype(np.float32)),
        }
        nothing = pa.nulls(len(gone), pa.string())
        table = pa.table([columns.get(field.name, nothing) for field in removed.SCHEMA], schema=removed.SCHEMA)
        entry["table"] = removed.write_table(plan.directory, number, table)
        entry["examples"] = table.slice(0, 3).select(["id", "kept_id", "similarity"]).to_pylist()
    exchange.commit(plan.directory, "remove", number, entry)


def finish(context: StageContext, plan: SemanticPlan, timings: dict[str, Any]) -> None:
    directory = plan.directory
    view, tables, examples = [], [], list[dict[str, Any]]()
    for number, part in enumerate(plan.parts):
        entry = exchange.load_record(directory, "remove", number)
        place = {"path": shards.relative_to_run(directory, part.path), "rows": part.rows}
        view.append({**place, "removed": entry["bitmap"], "removed_rows": entry["removed_rows"]})
        tables += [entry["table"]] if entry["table"] else []
        examples += entry["examples"][: 5 - len(examples)]
    gone = sum(part["removed_rows"] for part in view) - sum(part.removed_rows for part in plan.parts)
    sizes: Counter[str] = Counter()
    for number in range(plan.partitions):
        sizes.update(exchange.load_record(directory, "compare", number)["sizes"])
    stats = {
        "documents": plan.rows,
        "without_embedding": sum(embed.load_record(directory, number)["without"] for number in range(len(plan.parts))),
        "sample": exchange.load_record(directory, "train", 0)["sample"],
        "clusters": sum(sizes.values()),
        "cluster_rows_up_to": {size: sizes[size] for size in sorted(sizes, key=int)},
        "dimensions": plan.dimensions,
        "examples": examples,
    }
    ledger = Ledger(plan.rows, 0, plan.rows - gone, +Counter({REASON: gone}))
    context.finish(ledger=ledger, stats=stats, view=view, files={"removed": tables}, timings=timings)
    storage.delete(exchange.keys_directory(directory))
