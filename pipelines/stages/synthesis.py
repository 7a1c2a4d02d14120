"""The stages that write instructions: self_instruct and evol_instruct."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cluster import storage
from operators import shards
from operators.stage import StageContext
from operators.synthesis.evol_instruct import UNIT_ROWS, EvolInstruct, EvolSettings, Known
from operators.synthesis.generator import Usage
from operators.synthesis.rows import INSTRUCTIONS
from operators.synthesis.seeds import read_seeds
from operators.synthesis.self_instruct import Round, SelfInstruct, SelfInstructSettings, Task, round_stats
from pipelines.stages.generating import GeneratingStage, follow_rows, listed

_TASKS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("instruction", pa.large_string(), nullable=False),
        pa.field("lang", pa.string(), nullable=False),
        pa.field("input", pa.large_string()),
        pa.field("output", pa.large_string()),
    ]
)
"""The tasks of a round that were new, in their order, whatever became of their instances."""

_REWRITES = pa.schema(
    [
        pa.field("place", pa.int32(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
    ]
)
"""The rewrites of a unit that were new, whatever became of their answers."""


class SelfInstructStage(GeneratingStage, SelfInstructSettings):
    """Self-Instruct: new tasks from seed tasks, checked, answered, with provenance.

    Rounds go on until `target` rows, `max_generated_tokens`, `max_rounds`, or too few rows a request (`min_yield`). Each
    round is one committed unit; a run that goes on takes the pool from the committed rounds and asks for nothing again.
    """

    kind: Literal["self_instruct"]
    version = 2
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
        rejected: Counter[str] = Counter()
        done = shards.committed_units(context.directory)
        for number in range(len(done)):
            record = done[number]
            figures = record["stats"]["rounds"][str(number)]
            rejected = Counter(record["ledger"]["rejected"])
            usage = Usage.from_json(record["stats"]["usage"])
            method.restore(_tasks(context, record), figures["asked"], figures["kept"], usage, record["capped"])
        if done:
            context.log(f"{len(done)} committed rounds taken over: {method.kept} of {target} rows")
        for made in method.rounds():
            before, rejected = rejected, Counter(made.account.ledger.rejected)
            tasks = pa.Table.from_pylist([_task_row(task) for task in made.tasks], schema=_TASKS)
            extra = {"capped": made.capped, "tasks": _publish(context, "tasks", made.number, tasks)}
            self.commit(context, made.number, made.account, INSTRUCTIONS, round_stats(made), extra)
            context.log(_progress(made, method, target))
            context.progress(min(method.kept, target), target, "rows")
            context.check_cancelled()
            rejected += Counter() if method.settings.yield_window == 1 else before
        context.log(f"self_instruct stopped: {stopped_because(method, rejected)}")
        self.finish(context, generator, started, {"stopped": method.stopped, "seeds": len(seeds)})


class EvolInstructStage(GeneratingStage, EvolSettings):
    """Evol-Instruct: the input's instructions made harder in depth and breadth, with eliminations and lineage.

    Writes the input's rows and the evolved ones (as the paper trains on all rounds). Begins while its input is still
    being made. Every 256 input rows with all that became of them are one committed unit.
    """

    kind: Literal["evol_instruct"]
    version = 2
    input: str | list[str] = Field(description="stage(s) whose conversations are evolved; rows of more than one turn pass through")

    def input_names(self) -> list[str]:
        return [*listed(self.input), *self.model_stages()]

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        done = shards.committed_units(context.directory)
        settings: EvolSettings = self.method_settings(EvolSettings, context)
        generator = self.make_generator(context)
        method = EvolInstruct(settings, generator, self.model_name, context.seed, context.limit)

        def known(unit: int) -> Known | None:
            if unit not in done or self.max_generated_tokens is not None:
                return None  # under a cap all is played again, from cached replies, so that it ends at the same request
            return _rewrites(context, done[unit])

        rows = follow_rows(context, listed(self.input), INSTRUCTIONS)
        for made in method.units(rows, known):
            if made.number in done:
                continue
            table = pa.table([[rewrite[column] for rewrite in made.rewrites] for column in range(len(_REWRITES))], schema=_REWRITES)
            extra = {"rewrites": _publish(context, "rewrites", made.number, table)}
            stats = {**made.account.stats(), "usage": made.usage.to_json()}
            self.commit(context, made.number, made.account, INSTRUCTIONS, stats, extra)
            kept = made.account.ledger.kept - made.account.ledger.rows_in
            first = made.number * UNIT_ROWS
            context.log(f"rows {first} to {first + made.account.ledger.rows_in - 1}: {kept} evolved rows kept")
            context.check_cancelled()
        self.finish(context, generator, started, {"stopped": "token_cap" if generator.capped else "rounds"})


def _publish(context: StageContext, folder: str, unit: int, table: pa.Table) -> str:
    """Write what later units depend on; the unit's record names it."""
    scratch = storage.scratch_file(context.directory)
    pq.write_table(table, scratch, compression="zstd")
    return shards.publish_by_content(scratch, context.directory, folder, unit)


