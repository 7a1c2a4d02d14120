"""Exact substring dedup (Lee et al. 2021, arXiv:2107.06499) over any number of parts, by keys instead of a suffix array.

**What is cut.** The corpus is a sequence of documents, each a sequence of tokens (see `windows`). A window of N tokens that
equals an earlier one (of an earlier document, or further left in the same) is a duplicate. A token goes if a duplicate
window covers it. So every span of at least N tokens that occurs twice is cut from all its places but the first; no window
of N tokens of the input is left twice; and of a text that repeats itself with a period shorter than N one period stays.

    map      part -> (k-gram, context, position) of its anchors, 24 B each; tokens of each document
    match    partition -> anchors whose whole context occurred before (all its windows are duplicates); of the others,
             anchors that occur in several contexts: only their windows must be compared one by one
    windows  part -> (hash, hash, position) of those windows, 24 B each
    meet     partition -> windows that occurred before
    spans    part -> its duplicate spans, joined, with the place of the first occurrence; asks its part for a digest
    answer   part -> BLAKE2b digests (128 bits) of the spans asked for, ids of their documents
    cut      part -> the part without its spans, where both digests agree

The kernels' hashes only propose; a span is cut if the cryptographic digests of the bytes of its tokens agree in both
places. Text never leaves its part. Memory: a partition (64 MB of keys), the records of one part, one document.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster import storage
from operators import shards
from operators.dedup import cutting, exchange, routes
from operators.dedup.cutting import CutOptions, CutPlan, Cuts
from operators.dedup.lines import partition_of, read_ids
from operators.dedup.normalise import code_table, text_buffers
from operators.dedup.schedule import Phase, run_phases
from operators.dedup.windows import find_anchors, find_windows, plain_tokens, tokens_of
from operators.stage import StageContext

_PART_SHIFT = np.uint64(40)  # a position is (part, token of the part): 2^24 parts of 2^40 tokens
_TOKEN_MASK = np.uint64((1 << 40) - 1)
_RUN_RECORDS = 1 << 20


class SubstringOptions(CutOptions):
    """How long a repeated span must be, and what becomes of it."""

    tokens: int = Field(
        50, ge=2, le=65536, description="shortest span, in tokens: words, characters of unspaced scripts, runs of another character"
    )
    anchor_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of the k-gram that groups windows (default: half); changes the work, never the result",
    )
    action: Literal["cut", "mark"] = Field(
        "cut", description="cut repeated spans, or leave the text and add a column `duplicate_spans` of their bytes (start, end)"
    )

    @property
    def k(self) -> int:
        return min(self.anchor_tokens or max(1, self.tokens // 2), self.tokens)


def run_substring(context: StageContext, options: SubstringOptions, inputs: list[str]) -> None:
    """Write the inputs without repeated spans into `context.directory`."""
    started = time.time()
    parts = shards.parts(inputs)
    share = 24 / 5 * 2 / (options.tokens - options.k + 2)  # a record for each anchor, five bytes of text a token
    plan = CutPlan(context.directory, context.kind, parts, options, cutting.partitions_for(parts, options.partitions, share))
    seconds = run_phases(context, plan, phases_of(plan))
    cutting.finish(context, plan, stats_of(plan), {"phases": seconds, "seconds": round(time.time() - started, 3)})


def phases_of(plan: CutPlan) -> list[Phase]:
    """The phases in order; each may run its units in any order and on any worker."""
    units = len(plan.parts)
    return [
        Phase("map", map_part, units, of_parts=True),
        Phase("anchors", index_anchors, 1),
        Phase("match", match_partition, plan.partitions),
        Phase("emit", index_matches, 1),
        Phase("windows", write_windows, units, of_parts=True),
        Phase("index", index_windows, 1),
        Phase("meet", meet_partition, plan.partitions),
        Phase("address", index_meetings, 1),
        Phase("spans", join_spans, units, of_parts=True),
        Phase("ask", index_questions, 1),
        Phase("answer", answer_questions, units, of_parts=True),
        Phase("told", index_answers, 1),
        Phase("cut", cut_spans, units, of_parts=True),
    ]


def stats_of(plan: CutPlan) -> dict[str, int]:
    keys = exchange.load_record(plan.directory, "anchors", 0)
    windows = exchange.load_record(plan.directory, "index", 0)
    unverified = sum(exchange.load_record(plan.directory, "verified", number)["unverified"] for number in range(len(plan.parts)))
    tokens = sum(exchange.load_record(plan.directory, "map", number)["tokens"] for number in range(len(plan.parts)))
    return {"tokens": tokens, "anchors": keys["records"], "windows": windows["records"], "unverified": unverified}


def map_part(plan: CutPlan, number: int) -> None:
    """The anchors of a part and the token counts of its documents."""
    if number >= 1 << 24:
        raise ValueError(f"substring dedup takes at most {1 << 24} parts; compact the input first")
    options, part = plan.options, plan.parts[number]
    sender = routes.Sender(plan.directory, "anchors", number, 3)
    pending, sizes = list[np.ndarray](), [np.empty(0, np.int64)]
    ordinals_of, near, token = [np.empty(0, np.uint64)], [np.empty((0, 3), np.int64)], 0

    def flush() -> None:
        records = np.concatenate([np.empty((0, 3), np.uint64), *pending])
        pending.clear()
        sender.send(records, partition_of(records[:, 0], plan.partitions))

    try:
        for ordinals, batch in shards.read(part, ["id", options.column], cutting.BATCH_ROWS):
            data, offsets = text_buffers(batch.column(options.column))
            counts = np.empty(len(offsets) - 1, np.int64)
            capacity = int(offsets[-1] - offsets[0]) // 32 + 64
            while True:
                out, close = np.empty((capacity, 3), np.uint64), np.empty((capacity, 3), np.int64)
                found, spans = find_anchors(data, offsets, code_table(), options.tokens, options.k, token, counts, out, close)
                if max(found, spans) <= capacity:
                    break
                capacity = max(found, spans)
            near.append(close[:spans])
            out[:found, 2] |= np.uint64(number) << _PART_SHIFT
            pending.append(out[:found])
            sizes.append(counts)
            ordinals_of.append(ordinals.to_numpy())
            token += int(counts.sum())
            if sum(map(len, pending)) >= _RUN_RECORDS:
                flush()
        flush()
        sender.publish()
    except BaseException:
        sender.abandon()
        raise
    ends = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    exchange.write_array(plan.directory, exchange.data_path(plan.directory, "ends", number), ends)
    exchange.write_array(plan.directory, exchange.data_path(plan.directory, "rows", number), np.concatenate(ordinals_of))
    exchange.write_array(plan.directory, exchange.data_path(plan.directory, "near", number), np.concatenate(near))
    exchange.commit(plan.directory, "map", number, {"tokens": token})


@dataclass(frozen=True)
class _Documents:
    """The surviving documents of a part: tokens ends[i]..ends[i + 1] are those of ordinals[i]."""

    ends: np.ndarray
    ordinals: np.ndarray

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """int64[n]: the document that holds each token of the part."""
        return np.searchsorted(self.ends, tokens, side="right") - 1


def _documents(plan: CutPlan, number: int) -> _Documents:
    ends, ordinals = (storage.read_bytes(exchange.data_path(plan.directory, kind, number)) for kind in ("ends", "rows"))
    return _Documents(np.frombuffer(ends, np.int64), np.frombuffer(ordinals, np.uint64))


def index_anchors(plan: CutPlan, number: int) -> None:
    records = routes.gather(plan.directory, "anchors", len(plan.parts), plan.partitions)
    exchange.commit(plan.directory, "anchors", number, {"records": records})


def match_partition(plan: CutPlan, number: int) -> None:
    """Anchors with a context that occurred before, and first ones of a context whose windows must be compared."""
    records, _ = routes.receive(plan.directory, "anchors", number, 3)
    full, emit = matches(records)
    _send(plan, number, {"full": full, "emit": emit})
    exchange.commit(plan.directory, "match", number, {})


def _send(plan: CutPlan, number: int, kinds: dict[str, np.ndarray]) -> None:
    """Send records to the parts that hold the positions in their first column."""
    for kind, records in kinds.items():
        sender = routes.Sender(plan.directory, kind, number, records.shape[1])
        try:
            sender.send(records, (records[:, 0] >> _PART_SHIFT).astype(np.int64))
            sender.publish()
        except BaseException:
            sender.abandon()
            raise


def matches(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of records (k-gram, context, position): (position, first position with its context), and positions that must emit."""
    records = records[np.lexsort([records[:, 2], records[:, 1], records[:, 0]])]
    if not len(records):
        return np.empty((0, 2), np.uint64), np.empty((0, 1), np.uint64)
    new_gram = np.append(True, records[1:, 0] != records[:-1, 0])
    new_context = new_gram | np.append(True, records[1:, 1] != records[:-1, 1])
    firsts = records[np.flatnonzero(new_context)[np.cumsum(new_context) - 1], 2]
    again = ~new_context
    contexts = np.bincount(np.cumsum(new_gram) - 1, weights=new_context)[np.cumsum(new_gram) - 1]
    emits = new_context & (contexts > 1)
    return np.column_stack([records[again, 2], firsts[again]]), records[emits, 2:]


