"""Documents to packed sequences of token ids, on Ray tasks, in the same order whatever the files, units and workers.

The kept rows of all inputs, in their order, are cut into windows of a fixed number of documents. A task encodes and
packs the windows of one unit and commits them; when all are there, the numbers of sequences are known and a second,
cheap pass numbers them and writes the parts; then the flat twin is streamed from the parts. Text is read by the tasks
and goes nowhere else. Nothing depends on how windows are spread over units except which file a row lies in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from cluster import storage
from cluster.placement import placement
from operators import shards, tables
from operators.ledger import Equation, Ledger, merge_stats
from operators.shards import UnitWriter
from operators.stage import StageContext
from operators.tasks import run_tasks
from operators.tokens import twin
from operators.tokens.encode import Encoder, TokenizerFiles, single_threaded
from operators.tokens.holdout import is_held_out
from operators.tokens.layout import Layout, Method, place
from operators.tokens.window import Span, read_span, spans

_MOST_WINDOW_TOKENS = 1 << 24  # a window of huge documents is packed early: 64 MiB of ids
_TABLE_TOKENS = 1 << 20  # of the sequences that are built at a time
_UNNUMBERED = pa.schema([field for field in tables.TOKENS if field.name != "sequence"])


@dataclass(frozen=True)
class PackSettings:
    """What decides the content of packed sequences, besides documents and tokenizer."""

    length: int
    eos_token_id: int
    padding_token_id: int
    holdout: float = 0.0
    seed: int = 0
    method: Method = "best_fit"
    window_documents: int = 4096
    max_document_tokens: int | None = None


@dataclass
class Documents:
    """Encoded documents, the end-of-text token included: Arrow string arrays, and the tokens one after the other."""

    ids: pa.Array
    sources: pa.Array
    langs: pa.Array
    tokens: np.ndarray  # uint32
    offsets: np.ndarray  # int64[documents + 1]


def pack_documents(documents: Documents, settings: PackSettings) -> tuple[Iterator[pa.Table], dict[str, Any]]:
    """Pack one window: (tables of schema tables.TOKENS without `sequence`, about 2**20 tokens each; statistics)."""
    lengths = np.diff(documents.offsets)
    used = lengths if settings.max_document_tokens is None else np.minimum(lengths, settings.max_document_tokens)
    layout = place(used, settings.length, settings.method)
    stats = {
        "tokens_in": int(lengths.sum()),
        "tokens_cut": int((lengths - used).sum()),
        "documents_cut": int((lengths > used).sum()),
        "documents_split": int((np.bincount(layout.document, minlength=len(lengths)) > 1).sum()),
        "sequences": layout.sequences,
        "languages": _totals(documents.langs, used),
        "sources": _totals(documents.sources, used),
    }
    return _tables(documents, layout, settings), stats


def _totals(keys: pa.Array, tokens: np.ndarray) -> dict[str, int]:
    found = pa.table({"key": keys, "tokens": tokens}).group_by("key").aggregate([("tokens", "sum")])
    return {key: int(count) for key, count in sorted(zip(found["key"].to_pylist(), found["tokens_sum"].to_pylist(), strict=True))}


def _tables(documents: Documents, layout: Layout, settings: PackSettings) -> Iterator[pa.Table]:
    step = max(1, _TABLE_TOKENS // settings.length)
    for first in range(0, layout.sequences, step):
        start = layout.start[first : min(first + step, layout.sequences) + 1]
        pieces = slice(start[0], start[-1])
        document = layout.document[pieces]
        start = start - start[0]
        flat, boundaries, ends = _fill(
            documents.tokens, documents.offsets[document] + layout.offset[pieces], layout.tokens[pieces], start,
            settings.length, np.uint32(settings.padding_token_id),
        )  # fmt: skip
        sequences = len(start) - 1
        spans_of_loss = np.zeros((sequences, 2), np.int32)
        spans_of_loss[:, 1] = ends
        rows = pa.array(document)
        columns = [
            _lists(np.arange(sequences + 1) * settings.length, pa.array(flat)),
            _lists(start + np.arange(sequences + 1), pa.array(boundaries)),
            _lists(start, documents.ids.take(rows)),
            _lists(start, pa.array(layout.offset[pieces])),
            _lists(start, documents.sources.take(rows)),
            _lists(start, documents.langs.take(rows)),
            _lists(np.arange(sequences + 1) * 2, pa.array(spans_of_loss.reshape(-1))),
        ]
        yield pa.table(columns, schema=_UNNUMBERED)


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


@numba.njit(cache=True, nogil=True)
def _fill(
    tokens: np.ndarray, begin: np.ndarray, counts: np.ndarray, start: np.ndarray, length: int, padding: np.uint32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(uint32[sequences * length] ids, int32 cu_seqlens one after the other, int32[sequences] tokens in each)."""
    sequences = len(start) - 1
    flat = np.full(sequences * length, padding, np.uint32)
    boundaries = np.zeros(len(begin) + sequences, np.int32)
    ends = np.zeros(sequences, np.int32)
    for sequence in range(sequences):
        position = 0
        for piece in range(start[sequence], start[sequence + 1]):
            target = sequence * length + position
            flat[target : target + counts[piece]] = tokens[begin[piece] : begin[piece] + counts[piece]]
            position += counts[piece]
            boundaries[piece + sequence + 1] = position
        ends[sequence] = position
    return flat, boundaries, ends


