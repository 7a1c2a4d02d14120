"""What became of one row: the stages' parts, rejects, removals, packed sequences and training samples are searched for it.

Reads Parquet column by column and row group by row group, so memory does not grow with the run; time does, with the
bytes of the id columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards, tombstones


@dataclass(frozen=True)
class Event:
    """One thing that happened to the row in one stage."""

    stage: str
    what: str  # kept, made, rejected, quarantined, removed, represents, cut, packed, trained, forgotten
    detail: str


def trace(run_directory: str, row_id: str) -> list[Event]:
    """All events of a row in the order of the stages. Raises FileNotFoundError when the directory is no run."""
    path = storage.join(run_directory, "run.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"{run_directory} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    record = json.loads(storage.read_bytes(path))
    events = [_forgotten(takedown, row_id) for takedown in tombstones.of(run_directory, row_id)]
    sequences: dict[str, list[int]] = {}
    for name in record["order"]:
        entry = record["stages"][name]
        directory = storage.join(run_directory, entry["directory"])
        if entry["status"] != "done":
            continue
        manifest = shards.load_manifest(directory)
        if manifest.kind == "pack":
            found, sequences[name] = _packed(name, directory, manifest, row_id)
            events += found
        elif manifest.kind in ("pretrain", "sft", "dpo", "kto"):
            events += _trained(name, directory, manifest, row_id, {s for i in entry["inputs"] for s in sequences.get(i, [])})
        else:
            events += _kept(name, directory, manifest, row_id)
        events += _made_from(name, directory, manifest, row_id)
        events += _rejected(name, directory, manifest, row_id)
        events += _removed(name, directory, manifest, row_id)
        events += _cut(name, directory, manifest, row_id)
    return events


def _forgotten(takedown: dict[str, Any], row_id: str) -> Event:
    why = f" ({takedown['reason']})" if takedown["reason"] else ""
    made = "" if tombstones.hashed(row_id) in takedown["ids"] else ", with a row that it was made from"
    models = [
        f"{model['relative']} ({model['samples']} samples)" if model["samples"] else model["relative"]
        for model in takedown["models"]
    ]
    whose = "seen by" if len(takedown["ids"]) == 1 else f"of its {len(takedown['ids']):,} ids some were seen by"
    saw = f"; {whose} {', '.join(models)}" if models else ""
    return Event("(run)", "forgotten", f"on {takedown['time']}{why}{made}{saw}")


def _matches(path: str, columns: list[str], column: str, value: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows whose `column` equals the value (or, for a list column, holds it), with their row numbers."""
    with storage.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        if column not in file.schema_arrow.names:
            return
        wanted = [name for name in columns if name in file.schema_arrow.names]
        start = 0
        for batch in file.iter_batches(batch_size=8192, columns=wanted):
            values = batch.column(column)
            if pa.types.is_list(values.type):
                hit = pc.equal(values.flatten(), value)
                rows = pc.unique(pc.list_parent_indices(values).filter(hit)).to_pylist()
            else:
                rows = pc.indices_nonzero(pc.fill_null(pc.equal(values, value), False)).to_pylist()
            for row in rows:
                yield start + row, {name: batch.column(name)[row].as_py() for name in wanted}
            start += batch.num_rows


def _kept(name: str, directory: str, manifest: shards.Manifest, row_id: str) -> list[Event]:
    events = []
    for part in manifest.parts:
        path = storage.join(directory, part["name"])
        for row, values in _matches(path, ["id", "lang", "source", "quality", "provenance"], "id", row_id):
            shown = ", ".join(f"{key} {value}" for key, value in values.items() if key not in ("id", "provenance") and value)
            origin = values.get("provenance") or {}
            if origin.get("parents"):
                shown += f" by {origin['operation']} from {', '.join(origin['parents'][:8])}"
            events.append(Event(name, "kept", f"{part['name']} row {row} {shown}".rstrip()))
    return events


def _made_from(name: str, directory: str, manifest: shards.Manifest, row_id: str) -> list[Event]:
    """Rows of the stage that were made from the row: from a document, with the characters that prove them."""
    made: list[str] = []
    rows = 0
    for part in manifest.parts:
        for _, values in _matches(
            storage.join(directory, part["name"]), ["id", "source_id", "span_start", "span_end"], "source_id", row_id
        ):
            rows += 1
            if len(made) < 8:
                made.append(f"{values['id']} (characters {values['span_start']}..{values['span_end'] - 1})")
    if not rows:
        return []
    more = f" and {rows - len(made)} more" if rows > len(made) else ""
    return [Event(name, "made", f"{rows} rows from it: {', '.join(made)}{more}")]