def index_matches(plan: CutPlan, number: int) -> None:
    for kind in ("full", "emit"):
        routes.gather(plan.directory, kind, plan.partitions, len(plan.parts))
    exchange.commit(plan.directory, "emit", number, {})


def write_windows(plan: CutPlan, number: int) -> None:
    """The hashes of the windows that must be compared one by one."""
    options, part = plan.options, plan.parts[number]
    emit, _ = routes.receive(plan.directory, "emit", number, 1)
    wanted = np.sort(emit[:, 0] & _TOKEN_MASK)
    documents = _documents(plan, number)
    involved = documents.ordinals[np.unique(documents.of(wanted.astype(np.int64)))]
    sender = routes.Sender(plan.directory, "windows", number, 3)
    try:
        for ordinals, batch in shards.read(part, [options.column], cutting.BATCH_ROWS) if len(wanted) else ():
            rows, batch = _only(ordinals.to_numpy(), batch, involved)
            if not len(rows):
                continue
            data, offsets = text_buffers(batch.column(options.column))
            firsts = documents.ends[np.searchsorted(documents.ordinals, rows)]
            last = documents.ends[np.searchsorted(documents.ordinals, rows[-1]) + 1]
            own = wanted[slice(*np.searchsorted(wanted, [np.uint64(firsts[0]), np.uint64(last)]))]
            out = np.empty((len(own) * (options.tokens - options.k + 1), 3), np.uint64)
            found = find_windows(data, offsets, code_table(), options.tokens, options.k, firsts, own, out)
            out[:found, 2] |= np.uint64(number) << _PART_SHIFT
            sender.send(out[:found], partition_of(out[:found, 0], plan.partitions))
        sender.publish()
    except BaseException:
        sender.abandon()
        raise
    exchange.commit(plan.directory, "windows", number, {})


