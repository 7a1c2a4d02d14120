"""A sample of a corpus up to a number of bytes, drawn by the hash of each document's id.

The documents of smallest hash are taken until the bytes are used up: which ones depends on ids, texts and seed alone,
not on files, order or workers. Two passes over the parts: a histogram of bytes by hash gives the limit, then the
documents below it are copied out. The bins are logarithmic (256 an octave), so the sample misses its size by about
1/256 whether it is half of the corpus or a millionth, at 16,640 numbers a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.ledger import Ledger
from operators.shards import Part, UnitWriter
from operators.stage import StageContext
from operators.tasks import run_tasks
from operators.tokens.hashing import hash_strings

BINS = 65 * 256
_SALT = 0x73_61_6D_70_6C_65_00_00  # "sample"
_GROUP_ROWS = 20_000
_BATCH_ROWS = 1024

SAMPLE = pa.schema([pa.field("text", pa.large_string()), pa.field("lang", pa.string()), pa.field("bin", pa.int32())])
_HISTOGRAM = pa.schema([pa.field("bin", pa.int32()), pa.field("documents", pa.int64()), pa.field("bytes", pa.int64())])


@dataclass(frozen=True)
class Sample:
    """What was drawn: Parquet files of schema SAMPLE, and the counts. `limit` is the first bin left out."""

    paths: list[str]
    limit: int
    documents: int
    bytes: int
    corpus_documents: int
    corpus_bytes: int  # each document counted up to the cap
    histogram: np.ndarray  # int64[BINS] bytes


def hash_bins(ids: pa.Array, seed: int) -> np.ndarray:
    """int32[rows] in [0, BINS): exponent and 8 bits of mantissa of the id's hash, so that order is kept."""
    bits = hash_strings(ids, seed ^ _SALT).astype(np.float64).view(np.uint64) >> np.uint64(44)
    return np.clip(bits.astype(np.int64) - (1023 << 8), 0, BINS - 1).astype(np.int32)


def limit_for(histogram: np.ndarray, wanted_bytes: int) -> int:
    """The first bin left out so that the bins below hold at most `wanted_bytes`, but at least one document."""
    limit = int(np.searchsorted(np.cumsum(histogram), wanted_bytes, side="right"))
    occupied = np.flatnonzero(histogram)
    return max(limit, int(occupied[0]) + 1) if len(occupied) else limit


def draw(context: StageContext, parts: Sequence[Part], wanted_bytes: int, document_characters: int) -> Sample:
    """Draw the sample into `.scratch` of the stage's directory, part groups as Ray tasks; a crash repeats only open groups."""
    scan, copy = (storage.join(context.directory, ".scratch", name) for name in ("scan", "sample"))
    spans = _groups([part.kept_rows for part in parts], _GROUP_ROWS)
    total = 2 * len(spans)

    def run(function: Any, directory: str, jobs: list[tuple[Any, ...]], done: int) -> dict[int, dict[str, Any]]:
        committed = shards.committed_units(directory)
        for record in [job for job in jobs if job[1] in committed]:
            jobs.remove(record)
        context.progress(done := done + len(committed), total, "units")
        for _, record in run_tasks(context, function, jobs):
            committed[record["unit"]] = record
            context.progress(done := done + 1, total, "units")
        return committed

    scans = run(
        _scan,
        scan,
        [(scan, unit, list(parts[first:last]), context.seed, document_characters) for unit, (first, last) in enumerate(spans)],
        0,
    )
    histogram, corpus_documents = np.zeros(BINS, np.int64), 0
    documents_by_bin = np.zeros(BINS, np.int64)
    lowest = {}
    for unit, record in scans.items():
        for part in record["parts"]:
            with storage.open_input(storage.join(scan, part["name"])) as stream:
                table = pq.read_table(stream)
            bins = table["bin"].to_numpy()
            histogram[bins] += table["bytes"].to_numpy()
            documents_by_bin[bins] += table["documents"].to_numpy()
            lowest[unit] = int(bins.min())
            corpus_documents += int(table["documents"].to_numpy().sum())
    limit = limit_for(histogram, wanted_bytes)
    jobs = [
        (copy, unit, list(parts[first:last]), context.seed, document_characters, limit)
        for unit, (first, last) in enumerate(spans)
        if lowest.get(unit, BINS) < limit
    ]
    copies = run(_copy, copy, jobs, len(spans) + (len(spans) - len(jobs)))
    paths = [storage.join(copy, part["name"]) for unit in sorted(copies) for part in copies[unit]["parts"]]
    return Sample(
        paths, limit, int(documents_by_bin[:limit].sum()), int(histogram[:limit].sum()),
        corpus_documents, int(histogram.sum()), histogram,
    )  # fmt: skip


def _rows(part: Part, seed: int, document_characters: int) -> Iterator[tuple[np.ndarray, pa.Array, pa.Array]]:
    """(bins, capped texts, languages) batch by batch."""
    with storage.open_input(part.path) as stream:
        has_lang = "lang" in pq.read_schema(stream).names
    for _, batch in shards.read(part, ["id", "text", "lang"] if has_lang else ["id", "text"], _BATCH_ROWS):
        text = pc.fill_null(batch["text"].cast(pa.large_string()), "")
        if len(text) and pc.max(pc.binary_length(text)).as_py() > document_characters:
            text = pc.utf8_slice_codeunits(text, 0, document_characters)
        lang = pc.fill_null(batch["lang"].cast(pa.string()), "") if has_lang else pa.array([""] * len(text), pa.string())
        yield hash_bins(batch["id"], seed), text, lang


def _scan(directory: str, unit: int, parts: list[Part], seed: int, document_characters: int) -> dict[str, Any]:
    documents, size = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for part in parts:
        for bins, text, _ in _rows(part, seed, document_characters):
            np.add.at(documents, bins, 1)
            np.add.at(size, bins, pc.binary_length(text).to_numpy())
    used = np.flatnonzero(documents)
    writer = UnitWriter(directory, unit)
    writer.write(pa.table([used.astype(np.int32), documents[used], size[used]], schema=_HISTOGRAM))
    return writer.commit(Ledger(created=len(used), kept=len(used)))


def _copy(directory: str, unit: int, parts: list[Part], seed: int, document_characters: int, limit: int) -> dict[str, Any]:
    writer, rows = UnitWriter(directory, unit), 0
    for part in parts:
        for bins, text, lang in _rows(part, seed, document_characters):
            chosen = bins < limit
            if chosen.any():
                mask = pa.array(chosen)
                writer.write(pa.table([text.filter(mask), lang.filter(mask), bins[chosen]], schema=SAMPLE))
                rows += int(chosen.sum())
    return writer.commit(Ledger(rows_in=rows, kept=rows))


def _groups(rows: Sequence[int], least_rows: int, most_groups: int = 4096) -> list[tuple[int, int]]:
    """Cut a list of parts into runs [first, last) of at least `least_rows` rows, and at most about `most_groups` of them."""
    target = max(least_rows, -(-sum(rows) // most_groups), 1)
    found, first, total = [], 0, 0
    for index, count in enumerate(rows):
        total += count
        if total >= target:
            found.append((first, index + 1))
            first, total = index + 1, 0
    if first < len(rows):
        found.append((first, len(rows)))
    return found
