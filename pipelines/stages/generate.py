"""The stage that asks a model about every row of any table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from operators import shards, tables
from operators.config import SettingsError, import_class
from operators.stage import StageContext
from operators.synthesis.flow import Flow
from operators.synthesis.requests import Reject, SamplingSettings
from operators.synthesis.rows import Account
from operators.synthesis.structured import schema_text
from operators.synthesis.template import Asking, Method, PromptTemplate, TemplateMethod, check_columns, shown, template_flow
from pipelines.stages.generating import GeneratingStage, Row, listed

_PROVENANCE = "generation"


class GenerateStage(GeneratingStage):
    """Ask a model about every row: a prompt over its columns, the reply (or the fields of a JSON reply) as new columns.

    Rows of documents, conversations or any other stage pass through with all their columns. With `json_schema` the engine
    holds the model to the schema and each property becomes a column; replies that are cut or do not fit are asked again up
    to `attempts` times and then rejected with the reason. `method` names a class of one's own (`package.module:Class` with
    `render`, `parse` and `fields`, see operators.synthesis.template.Method) instead of `prompt`.
    """

    kind: Literal["generate"]
    input: str | list[str] = Field(description="stage(s) whose rows are asked about")
    prompt: PromptTemplate | None = Field(default=None, description="the messages; `$column` stands for the row's value")
    method: str | None = Field(default=None, description="import path of a class that renders and parses, instead of `prompt`")
    options: dict[str, Any] = Field(default={}, description="arguments of the class that `method` names")
    column: str = Field(default="reply", min_length=1, description="name of the new column, where there is no json_schema")
    json_schema: dict[str, Any] | None = Field(default=None, description="JSON schema of an object; its properties become columns")
    samples: int = Field(default=1, ge=1, le=1024, description="replies to a row; each is a row, numbered in a column `sample`")
    attempts: int = Field(default=2, ge=1, le=16, description="draws of a reply that is cut, empty or does not fit the schema")
    sampling: SamplingSettings = Field(default=SamplingSettings(), description="how replies are drawn")

    def input_names(self) -> list[str]:
        return [*listed(self.input), *self.model_stages()]

    def validate_deep(self) -> None:
        super().validate_deep()
        self._method()
        if self.json_schema is not None:
            schema_text(self.json_schema, f"{self.kind}.json_schema")
        if self.prompt is not None:
            self.prompt.columns()

    def _method(self) -> Method:
        if (self.prompt is None) == (self.method is None):
            raise SettingsError(f"{self.kind}: give either `prompt` or `method`")
        if self.prompt is not None:
            if self.options:
                raise SettingsError(f"{self.kind}.options: are for `method`, there is none")
            made = TemplateMethod(self.prompt, self.column, self.json_schema)
            made.fields()
            return made
        assert self.method is not None
        found: Any = import_class(self.method, object, f"{self.kind}.method {self.method!r}")
        missing = [name for name in ("render", "parse", "fields") if not callable(getattr(found, name, None))]
        if missing:
            raise SettingsError(f"{self.kind}.method {self.method!r} lacks {', '.join(missing)}")
        try:
            own: Method = found(**self.options)
        except TypeError as error:
            raise SettingsError(f"{self.kind}.options do not fit {self.method!r}: {error}") from error
        return own

    def run(self, context: StageContext) -> None:
        started = time.monotonic()
        method, generator = self._method(), self.make_generator(context)
        schema = schema_text(self.json_schema) if self.json_schema is not None else None
        asking = Asking(self.sampling, schema, self.samples, self.attempts, context.seed)
        new = [
            *([pa.field("sample", pa.int32())] if self.samples > 1 else []),
            *method.fields(),
            pa.field(_PROVENANCE, tables.PROVENANCE),
        ]
        source = _Source(context, listed(self.input), self.prompt.columns() if self.prompt is not None else set(), new)
        template = self.prompt.model_dump() if self.prompt is not None else [self.method, self.options]
        provenance = {
            "generator": self.model_name,
            "revision": generator.revision,
            "template": tables.content_hash(template)[:16],
            "sampling": self.sampling.model_dump_json(),
            "seed": context.seed,
            "operation": "generate",
        }

        def flow_of(row: Row) -> tuple[int, Flow[Account]]:
            item = _item(row)
            added = {_PROVENANCE: {**provenance, "parents": [item]}}
            return asking.most_tokens, template_flow(row, item, method, asking, added, self.kind)

        def unasked(row: Row, account: Account) -> None:
            account.reject(_item(row), _text(row), Reject("token_cap"), created=False)

        self.run_rows(context, source.rows(), flow_of, unasked, lambda: source.schema, generator)
        self.finish(context, generator, started)


class _Source:
    """Rows of the inputs with all their columns; the schema of what comes out once the first part is there."""

    def __init__(self, context: StageContext, names: list[str], wanted: set[str], new: list[pa.Field]) -> None:
        self._context, self._names, self._wanted, self._new = context, names, wanted, new
        self._schema: pa.Schema | None = None

    @property
    def schema(self) -> pa.Schema:
        return self._schema if self._schema is not None else pa.schema(self._new)

    def rows(self) -> Iterator[Row | None]:
        """None for "nothing yet"; a trial run ends after its number of rows."""
        left = self._context.limit
        for part in self._context.follow(self._names):
            if part is None:
                yield None
                continue
            for _, batch in shards.read(part, batch_rows=256):
                self._check(batch.schema, part.path)
                rows = batch.to_pylist() if left is None else batch.slice(0, left).to_pylist()
                yield from rows
                if left is not None:
                    left -= len(rows)
                    if not left:
                        return

    def _check(self, found: pa.Schema, path: str) -> None:
        if self._schema is None:
            check_columns(self._wanted, [item.name for item in self._new], found.names, f"stage {self._context.stage}")
            self._schema = pa.schema([*found, *self._new])
        elif found.names != self._schema.names[: -len(self._new)]:
            raise SettingsError(f"{path} has the columns {found.names}, an earlier input {self._schema.names[: -len(self._new)]}")


def _item(row: Row) -> str:
    """What names a row among requests: its id, else its content."""
    identity = row.get("id")
    return identity if isinstance(identity, str) else tables.stable_id(shown(row))


def _text(row: Row) -> str:
    return str(row["text"]) if isinstance(row.get("text"), str) else shown(row)