def _only(ordinals: np.ndarray, batch: pa.RecordBatch, wanted: np.ndarray) -> tuple[np.ndarray, pa.RecordBatch]:
    """The rows of a batch that are in `wanted`."""
    mask = np.isin(ordinals, wanted, assume_unique=True)
    return ordinals[mask], batch.filter(pa.array(mask))


def index_windows(plan: CutPlan, number: int) -> None:
    records = routes.gather(plan.directory, "windows", len(plan.parts), plan.partitions)
    exchange.commit(plan.directory, "index", number, {"records": records})


def meet_partition(plan: CutPlan, number: int) -> None:
    """Windows that occurred before: (position, position of the first)."""
    records, _ = routes.receive(plan.directory, "windows", number, 3)
    records = records[np.lexsort([records[:, 2], records[:, 1], records[:, 0]])]
    new = np.append(True, (records[1:, :2] != records[:-1, :2]).any(axis=1))[: len(records)]
    firsts = records[np.flatnonzero(new)[np.cumsum(new) - 1], 2] if len(records) else np.empty(0, np.uint64)
    _send(plan, number, {"met": np.column_stack([records[~new, 2], firsts[~new]])})
    exchange.commit(plan.directory, "meet", number, {})


def index_meetings(plan: CutPlan, number: int) -> None:
    routes.gather(plan.directory, "met", plan.partitions, len(plan.parts))
    exchange.commit(plan.directory, "address", number, {})


def join_spans(plan: CutPlan, number: int) -> None:
    """Duplicate spans of a part: (document, first token, last, source), joined where they overlap at one distance."""
    options, documents = plan.options, _documents(plan, number)
    full, _ = routes.receive(plan.directory, "full", number, 2)
    met, _ = routes.receive(plan.directory, "met", number, 2)
    anchors, windows = ((records[:, 0] & _TOKEN_MASK).astype(np.int64) for records in (full, met))
    row = documents.of(anchors)
    low = np.maximum(documents.ends[row], anchors + options.k - options.tokens)
    high = np.minimum(documents.ends[row + 1], anchors + options.tokens)
    near = np.frombuffer(storage.read_bytes(exchange.data_path(plan.directory, "near", number)), np.int64).reshape(-1, 3)
    close = (near[:, 0] - near[:, 2]).astype(np.uint64) | np.uint64(number) << _PART_SHIFT
    first = np.concatenate([low, windows, near[:, 0]])
    last = np.concatenate([high, windows + options.tokens, near[:, 1]])
    source = np.concatenate([full[:, 1] - (anchors - low).astype(np.uint64), met[:, 1], close])
    spans = joined(documents.of(first), first, last, source)
    exchange.write_array(plan.directory, exchange.data_path(plan.directory, "spans", number), spans)
    sender = routes.Sender(plan.directory, "questions", number, 2)
    try:
        asked = np.unique(np.column_stack([spans[:, 3], spans[:, 2] - spans[:, 1]]), axis=0)
        sender.send(asked, (asked[:, 0] >> _PART_SHIFT).astype(np.int64))
        sender.publish()
    except BaseException:
        sender.abandon()
        raise
    exchange.commit(plan.directory, "spans", number, {})


