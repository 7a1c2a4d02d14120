"""Text to measure on: real documents, enlarged to any size with edited and recombined variants of them.

`build(directory, megabytes)` writes Parquet parts of `id` and `text`. The first documents are the real ones as they are.
Each further round over them makes one new document for each: with probability 0.05 a copy, with probability 0.15 the
document with a share of its pieces (drawn from 0 to 25%) replaced, else a *recombination*: pieces drawn one by one from
all real documents of the language, as many as the document has. A piece is a line or sentence of real text, so words,
punctuation and lengths stay those of real text, while two recombinations have next to no shingle in common.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measure import ROOT

_PACK = ROOT.parent / "shared" / "data" / "corpus"
_SMALL = ROOT / "examples" / "data" / "documents.parquet"
_PIECE_BYTES = 160
_COPY, _EDITED, _RECOMBINED = 0, 1, 2


def real_texts(languages: Sequence[str] = ("en", "zh")) -> tuple[list[pa.Array], str]:
    """(real documents of each language as large_string, what they are): the data pack, else the examples."""
    if all((_PACK / f"{language}.parquet").exists() for language in languages):
        found = [
            _one_array(pq.read_table(_PACK / f"{language}.parquet", columns=["text"]).column("text")) for language in languages
        ]
        return found, f"data pack corpus/{{{','.join(languages)}}}.parquet, {_size(found)}"
    table = pq.read_table(_SMALL, columns=["text", "language"])
    found = [_one_array(table.filter(pc.starts_with(table["language"], language)).column("text")) for language in languages]
    return found, f"examples/data/documents.parquet ({', '.join(languages)}), {_size(found)}"


def _size(texts: list[pa.Array]) -> str:
    size = sum(int(pc.sum(pc.binary_length(each)).as_py()) for each in texts)
    return f"{sum(len(each) for each in texts)} documents, {size / 1e6:.0f} MB"


def _one_array(texts: pa.ChunkedArray) -> pa.Array:
    joined = texts.cast(pa.large_string()).combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined


def build(
    directory: Path, megabytes: float, *, part_megabytes: float = 32, languages: Sequence[str] = ("en", "zh"), seed: int = 17
) -> str:
    """Write part-NNNN.parquet into `directory` (made anew unless it has this very material); says what was written."""
    label = json.dumps({"megabytes": megabytes, "part": part_megabytes, "languages": list(languages), "seed": seed, "version": 1})
    stamp = directory / "material.json"
    if stamp.exists() and json.loads(stamp.read_text())["label"] == label:
        return str(json.loads(stamp.read_text())["description"])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    texts, source = real_texts(languages)
    documents = size = part = 0
    for table in _parts(texts, int(megabytes * 1e6), int(part_megabytes * 1e6), seed):
        pq.write_table(table, directory / f"part-{part:04d}.parquet", compression="zstd", row_group_size=2048)
        part, documents = part + 1, documents + table.num_rows
        size += int(pc.sum(pc.binary_length(table["text"])).as_py())
    description = f"{source}, enlarged to {documents} documents, {size / 1e6:.0f} MB of text in {part} parts"
    stamp.write_text(json.dumps({"label": label, "description": description, "documents": documents, "bytes": size}))
    return description


def documents_and_bytes(directory: Path) -> tuple[int, int]:
    known = json.loads((directory / "material.json").read_text())
    return int(known["documents"]), int(known["bytes"])


def as_jsonl(directory: Path, target: Path) -> Path:
    """The same documents as one JSONL file, for tools that read no Parquet."""
    if not target.exists():
        with open(target, "w", encoding="utf-8") as stream:
            for path in sorted(directory.glob("part-*.parquet")):
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in pq.read_table(path).to_pylist())
    return target


def _parts(texts: list[pa.Array], total: int, part: int, seed: int) -> Iterator[pa.Table]:
    generator = np.random.default_rng(seed)
    pools = [_Pool(each) for each in texts]
    number = written = 0
    round_ = 0
    while written < total:
        for pool in pools:
            for batch in pool.round(round_, generator, part):
                size = int(pc.sum(pc.binary_length(batch)).as_py())
                if written + size > total:
                    ends = np.cumsum(pc.binary_length(batch).to_numpy())
                    batch = batch.slice(0, int(np.searchsorted(ends, total - written, side="right")))
                    size = total - written
                ids = pa.array(np.char.mod("d%09d", np.arange(number, number + len(batch))))
                if len(batch):
                    yield pa.table({"id": ids, "text": batch})
                number, written = number + len(batch), written + size
                if written >= total:
                    return
        round_ += 1


class _Pool:
    """The real documents of a language cut into pieces, and variants made of them."""

    def __init__(self, texts: pa.Array) -> None:
        self.texts = texts
        _, offsets, data = texts.buffers()
        self.data = np.frombuffer(data, np.uint8)
        self.offsets = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        self.starts, self.of_document = _cut(self.data, self.offsets)

    def round(self, number: int, generator: np.random.Generator, part_bytes: int) -> Iterator[pa.Array]:
        """One document for each real one, in batches of about `part_bytes`; round 0 is the real ones."""
        sizes = np.diff(self.offsets)
        batches = np.cumsum(sizes) // part_bytes
        for batch in np.unique(batches):
            rows = np.flatnonzero(batches == batch)
            if number == 0:
                yield self.texts.slice(int(rows[0]), len(rows))
            else:
                yield self._variants(rows, generator)

    def _variants(self, rows: np.ndarray, generator: np.random.Generator) -> pa.Array:
        kinds = generator.choice(3, len(rows), p=[0.05, 0.15, 0.8])
        share = np.select([kinds == _COPY, kinds == _EDITED], [np.zeros(len(rows)), generator.random(len(rows)) * 0.25], 1.0)
        first, last = self.of_document[rows], self.of_document[rows + 1]
        owner = np.repeat(np.arange(len(rows)), last - first)
        inside = np.arange(len(owner)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
        chosen = first[owner] + inside
        replaced = generator.random(len(owner)) < share[owner]
        chosen[replaced] = generator.integers(0, len(self.starts) - 1, int(replaced.sum()))
        data, offsets = _gather(self.data, self.starts, chosen, owner, len(rows))
        return pa.LargeStringArray.from_buffers(len(rows), pa.py_buffer(offsets), pa.py_buffer(data))


@nb.njit(cache=True)
def _cut(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start of every piece and the end of the last, first piece of every document): after a new line, a full stop and a
    space or a Chinese full stop, or a space from twice `_PIECE_BYTES` on."""
    starts = np.empty(offsets[-1] - offsets[0] + 2, np.int64)
    of_document = np.empty(len(offsets), np.int64)
    count = 0
    for row in range(len(offsets) - 1):
        of_document[row] = count
        begin = offsets[row]
        if begin == offsets[row + 1]:
            continue
        starts[count] = begin
        count += 1
        for at in range(begin, offsets[row + 1]):
            size, byte = at + 1 - begin, data[at]
            ends = size >= _PIECE_BYTES // 8 and byte == 10
            if size >= _PIECE_BYTES // 2:
                ends |= byte == 32 and data[at - 1] == 46
                ends |= byte == 0x82 and data[at - 1] == 0x80 and data[at - 2] == 0xE3
            ends |= size >= 2 * _PIECE_BYTES and byte == 32
            if ends and at + 1 < offsets[row + 1]:
                begin = at + 1
                starts[count] = begin
                count += 1
    of_document[-1] = count
    starts[count] = offsets[-1]
    return starts[: count + 1].copy(), of_document


@nb.njit(cache=True)
def _gather(
    data: np.ndarray, starts: np.ndarray, chosen: np.ndarray, owner: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(rows + 1, np.int64)
    for i in range(len(chosen)):
        offsets[owner[i] + 1] += starts[chosen[i] + 1] - starts[chosen[i]]
    for row in range(rows):
        offsets[row + 1] += offsets[row]
    out = np.empty(offsets[-1], np.uint8)
    at = 0
    for i in range(len(chosen)):
        for j in range(starts[chosen[i]], starts[chosen[i] + 1]):
            out[at] = data[j]
            at += 1
    return out, offsets
