"""What all stages that ask a model have in common: the model, the cap, the price, units of rows, and the account of spending."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from cluster import storage
from operators import shards, tables
from operators.config import Settings, SettingsError
from operators.ledger import Equation, merge_stats
from operators.stage import Stage, StageContext
from operators.synthesis.cache import ReplyCache
from operators.synthesis.engine import EngineSettings, check_engine, engine_revision
from operators.synthesis.flow import Flow, asks_nothing
from operators.synthesis.generator import Generator, Usage
from operators.synthesis.packaged import PREFIX, ModelError
from operators.synthesis.requests import Reject
from operators.synthesis.rows import Account, table_of

UNIT_ROWS = 256  # input rows of a unit: what a crash makes to be parsed again (their replies come from the cache)

Row = dict[str, Any]


class PriceSettings(Settings):
    """What tokens cost, in any currency."""

    prompt_per_million: float = Field(default=0.0, ge=0, description="price of a million prompt tokens")
    completion_per_million: float = Field(default=0.0, ge=0, description="price of a million generated tokens")
    currency: str = Field(default="USD", description="named beside the sums")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt_per_million + completion_tokens * self.completion_per_million) / 1e6


class GeneratingStage(Stage):
    """Base of the stages with a generator.

    A stage whose rows do not depend on each other builds a flow for each input row and calls `run_rows`; others play
    their flows themselves and call `commit` and `finish`.
    """

    resource: ClassVar[str] = "generate"
    follows: ClassVar[bool] = True
    operational: ClassVar[frozenset[str]] = frozenset({"price"})

    generator: EngineSettings = Field(
        default=EngineSettings(), description="the model; stages with equal settings share one engine"
    )
    max_generated_tokens: int | None = Field(default=None, ge=1, description="cap on generated tokens, cached replies included")
    price: PriceSettings | None = Field(default=None, description="prices, for the cost in the report")
    keep_replies: bool = Field(default=False, description="write a column `replies` with the model's raw replies behind each row")

    def validate_deep(self) -> None:
        try:
            check_engine(self.generator)
        except ModelError as error:
            raise SettingsError(f"{self.kind}.generator.{error}") from error

    def needs_ray(self) -> bool:
        return self.generator.endpoint is None

    def model_stages(self) -> list[str]:
        """The stage whose model generates, if `generator.model` is `@STAGE`. Part of the stage's inputs."""
        return [self.generator.model[1:]] if self.generator.model.startswith("@") else []

    def files(self) -> list[str]:
        model = self.generator.model
        local = self.generator.endpoint is None and not model.startswith((PREFIX, "@"))
        folder = getattr(self, "prompts", None)
        return [*([storage.join(model, "*.*")] if local else []), *([storage.join(folder, "*", "*.txt")] if folder else [])]

    def engine_settings(self, context: StageContext) -> EngineSettings:
        """The generator's settings with the path of the model in place of `@STAGE`."""
        return located(self.generator, context)

    def make_generator(self, context: StageContext) -> Generator:
        """A generator over the run's reply cache; the engine is asked for when the first reply is missing."""
        run = shards.run_directory(context.directory)
        settings = self.engine_settings(context)

        def progress(done: int, total: int) -> None:
            if total:
                context.progress(done, total, "items")
            if generator.seconds > 0:
                context.measured({"tokens_per_second": generator.drawn.completion_tokens / generator.seconds})

        generator = Generator(
            engine=lambda: context.services["engine"](settings),
            revision=engine_revision(settings, context.cache_directory),
            cache=ReplyCache(storage.join(run, ".replies"), context.stage),
            max_completion_tokens=self.max_generated_tokens,
            cancelled=context.cancelled,
            progress=progress,
            keep_replies=self.keep_replies,
            max_model_len=settings.max_model_len if settings.endpoint is None else None,
        )
        return generator

    def prompt_folder(self, context: StageContext) -> str | None:
        folder = getattr(self, "prompts", None)
        return context.path(folder) if folder else None

    def method_settings(self, model: type[Settings], context: StageContext, **changed: Any) -> Any:
        """The part of the stage's settings that a method's own settings class declares; `prompts` becomes a full path."""
        values = {name: getattr(self, name) for name in model.model_fields}
        if "prompts" in values:
            values["prompts"] = self.prompt_folder(context)
        return model.model_validate({**values, **changed})

    @property
    def model_name(self) -> str:
        """The model as provenance names it."""
        return short_name(self.generator.model)

    def run_rows(
        self,
        context: StageContext,
        rows: Iterable[Row | None],
        flow_of: Callable[[Row], tuple[int, Flow[Account]]],
        unasked: Callable[[Row, Account], None],
        schema: pa.Schema | Callable[[], pa.Schema],
        generator: Generator,
        unit_rows: int = UNIT_ROWS,
        settle: Callable[[Row, Account], None] | None = None,
    ) -> None:
        """One flow a row, one unit for every `unit_rows` rows, in order; rows of committed units are not asked again.

        `flow_of(row)` is (most completion tokens, flow) and the flow returns the row's account, into which the row itself
        is entered as well; `unasked(row, account)` enters a row that the token cap left out. `rows` may give None for
        "nothing yet" (see StageContext.follow). `settle(row, account)` may change the account of a row of a new unit; it is
        called in the order of the rows, whatever the order of completion, so it may decide by what came before.
        """
        done = shards.committed_units(context.directory)
        for record in done.values():
            generator.usage.merge(Usage.from_json(record["stats"].get("usage", {})))
            generator.capped |= bool(record.get("capped"))
        waiting: deque[Row] = deque()  # rows whose outcome is still to come, in order

        def flows() -> Iterator[tuple[int, Flow[Account]] | None]:
            number = 0
            for row in rows:
                if row is None:
                    yield None
                    continue
                if number // unit_rows not in done:
                    waiting.append(row)
                    yield flow_of(row)
                else:
                    waiting.append(row)
                    yield 0, asks_nothing(Account(""))  # its unit is committed
                number += 1

        unit, inside, capped = 0, 0, False
        account, usage = Account(self.kind), Usage()
        for outcome in generator.run(flows()):
            row = waiting.popleft()
            if unit not in done:
                capped = capped or not outcome.admitted
                if outcome.value is None:
                    unasked(row, account)
                else:
                    if settle is not None:
                        settle(row, outcome.value)
                    if self.keep_replies:
                        for made in outcome.value.rows:
                            made["replies"] = [reply.text for reply in outcome.replies]
                    account.merge(outcome.value)
                usage.merge(outcome.usage)
            inside += 1
            if inside == unit_rows:
                self._close_unit(context, unit, unit in done, account, usage, schema, capped)
                unit, inside, account, usage = unit + 1, 0, Account(self.kind), Usage()
                context.check_cancelled()
        if inside or not unit:
            self._close_unit(context, unit, unit in done, account, usage, schema, capped)

    def _close_unit(
        self,
        context: StageContext,
        unit: int,
        done: bool,
        account: Account,
        usage: Usage,
        schema: pa.Schema | Callable[[], pa.Schema],
        capped: bool,
    ) -> None:
        if not done:
            schema = schema if isinstance(schema, pa.Schema) else schema()
            self.commit(context, unit, account, schema, {**account.stats(), "usage": usage.to_json()}, {"capped": capped})

    def commit(
        self,
        context: StageContext,
        unit: int,
        account: Account,
        schema: pa.Schema,
        stats: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Write an account as a committed unit. `stats` should hold the `usage` of the unit's replies; `extra` goes into the
        unit's record beside them, for a stage that reads it when it goes on."""
        if self.keep_replies:
            schema = schema.append(pa.field("replies", pa.list_(pa.large_string())))
        writer = shards.UnitWriter(context.directory, unit)
        try:
            writer.write(table_of(account.rows, schema))
            writer.reject(tables.rejects_table(account.rejects))
            writer.commit(account.ledger, stats, extra)
        except BaseException:
            writer.abandon()
            raise

    def finish(
        self,
        context: StageContext,
        generator: Generator,
        started: float,
        stats: dict[str, Any] | None = None,
        equations: Sequence[Equation] = (),
    ) -> None:
        """The manifest: the units' statistics, tokens in and out and their price; what was waited for goes to the timings."""
        usage = Usage()
        for record in shards.committed_units(context.directory).values():
            usage.merge(Usage.from_json(record["stats"].get("usage", {})))
        found: dict[str, Any] = {**usage.to_json()}
        timings = {"seconds": time.monotonic() - started, **generator.timings()}
        if self.price is not None:
            timings["cost"] = self.price.cost(usage.prompt_tokens, usage.completion_tokens)
            timings["cost_drawn"] = self.price.cost(generator.drawn.prompt_tokens, generator.drawn.completion_tokens)
            timings["currency"] = self.price.currency
        context.finish(stats=merge_stats(found, stats or {}), timings=timings, equations=equations)


def located(settings: EngineSettings, context: StageContext) -> EngineSettings:
    """Settings with the path of the model in place of `@STAGE`."""
    if not settings.model.startswith("@"):
        return settings
    return settings.model_copy(update={"model": context.model_of(settings.model[1:])})


def short_name(model: str) -> str:
    """A model without the folder it lies in."""
    return model.removeprefix(PREFIX) if model.startswith((PREFIX, "@")) else Path(model).name


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def follow_rows(context: StageContext, names: Iterable[str], schema: pa.Schema) -> Iterator[Row | None]:
    """Rows of input stages in order, also while those are still being made (then None for "nothing yet").

    Columns of the schema that a stage does not write are null.
    """
    for part in context.follow(list(names)):
        if part is None:
            yield None
            continue
        for _, batch in shards.read(part, batch_rows=1024):
            for row in batch.select([name for name in schema.names if name in batch.schema.names]).to_pylist():
                yield {name: row.get(name) for name in schema.names}


def input_rows(context: StageContext, names: Iterable[str], schema: pa.Schema) -> Iterator[Row]:
    """As follow_rows, waiting where there is nothing yet."""
    for row in follow_rows(context, names, schema):
        if row is None:
            context.check_cancelled()
            time.sleep(0.2)
        else:
            yield row


__all__ = ["UNIT_ROWS", "GeneratingStage", "PriceSettings", "Reject", "Row", "follow_rows", "input_rows", "listed"]