def joined(row: np.ndarray, first: np.ndarray, last: np.ndarray, source: np.ndarray) -> np.ndarray:
    """uint64[spans, 4] of (row, first, last, source): spans of one row that overlap at one distance to their source.

    Overlap, not touch: a token in common is what makes sure that the sources lie in one document.
    """
    distance = source - first.astype(np.uint64)
    order = np.lexsort([last, first, distance, row])
    row, first, last, distance = row[order], first[order], last[order], distance[order]
    if not len(row):
        return np.empty((0, 4), np.uint64)
    group = np.cumsum(np.append(True, (row[1:] != row[:-1]) | (distance[1:] != distance[:-1]))) - 1
    lift = group * (int(last.max()) + 1)  # so that one running maximum serves all groups
    reach = np.maximum.accumulate(last + lift)
    new = np.append(True, (first + lift)[1:] >= reach[:-1])
    begins = np.flatnonzero(new)
    ends = np.maximum.reduceat(last, begins)
    starts = first[begins].astype(np.uint64)
    return np.column_stack([row[begins].astype(np.uint64), starts, ends.astype(np.uint64), starts + distance[begins]])


def index_questions(plan: CutPlan, number: int) -> None:
    routes.gather(plan.directory, "questions", len(plan.parts), len(plan.parts))
    exchange.commit(plan.directory, "ask", number, {})


def answer_questions(plan: CutPlan, number: int) -> None:
    """Digests of the spans of a part that others asked for, with the ordinal of their document, and its id."""
    part, documents = plan.parts[number], _documents(plan, number)
    asked, askers = routes.receive(plan.directory, "questions", number, 2)
    unique, which = np.unique(asked, axis=0, return_inverse=True)
    starts = (unique[:, 0] & _TOKEN_MASK).astype(np.int64)
    row = documents.of(starts)
    digests = np.zeros((len(unique), 2), np.uint64)
    for found, pieces in _digests(plan, number, row, starts, starts + unique[:, 1].astype(np.int64)):
        digests[found] = pieces
    ordinals = documents.ordinals[row]
    sender = routes.Sender(plan.directory, "answers", number, 5)
    try:
        which = which.reshape(-1)
        sender.send(np.column_stack([asked, ordinals[which], digests[which]]), askers)
        sender.publish()
    except BaseException:
        sender.abandon()
        raise
    routes.answer_ids(plan.directory, number, ordinals[which], askers, read_ids(part), part.first_ordinal)
    exchange.commit(plan.directory, "answer", number, {})


def _digests(plan: CutPlan, number: int, row: np.ndarray, first: np.ndarray, last: np.ndarray):  # type: ignore[no-untyped-def]
    """Yield (indices, uint64[n, 2]) of the spans (document `row`, tokens first..last of the part), batch by batch."""
    documents, column = _documents(plan, number), plan.options.column
    order = np.argsort(row, kind="stable")
    involved = documents.ordinals[np.unique(row)]
    for ordinals, batch in shards.read(plan.parts[number], [column], cutting.BATCH_ROWS) if len(row) else ():
        rows, batch = _only(ordinals.to_numpy(), batch, involved)
        data, offsets = text_buffers(batch.column(column))
        for i, document in enumerate(np.searchsorted(documents.ordinals, rows).tolist()):
            own = order[slice(*np.searchsorted(row[order], [document, document + 1]))]
            places = _places(data, int(offsets[i]), int(offsets[i + 1]))
            base = documents.ends[document]
            yield own, _digest(data, int(offsets[i]), places, first[own] - base, last[own] - base)


