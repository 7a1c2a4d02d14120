"""The stage that reads files of chat data: conversations, preference pairs, or conversations with labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster import storage
from operators import shards, tables, tombstones
from operators.config import SettingsError
from operators.ledger import Ledger
from operators.stage import Stage, StageContext
from operators.synthesis import conversations, formats
from operators.synthesis.formats import Dataset, Format, Table, llama_factory
from operators.synthesis.requests import Reject
from operators.synthesis.rows import table_of
from pipelines.stages.generating import listed

_BATCH_ROWS = 4096


@dataclass(frozen=True)
class _Source:
    """One file and how its rows are read."""

    entry: storage.FileEntry
    form: Format | Dataset

    @property
    def table(self) -> Table:
        return self.form.table if isinstance(self.form, Dataset) else formats.TABLES[self.form]

    @property
    def said(self) -> str:
        return f"llama_factory data set {self.form.name}" if isinstance(self.form, Dataset) else self.form


class ConversationsStage(Stage):
    """Read files of chat data: seed tasks, Alpaca, ShareGPT, OpenAI messages; DPO pairs; KTO labels; LLaMA-Factory data sets.

    A row that the table cannot hold without loss is rejected with a reason; a line that is no JSON is quarantined. `dpo`
    gives preference pairs, `kto` conversations with a column `label`, everything else conversations.
    """

    kind: Literal["conversations"]
    path: str | list[str] = Field(
        description="files or globs: JSON lines (also .gz, .zst), JSON arrays, Parquet, Arrow; llama_factory: the dataset_info.json"
    )
    format: Format | Literal["llama_factory", "auto"] = Field(
        description="shape of the rows; auto tells it from the fields of each file's first row, and says so"
    )
    datasets: list[str] | None = Field(
        default=None, min_length=1, description="llama_factory: names of data sets, in this order; all of them by default"
    )
    leave_out: list[str] = Field(
        default_factory=list, description="fields to leave out; any other field that has no place rejects its row"
    )
    label: bool | None = Field(default=None, description="kto: keep only the rows with this label, e.g. true for SFT")
    author: str = Field(default="human", description="who wrote the replies; goes into the rows' provenance")

    @model_validator(mode="after")
    def _fitting(self) -> ConversationsStage:
        if self.datasets is not None and self.format != "llama_factory":
            raise ValueError("`datasets` is for `format: llama_factory`")
        if self.format == "llama_factory" and len(listed(self.path)) != 1:
            raise ValueError("`format: llama_factory` reads one dataset_info.json")
        if self.leave_out and self.format == "llama_factory":
            raise ValueError("`leave_out` is not for llama_factory: columns that a description does not name are left out")
        if self.label is not None and self.format not in ("kto", "llama_factory"):
            raise ValueError("`label` is for rows that have one: `format: kto` or `llama_factory`")
        return self

    def needs_ray(self) -> bool:
        return False

    def files(self) -> list[str]:
        return listed(self.path)

    def files_at(self, base_directory: str) -> list[str]:
        if self.format != "llama_factory":
            return self.files()
        path = storage.absolute(listed(self.path)[0], base_directory)
        path = path if path.endswith(".json") else storage.join(path, llama_factory.FILE_NAME)
        return [path, *(dataset.pattern for dataset in llama_factory.load(path, self.datasets))]

    def run(self, context: StageContext) -> None:
        sources = self._sources(context)
        found = {source.table: source for source in reversed(sources)}
        if len(found) > 1:
            told = "; ".join(f"{source.entry.relative} ({source.said}) holds {table}" for table, source in found.items())
            raise SettingsError(f"stage {context.stage}: one stage reads one kind of rows: {told}")
        if self.label is not None and "labelled" not in found:
            raise SettingsError(f"stage {context.stage}: `label` needs rows with labels, the files hold {', '.join(found)}")
        done = shards.committed_units(context.directory)
        left = context.limit
        for unit, source in enumerate(sources):
            context.check_cancelled()
            record = done.get(unit) or self._read(context, unit, source, left)
            if left is not None:
                left = max(0, left - record["ledger"]["in"])
            context.progress(unit + 1, len(sources), "units")
        context.finish()

    def _sources(self, context: StageContext) -> list[_Source]:
        """The files in order, each with its format."""
        if self.format == "llama_factory":
            found = []
            for dataset in llama_factory.load(context.path(listed(self.path)[0]), self.datasets):
                entries = storage.list_files(dataset.pattern)
                if not entries:
                    raise FileNotFoundError(f"stage {context.stage}: data set {dataset.name!r} has no file {dataset.pattern}")
                found += [_Source(entry, dataset) for entry in entries]
            return found
        entries = [entry for pattern in self.files() for entry in storage.list_files(context.path(pattern))]
        return [_Source(entry, self.format if self.format != "auto" else self._detected(context, entry)) for entry in entries]

    def _detected(self, context: StageContext, entry: storage.FileEntry) -> Format:
        for _, item in conversations.read_rows(entry.path):
            if isinstance(item, dict):
                try:
                    form = formats.detect(self._without(item))
                except ValueError as error:
                    raise SettingsError(f"stage {context.stage}: {entry.relative}: {error}") from None
                context.log(f"{entry.relative}: format {form}, by the fields of its first row")
                return form
        raise SettingsError(f"stage {context.stage}: {entry.relative}: no row to tell the format from; set `format`")

    def _without(self, item: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in item.items() if name not in self.leave_out} if self.leave_out else item

    def _read(self, context: StageContext, unit: int, source: _Source, limit: int | None) -> dict[str, Any]:
        """One file as one unit, in batches."""
        writer = shards.UnitWriter(context.directory, unit)
        name, schema = source.entry.relative, formats.SCHEMAS[source.table]
        ledger, languages, left_out = Ledger(), Counter[str](), Counter[str]()
        rows: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        forgotten = tombstones.hashes(tuple(tombstones.files(shards.run_directory(context.directory))))
        named = llama_factory.named_columns(source.form) if isinstance(source.form, Dataset) else None

        def flush() -> None:
            writer.write(table_of(rows, schema))
            writer.reject(tables.rejects_table(rejects))
            rows.clear()
            rejects.clear()

        def reject(base: Mapping[str, Any], item: Any, reason: str, detail: str | None) -> None:
            ledger.rows_in += 1
            ledger.rejected[f"conversations:{reason}"] += 1
            rejects.append({**base, "text": json.dumps(item, ensure_ascii=False, default=str), "reason": reason, "detail": detail})

        provenance = {"generator": self.author, "parents": [], "operation": "seed" if self.format == "seed_tasks" else "read"}
        try:
            for number, item in conversations.read_rows(source.entry.path):
                if limit is not None and ledger.rows_in >= limit:
                    break
                base = {"id": tables.stable_id(name, number), "source": name, "operator": "conversations"}
                if isinstance(item, conversations.Unreadable):
                    ledger.rows_in += 1
                    ledger.quarantined += 1
                    rejects.append({**base, "text": item.text, "reason": "unreadable", "detail": item.detail, "quarantined": True})
                    continue
                left_out.update(
                    key
                    for key, value in item.items()
                    if value is not None and (key in self.leave_out or (named and key not in named))
                )
                found = formats.parse_row(self._without(item), source.form, name, number)
                if isinstance(found, Reject):
                    reject(base, item, found.reason, found.detail)
                    continue
                for row in found:
                    if forgotten and tombstones.hashed(row["id"]) in forgotten:
                        ledger.rows_in += 1
                        ledger.forgotten += 1
                        continue
                    if self.label is not None and row["label"] != self.label:
                        reject({**base, "id": row["id"]}, item, "other_label", f"label {row['label']}")
                        continue
                    ledger.rows_in += 1
                    ledger.kept += 1
                    rows.append({**row, "provenance": provenance})
                    languages[row["lang"] or "unknown"] += 1
                if len(rows) + len(rejects) >= _BATCH_ROWS:
                    flush()
                    context.check_cancelled()
            flush()
            stats: dict[str, Any] = {
                "sources": {name: ledger.kept},
                "languages": dict(languages),
                "formats": {source.said: ledger.kept},
            }
            return writer.commit(ledger, stats | ({"left_out": dict(left_out)} if left_out else {}))
        except BaseException:
            writer.abandon()
            raise