class _Window:
    """The documents of one window as they come in."""

    def __init__(self, encoder: Encoder, settings: PackSettings) -> None:
        self._encoder, self._settings = encoder, settings
        self._batches: list[pa.RecordBatch] = []
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self.token_count = 0

    def add(self, batch: pa.RecordBatch) -> None:
        tokens, offsets = self._encoder.encode(batch["text"])
        lengths = np.diff(offsets)
        closed = np.full(len(tokens) + len(lengths), self._settings.eos_token_id, np.uint32)
        closed[np.arange(len(tokens)) + np.repeat(np.arange(len(lengths)), lengths)] = tokens
        self._batches.append(batch.select(["id", "source", "lang"]))
        self._tokens.append(closed)
        self._lengths.append(lengths + 1)
        self.token_count += len(closed)

    def take(self, most_tokens: int | None = None) -> Documents | None:
        """What came in since the last call, None when nothing did. With `most_tokens`: up to and with the document that
        reaches them; the others stay."""
        if not self._batches:
            return None
        rows = pa.Table.from_batches(self._batches).combine_chunks()
        lengths, tokens = np.concatenate(self._lengths), np.concatenate(self._tokens)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        last = len(lengths)
        if most_tokens is not None:
            last = min(last, int(np.searchsorted(offsets, most_tokens)))
        self._batches = rows.slice(last).to_batches()
        self._lengths, self._tokens = [lengths[last:]], [tokens[offsets[last] :]]
        self.token_count = len(self._tokens[0])
        ids, sources, langs = (rows[name].slice(0, last).combine_chunks() for name in ("id", "source", "lang"))
        return Documents(ids, sources, langs, tokens[: offsets[last]], offsets[: last + 1])


def pack_span(span: Span, encoder: Encoder, settings: PackSettings, writer: UnitWriter) -> tuple[Ledger, dict[str, Any]]:
    """Encode and pack the windows of one span into the writer (rows without `sequence`); returns its ledger and statistics.

    The ledger counts sequences, which are created; documents balance in an equation of their own. Documents set aside
    (empty ones, those held out) are written as rejects without their text.
    """
    window = _Window(encoder, settings)
    stats: dict[str, Any] = {"documents": 0, "packed": 0, "set_aside": {"held_out": 0, "empty": 0}, "sequences": 0}
    stats |= {"tokens_in": 0, "tokens": 0, "tokens_cut": 0, "padding_tokens": 0, "documents_cut": 0, "documents_split": 0}
    stats |= {"languages": {}, "sources": {}}

    def flush(most_tokens: int | None = None) -> None:
        documents = window.take(most_tokens)
        if documents is None:
            return
        packed, counts = pack_documents(documents, settings)
        for table in packed:
            writer.write(table)
            real = int(pc.sum(table["loss_spans"].combine_chunks().flatten()).as_py())
            stats["tokens"] += real
            stats["padding_tokens"] += len(table["tokens"].combine_chunks().flatten()) - real
        merge_stats(stats, counts)

    seen = 0
    for batch in read_span(span, ["id", "text", "source"], optional=["lang"]):
        batch = _plain(batch)
        while batch.num_rows:
            head = batch.slice(0, settings.window_documents - seen % settings.window_documents)
            batch = batch.slice(head.num_rows)
            seen += head.num_rows
            kept = _set_aside(head, settings, writer, stats)
            for row in _by_size(kept):
                window.add(row)
                stats["packed"] += row.num_rows
                while window.token_count >= _MOST_WINDOW_TOKENS:
                    flush(_MOST_WINDOW_TOKENS)
            if seen % settings.window_documents == 0:
                flush()
    flush()
    stats["documents"] = seen
    return Ledger(created=stats["sequences"], kept=stats["sequences"]), stats


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The columns in the types of tables.TOKENS' lists, no nulls."""
    columns = [
        batch["id"].cast(pa.string()),
        pc.fill_null(batch["text"].cast(pa.large_string()), ""),
        pc.fill_null(batch["source"].cast(pa.string()), ""),
        pc.fill_null(batch["lang"].cast(pa.string()), ""),
    ]
    return pa.RecordBatch.from_arrays(columns, ["id", "text", "source", "lang"])


