"""The synthesis stages of a recipe: conversations, self_instruct, evol_instruct, preferences."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from cluster import storage
from operators import shards, tables
from operators.config import SettingsError
from operators.ledger import Ledger
from operators.stage import Stage, StageContext
from operators.synthesis import conversations
from operators.synthesis.cache import ReplyCache
from operators.synthesis.engine import EngineSettings
from operators.synthesis.evol_instruct import EvolInstruct, EvolSettings, Instruction
from operators.synthesis.generator import Generator
from operators.synthesis.heuristics import language_of
from operators.synthesis.packaged import PREFIX, ModelError, check_model, model_revision
from operators.synthesis.preferences import PreferencePrompt, PreferenceSettings, make_pairs
from operators.synthesis.requests import Reject
from operators.synthesis.rows import INSTRUCTIONS, Account, table_of
from operators.synthesis.seeds import read_seeds
from operators.synthesis.self_instruct import SelfInstruct, SelfInstructSettings, round_stats

_BATCH_ROWS = 4096
_PROMPTS_PER_UNIT = 1024  # prompts of a preferences unit: what is in memory at once, and what a crash makes to be parsed again


class ConversationsStage(Stage):
    """Read files of instruction data (seed tasks, Alpaca, ShareGPT, OpenAI messages) into conversations.

    A row that the table cannot hold without loss is rejected with a reason; a line that is no JSON is quarantined.
    """

    kind: Literal["conversations"]
    path: str | list[str] = Field(description="files or globs: JSON lines (also .gz, .zst) or JSON arrays")
    format: conversations.Format = Field(description="shape of the rows")
    author: str = Field(default="human", description="who wrote the replies; goes into the rows' provenance")

    def files(self) -> list[str]:
        return _listed(self.path)

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


class _Generating(Stage):
    """What the stages with a generator share."""

    resource: ClassVar[str] = "generate"

    generator: EngineSettings = Field(
        default=EngineSettings(), description="the model; stages with equal settings share one engine"
    )
    max_generated_tokens: int | None = Field(default=None, ge=1, description="cap on generated tokens, cached replies included")

    def validate_deep(self) -> None:
        try:
            check_model(self.generator.model)
        except ModelError as error:
            raise SettingsError(f"{self.kind}.generator.{error}") from error

    def files(self) -> list[str]:
        found = [] if self.generator.model.startswith(PREFIX) else [storage.join(self.generator.model, "*.*")]
        folder = getattr(self, "prompts", None)
        return [*found, *([storage.join(folder, "*", "*.txt")] if folder else [])]

    def make_generator(self, context: StageContext) -> Generator:
        """A generator over the run's reply cache; the engine is asked for when the first reply is missing."""
        run = shards.run_directory(context.directory)
        return Generator(
            engine=lambda: context.services["engine"](self.generator),
            revision=model_revision(self.generator.model, context.cache_directory),
            cache=ReplyCache(storage.join(run, ".replies"), context.stage),
            max_completion_tokens=self.max_generated_tokens,
            cancelled=context.cancelled,
            progress=lambda done, total: context.progress(done, total, "replies"),
        )

    def prompt_folder(self, context: StageContext) -> str | None:
        folder = getattr(self, "prompts", None)
        return context.path(folder) if folder else None

    @property
    def model_name(self) -> str:
        """The model as provenance names it: without the folder it lies in."""
        model = self.generator.model
        return model.removeprefix(PREFIX) if model.startswith(PREFIX) else Path(model).name


