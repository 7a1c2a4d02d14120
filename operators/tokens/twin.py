"""The flat twin of packed Parquet shards: files that training maps into memory and indexes by sequence.

tokens.bin            uint16 (uint32 from 65,536 tokens of vocabulary on), little endian, [sequences, length]
boundaries.bin        int32, little endian: the cu_seqlens of all sequences one after the other
boundary_offsets.bin  int64, little endian, [sequences + 1]: where each sequence's cu_seqlens begin, in elements
tokens.json           the index: dtype, length, sequences, vocab_size, eos_token_id, padding_token_id, file names and
                      the SHA-256 of the files, to which copies on a training node are held
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import disk, storage

TOKENS, INDEX, BOUNDARIES, BOUNDARY_OFFSETS = "tokens.bin", "tokens.json", "boundaries.bin", "boundary_offsets.bin"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


def write_twin(
    directory: str, parts: Sequence[str], *, length: int, vocab_size: int, eos_token_id: int, padding_token_id: int
) -> int:
    """Stream the packed parts (paths in order) into the flat files and write the index last; returns the sequences.

    Memory is bounded by a row group. Works on any storage, as each file is one stream from its start to its end.
    Raises ValueError when a sequence has another length.
    """
    dtype = token_dtype(vocab_size)
    sequences, elements = 0, 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(_stream(directory, name)) for name in (TOKENS, BOUNDARIES, BOUNDARY_OFFSETS)}
        tokens, boundaries, offsets = files.values()
        offsets.write(np.zeros(1, "<i8").tobytes())
        for path in parts:
            for table in _row_groups(path, ["tokens", "cu_seqlens"]):
                for column in table["tokens"].chunks:
                    flat = column.flatten().to_numpy()
                    if len(flat) != len(column) * length:
                        raise ValueError(f"{path} holds sequences of another length than {length}")
                    tokens.write(memoryview(flat.astype(dtype)).cast("B"))
                for column in table["cu_seqlens"].chunks:
                    boundaries.write(memoryview(column.flatten().to_numpy().astype("<i4")).cast("B"))
                    counts = column.value_lengths().to_numpy()
                    offsets.write((elements + np.cumsum(counts, dtype="<i8")).astype("<i8").tobytes())
                    elements += int(counts.sum())
                sequences += table.num_rows
    index = {
        "dtype": dtype.name,
        "length": length,
        "sequences": sequences,
        "vocab_size": vocab_size,
        "eos_token_id": eos_token_id,
        "padding_token_id": padding_token_id,
        "boundaries": BOUNDARIES,
        "boundary_offsets": BOUNDARY_OFFSETS,
        "sha256": {name: file.digest.hexdigest() for name, file in files.items()},
    }
    storage.write_bytes(storage.join(directory, INDEX), json.dumps(index, indent=1, sort_keys=True).encode())
    return sequences


def _row_groups(path: str, columns: list[str]) -> Iterator[pa.Table]:
    with storage.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


class _Hashed:
    """A stream that knows the SHA-256 of what was written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self._stream.write(data)


@contextmanager
def _stream(directory: str, name: str) -> Iterator[_Hashed]:
    """A local scratch file that takes its name when complete."""
    scratch = storage.scratch_file(directory)
    try:
        with disk.writing(scratch), open(scratch, "wb") as stream:
            yield _Hashed(stream)
        storage.publish(scratch, storage.join(directory, name))
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)
