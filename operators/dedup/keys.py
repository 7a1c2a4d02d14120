"""From a batch of documents to the fixed-width keys that are exchanged instead of text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.dedup.bands import band_hashes, sketch
from operators.dedup.definitions import by_unit, plain_table
from operators.dedup.exact import content_hashes
from operators.dedup.options import DedupOptions, ShingleOptions
from operators.dedup.reference import sign_with_datasketch
from operators.dedup.signatures import Signatures, shingle_sets, sign
from operators.dedup.url import normalise_urls

EMPTY = np.uint32(0xFFFFFFFF)  # every value of the signature of a document without shingles

KINDS = {"exact": 3, "bands": 2, "ids": 2}
"""Kinds of key records and the uint64 values of each: content hash (2) + ordinal; band hash + ordinal; id hash + ordinal."""


@dataclass(frozen=True)
class Keys:
    """Keys of n documents. `records` maps a kind to uint64[records, width]; the last value is the document's ordinal.

    `sketch` uint8[n, permutations] (zeros for unsigned documents) and `scores` (see there) are None where not asked for.
    """

    records: dict[str, np.ndarray]
    signed: int
    sketch: np.ndarray | None
    scores: np.ndarray | None


def document_keys(batch: pa.RecordBatch | pa.Table, ordinals: np.ndarray, options: DedupOptions, with_ids: bool) -> Keys:
    """The keys of a batch with the columns of `options.columns()`, and `id` if `with_ids`."""
    texts = batch.column(options.column)
    records: dict[str, np.ndarray] = {}
    estimate: np.ndarray | None = None
    signed = 0
    if options.finds_exact:
        records["exact"] = _exact_keys(batch, texts, ordinals, options)
    if options.finds_near:
        signatures = document_signatures(batch, options)
        signed = int(signatures.signed.sum())
        bands, rows = options.shape
        hashes = band_hashes(signatures.values[signatures.signed], bands, rows)
        records["bands"] = np.column_stack([hashes.ravel(), np.repeat(ordinals[signatures.signed], bands)])
        if options.similarity:
            estimate = sketch(signatures.values)
            estimate[~signatures.signed] = 0
    if with_ids:
        records["ids"] = np.column_stack([content_hashes(batch.column("id"))[:, 0], ordinals])
    return Keys(records, signed, estimate, scores(batch, options))


def _exact_keys(
    batch: pa.RecordBatch | pa.Table, texts: pa.Array | pa.ChunkedArray, ordinals: np.ndarray, options: DedupOptions
) -> np.ndarray:
    """uint64[keys, 3] of (content hash, content hash, ordinal); rows without a URL or value have no key."""
    if options.exact_on in ("url", "value"):
        texts = normalise_urls(texts) if options.exact_on == "url" else texts.cast(pa.large_string())
        there = pc.is_valid(texts)
        texts, ordinals = texts.filter(there), ordinals[there.to_numpy(zero_copy_only=False)]
    langs, keep_digits = _langs(batch, options), options.digits == "keep"
    hashes = content_hashes(texts, options.exact_on == "normalised", options.unit, langs, keep_digits)
    return np.column_stack([hashes, ordinals])


def scores(batch: pa.RecordBatch | pa.Table, options: DedupOptions) -> np.ndarray | None:
    """What decides who stays, column by column, the highest first: float64[rows, options.score_columns], None without any.

    First the precedence of the row's source, then what the keep rule compares: characters for `longest`, the column for `best`.
    """
    columns = []
    if options.priority:
        place = pc.index_in(batch.column(options.priority_column).cast(pa.string()), pa.array(options.priority, pa.string()))
        columns.append(-pc.fill_null(place, len(options.priority)).to_numpy(zero_copy_only=False).astype(float))
    if options.keep == "longest":
        columns.append(pc.fill_null(pc.utf8_length(batch.column(options.column)), 0).to_numpy(zero_copy_only=False).astype(float))
    elif options.keep == "best":
        values = pc.fill_null(batch.column(options.keep_column).cast(pa.float64()), -np.inf).to_numpy(zero_copy_only=False)
        columns.append(np.round(np.where(np.isnan(values), -np.inf, values), 6))
    return np.column_stack(columns) if columns else None


def document_shingles(batch: pa.RecordBatch | pa.Table, options: ShingleOptions) -> tuple[np.ndarray, np.ndarray]:
    """Sorted shingle sets of a batch: (hashes uint64, offsets int64[rows + 1])."""
    texts, langs, sizes, keep = batch.column(options.column), _langs(batch, options), _sizes(options), options.digits == "keep"
    if options.normalisation == "folded":
        return shingle_sets(texts, *sizes, options.unit, langs, keep)
    counts, found = np.zeros(len(texts), np.int64), []
    for unit, rows, some in by_unit(texts, langs, options.unit):
        hashes, offsets = shingle_sets(some, *sizes, unit, None, keep, plain_table(unit))
        counts[rows] = np.diff(offsets)
        found.append((rows, hashes, offsets))
    ends = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    joined = np.empty(int(ends[-1]), np.uint64)
    for rows, hashes, offsets in found:
        joined[np.repeat(ends[rows] - offsets[:-1], np.diff(offsets)) + np.arange(len(hashes))] = hashes
    return joined, ends


def partition_of(records: np.ndarray, partitions: int) -> np.ndarray:
    """int64[records]: the piece of the key space that each record's first hash falls into."""
    return ((records[:, 0] >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)


def split(records: np.ndarray, partitions: int) -> tuple[np.ndarray, np.ndarray]:
    """The records in order of partition (stable), and where each partition starts: int64[partitions + 1]."""
    if partitions == 1:
        return records, np.array([0, len(records)], np.int64)
    piece = partition_of(records, partitions)
    starts = np.zeros(partitions + 1, np.int64)
    np.cumsum(np.bincount(piece, minlength=partitions), out=starts[1:])
    return records[np.argsort(piece, kind="stable")], starts


def _langs(batch: pa.RecordBatch | pa.Table, options: ShingleOptions) -> pa.Array | pa.ChunkedArray | None:
    return batch.column(options.language_column) if options.language_column else None


def document_signatures(batch: pa.RecordBatch | pa.Table, options: DedupOptions) -> Signatures:
    """The signatures of a batch, by the back end and the shingle definition of the options."""
    make = sign if options.backend == "kernel" else sign_with_datasketch
    texts, langs, keep = batch.column(options.column), _langs(batch, options), options.digits == "keep"
    shape = (options.permutations, options.seed, *_sizes(options))
    if options.normalisation == "folded":
        return make(texts, *shape, options.unit, langs, keep, options.signature)
    found = Signatures(np.full((len(texts), options.permutations), EMPTY, np.uint32), np.zeros(len(texts), np.bool_))
    for unit, rows, some in by_unit(texts, langs, options.unit):
        piece = make(some, *shape, unit, None, keep, options.signature, plain_table(unit))
        found.values[rows], found.signed[rows] = piece.values, piece.signed
    return found


def _sizes(options: ShingleOptions) -> tuple[int, int]:
    return options.words, options.characters