class SelfInstructStage(_Generating, SelfInstructSettings):
    """Self-Instruct: new tasks from seed tasks, checked, answered, with provenance.

    Rounds go on until `target` rows, `max_generated_tokens`, `max_rounds`, or two rounds without a row. Each round is
    one committed unit; after a crash the replies of earlier rounds come from the cache.
    """

    kind: Literal["self_instruct"]
    seeds: str | list[str] = Field(description="seed task files: JSON lines of id, instruction, instances, is_classification")

    def files(self) -> list[str]:
        return [*_listed(self.seeds), *super().files()]

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        seeds = read_seeds([context.path(path) for path in _listed(self.seeds)])
        target = self.target if context.limit is None else min(self.target, context.limit)
        settings = SelfInstructSettings.model_validate(
            {
                **{name: getattr(self, name) for name in SelfInstructSettings.model_fields},
                "target": target,
                "prompts": self.prompt_folder(context),
            }
        )
        generator = self.make_generator(context)
        method = SelfInstruct(settings, seeds, generator, self.model_name, context.seed)
        done = shards.committed_units(context.directory)
        for made in method.rounds():
            if made.number not in done:
                _commit(context, made.number, made.account, INSTRUCTIONS, round_stats(made))
            context.log(
                f"round {made.number}: {made.asked} requests, {made.accepted} new tasks, {len(made.account.rows)} rows; "
                f"{method.kept} of {target} rows, {generator.usage.completion_tokens} tokens generated"
            )
            context.progress(min(method.kept, target), target, "rows")
            context.check_cancelled()
        context.log(f"self_instruct stopped: {_STOPPED[method.stopped]}")
        _finish(context, generator, time.monotonic() - started, {"stopped": method.stopped, "seeds": len(seeds)})


class EvolInstructStage(_Generating, EvolSettings):
    """Evol-Instruct: the input's instructions made harder in depth and breadth, with eliminations and lineage.

    Writes the input's rows and the evolved ones (as the paper trains on all rounds). Each round is one committed unit.
    """

    kind: Literal["evol_instruct"]
    input: str | list[str] = Field(description="stage(s) whose conversations are evolved; rows of more than one turn pass through")

    def input_names(self) -> list[str]:
        return _listed(self.input)

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        done = shards.committed_units(context.directory)
        pool = self._pool(context, write=0 not in done)
        settings = EvolSettings.model_validate(
            {**{name: getattr(self, name) for name in EvolSettings.model_fields}, "prompts": self.prompt_folder(context)}
        )
        generator = self.make_generator(context)
        method = EvolInstruct(settings, pool, generator, self.model_name, context.seed, context.limit)
        for made in method.rounds():
            if made.number + 1 not in done:
                rounds = {str(made.number): {"asked": made.asked, "kept": len(made.account.rows)}}
                _commit(context, made.number + 1, made.account, INSTRUCTIONS, {"rounds": rounds, **made.account.stats()})
            context.log(f"round {made.number}: {made.asked} rewritten, {len(made.account.rows)} kept")
            context.progress(made.number + 1, settings.rounds, "rounds")
            context.check_cancelled()
        _finish(context, generator, time.monotonic() - started, {"stopped": method.stopped, "pool": len(pool)})

    def _pool(self, context: StageContext, write: bool) -> list[Instruction]:
        """The single-turn instructions to evolve; all input rows are written through as unit 0."""
        pool: list[Instruction] = []
        ledger = Ledger()
        stats: dict[str, Counter[str]] = {"languages": Counter(), "operations": Counter()}
        writer = shards.UnitWriter(context.directory, 0)
        try:
            for batch in _batches(_rows(context, self.input_names(), INSTRUCTIONS), _BATCH_ROWS):
                for row in batch:
                    lang = row["lang"] or language_of(row["messages"][0]["content"] if row["messages"] else "")
                    if [message["role"] for message in row["messages"]] == ["user", "assistant"]:
                        pool.append(Instruction(row["id"], row["messages"][0]["content"], lang))
                    stats["languages"][row["lang"] or "unknown"] += 1
                    stats["operations"][(row["provenance"] or {}).get("operation") or "unknown"] += 1
                ledger.rows_in += len(batch)
                ledger.kept += len(batch)
                if write:
                    writer.write(table_of(batch, INSTRUCTIONS))
            if write:
                writer.commit(ledger, {name: dict(sorted(counter.items())) for name, counter in stats.items()})
        except BaseException:
            writer.abandon()
            raise
        return pool


