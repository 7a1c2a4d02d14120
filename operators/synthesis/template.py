"""A prompt over the columns of any table: the row in, a reply or the fields of a JSON object as new columns.

`$column` in a prompt is replaced by the row's value, once: text of a row is never expanded again. Lists and structs are
shown as JSON, a missing value as nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, Protocol

import pyarrow as pa
from pydantic import Field

from operators.config import Settings, SettingsError, nearest
from operators.synthesis.flow import MALFORMED, Flow, ask_all
from operators.synthesis.requests import Messages, Reject, Reply, Request, SamplingSettings, request_seed
from operators.synthesis.rows import Account
from operators.synthesis.structured import parse_json, schema_text

Row = dict[str, Any]


class PromptTemplate(Settings):
    """The messages of a prompt; `$column` stands for the row's value, `$$` for a dollar."""

    system: str | None = Field(default=None, description="system message")
    user: str = Field(description="user message")
    reply: str | None = Field(default=None, description="beginning of the reply, which the model continues")

    def render(self, row: Row) -> Messages:
        values = {name: shown(value) for name, value in row.items()}
        sections = (("system", self.system), ("user", self.user), ("assistant", self.reply))
        return tuple((role, Template(text).substitute(values)) for role, text in sections if text is not None)

    def columns(self) -> set[str]:
        """The columns that the prompt reads. Raises SettingsError for a `$` that names none."""
        found: set[str] = set()
        for text in (self.system, self.user, self.reply):
            if text is None:
                continue
            if not Template(text).is_valid():
                raise SettingsError("prompt: a `$` stands before something that is no column's name; write `$$` for a dollar")
            found.update(Template(text).get_identifiers())
        return found


class Method(Protocol):
    """A user's own way to ask and to read, named by import path instead of `prompt`."""

    def render(self, row: Row) -> Messages:
        """The messages of a row; pure."""

    def parse(self, reply: Reply, row: Row) -> Row | Reject:
        """New columns from a reply, or why there are none; pure. Reasons of flow.MALFORMED are asked again."""

    def fields(self) -> Sequence[pa.Field]:
        """The new columns."""


@dataclass(frozen=True)
class TemplateMethod:
    """A prompt template whose reply becomes one column, or the fields of a JSON object."""

    prompt: PromptTemplate
    column: str
    schema: dict[str, Any] | None = None

    def render(self, row: Row) -> Messages:
        return self.prompt.render(row)

    def parse(self, reply: Reply, row: Row) -> Row | Reject:
        if self.schema is None:
            if reply.truncated:
                return Reject("truncated")
            text = reply.text.strip()
            return {self.column: text} if text else Reject("empty")
        found = parse_json(reply, schema_text(self.schema))
        if isinstance(found, Reject):
            return found
        return {item.name: _as(found.get(item.name), item.type) for item in self.fields()}

    def fields(self) -> list[pa.Field]:
        """The new columns: the reply, or one for each property of the schema (Arrow's type, JSON text for nested ones)."""
        if self.schema is None:
            return [pa.field(self.column, pa.large_string())]
        properties = self.schema.get("properties")
        if self.schema.get("type") != "object" or not isinstance(properties, dict) or not properties:
            raise SettingsError("schema: must be of type `object` with `properties`, which become columns")
        return [pa.field(name, _arrow_type(item)) for name, item in properties.items()]


_ARROW: dict[str, pa.DataType] = {
    "string": pa.large_string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_(),
}  # fmt: skip


def _arrow_type(schema: Any) -> pa.DataType:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "array" and isinstance(schema.get("items"), dict) and schema["items"].get("type") in _ARROW:
        return pa.list_(_ARROW[schema["items"]["type"]])
    return _ARROW.get(kind, pa.large_string()) if isinstance(kind, str) else pa.large_string()


def _as(value: Any, kind: pa.DataType) -> Any:
    """A JSON value for a column: what has no type of its own is kept as JSON text."""
    if value is None or (not pa.types.is_large_string(kind)) or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def shown(value: Any) -> str:
    """A value as a prompt shows it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def check_columns(wanted: set[str], new: Sequence[str], existing: Sequence[str], where: str) -> None:
    """Raises SettingsError when a prompt reads a column that is not there, or a new one has the name of an old one."""
    for name in sorted(wanted):
        if name not in existing:
            raise SettingsError(
                f"{where}: the prompt reads ${name}, but its input has no such column{nearest(name, list(existing))}"
            )
    for name in new:
        if name in existing:
            raise SettingsError(f"{where}: the input has a column {name!r} already; give the new one another name")


@dataclass(frozen=True)
class Asking:
    """How the replies to one row are drawn: `samples` of them, each again up to `attempts` times while it is malformed."""

    sampling: SamplingSettings
    json_schema: str | None
    samples: int
    attempts: int
    seed: int

    @property
    def tries(self) -> int:
        """Greedy decoding gives the same reply again: it is asked once."""
        return self.attempts if self.sampling.temperature else 1

    @property
    def most_tokens(self) -> int:
        return self.samples * self.tries * self.sampling.max_tokens

    def request(self, messages: Messages, item: str, sample: int, attempt: int) -> Request:
        seed = request_seed(self.seed, "generate", item, sample, attempt) if self.sampling.temperature else 0
        return Request(messages, self.sampling, seed, sample, self.json_schema, redraw=attempt > 0)


def template_flow(row: Row, item: str, method: Method, asking: Asking, added: Row, operator: str) -> Flow[Account]:
    """Every sample that parses is a row: the input's columns, `added`, `sample` where there are several, and the method's.

    The first row takes the input row's place in the account, the others are created. Where no sample parses, the input
    row is rejected with the reason of the first one.
    """
    account = Account(operator)
    messages = method.render(row)
    results: dict[int, tuple[Row | Reject, Reply]] = {}
    left = list(range(asking.samples))
    for attempt in range(asking.tries):
        replies = yield from ask_all([asking.request(messages, item, sample, attempt) for sample in left])
        for sample, reply in zip(left, replies, strict=True):
            results[sample] = (reply.unanswered or method.parse(reply, row), reply)
        left = [sample for sample in left if _again(results[sample][0])]
        if not left:
            break
    good = [sample for sample, (found, _) in sorted(results.items()) if not isinstance(found, Reject)]
    first = good[0] if good else 0  # the sample that stands for the input row
    for sample, (found, reply) in sorted(results.items()):
        if isinstance(found, Reject):
            text = "\n\n".join([*(content for _, content in messages), reply.text])
            account.reject(item, text, found, created=sample != first)
        else:
            numbered = {"sample": sample} if asking.samples > 1 else {}
            account.keep({**row, **added, **numbered, **found}, operator, created=sample != first)
    return account


def _again(found: Row | Reject) -> bool:
    return isinstance(found, Reject) and found.reason in MALFORMED