def _set_aside(batch: pa.RecordBatch, settings: PackSettings, writer: UnitWriter, stats: dict[str, Any]) -> pa.RecordBatch:
    """The documents to pack; the others go to the rejects, without their text, which their own stage still holds."""
    empty = pc.equal(pc.binary_length(batch["text"]), 0)
    held_out = pa.array(is_held_out(batch["id"], settings.seed, settings.holdout))
    reason = pc.if_else(empty, "empty", pc.if_else(held_out, "held_out", pa.scalar(None, pa.string())))
    aside = pc.is_valid(reason)
    count = pc.sum(aside).as_py() or 0
    if not count:
        return batch
    rows, reasons = batch.filter(aside), reason.filter(aside)
    for name in ("empty", "held_out"):
        stats["set_aside"][name] += pc.sum(pc.equal(reasons, name)).as_py()
    constant = pa.array(["pack"] * count, pa.string())
    columns = [
        rows["id"], pa.nulls(count, pa.large_string()), rows["source"], constant, reasons,
        pa.nulls(count, pa.float64()), pa.nulls(count, pa.string()), pa.array(np.zeros(count, bool)),
    ]  # fmt: skip
    writer.reject(pa.table(columns, schema=tables.REJECTS))
    return batch.filter(pc.invert(aside))


