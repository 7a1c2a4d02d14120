"""The export stage: rows of finished stages as files of one size, in Parquet, JSON Lines, a Hugging Face folder, or chat formats.

Each output file is a work unit: a supervised child reads its stretches of the inputs' parts, writes the file, and
commits it. Nothing on the driver grows with the rows.

    data/NAME-KKKKK-of-NNNNN.parquet (or .jsonl.zst)      the rows
    README.md                                             the data card, for `huggingface`
    dataset_info.json                                     what LLaMA-Factory is told, for `llama_factory`
    export.json                                           what was written: rows, bytes and SHA-256 of each file

These lie in the stage's directory, where later stages may take Parquet files as their input (compaction), or below `path`.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import resource
import time
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from cluster import storage
from operators import shards, tables
from operators.config import Settings, SettingsError
from operators.dispatch import run_units
from operators.ledger import Ledger
from operators.sinks import card, chat
from operators.sinks.counts import count, merge_counts
from operators.sinks.formats import Sink, check_json, make_sink
from operators.sinks.plan import measured_ratio, plan_files
from operators.sinks.rows import Stretch, choose, conform, joint_schema, part_bytes, read_stretch
from operators.stage import StageContext
from operators.supervise import Limits, Report, Task


class ExportOptions(Settings):
    """What an export writes."""

    format: Literal["parquet", "jsonl.zst", "huggingface", "alpaca", "sharegpt", "messages", "dpo", "kto", "llama_factory"] = Field(
        "parquet",
        description="parquet: plain files; jsonl.zst: JSON Lines; huggingface: a folder that datasets.load_dataset reads, with "
        "Parquet files and a data card (README.md); the others are formats of chat data, for conversations, preference pairs and "
        "labelled conversations: a row that does not fit is rejected with a reason",
    )
    container: chat.Container | None = Field(
        None, description="files of a chat format: jsonl (the default), jsonl.zst, or parquet, where tools are JSON text"
    )
    formatting: Literal["alpaca", "sharegpt"] | None = Field(
        None, description="llama_factory: shape of the rows; default: sharegpt, which holds system messages, tools and calls"
    )
    dataset_name: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="llama_factory: name in dataset_info.json; default: the stage's name"
    )
    path: str | None = Field(
        None,
        description="Folder or URI to write to: a new or empty one, or that of an earlier export, which is replaced. "
        "Without it the files lie in the stage's directory, where later stages may take them as input (not jsonl.zst)",
    )
    target_bytes: int = Field(256 << 20, ge=1 << 10, description="Size of an output file in bytes, about")
    columns: list[str] | None = Field(None, min_length=1, description="The columns to write, in this order; default: all")
    compression_level: int = Field(3, ge=1, le=19, description="zstd level")
    split: str = Field("train", pattern=r"^\w+(\.\w+)*$", description="Name of the split in a Hugging Face folder")
    title: str | None = Field(None, description="Title of the data card; default: the stage's name")
    description: str = Field("", description="What the data set is, for the data card (Markdown)")
    license: str | None = Field(None, description="Licence of the whole data set, as Hugging Face spells it (`cc-by-sa-4.0`)")

    @model_validator(mode="after")
    def _options_of_the_format(self) -> ExportOptions:
        if self.format not in chat.FORMS and self.container is not None:
            raise ValueError(f"`container` is for chat formats ({', '.join(chat.FORMS)})")
        if self.format in chat.FORMS and self.columns is not None:
            raise ValueError(f"`columns` cannot be chosen: `format: {self.format}` has its own")
        if self.format != "llama_factory" and (self.formatting is not None or self.dataset_name is not None):
            raise ValueError("`formatting` and `dataset_name` are for `format: llama_factory`")
        if self.format == "llama_factory" and self.container == "jsonl.zst":
            raise ValueError("LLaMA-Factory does not read .jsonl.zst: take `container: jsonl` or `parquet`")
        return self


def run_export(context: StageContext, options: ExportOptions, directories: Sequence[str], limits: Limits) -> None:
    """Write every planned file that is not committed yet, then the card and the manifest."""
    parts = shards.parts(directories)
    destination = context.directory if options.path is None else context.path(options.path)
    plan = _plan(context, options, parts)
    schema = _from_text(plan["schema"])
    names = [_file_name(options, index, len(plan["files"])) for index in range(len(plan["files"]))]
    if options.path is not None:
        _claim(destination, names, context.fingerprint)
    done = shards.committed_numbers(context.directory)
    todo = [
        {
            "unit": {"index": index, "path": name},
            "stretches": stretches,
            "schema": plan["schema"],
            "format": options.format,
            "chat": plan["chat"],
            "level": options.compression_level,
            "directory": context.directory,
            "destination": destination,
        }
        for index, (name, stretches) in enumerate(zip(names, plan["files"], strict=True))
        if index not in done
    ]
    run_units(context, "operators.sinks.export:write_file", todo, limits, already=len(names) - len(todo), note="files")
    records = [record for _, record in sorted(shards.committed_units(context.directory).items())]
    written = [record["file"] for record in records]
    merged: dict[str, Any] = {}
    for record in records:
        merged = merge_counts(merged, record["counts"])
    if options.format == "huggingface":
        page = card.render(options, context, schema, written, merged, directories)
        storage.write_bytes(storage.join(destination, "README.md"), page.encode())
    if options.format == "llama_factory":
        listing = chat.dataset_info(options.dataset_name or context.stage, plan["chat"]["formatting"], plan["chat"]["table"])
        storage.write_bytes(storage.join(destination, "dataset_info.json"), listing)
    if options.path is not None:
        _settle(destination, context.fingerprint, written)
    export = {
        "path": options.path or ".",
        "format": options.format,
        "files": written,
        "schema": [[f.name, str(f.type)] for f in schema],
    }
    context.finish(stats={"export": merged}, files={"export": export})


def write_file(task: Task, report: Report) -> dict[str, Any]:
    """One output file in the supervised child."""
    given = task.arguments
    index, name = given["unit"]["index"], given["unit"]["path"]
    if task.unreadable is not None:
        raise OSError(f"{name}: writing it ended its process twice ({task.unreadable}); a larger `unit_memory_bytes` may help")
    started, cpu = time.time(), time.process_time()
    schema = _from_text(given["schema"])
    local = storage.scratch_file(given["destination"])  # on the disk where it is to lie
    sink = _sink(given["format"], given["chat"], given["level"], local, schema)
    rejects = shards.UnitWriter(given["directory"], index)
    rows, counts = 0, dict[str, Any]()
    try:
        for stretch in (Stretch(**item) for item in given["stretches"]):
            report.alive()
            for batch in read_stretch(stretch, schema.names):
                table = conform(batch, schema)
                sink.write(table)
                rows += table.num_rows
                counts = merge_counts(counts, count(table))
                if isinstance(sink, chat.ChatSink):
                    rejects.reject(tables.rejects_table(sink.rejects))
                    sink.rejects.clear()
                report.alive()
        sink.close()
        set_aside = rejects.close_rejects()
    except BaseException:
        sink.abandon()
        rejects.abandon()
        os.unlink(local)
        raise
    ledger = Ledger(rows_in=rows, kept=rows)
    if isinstance(sink, chat.ChatSink):  # of a pair KTO has two rows
        kept = sink.made
        ledger = Ledger(rows, max(0, kept + sink.rejected.total() - rows), kept, sink.rejected)
    entry = {"name": name, "rows": ledger.kept, "bytes": os.path.getsize(local), "sha256": storage.sha256_of(local)}
    storage.publish(local, storage.join(given["destination"], name))
    # Parquet in the stage's own directory is what later stages read; everything else is only listed.
    inside = given["destination"] == given["directory"] and given["format"] in ("parquet", "huggingface")
    record = {
        "unit": index,
        "parts": [entry] if inside else [],
        "rejects": set_aside,
        "ledger": ledger.to_json(),
        "stats": {},
        "counts": counts,
        "file": entry,
    }
    times = {
        "seconds": time.time() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    storage.write_bytes(storage.join(given["directory"], "timings", f"{index:08d}.json"), _json(times))
    storage.create_if_absent(storage.join(given["directory"], "units", f"{index:08d}.json"), _json(record))
    return {"unit": index, "rows": rows}


def _plan(context: StageContext, options: ExportOptions, parts: Sequence[shards.Part]) -> dict[str, Any]:
    """The schema and the stretches of every file; made once, so that a run that goes on later keeps to it."""
    path = storage.join(context.directory, "plan.json")
    if not storage.exists(path):
        joint, form, chosen, wanted = joint_schema([part.path for part in parts]), _chat_form(options), None, options.columns
        if form is not None:
            table = chat.table_for(form, joint.names, f"stage {context.stage}")
            wanted = chat.columns_of(table, joint.names)
            formatting, container = options.formatting or "sharegpt", options.container or "jsonl"
            chosen = {"table": table, "form": form, "formatting": formatting, "container": container}
        schema = choose(joint, wanted, f"stage {context.stage}: columns")
        if options.format == "jsonl.zst":
            check_json(schema)
        sink = functools.partial(_sink, options.format, chosen, options.compression_level)
        ratio = measured_ratio(parts, schema, sink, context.directory)
        share = [part.kept_rows / max(1, part.rows) for part in parts]
        files = plan_files(parts, part_bytes(parts) * share * ratio, options.target_bytes)
        plan = {"schema": _to_text(schema), "chat": chosen, "files": [[stretch.__dict__ for stretch in file] for file in files]}
        storage.create_if_absent(path, _json(plan))
    return dict(json.loads(storage.read_bytes(path)))


def _sink(format_: str, chosen: dict[str, Any] | None, level: int, path: str, schema: pa.Schema) -> Sink:
    if chosen is None:
        return make_sink(format_, path, schema, level)
    return chat.ChatSink(path, **chosen, level=level)


def _chat_form(options: ExportOptions) -> chat.Written | None:
    return next((form for form in chat.FORMS if form == options.format), None)


def _file_name(options: ExportOptions, index: int, count: int) -> str:
    stem = options.split if options.format == "huggingface" else "part"
    ending = "jsonl.zst" if options.format == "jsonl.zst" else "parquet"
    if _chat_form(options) is not None:
        ending = options.container or "jsonl"
    return f"data/{stem}-{index:05d}-of-{count:05d}.{ending}"


def _claim(destination: str, names: Sequence[str], fingerprint: str) -> None:
    """Mark a folder as this export's. Raises SettingsError when it holds files that no export has written."""
    marker = storage.join(destination, "export.json")
    before = json.loads(storage.read_bytes(marker)) if storage.exists(marker) else None
    if before is None:
        try:
            found = storage.list_files(destination)
        except FileNotFoundError:
            found = []
        if found:
            raise SettingsError(
                f"{destination} holds files that no export has written ({found[0].relative}, ...): give `path` an empty folder"
            )
    earlier = set(before["names"]) if before else set()
    listing = {"fingerprint": fingerprint, "complete": False, "names": sorted(earlier | set(names))}
    storage.write_bytes(marker, _json(listing))


def _settle(destination: str, fingerprint: str, written: Sequence[dict[str, Any]]) -> None:
    """Remove the files of an earlier export that are not of this one, and say what there is."""
    marker = storage.join(destination, "export.json")
    names = {entry["name"] for entry in written}
    for name in json.loads(storage.read_bytes(marker))["names"]:
        if name not in names:
            storage.delete(storage.join(destination, name))
    storage.delete(storage.join(destination, ".scratch"))
    storage.write_bytes(
        marker, _json({"fingerprint": fingerprint, "complete": True, "names": sorted(names), "files": list(written)})
    )


def _to_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize()).decode()


def _from_text(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode()
