"""What a mixture holds, counted for its data card: rows and sizes by language, generator, operation, source and licence, the
lengths of rows, and how many refuse. Each row counts as often as it was taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.sampling.contents import spoken, turns_of
from operators.shards import Part
from operators.sinks.counts import merge_counts
from operators.synthesis.curate.refusals import refuses
from operators.synthesis.curate.turns import REPLIES

_COLUMNS = {"lang": "languages", "source": "sources", "license": "licenses", "licence": "licenses"}
_FIELDS = {"generator": "generators", "operation": "operations"}
_BATCH_ROWS = 2048


def describe(part: Part, source: str, times: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Counts of one part; `times` and `sizes` are int64[rows of the file].

    `{name: {value: rows}}` and `{name_size: {value: size}}`, `lengths` `{power of two that the size does not exceed: rows}`,
    `rows`, `size`, and of conversations `answered`, `refusals` and `unknown` (rows with a reply that says it does not know).
    """
    with storage.open_input(part.path) as stream:
        schema = pq.read_schema(stream)
    names = set(schema.names)
    said = next((name for name in ("messages", "chosen") if name in names), None)
    wanted = [*(name for name in _COLUMNS if name in names), *({"provenance"} & names)]
    wanted += [name for name in ("messages", "prompt", "chosen") if name in names]
    found: dict[str, Any] = {}
    for ordinals, batch in shards.read(part, wanted or ["id"], _BATCH_ROWS):
        local = (ordinals.to_numpy() - np.uint64(part.first_ordinal)).astype(np.int64)
        taken, size = times[local], times[local] * sizes[local]
        if not taken.any():
            continue
        counts: dict[str, Any] = {"rows": int(taken.sum()), "size": int(size.sum())}
        counts |= _by("inputs", pa.array([source] * batch.num_rows), taken, size)
        counts["lengths"] = _lengths(sizes[local], taken)
        for column, name in _COLUMNS.items():
            if column in names:
                counts |= _by(name, batch[column], taken, size)
        if "provenance" in names:
            for field, name in _FIELDS.items():
                if batch["provenance"].type.get_field_index(field) >= 0:
                    counts |= _by(name, pc.struct_field(batch["provenance"], field), taken, size)
        if said is not None:
            counts |= _by("turns", turns_of(batch), taken, size) | _refusing(batch, said, taken)
        found = merge_counts(found, counts)
    return found


def _by(name: str, column: Any, taken: np.ndarray, size: np.ndarray) -> dict[str, dict[str, int]]:
    encoded = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
    index, values = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    rows, total = (np.bincount(index, weights, len(values)).astype(np.int64) for weights in (taken, size))
    some = np.flatnonzero(rows)
    return {
        name: {values[place]: int(rows[place]) for place in some},
        f"{name}_size": {values[place]: int(total[place]) for place in some},
    }


def _lengths(sizes: np.ndarray, taken: np.ndarray) -> dict[str, int]:
    bins = np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64)
    counts = np.bincount(bins, taken).astype(np.int64)
    return {str(1 << place): int(counts[place]) for place in np.flatnonzero(counts)}


def _refusing(batch: pa.RecordBatch, column: str, taken: np.ndarray) -> dict[str, int]:
    replies = spoken(batch, column).of(*REPLIES)
    no, know_not = refuses(replies)
    answered = replies.any(np.ones(len(replies), bool))
    return {
        "answered": int(taken[answered].sum()),
        "refusals": int(taken[replies.any(no)].sum()),
        "unknown": int(taken[replies.any(know_not)].sum()),
    }