def _by_size(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Runs of rows, each closed by the row that brings it to 4 MiB of text: the grain at which a window notices its size."""
    sizes = np.cumsum(pc.binary_length(batch["text"]).to_numpy(zero_copy_only=False), dtype=np.int64)
    first = 0
    while first < batch.num_rows:
        done = int(sizes[first - 1]) if first else 0
        last = min(int(np.searchsorted(sizes, done + (4 << 20))) + 1, batch.num_rows)
        yield batch.slice(first, last - first)
        first = last


@lru_cache(maxsize=1)
def _encoder(model: bytes) -> Encoder:
    """Compiled once a worker process, and with it go the words that earlier units have met."""
    return Encoder(model)


def _pack_unit(directory: str, unit: int, span: Span, model: bytes, settings: PackSettings) -> dict[str, Any]:
    single_threaded()
    writer = UnitWriter(directory, unit)
    ledger, stats = pack_span(span, _encoder(model), settings, writer)
    return writer.commit(ledger, stats)


def _number_unit(source: str, directory: str, record: dict[str, Any], first_sequence: int) -> dict[str, Any]:
    writer = UnitWriter(directory, record["unit"])
    for kind, write in (("parts", writer.write), ("rejects", writer.reject)):
        for part in record[kind]:
            with storage.open_input(storage.join(source, part["name"])) as stream:
                file = pq.ParquetFile(stream)
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    if kind == "parts":
                        numbers = np.arange(first_sequence, first_sequence + table.num_rows, dtype=np.int64)
                        first_sequence += table.num_rows
                        table = table.add_column(0, tables.TOKENS.field("sequence"), pa.array(numbers)).cast(tables.TOKENS)
                    write(table)
    return writer.commit(Ledger.from_json(record["ledger"]), record["stats"])


@ray.remote(num_cpus=1)
def _write_twin(directory: str, parts: list[str], **index: int) -> int:
    return twin.write_twin(directory, parts, **index)


def pack_stage(
    context: StageContext,
    directories: Sequence[str],
    tokenizer: TokenizerFiles,
    *,
    length: int,
    holdout: float = 0.0,
    method: Method = "best_fit",
    window_documents: int = 4096,
    max_document_tokens: int | None = None,
    unit_windows: int | None = None,
) -> None:
    """Pack the kept rows of finished stages and finish the stage: TOKENS parts, the flat twin and a copy of the tokenizer.

    Raises ValueError when the tokenizer names no `eos_token` or no document is left to pack.
    """
    eos = tokenizer.token_id("eos_token")
    if eos is None:
        raise ValueError(f"stage {context.stage}: tokenizer_config.json must name an `eos_token`, which ends each document")
    padding = tokenizer.token_id("pad_token")
    settings = PackSettings(
        length, eos, eos if padding is None else padding, holdout, context.seed, method, window_documents, max_document_tokens
    )
    units = spans(shards.parts(directories), window_documents, unit_windows)
    total = 2 * len(units) + 1
    directory, scratch = context.directory, storage.join(context.directory, ".scratch", "windows")

    done = shards.committed_units(directory)
    if len(done) < len(units):
        model = ray.put(tokenizer.model)
        packed = shards.committed_units(scratch)
        jobs = [(scratch, unit, span, model, settings) for unit, span in enumerate(units) if unit not in packed]
        for _, record in run_tasks(context, _pack_unit, jobs):
            packed[record["unit"]] = record
            context.progress(len(packed), total, "units")
        first_sequence, numbering = 0, []
        for unit in range(len(units)):
            if unit not in done:
                numbering.append((scratch, directory, packed[unit], first_sequence))
            first_sequence += packed[unit]["stats"]["sequences"]
        for _, record in run_tasks(context, _number_unit, numbering):
            done[record["unit"]] = record
            context.progress(len(units) + len(done), total, "units")

    stats: dict[str, Any] = {}
    for record in done.values():
        merge_stats(stats, record["stats"])
    if not stats.get("sequences"):
        raise ValueError(f"stage {context.stage}: no document of {sorted(context.inputs)} is left to pack: {stats}")
    context.check_cancelled()
    paths = [storage.join(directory, part["name"]) for unit in sorted(done) for part in done[unit]["parts"]]
    index = {
        "length": length,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": eos,
        "padding_token_id": settings.padding_token_id,
    }
    flat_sequences = ray.get(_write_twin.options(resources=placement("cpu")).remote(directory, paths, **index))
    storage.write_bytes(storage.join(directory, "tokenizer.json"), tokenizer.model)
    config = json.dumps(tokenizer.settings, indent=1, ensure_ascii=False, sort_keys=True).encode()
    storage.write_bytes(storage.join(directory, "tokenizer_config.json"), config)
    context.progress(total, total, "units")
    context.finish(
        equations=_equations(shards.parts(directories), stats, length, flat_sequences),
        files={
            "tokens": twin.TOKENS,
            "index": twin.INDEX,
            "boundaries": twin.BOUNDARIES,
            "boundary_offsets": twin.BOUNDARY_OFFSETS,
            "tokenizer": "tokenizer.json",
            "tokenizer_config": "tokenizer_config.json",
        },
    )


def _equations(parts: Sequence[shards.Part], stats: dict[str, Any], length: int, flat_sequences: int) -> list[Equation]:
    return [
        Equation(
            "documents in = documents packed + documents set aside",
            {"documents": sum(part.kept_rows for part in parts)},
            {"packed": stats["packed"], **stats["set_aside"]},
        ),
        Equation(
            "tokens in = tokens packed + tokens cut",
            {"tokens": stats["tokens_in"]},
            {"packed": stats["tokens"], "cut": stats["tokens_cut"]},
        ),
        Equation(
            "sequences x length = tokens packed + padding",
            {"sequences x length": stats["sequences"] * length},
            {"packed": stats["tokens"], "padding": stats["padding_tokens"]},
        ),
        Equation("sequences = sequences of the flat twin", {"parquet": stats["sequences"]}, {"flat": flat_sequences}),
    ]
