"""LLaMA-Factory's `dataset_info.json`: which file a data set is, and which of its columns and tags mean what.

Read by the rules of LLaMA-Factory's own parser (src/llamafactory/data/parser.py): where `columns` or `tags` are given, those
that they do not name are absent; a column that is not named is no part of the data set. A described row is renamed to the
plain shape of its formatting and read as such, so that reading loses nothing silently: the readers of those shapes say why
a row does not fit.

Written are data files that LLaMA-Factory's converters (src/llamafactory/data/converter.py) take whole: they skip, with a
warning, conversations that do not alternate between user or observation and assistant or function call, so those are
rejected here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from cluster import storage
from operators.config import Settings, SettingsError, nearest, parse
from operators.synthesis.formats import alpaca, labels, messages, pairs, sharegpt
from operators.synthesis.formats.fields import Message, Row, RowError

Formatting = Literal["alpaca", "sharegpt", "openai"]
FILE_NAME = "dataset_info.json"
_ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_ENDINGS = (".json", ".jsonl", ".parquet", ".arrow")


class Columns(Settings):
    """Names of columns; None is absent. The defaults hold where a description has no `columns` at all."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class Tags(Settings):
    """How turns are written in ShareGPT and OpenAI formatting."""

    role_tag: str | None = None
    content_tag: str | None = None
    user_tag: str | None = None
    assistant_tag: str | None = None
    observation_tag: str | None = None
    function_tag: str | None = None
    system_tag: str | None = None


_COLUMNS = Columns(prompt="instruction", query="input", response="output", messages="conversations")
_TAGS = Tags(
    role_tag="from", content_tag="value", user_tag="human", assistant_tag="gpt",
    observation_tag="observation", function_tag="function_call", system_tag="system",
)  # fmt: skip


class Description(Settings):
    """One entry of `dataset_info.json`."""

    file_name: str = Field(description="the data file or folder, beside dataset_info.json")
    formatting: Formatting = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: Columns = _COLUMNS
    tags: Tags = _TAGS


@dataclass(frozen=True)
class Dataset:
    """A described data set and its files."""

    name: str
    description: Description
    pattern: str  # a file, or a glob of those in a folder

    @property
    def table(self) -> Literal["conversations", "preferences", "labelled"]:
        """Which rows it holds."""
        if self.description.columns.kto_tag is not None:
            return "labelled"
        return "preferences" if self.description.ranking else "conversations"


def load(path: str, names: list[str] | None = None) -> list[Dataset]:
    """The data sets of a `dataset_info.json` (or of the folder it lies in), those of `names` in their order, or all.

    Raises SettingsError for a name that is not there and for what cannot be read here, FileNotFoundError for a file.
    """
    path = path if path.endswith(".json") else storage.join(path, FILE_NAME)
    if not storage.exists(path):
        raise FileNotFoundError(f"no {FILE_NAME} at {path}")
    try:
        entries = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise SettingsError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise SettingsError(f"{path} must be an object of objects: a description for each data set")
    for name in names or []:
        if name not in entries:
            raise SettingsError(f"{path} has no data set {name!r}{nearest(name, list(entries))}")
    return [_dataset(path, name, entries[name]) for name in names or entries]


def _dataset(path: str, name: str, entry: dict[str, Any]) -> Dataset:
    where = f"{path}: {name}"
    elsewhere = [key for key in _ELSEWHERE if entry.get(key)]
    if elsewhere:
        raise SettingsError(f"{where}: lies elsewhere ({elsewhere[0]}); get its files and name them by `file_name`")
    found = parse(Description, entry, where)
    if found.num_samples is not None:
        raise SettingsError(f"{where}: `num_samples` draws rows at random; leave it out and use a `select` or `mix` stage")
    if found.subset is not None or found.folder is not None or found.split != "train":
        raise SettingsError(f"{where}: `subset`, `folder` and `split` belong to data sets of a hub; name one file by `file_name`")
    if found.columns.kto_tag is not None and found.ranking:
        raise SettingsError(f"{where}: give either `ranking` or `kto_tag`")
    if found.ranking and (found.columns.chosen is None or found.columns.rejected is None):
        raise SettingsError(f"{where}: `ranking` needs the columns `chosen` and `rejected`")
    pattern = storage.absolute(found.file_name, path.rpartition("/")[0] or ".")
    if not pattern.endswith(_ENDINGS):
        if "." in pattern.rsplit("/", 1)[-1]:
            raise SettingsError(f"{where}: {found.file_name} cannot be read; known endings: {', '.join(_ENDINGS)}")
        pattern = storage.join(pattern, "*")
    return Dataset(name, found, pattern)


# --- reading


def read(dataset: Dataset, row: Mapping[str, Any], identity: str) -> Iterator[Row]:
    """The row of a data set. Raises RowError."""
    description = dataset.description
    plain = _alpaca(row, description) if description.formatting == "alpaca" else _turns(row, description)
    for media in ("images", "videos", "audios"):
        column = getattr(description.columns, media)
        if column is not None and row.get(column):
            raise RowError("media", f"column {column!r} holds {media}: only text can be read")
    if description.columns.kto_tag is not None:
        yield from labels.from_label({**plain, "label": row.get(description.columns.kto_tag)}, identity)
    elif description.ranking:
        yield from pairs.from_pair(plain, identity)
    elif description.formatting == "alpaca":
        tool_text = plain.pop("tools", None)
        for found in alpaca.from_alpaca(plain, identity):
            yield {**found, "tools": tool_text or None}
    elif description.formatting == "openai":
        yield from messages.from_messages(plain, identity)
    else:
        yield from sharegpt.from_sharegpt(plain, identity)