def _rejected(name: str, directory: str, manifest: shards.Manifest, row_id: str) -> list[Event]:
    events = []
    columns = ["id", "operator", "reason", "value", "detail", "quarantined"]
    for part in manifest.rejects:
        for _, values in _matches(storage.join(directory, part["name"]), columns, "id", row_id):
            value = "" if values["value"] is None else f" (measured {values['value']:.4g})"
            what = "quarantined" if values["quarantined"] else "rejected"
            detail = f" {values['detail']}" if values["detail"] else ""
            events.append(Event(name, what, f"{values['operator']}: {values['reason']}{value}{detail}"))
    return events


def _removed(name: str, directory: str, manifest: shards.Manifest, row_id: str) -> list[Event]:
    tables = manifest.files.get("removed") or []
    events = []
    columns = ["id", "reason", "match_id", "match_from", "kept_id", "kept_from", "similarity", "value"]
    for table in [tables] if isinstance(tables, str) else tables:
        path = storage.join(directory, table)
        for _, values in _matches(path, columns, "id", row_id):
            if "match_id" not in values:  # left out by choice, not as a duplicate
                measured = "" if values.get("value") is None else f" (score {values['value']:.4g})"
                events.append(Event(name, "removed", f"{values['reason']}{measured}"))
                continue
            close = "" if values.get("similarity") is None else f", similarity {values['similarity']:.3f}"
            match, kept = (
                f"{values[f'{side}_id']} of {values[f'{side}_from']}" if values.get(f"{side}_from") else values[f"{side}_id"]
                for side in ("match", "kept")
            )
            detail = f"{values['reason']}: matches {match}, kept instead: {kept}{close}"
            events.append(Event(name, "removed", detail))
        others = sum(1 for _ in _matches(path, ["kept_id"], "kept_id", row_id))
        if others:
            events.append(Event(name, "represents", f"kept for {others} removed near or exact duplicates"))
    return events


def _cut(name: str, directory: str, manifest: shards.Manifest, row_id: str) -> list[Event]:
    """What line and substring dedup took out of the row's text, and what they left there of others."""
    events, others = [], 0
    for table in manifest.files.get("cut") or []:
        path = storage.join(directory, table)
        for _, span in _matches(path, ["id", "start_byte", "end_byte", "kept_id", "text"], "id", row_id):
            place = f"bytes {span['start_byte']}..{span['end_byte'] - 1}"
            events.append(Event(name, "cut", f"{place}, first in {span['kept_id']}: {span['text'].strip()[:80]!r}"))
        others += sum(1 for _ in _matches(path, ["kept_id"], "kept_id", row_id))
    if others:
        events.append(Event(name, "represents", f"holds the first occurrence of {others} spans that were cut"))
    return events


def _packed(name: str, directory: str, manifest: shards.Manifest, row_id: str) -> tuple[list[Event], list[int]]:
    events, sequences = [], []
    for part in manifest.parts:
        columns = ["sequence", "documents", "cu_seqlens", "offsets"]
        for _, values in _matches(storage.join(directory, part["name"]), columns, "documents", row_id):
            sequences.append(values["sequence"])
            for piece, document in enumerate(values["documents"]):
                if document == row_id:
                    start, stop = values["cu_seqlens"][piece : piece + 2]
                    offset = values["offsets"][piece]
                    own = f"{offset}..{offset + stop - start - 1}"
                    detail = f"sequence {values['sequence']} tokens {start}..{stop - 1} (its tokens {own})"
                    events.append(Event(name, "packed", detail))
    return events, sequences


def _trained(name: str, directory: str, manifest: shards.Manifest, row_id: str, sequences: set[int]) -> list[Event]:
    steps: list[int] = []
    for part in manifest.parts:
        path = storage.join(directory, part["name"])
        steps += [values["step"] for _, values in _matches(path, ["id", "step"], "id", row_id)]
        for sequence in sequences:
            steps += [values["step"] for _, values in _matches(path, ["id", "step"], "id", str(sequence))]
    if not steps:
        return []
    listed = sorted(set(steps))
    shown = ", ".join(map(str, listed[:10])) + (" ..." if len(listed) > 10 else "")
    return [Event(name, "trained", f"seen in {len(steps)} samples, steps {shown}")]