class PreferencesStage(_Generating, PreferenceSettings):
    """Preference pairs: several samples for each prompt of the input, scored; the best and the worst if far enough apart."""

    kind: Literal["preferences"]
    input: str | list[str] = Field(description="stage(s) whose conversations give the prompts")

    def input_names(self) -> list[str]:
        return _listed(self.input)

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        settings = PreferenceSettings.model_validate(
            {**{name: getattr(self, name) for name in PreferenceSettings.model_fields}, "prompts": self.prompt_folder(context)}
        )
        generator = self.make_generator(context)
        done = shards.committed_units(context.directory)
        for unit, (batch, unusable) in enumerate(self._batches(context)):
            account, stats = make_pairs(batch, settings, generator, self.model_name, context.seed)
            for identity, text, why in unusable:
                account.reject(identity, text, why, created=False)
            if unit not in done:
                _commit(context, unit, account, tables.PREFERENCES, stats)
            context.check_cancelled()
        _finish(context, generator, time.monotonic() - started, {})

    def _batches(self, context: StageContext) -> Iterator[tuple[list[PreferencePrompt], list[tuple[str, str, Reject]]]]:
        """Prompts in units, each with the rows that give none."""
        batch: list[PreferencePrompt] = []
        unusable: list[tuple[str, str, Reject]] = []
        seen: set[str] = set()
        taken = 0
        for row in _rows(context, self.input_names(), tables.CONVERSATIONS):
            messages = tuple((message["role"], message["content"]) for message in row["messages"])
            text = "\n\n".join(content for _, content in messages)
            key = tables.content_hash(messages[:-1])
            if not messages or messages[-1][0] != "assistant" or len(messages) < 2 or messages[-2][0] != "user":
                unusable.append((row["id"], text, Reject("no_prompt")))
            elif key in seen:
                unusable.append((row["id"], text, Reject("duplicate_prompt")))
            elif context.limit is not None and taken >= context.limit:
                unusable.append((row["id"], text, Reject("left_over", detail="limit")))
            else:
                seen.add(key)
                taken += 1
                lang = row["lang"] or language_of(messages[-2][1])
                batch.append(PreferencePrompt(row["id"], messages[:-1], messages[-1][1], lang))
            if len(batch) + len(unusable) >= _PROMPTS_PER_UNIT:
                yield batch, unusable
                batch, unusable = [], []
        yield batch, unusable


_STOPPED = {
    "target": "the target is reached",
    "token_cap": "max_generated_tokens is reached",
    "max_rounds": "max_rounds is reached",
    "no_yield": "two rounds in a row made no row; use a larger model, other seeds, or looser rules",
}


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _rows(context: StageContext, names: list[str], schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """Rows of input stages in order; columns of the schema that a stage does not write are null."""
    for part in shards.parts([context.inputs[name] for name in names]):
        for _, batch in shards.read(part, batch_rows=1024):
            for row in batch.select([name for name in schema.names if name in batch.schema.names]).to_pylist():
                yield {name: row.get(name) for name in schema.names}


def _batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _commit(context: StageContext, unit: int, account: Account, schema: pa.Schema, stats: dict[str, Any]) -> None:
    writer = shards.UnitWriter(context.directory, unit)
    try:
        writer.write(table_of(account.rows, schema))
        writer.reject(tables.rejects_table(account.rejects))
        writer.commit(account.ledger, stats)
    except BaseException:
        writer.abandon()
        raise


def _finish(context: StageContext, generator: Generator, seconds: float, stats: dict[str, Any]) -> None:
    usage = generator.usage
    counted = ("calls", "prompt_tokens", "completion_tokens", "truncated", "prompt_too_long", "cache_hits")
    context.finish(
        stats={**{name: getattr(usage, name) for name in counted}, **stats},
        timings={"seconds": seconds, "generation_seconds": usage.seconds, "cache_hits": usage.cache_hits},
    )