def named_columns(dataset: Dataset) -> set[str]:
    """The columns that are part of the data set; others are left out, as LLaMA-Factory leaves them."""
    return {"id", "margin", *(value for value in dataset.description.columns.model_dump().values() if value is not None)}


def _column(row: Mapping[str, Any], name: str | None) -> Any:
    return row.get(name) if name is not None else None


def _alpaca(row: Mapping[str, Any], description: Description) -> Row:
    columns = description.columns
    found = {
        "instruction": _column(row, columns.prompt) or "",
        "input": _column(row, columns.query),
        "system": _column(row, columns.system),
        "history": _column(row, columns.history),
        "tools": _column(row, columns.tools),
    }
    if description.ranking:
        found |= {"chosen": _column(row, columns.chosen), "rejected": _column(row, columns.rejected), "margin": row.get("margin")}
    else:
        found["output"] = _column(row, columns.response)
    return {name: value for name, value in found.items() if value is not None and value != ""} | {
        "instruction": found["instruction"]
    }


def _turns(row: Mapping[str, Any], description: Description) -> Row:
    columns, tags = description.columns, description.tags
    roles = {
        tags.user_tag: ("human", "user"), tags.assistant_tag: ("gpt", "assistant"), tags.observation_tag: ("observation", "tool"),
        tags.function_tag: ("function_call", "function_call"), tags.system_tag: ("system", "system"),
    }  # fmt: skip
    openai = description.formatting == "openai"

    def turn(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given  # the reader says what is wrong
        role = given.get(tags.role_tag or "")
        if role is None or role not in roles:
            known = sorted(str(name) for name in roles if name is not None)
            raise RowError("unknown_role", f"unknown role {role!r}; the data set's tags are {', '.join(known)}")
        rest = {name: value for name, value in given.items() if name not in (tags.role_tag, tags.content_tag)}
        said = given.get(tags.content_tag or "")
        return {("role" if openai else "from"): roles[role][openai], ("content" if openai else "value"): said, **rest}

    given = _column(row, columns.messages)
    turns = [turn(item) for item in given] if isinstance(given, list) else given
    found: Row = {"system": _column(row, columns.system), "tools": _column(row, columns.tools)}
    if openai:
        if found["system"] and isinstance(turns, list) and isinstance(found["system"], str):
            turns = [{"role": "system", "content": found["system"]}, *turns]
        found.pop("system")
    elif found["system"] and isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") == "system":
        found.pop("system")  # a system message among the turns goes before the column
    if not description.ranking:
        return {**found, ("messages" if openai else "conversations"): turns}
    sides = {
        side: [turn(_column(row, column))] if isinstance(_column(row, column), Mapping) else _column(row, column)
        for side, column in (("chosen", columns.chosen), ("rejected", columns.rejected))
    }
    return {**found, ("prompt" if openai else "conversations"): turns, **sides, "margin": row.get("margin")}


# --- writing


def describe(formatting: Formatting, table: str, file_name: str) -> dict[str, Any]:
    """The entry of `dataset_info.json` for files that `write` has made."""
    entry: dict[str, Any] = {"file_name": file_name, "formatting": formatting}
    if formatting == "alpaca":
        columns = {"prompt": "instruction", "query": "input", "system": "system", "history": "history"}
        if table != "preferences":
            columns["response"] = "output"
    else:
        columns = {"messages": "conversations", "system": "system"}
        if table != "preferences":
            columns["tools"] = "tools"
    if table == "preferences":
        entry["ranking"] = True
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    if table == "labelled":
        columns["kto_tag"] = "label"
    return {**entry, "columns": columns}


def write(row: Mapping[str, Any], formatting: Formatting, table: str) -> Row:
    """A row for LLaMA-Factory; every column of the description is there, empty where the row has nothing. Raises RowError."""
    if formatting == "alpaca":
        made = {"preferences": pairs.to_alpaca_pair, "labelled": labels.to_alpaca_label}.get(table, alpaca.to_alpaca)(row)
        return {**made, "system": made.get("system", ""), "history": made.get("history", [])}
    made = {"preferences": pairs.to_sharegpt_pair, "labelled": labels.to_sharegpt_label}.get(table, sharegpt.to_sharegpt)(row)
    _alternating(made["conversations"], table == "preferences")
    tool_text = {} if table == "preferences" else {"tools": made.get("tools", "")}
    return {**made, "system": made.get("system", ""), **tool_text}


def _alternating(turns: list[Message], ranking: bool) -> None:
    for index, turn in enumerate(turns):
        if turn["from"] not in (("human", "observation"), ("gpt", "function_call"))[index % 2]:
            raise RowError("turns", "LLaMA-Factory takes turns that alternate between user or observation and assistant or call")
    if len(turns) % 2 != ranking:
        raise RowError("turns", f"LLaMA-Factory takes an {'odd' if ranking else 'even'} number of turns here, not {len(turns)}")
