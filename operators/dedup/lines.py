"""Lines or paragraphs that other documents hold already, cut out of the text (CCNet, arXiv:1911.00359, section 3.1).

map    part -> (hash, hash, ordinal), 24 B for each line or paragraph that is long enough, by partition of the hash
join   partition -> what is cut from which document, for the part that holds it; which ids that part must ask for
told   part -> ids for the parts that asked
cut    part -> the part without its cuts

A piece stays in the first `documents` documents that hold it. No text is exchanged; a partition holds 24 B a record.
"""

from __future__ import annotations

import time
from typing import Literal

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cluster import storage
from operators import shards
from operators.dedup import cutting, exchange, routes
from operators.dedup.cutting import CutOptions, CutPlan, Cuts
from operators.dedup.schedule import Phase, run_phases
from operators.dedup.spans import LINE, PARAGRAPH, Pieces, find_pieces
from operators.stage import StageContext

_RUN_RECORDS = 1 << 20


class LineOptions(CutOptions):
    """Which pieces are compared, and which of them stay."""

    unit: Literal["line", "paragraph"] = Field("line", description="what is compared; paragraphs are parted by blank lines")
    compare: Literal["folded", "exact"] = Field(
        "folded",
        description="folded: lower case, no accents and punctuation, numbers as 0; exact: bytes, but for white space at the ends",
    )
    digits: Literal["fold", "keep"] = Field("fold", description="folded: every run of digits counts as one 0, or stays")
    min_characters: int = Field(
        20, ge=0, description="shorter pieces are left alone; normalised characters, those of unspaced scripts count as two"
    )
    documents: int = Field(1, ge=1, description="a piece stays in so many documents, the first that hold it")
    everywhere: bool = Field(False, description="cut a piece that more documents hold out of all of them (boilerplate)")
    within: Literal["cut", "keep"] = Field(
        "cut", description="what repeats inside one document: cut after its first occurrence, or keep"
    )


def run_lines(context: StageContext, options: LineOptions, inputs: list[str]) -> None:
    """Write the inputs without repeated lines or paragraphs into `context.directory`."""
    started = time.time()
    parts = shards.parts(inputs)
    plan = CutPlan(context.directory, context.kind, parts, options, cutting.partitions_for(parts, options.partitions, 0.4))
    seconds = run_phases(context, plan, phases_of(plan))
    pieces = exchange.load_record(plan.directory, "index", 0)["pieces"]
    timings = {"phases": seconds, "seconds": round(time.time() - started, 3)}
    cutting.finish(context, plan, {"pieces": pieces}, timings)


def phases_of(plan: CutPlan) -> list[Phase]:
    """The phases in order; each may run its units in any order and on any worker."""
    units = len(plan.parts)
    return [
        Phase("map", map_part, units, of_parts=True),
        Phase("index", index_keys, 1),
        Phase("join", join_partition, plan.partitions),
        Phase("address", index_cuts, 1),
        Phase("tell", tell_ids, units, of_parts=True),
        Phase("told", index_ids, 1),
        Phase("cut", cut_part, units, of_parts=True),
    ]


def _pieces(batch: pa.RecordBatch, options: LineOptions) -> Pieces:
    return find_pieces(
        batch.column(options.column), LINE if options.unit == "line" else PARAGRAPH, options.min_characters,
        options.compare == "folded", options.digits == "keep",
    )  # fmt: skip


def map_part(plan: CutPlan, number: int) -> None:
    """The hashes of a part's pieces."""
    sender = routes.Sender(plan.directory, "pieces", number, 3)
    pending: list[np.ndarray] = []

    def flush() -> None:
        records = np.concatenate([np.empty((0, 3), np.uint64), *pending])
        pending.clear()
        sender.send(records, partition_of(records[:, 0], plan.partitions))

    try:
        for ordinals, batch in shards.read(plan.parts[number], ["id", plan.options.column], cutting.BATCH_ROWS):
            found = _pieces(batch, plan.options)
            pending.append(np.column_stack([found.hashes, ordinals.to_numpy()[found.rows]]))
            if sum(map(len, pending)) >= _RUN_RECORDS:
                flush()
        flush()
        sender.publish()
    except BaseException:
        sender.abandon()
        raise
    exchange.commit(plan.directory, "map", number, {})


