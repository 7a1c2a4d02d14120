"""The stages that write instructions: self_instruct and evol_instruct."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from operators import shards
from operators.ledger import Ledger
from operators.stage import StageContext
from operators.synthesis.evol_instruct import EvolInstruct, EvolSettings, Instruction
from operators.synthesis.generator import Generator, Usage
from operators.synthesis.heuristics import language_of
from operators.synthesis.rows import INSTRUCTIONS, table_of
from operators.synthesis.seeds import read_seeds
from operators.synthesis.self_instruct import SelfInstruct, SelfInstructSettings, round_stats
from pipelines.stages.generating import GeneratingStage, input_rows, listed

_BATCH_ROWS = 4096


class SelfInstructStage(GeneratingStage, SelfInstructSettings):
    """Self-Instruct: new tasks from seed tasks, checked, answered, with provenance.

    Rounds go on until `target` rows, `max_generated_tokens`, `max_rounds`, or two rounds without a row. Each round is
    one committed unit; after a crash the replies of earlier rounds come from the cache.
    """

    kind: Literal["self_instruct"]
    seeds: str | list[str] = Field(description="seed task files: JSON lines of id, instruction, instances, is_classification")

    def files(self) -> list[str]:
        return [*listed(self.seeds), *super().files()]

    def input_names(self) -> list[str]:
        return self.model_stages()

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        seeds = read_seeds([context.path(path) for path in listed(self.seeds)])
        target = self.target if context.limit is None else min(self.target, context.limit)
        settings: SelfInstructSettings = self.method_settings(SelfInstructSettings, context, target=target)
        generator = self.make_generator(context)
        method = SelfInstruct(settings, seeds, generator, self.model_name, context.seed)
        done = shards.committed_units(context.directory)
        before = Usage()
        for made in method.rounds():
            spent, before = _since(generator, before)
            if made.number not in done:
                self.commit(context, made.number, made.account, INSTRUCTIONS, {**round_stats(made), "usage": spent})
            context.log(
                f"round {made.number}: {made.asked} requests, {made.accepted} new tasks, {len(made.account.rows)} rows; "
                f"{method.kept} of {target} rows, {generator.usage.completion_tokens} tokens generated"
            )
            context.progress(min(method.kept, target), target, "rows")
            context.check_cancelled()
        context.log(f"self_instruct stopped: {_STOPPED[method.stopped]}")
        self.finish(context, generator, started, {"stopped": method.stopped, "seeds": len(seeds)})


class EvolInstructStage(GeneratingStage, EvolSettings):
    """Evol-Instruct: the input's instructions made harder in depth and breadth, with eliminations and lineage.

    Writes the input's rows and the evolved ones (as the paper trains on all rounds). Each round is one committed unit.
    """

    kind: Literal["evol_instruct"]
    input: str | list[str] = Field(description="stage(s) whose conversations are evolved; rows of more than one turn pass through")

    def input_names(self) -> list[str]:
        return [*listed(self.input), *self.model_stages()]

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        done = shards.committed_units(context.directory)
        pool = self._pool(context, write=0 not in done)
        settings: EvolSettings = self.method_settings(EvolSettings, context)
        generator = self.make_generator(context)
        method = EvolInstruct(settings, pool, generator, self.model_name, context.seed, context.limit)
        before = Usage()
        for made in method.rounds():
            spent, before = _since(generator, before)
            if made.number + 1 not in done:
                rounds = {str(made.number): {"asked": made.asked, "kept": len(made.account.rows)}}
                self.commit(
                    context, made.number + 1, made.account, INSTRUCTIONS, {"rounds": rounds, **made.account.stats(), "usage": spent}
                )
            context.log(f"round {made.number}: {made.asked} rewritten, {len(made.account.rows)} kept")
            context.progress(made.number + 1, settings.rounds, "rounds")
            context.check_cancelled()
        self.finish(context, generator, started, {"stopped": method.stopped, "pool": len(pool)})

    def _pool(self, context: StageContext, write: bool) -> list[Instruction]:
        """The single-turn instructions to evolve; all input rows are written through as unit 0."""
        pool: list[Instruction] = []
        ledger = Ledger()
        stats: dict[str, Counter[str]] = {"languages": Counter(), "operations": Counter()}
        writer = shards.UnitWriter(context.directory, 0)
        try:
            for batch in _batches(input_rows(context, listed(self.input), INSTRUCTIONS), _BATCH_ROWS):
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


_STOPPED = {
    "target": "the target is reached",
    "token_cap": "max_generated_tokens is reached",
    "max_rounds": "max_rounds is reached",
    "no_yield": "two rounds in a row made no row; use a larger model, other seeds, or looser rules",
}


def _batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _since(generator: Generator, before: Usage) -> tuple[dict[str, int], Usage]:
    """(what was spent since, the state now)."""
    now = replace(generator.usage)
    return {name: value - before.to_json()[name] for name, value in now.to_json().items()}, now
