"""The stage that reads files of instruction data into conversations."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from cluster import storage
from operators import shards, tables
from operators.ledger import Ledger
from operators.stage import Stage, StageContext
from operators.synthesis import conversations
from operators.synthesis.requests import Reject
from operators.synthesis.rows import INSTRUCTIONS, table_of
from pipelines.stages.generating import listed

_BATCH_ROWS = 4096


class ConversationsStage(Stage):
    """Read files of instruction data (seed tasks, Alpaca, ShareGPT, OpenAI messages) into conversations.

    A row that the table cannot hold without loss is rejected with a reason; a line that is no JSON is quarantined.
    """

    kind: Literal["conversations"]
    path: str | list[str] = Field(description="files or globs: JSON lines (also .gz, .zst) or JSON arrays")
    format: conversations.Format = Field(description="shape of the rows")
    author: str = Field(default="human", description="who wrote the replies; goes into the rows' provenance")

    def needs_ray(self) -> bool:
        return False

    def files(self) -> list[str]:
        return listed(self.path)

    def run(self, context: StageContext) -> None:
        entries = [entry for pattern in self.files() for entry in storage.list_files(context.path(pattern))]
        done = shards.committed_units(context.directory)
        left = context.limit
        for unit, entry in enumerate(entries):
            context.check_cancelled()
            record = done.get(unit) or self._read(context, unit, entry, left)
            if left is not None:
                left = max(0, left - record["ledger"]["in"])
            context.progress(unit + 1, len(entries), "units")
        context.finish()

    def _read(self, context: StageContext, unit: int, entry: storage.FileEntry, limit: int | None) -> dict[str, Any]:
        """One file as one unit, in batches."""
        writer = shards.UnitWriter(context.directory, unit)
        ledger, languages = Ledger(), {"sources": {entry.relative: 0}, "languages": {}}
        rows: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []

        def flush() -> None:
            writer.write(table_of(rows, INSTRUCTIONS))
            writer.reject(tables.rejects_table(rejects))
            rows.clear()
            rejects.clear()

        provenance = {"generator": self.author, "parents": [], "operation": "seed" if self.format == "seed_tasks" else "read"}
        try:
            for number, item in conversations.read_rows(entry.path):
                if limit is not None and ledger.rows_in >= limit:
                    break
                base = {"id": tables.stable_id(entry.relative, number), "source": entry.relative, "operator": "conversations"}
                if isinstance(item, conversations.Unreadable):
                    ledger.rows_in += 1
                    ledger.quarantined += 1
                    rejects.append({**base, "text": item.text, "reason": "unreadable", "detail": item.detail, "quarantined": True})
                    continue
                found = conversations.parse_row(item, self.format, entry.relative, number)
                if isinstance(found, Reject):
                    ledger.rows_in += 1
                    ledger.rejected[f"conversations:{found.reason}"] += 1
                    shown = json.dumps(item, ensure_ascii=False)
                    rejects.append({**base, "text": shown, "reason": found.reason, "detail": found.detail})
                    continue
                for row in found:
                    ledger.rows_in += 1
                    ledger.kept += 1
                    rows.append({**row, "provenance": provenance})
                    lang = row["lang"] or "unknown"
                    languages["languages"][lang] = languages["languages"].get(lang, 0) + 1
                    languages["sources"][entry.relative] += 1
                if len(rows) + len(rejects) >= _BATCH_ROWS:
                    flush()
                    context.check_cancelled()
            flush()
            return writer.commit(ledger, languages)
        except BaseException:
            writer.abandon()
            raise