def partition_of(hashes: np.ndarray, partitions: int) -> np.ndarray:
    """int64[n]: the piece of the key space of each uint64 hash."""
    return ((hashes >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)


def index_keys(plan: CutPlan, number: int) -> None:
    pieces = routes.gather(plan.directory, "pieces", len(plan.parts), plan.partitions)
    exchange.commit(plan.directory, "index", number, {"pieces": pieces})


def join_partition(plan: CutPlan, number: int) -> None:
    """What is cut: (ordinal, hash, hash, first ordinal that holds it, documents that hold it), for the part of the ordinal."""
    records, _ = routes.receive(plan.directory, "pieces", number, 3)
    found = repeated(records, plan.options.documents, plan.options.everywhere, plan.options.within == "cut")
    cuts, asks = routes.Sender(plan.directory, "cuts", number, 5), routes.Sender(plan.directory, "asks", number, 2)
    try:
        askers = plan.part_of(found[:, 0])
        cuts.send(found, askers)
        wanted = np.unique(np.column_stack([askers.astype(np.uint64), found[:, 3]]), axis=0)
        asks.send(wanted, plan.part_of(wanted[:, 1]))
        cuts.publish()
        asks.publish()
    except BaseException:
        cuts.abandon()
        asks.abandon()
        raise
    exchange.commit(plan.directory, "join", number, {})


def repeated(records: np.ndarray, documents: int, everywhere: bool, within: bool) -> np.ndarray:
    """uint64[cuts, 5] of records (hash, hash, ordinal): the (document, piece) pairs of which something is cut.

    A pair in a document where the piece stays is listed (with documents 1) only to cut its repetitions there.
    """
    records = records[np.lexsort([records[:, 2], records[:, 1], records[:, 0]])]
    if not len(records):
        return np.empty((0, 5), np.uint64)
    new_pair = np.ones(len(records), bool)
    new_pair[1:] = (records[1:] != records[:-1]).any(axis=1)
    first = np.flatnonzero(new_pair)
    times = np.diff(np.append(first, len(records)))
    pairs = records[first]
    new_piece = np.ones(len(pairs), bool)
    new_piece[1:] = (pairs[1:, :2] != pairs[:-1, :2]).any(axis=1)
    begins = np.flatnonzero(new_piece)
    group = np.cumsum(new_piece) - 1
    holders = np.diff(np.append(begins, len(pairs)))[group]
    rank = np.arange(len(pairs)) - begins[group]
    goes = (holders > documents) if everywhere else (rank >= documents)
    repeats = ~goes & (times > 1) & within
    chosen = np.flatnonzero(goes | repeats)
    kept = np.where(goes, pairs[begins[group], 2], pairs[:, 2])[chosen]
    count = np.where(goes, holders, 1)[chosen].astype(np.uint64)
    return np.column_stack([pairs[chosen, 2], pairs[chosen, 0], pairs[chosen, 1], kept, count])


def index_cuts(plan: CutPlan, number: int) -> None:
    for kind in ("cuts", "asks"):
        routes.gather(plan.directory, kind, plan.partitions, len(plan.parts))
    exchange.commit(plan.directory, "address", number, {})


def tell_ids(plan: CutPlan, number: int) -> None:
    asked, _ = routes.receive(plan.directory, "asks", number, 2)
    routes.answer_ids(
        plan.directory,
        number,
        asked[:, 1],
        asked[:, 0].astype(np.int64),
        read_ids(plan.parts[number]),
        plan.parts[number].first_ordinal,
    )
    exchange.commit(plan.directory, "tell", number, {})


def read_ids(part: shards.Part) -> pa.Array:
    """The ids of all rows of a part, removed ones too."""
    with storage.open_input(part.path) as stream:
        return pq.ParquetFile(stream).read(columns=["id"]).column(0).combine_chunks()


def index_ids(plan: CutPlan, number: int) -> None:
    routes.gather(plan.directory, "ids-told", len(plan.parts), len(plan.parts))
    exchange.commit(plan.directory, "told", number, {})


def cut_part(plan: CutPlan, number: int) -> None:
    decided, _ = routes.receive(plan.directory, "cuts", number, 5)
    decided = decided[np.lexsort([decided[:, 2], decided[:, 1], decided[:, 0]])]
    known, ids = routes.told_ids(plan.directory, number)
    order = np.argsort(known)

    def find(ordinals: np.ndarray, batch: pa.RecordBatch) -> Cuts:
        inside = decided[slice(*np.searchsorted(decided[:, 0], [ordinals[0], ordinals[-1] + np.uint64(1)]))]
        return chosen_cuts(_pieces(batch, plan.options), ordinals, inside)

    cutting.cut_part(plan, number, find, (known[order], ids.take(pa.array(order))))


def chosen_cuts(pieces: Pieces, ordinals: np.ndarray, decided: np.ndarray) -> Cuts:
    """Match the pieces of a batch with the decisions for its rows, uint64[n, 5] sorted by (ordinal, hash, hash)."""
    chosen, decision = _match(ordinals[pieces.rows], pieces.hashes, decided)
    return Cuts(pieces.rows[chosen], pieces.starts[chosen], pieces.ends[chosen], decided[decision, 3], decided[decision, 4])


@nb.njit(cache=True, nogil=True)
def _match(ordinals: np.ndarray, hashes: np.ndarray, decided: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pieces to cut, the decision on each). A decision with one document spares the first piece that it meets."""
    chosen, decision = np.empty(len(ordinals), np.int64), np.empty(len(ordinals), np.int64)
    spared = np.zeros(len(decided), np.bool_)
    count = 0
    for piece in range(len(ordinals)):
        low, high = 0, len(decided)
        while low < high:
            middle = (low + high) >> 1
            if decided[middle, 0] != ordinals[piece]:
                below = decided[middle, 0] < ordinals[piece]
            elif decided[middle, 1] != hashes[piece, 0]:
                below = decided[middle, 1] < hashes[piece, 0]
            else:
                below = decided[middle, 2] < hashes[piece, 1]
            if below:
                low = middle + 1
            else:
                high = middle
        if low == len(decided) or decided[low, 0] != ordinals[piece]:
            continue
        if decided[low, 1] != hashes[piece, 0] or decided[low, 2] != hashes[piece, 1]:
            continue
        if decided[low, 4] == 1 and not spared[low]:
            spared[low] = True
            continue
        chosen[count], decision[count] = piece, low
        count += 1
    return chosen[:count], decision[:count]