def _read(context: StageContext, name: str) -> Iterator[dict[str, Any]]:
    with storage.open_input(storage.join(context.directory, name)) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=4096):
            yield from batch.to_pylist()


def _task_row(task: Task) -> dict[str, Any]:
    given, output = task.form or (None, None)
    return {"id": task.id, "instruction": task.instruction, "lang": task.lang, "input": given, "output": output}


def _tasks(context: StageContext, record: dict[str, Any]) -> list[Task]:
    return [
        Task(row["id"], row["instruction"], row["lang"], form=None if row["output"] is None else (row["input"], row["output"]))
        for row in _read(context, record["tasks"])
    ]


def _rewrites(context: StageContext, record: dict[str, Any]) -> Known:
    found: dict[int, dict[int, tuple[str, str]]] = {}
    for row in _read(context, record["rewrites"]):
        found.setdefault(row["place"], {})[row["round"]] = (row["id"], row["text"])
    return found


def _progress(made: Round, method: SelfInstruct, target: int) -> str:
    rows = len(made.account.rows)
    each = f"{rows / made.asked:.2f}" if made.asked else "-"
    share = f"{rows / len(made.tasks):.0%}" if made.tasks else "-"
    return (
        f"round {made.number}: {made.asked} requests, {len(made.tasks)} new tasks, {rows} rows ({each} a request, {share} of the "
        f"tasks); {method.kept} of {target} rows, {method.generator.usage.completion_tokens} tokens generated"
    )


_STOPPED = {
    "target": "the target is reached",
    "token_cap": "max_generated_tokens is reached",
    "max_rounds": "max_rounds is reached",
}

_REMEDIES = {
    "not_novel": "most tasks repeat others: give more varied seeds, raise instruction_sampling.temperature or max_similarity",
    "truncated": "most replies are cut: raise max_tokens of the step's sampling",
    "malformed": "most replies do not have the form that was asked for: use a larger model, or fewer tasks a call",
    "wrong_language": "most texts are in another language: use a model that writes it, or set languages",
    "too_long": "most tasks are too long: raise rules.max_length",
    "too_short": "most tasks are too short: lower rules.min_length",
    "keyword": "most tasks are about what a text model cannot do: change rules.keywords or the seeds",
    "refusal": "the model refuses most tasks: use other seeds or another model",
}


def stopped_because(method: SelfInstruct, rejected: Counter[str]) -> str:
    """Why the rounds ended, and for a collapsed yield what to change, by the commonest reasons of the last rounds."""
    if method.stopped in _STOPPED:
        return _STOPPED[method.stopped]
    total = rejected.total()
    common = [(name, count) for name, count in sorted(rejected.items(), key=lambda item: (-item[1], item[0]))[:3]]
    shown = ", ".join(f"{name} {count / total:.0%}" for name, count in common)
    reason = common[0][0].rsplit(":", 1)[-1] if common else ""
    remedy = _REMEDIES.get(reason, "use a larger model, other seeds, or looser rules")
    return (
        f"the last {method.settings.yield_window} rounds made {method.recent_yield:.2f} rows a request, under min_yield "
        f"{method.settings.min_yield:g} (set aside: {shown or 'nothing'}). {remedy[0].upper()}{remedy[1:]}; or lower min_yield"
    )
