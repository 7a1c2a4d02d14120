"""The stage that imports ranked replies as preference pairs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cluster import storage
from operators import shards, tables, tombstones
from operators.ledger import merge_stats
from operators.stage import Stage, StageContext
from operators.synthesis import conversations
from operators.synthesis.length_bias import biases, bound_length
from operators.synthesis.preferences import PAIRS, pair_statistics
from operators.synthesis.rankings import RankingSettings, pairs_of
from operators.synthesis.rows import Account, table_of
from pipelines.stages.generating import listed

_BATCH_ROWS = 1024  # rankings whose pairs are bound in their lengths together


class RankingsStage(Stage, RankingSettings):
    """Read files of prompts with ranked or scored replies, and write their pairs (see docs/preferences.md for the shape)."""

    kind: Literal["rankings"]
    path: str | list[str] = Field(description="files or globs: JSON lines (also .gz, .zst), JSON arrays, Parquet, Arrow")
    author: str = Field(default="human", description="who ranked the replies; goes into the rows' provenance")
    pairs: Literal["best_worst", "all"] = Field(default="all", description="one pair a prompt, or all that pass")

    def needs_ray(self) -> bool:
        return False

    def files(self) -> list[str]:
        return listed(self.path)

    def run(self, context: StageContext) -> None:
        entries = [entry for pattern in self.files() for entry in storage.list_files(context.path(pattern))]
        settings = RankingSettings.model_validate({name: getattr(self, name) for name in RankingSettings.model_fields})
        done = shards.committed_units(context.directory)
        left = context.limit
        total: dict[str, Any] = {}
        for unit, entry in enumerate(entries):
            context.check_cancelled()
            record = done.get(unit) or self._read(context, unit, entry, left, settings)
            if left is not None:
                left = max(0, left - record["ledger"]["in"])
            merge_stats(total, record["stats"].get("length", {}))
            context.progress(unit + 1, len(entries), "units")
        context.finish(stats={"length_bias": biases(total)} if total else {})

    def _read(
        self, context: StageContext, unit: int, entry: storage.FileEntry, limit: int | None, settings: RankingSettings
    ) -> dict[str, Any]:
        """One file as one unit, in batches."""
        writer = shards.UnitWriter(context.directory, unit)
        total, batch = Account(self.kind), Account(self.kind)
        stats: dict[str, Any] = {}
        rows = 0

        def flush() -> None:
            nonlocal batch
            bound_length(batch, self.max_chosen_longer, self.max_chosen_shorter)
            merge_stats(stats, pair_statistics(batch))
            writer.write(table_of(batch.rows, PAIRS))
            writer.reject(tables.rejects_table(batch.rejects))
            batch.rows, batch.rejects = [], []
            total.merge(batch)
            batch = Account(self.kind)
            context.check_cancelled()

        forgotten = tombstones.hashes(tuple(tombstones.files(shards.run_directory(context.directory))))
        try:
            for number, item in conversations.read_rows(entry.path):
                if limit is not None and rows >= limit:
                    break
                rows += 1
                identity = tables.stable_id(entry.relative, number)
                if isinstance(item, conversations.Unreadable):
                    batch.ledger.rows_in += 1
                    batch.ledger.quarantined += 1
                    base = {"id": identity, "text": item.text, "source": entry.relative, "operator": self.kind}
                    batch.rejects.append({**base, "reason": "unreadable", "detail": item.detail, "quarantined": True})
                else:
                    given = item.get("id")
                    named = str(given) if isinstance(given, str | int) else identity
                    if forgotten and tombstones.hashed(named) in forgotten:
                        batch.ledger.rows_in += 1
                        batch.ledger.forgotten += 1
                    else:
                        batch.merge(pairs_of(item, named, entry.relative, self.author, settings))
                if rows % _BATCH_ROWS == 0:
                    flush()
            flush()
            return writer.commit(total.ledger, merge_stats(total.stats(), stats))
        except BaseException:
            writer.abandon()
            raise
