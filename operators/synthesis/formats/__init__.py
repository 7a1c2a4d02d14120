"""Formats of chat data, to and from the tables CONVERSATIONS and PREFERENCES: which there are, and how a row is told.

Reading loses nothing or rejects the row with a reason; so does writing: `write` reads back what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import pyarrow as pa

from operators import tables
from operators.synthesis.formats import alpaca, labels, llama_factory, messages, pairs, sharegpt
from operators.synthesis.formats.fields import Row, RowError, language
from operators.synthesis.formats.labels import LABELLED
from operators.synthesis.formats.llama_factory import Dataset, Formatting
from operators.synthesis.requests import Reject
from operators.synthesis.rows import INSTRUCTIONS

Format = Literal["seed_tasks", "alpaca", "sharegpt", "messages", "dpo", "kto"]
Table = Literal["conversations", "preferences", "labelled"]
Written = Literal["alpaca", "sharegpt", "messages", "dpo", "kto", "llama_factory"]
Reader = Callable[[Mapping[str, Any], str], Iterator[Row]]
Writer = Callable[[Mapping[str, Any]], Row]

SCHEMAS: dict[Table, pa.Schema] = {"conversations": INSTRUCTIONS, "preferences": tables.PREFERENCES, "labelled": LABELLED}
TABLES: dict[Format, Table] = {
    "seed_tasks": "conversations", "alpaca": "conversations", "sharegpt": "conversations", "messages": "conversations",
    "dpo": "preferences", "kto": "labelled",
}  # fmt: skip

READERS: dict[str, Reader] = {
    "seed_tasks": alpaca.from_seed_task,
    "alpaca": alpaca.from_alpaca,
    "sharegpt": sharegpt.from_sharegpt,
    "messages": messages.from_messages,
    "dpo": pairs.from_pair,
    "kto": labels.from_label,
}

WRITERS: dict[tuple[Table, Written], Writer] = {
    ("conversations", "alpaca"): alpaca.to_alpaca,
    ("conversations", "sharegpt"): sharegpt.to_sharegpt,
    ("conversations", "messages"): messages.to_messages,
    ("preferences", "alpaca"): pairs.to_alpaca_pair,
    ("preferences", "sharegpt"): pairs.to_sharegpt_pair,
    ("preferences", "messages"): pairs.to_pair,
    ("preferences", "dpo"): pairs.to_pair,
    ("labelled", "alpaca"): labels.to_alpaca_label,
    ("labelled", "sharegpt"): labels.to_sharegpt_label,
    ("labelled", "messages"): labels.to_label,
    ("labelled", "kto"): labels.to_label,
}


def parse_row(row: Mapping[str, Any], form: Format | Dataset, source: str, number: int) -> list[Row] | Reject:
    """The rows of one object of a file. The id is the row's own, else a hash of file and row number."""
    own = row.get("id")
    named = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
    identity = str(own) if named else tables.stable_id(source, number)
    try:
        read = llama_factory.read(form, row, identity) if isinstance(form, Dataset) else READERS[form](row, identity)
        return [{**found, "lang": language(found)} for found in read]
    except RowError as error:
        return Reject(error.reason, detail=f"{source}, row {number}: {error}")


def detect(row: Mapping[str, Any]) -> Format:
    """The format whose fields the row has. Raises ValueError where that is none, or more than one."""
    names = {name for name, value in row.items() if value is not None}
    found: list[Format] = []
    if {"instruction", "instances"} <= names:
        found.append("seed_tasks")
    if {"chosen", "rejected"} <= names:
        found.append("dpo")
    if names & {"label", "kto_tag"}:
        if names & {"messages", "conversations"} or {"prompt", "completion"} <= names or {"instruction", "output"} <= names:
            found.append("kto")
    elif not found:
        shapes: list[tuple[Format, set[str]]] = [
            ("alpaca", {"instruction", "output"}),
            ("sharegpt", {"conversations"}),
            ("messages", {"messages"}),
        ]
        found += [form for form, needed in shapes if needed <= names]
    if len(found) != 1:
        told = f"it could be {' or '.join(found)}" if found else "its fields are those of none"
        raise ValueError(f"the format cannot be told from the fields {sorted(names)}: {told}; set `format`")
    return found[0]


def table_of_schema(names: list[str]) -> Table | None:
    """Which table columns of these names are, None where it is none of chat data."""
    if {"prompt", "chosen", "rejected"} <= set(names):
        return "preferences"
    if "messages" not in names:
        return None
    return "labelled" if "label" in names else "conversations"


def write(row: Row, table: Table, form: Written, formatting: Formatting = "sharegpt") -> Row:
    """The row in a format. Raises RowError where it does not fit, or would come back as another row."""
    if form == "llama_factory":
        made = llama_factory.write(row, formatting, table)
    else:
        made = WRITERS[table, form](row)
    (back,) = _read_back(made, table, form, formatting, row["id"])
    kept = ("prompt", "chosen", "rejected", "margin") if table == "preferences" else ("messages", "tools", "input_start", "label")
    wanted = kept_by(row, table, form, formatting)
    for name in kept:
        if back.get(name) != wanted.get(name):
            raise RowError("not_exact", f"{name!r} would come back from {form} as {str(back.get(name))[:200]!r}")
    return made


def _read_back(made: Row, table: Table, form: Written, formatting: Formatting, identity: str) -> Iterator[Row]:
    if form == "llama_factory":
        entry = llama_factory.describe(formatting, table, "data")
        dataset = Dataset("data", llama_factory.Description.model_validate(entry), "data")
        return llama_factory.read(dataset, made, identity)
    reader: dict[Table, str] = {"conversations": form, "preferences": "dpo", "labelled": "kto"}
    return READERS[reader[table]](made, identity)


def kept_by(row: Row, table: Table, form: Written, formatting: Formatting = "sharegpt") -> Row:
    """What a format keeps of a row: OpenAI's form respells the JSON of calls and tools, only Alpaca's keeps instruction and
    input apart."""
    if table == "preferences":
        return pairs.respelled(row) if form in ("messages", "dpo") else row
    if form in ("messages", "kto"):
        return messages.respelled(row)
    split = form == "alpaca" or (form == "llama_factory" and formatting == "alpaca")
    return row if split else {**row, "input_start": None}
