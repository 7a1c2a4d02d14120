"""The Arrow schemas that stages exchange. `SCHEMA_VERSION` is part of every stage's fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1

DOCUMENTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("url", pa.string()),
    ]
)
"""What every corpus stage writes at least; operators add annotation columns (`lang`, `lang_score`, `quality`, ...)."""

MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.large_string())])

PROVENANCE = pa.struct(
    [
        pa.field("generator", pa.string()),  # model name, or "human"
        pa.field("revision", pa.string()),  # content hash of the model's weights
        pa.field("template", pa.string()),  # hash of the prompt template
        pa.field("sampling", pa.string()),  # JSON of the sampling settings
        pa.field("seed", pa.int64()),
        pa.field("parents", pa.list_(pa.string())),  # ids of the rows it was made from
        pa.field("operation", pa.string()),  # e.g. seed, self_instruct, evol:deepen, preference
        pa.field("round", pa.int32()),
    ]
)

CONVERSATIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("messages", pa.list_(MESSAGE), nullable=False),
        pa.field("lang", pa.string()),
        pa.field("tools", pa.string()),  # JSON, as OpenAI's `tools`
        pa.field("provenance", PROVENANCE),
    ]
)

PREFERENCES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", pa.list_(MESSAGE), nullable=False),
        pa.field("chosen", pa.list_(MESSAGE), nullable=False),
        pa.field("rejected", pa.list_(MESSAGE), nullable=False),
        pa.field("margin", pa.float32()),
        pa.field("lang", pa.string()),
        pa.field("provenance", PROVENANCE),
    ]
)

TOKENS = pa.schema(
    [
        pa.field("sequence", pa.int64(), nullable=False),  # index of the row in the whole stage, from 0
        pa.field("tokens", pa.list_(pa.uint32()), nullable=False),  # exactly `length` ids; the tail may be padding
        pa.field(
            "cu_seqlens", pa.list_(pa.int32()), nullable=False
        ),  # 0, end of piece 0, end of piece 1, ...; padding after the last
        pa.field("documents", pa.list_(pa.string()), nullable=False),  # id of the document of each piece
        pa.field("offsets", pa.list_(pa.int64()), nullable=False),  # first token of each piece inside its document
        pa.field("sources", pa.list_(pa.string()), nullable=False),  # source of each piece
        pa.field("langs", pa.list_(pa.string()), nullable=False),  # language of each piece, "" if unknown
        pa.field("loss_spans", pa.list_(pa.int32()), nullable=False),  # start, end, start, end, ... of tokens with loss
    ]
)

REJECTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string()),  # the text as it entered the operator; JSON for rows that are no documents
        pa.field("source", pa.string()),
        pa.field("operator", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # the measured value that decided, if there is one
        pa.field("detail", pa.string()),  # where and what, for unreadable rows; the matched id for duplicates
        pa.field("quarantined", pa.bool_(), nullable=False),
    ]
)


def rejects_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """REJECTS from row dictionaries; absent keys become null, `quarantined` defaults to False."""
    filled = [{"quarantined": False, **row} for row in rows]
    return pa.table({f.name: pa.array([row.get(f.name) for row in filled], f.type) for f in REJECTS}, schema=REJECTS)


def crashed(ids: Sequence[str], rows: Sequence[int], reasons: Mapping[int, str], operator: str) -> list[dict[str, Any]]:
    """Rejects for rows (numbers within their unit) that ended the process that worked on them."""
    return [
        {
            "id": key,
            "operator": operator,
            "reason": f"crash: {reasons[row]}",
            "detail": f"row {row} of its unit",
            "quarantined": True,
        }
        for key, row in zip(ids, rows, strict=True)
    ]


def stable_id(*pieces: str | int) -> str:
    """A 32-hex-digit id from the place or the content of a row, the same on every machine."""
    return hashlib.blake2b("\x00".join(map(str, pieces)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def content_hash(value: Any) -> str:
    """32 hex digits over the canonical JSON of a plain value."""
    data = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.blake2b(data.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