def _places(data: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of each token of one text: (starts, ends), counted from the start of the text."""
    hashes, starts, ends = (np.empty(end - start, kind) for kind in (np.uint64, np.int64, np.int64))
    count = tokens_of(data, start, end, code_table(), hashes, starts, ends)
    return starts[:count], ends[:count]


def _digest(data: np.ndarray, begin: int, places: tuple[np.ndarray, np.ndarray], first: np.ndarray, last: np.ndarray) -> np.ndarray:
    digests = np.empty((len(first), 2), np.uint64)
    for i, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        plain = plain_tokens(data, begin, *places, low, high)
        digests[i] = np.frombuffer(hashlib.blake2b(plain, digest_size=16).digest(), np.uint64)
    return digests


def index_answers(plan: CutPlan, number: int) -> None:
    for kind in ("answers", "ids-told"):
        routes.gather(plan.directory, kind, len(plan.parts), len(plan.parts))
    exchange.commit(plan.directory, "told", number, {})


def cut_spans(plan: CutPlan, number: int) -> None:
    """Write the part without the spans whose digests agree."""
    documents = _documents(plan, number)
    spans = np.frombuffer(storage.read_bytes(exchange.data_path(plan.directory, "spans", number)), np.uint64).reshape(-1, 4)
    answers, _ = routes.receive(plan.directory, "answers", number, 5)
    answers = answers[np.lexsort([answers[:, 1], answers[:, 0]])]
    asked = np.column_stack([spans[:, 3], spans[:, 2] - spans[:, 1]])
    reply = answers[_find_rows(answers[:, :2], asked)]
    known, ids = routes.told_ids(plan.directory, number)
    order = np.argsort(known)
    unverified = 0

    def find(ordinals: np.ndarray, batch: pa.RecordBatch) -> Cuts:
        nonlocal unverified
        data, offsets = text_buffers(batch.column(plan.options.column))
        found: list[np.ndarray] = []
        kept: list[np.ndarray] = []
        for row, document in enumerate(np.searchsorted(documents.ordinals, ordinals).tolist()):
            inside = slice(*np.searchsorted(spans[:, 0], [np.uint64(document), np.uint64(document + 1)]))
            if inside.start == inside.stop:
                continue
            first, last = ((spans[inside, i].astype(np.int64) - documents.ends[document]) for i in (1, 2))
            places = _places(data, int(offsets[row]), int(offsets[row + 1]))
            digests = _digest(data, int(offsets[row]), places, first, last)
            agree = (digests == reply[inside, 3:]).all(axis=1)
            unverified += int((~agree).sum())
            starts, ends, sources = united(first[agree], last[agree], reply[inside, 2][agree])
            begins, stops = cut_bytes(places, starts, ends, int(offsets[row + 1] - offsets[row]))
            found.append(np.column_stack([np.full(len(starts), row), begins, stops]))
            kept.append(sources)
        rows, begins, stops = np.ascontiguousarray(np.concatenate([np.empty((0, 3), np.int64), *found]).T)
        return Cuts(rows, begins, stops, np.concatenate([np.empty(0, np.uint64), *kept]), None)

    cutting.cut_part(
        plan, number, find, (known[order], ids.take(pa.array(order))), plan.options.action == "mark",
        lambda: exchange.commit(plan.directory, "verified", number, {"unverified": unverified}),
    )  # fmt: skip


def _find_rows(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The row of each of `wanted` uint64[n, 2] in `table` (every one is there)."""
    _, codes = np.unique(np.concatenate([table, wanted]), axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    place = np.zeros(codes.max() + 1 if len(codes) else 0, np.int64)
    place[codes[: len(table)]] = np.arange(len(table))
    return place[codes[len(table) :]]


def united(first: np.ndarray, last: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The union of spans of one document, each with the source of the span that begins it (of several, the longest)."""
    order = np.lexsort([source, -last, first])
    first, last, source = first[order], last[order], source[order]
    new = np.append(True, first[1:] > np.maximum.accumulate(last)[:-1])[: len(first)]
    begins = np.flatnonzero(new)
    return first[begins], np.maximum.reduceat(last, begins) if len(begins) else last[:0], source[begins]


def cut_bytes(
    places: tuple[np.ndarray, np.ndarray], first: np.ndarray, last: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bytes that go with tokens first..last: also the white space after them, if there is some (or nothing) before them."""
    starts, ends = places
    begins, stops = starts[first], ends[last - 1]
    after = np.where(last < len(starts), starts[np.minimum(last, len(starts) - 1)], end)
    before = np.where(first > 0, ends[np.maximum(first - 1, 0)], 0)
    return begins, np.where((before < begins) | (first == 0), after, stops)
