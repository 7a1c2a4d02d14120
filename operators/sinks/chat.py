"""Chat data in the formats of other tools: rows of conversations, pairs or labels as JSON Lines or Parquet of one shape.

A row that the form has no place for, or that would come back from it as another row, is a counted reject.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from operators.config import SettingsError
from operators.synthesis import formats
from operators.synthesis.formats import Formatting, RowError, Table, Written, labels, llama_factory
from operators.synthesis.formats.fields import spelled

Container = Literal["jsonl", "jsonl.zst", "parquet"]
FORMS: tuple[Written, ...] = ("alpaca", "sharegpt", "messages", "dpo", "kto", "llama_factory")

_TEXT = pa.string()
_TURN = pa.struct([("from", _TEXT), ("value", _TEXT)])
_FUNCTION = pa.struct([("name", _TEXT), ("arguments", _TEXT)])
_CALL = pa.struct([("id", _TEXT), ("type", _TEXT), ("function", _FUNCTION)])
_MESSAGE = pa.struct([("role", _TEXT), ("content", _TEXT), ("tool_calls", pa.list_(_CALL)), ("tool_call_id", _TEXT)])
_TYPES: dict[str, pa.DataType] = {
    "conversations": pa.list_(_TURN), "messages": pa.list_(_MESSAGE), "prompt": pa.list_(_MESSAGE),
    "history": pa.list_(pa.list_(_TEXT)), "margin": pa.float32(), "label": pa.bool_(),
}  # fmt: skip
_FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("id", "instruction", "input", "output", "system", "history"),
    "sharegpt": ("id", "conversations", "system", "tools"),
    "messages": ("id", "messages", "tools"),
}
_PAIR_FIELDS: dict[str, tuple[str, ...]] = {
    "alpaca": ("id", "instruction", "input", "chosen", "rejected", "system", "history", "margin"),
    "sharegpt": ("id", "conversations", "chosen", "rejected", "system", "margin"),
    "messages": ("id", "prompt", "chosen", "rejected", "margin"),
}


def table_for(form: Written, names: list[str], where: str) -> Table:
    """Which rows the columns of an export's input hold. Raises SettingsError where the form cannot hold them."""
    table = formats.table_of_schema(names)
    wanted: dict[str, tuple[str, ...]] = {"dpo": ("preferences",), "kto": ("labelled", "preferences")}
    if table is None or table not in wanted.get(form, ("conversations", "preferences", "labelled")):
        held = "no chat data" if table is None else table
        needs = " or ".join(wanted.get(form, ("conversations", "preferences")))
        raise SettingsError(f"{where}: `format: {form}` needs {needs}, its input holds {held} (columns {', '.join(names)})")
    return table


def columns_of(table: Table, names: list[str]) -> list[str]:
    """The columns that a row is written from, and its language for the counts."""
    wanted = {
        "preferences": ("id", "prompt", "chosen", "rejected", "margin", "lang"),
        "labelled": ("id", "messages", "tools", "input_start", "label", "lang"),
        "conversations": ("id", "messages", "tools", "input_start", "lang"),
    }
    return [name for name in wanted[table] if name in names]


class ChatSink:
    """A file of chat data being written. `rejects` are rows of tables.REJECTS, `made` counts what was written."""

    def __init__(self, path: str, table: Table, form: Written, formatting: Formatting, container: Container, level: int) -> None:
        self.rejects: list[dict[str, Any]] = []
        self.rejected: Counter[str] = Counter()
        self.made = 0
        self._table, self._form, self._formatting = table, form, formatting
        self._halved = table == "preferences" and form == "kto"
        shape = "labelled" if self._halved else table
        self._schema = _schema(shape, form, formatting)
        self._file: Any = None
        if container == "parquet":
            self._stream: Any = pq.ParquetWriter(path, self._schema, compression="zstd", compression_level=level)
        else:
            self._file = open(path, "wb")  # noqa: SIM115 - closed by `close` or `abandon`
            packed = zstandard.ZstdCompressor(level=level, write_checksum=True)
            self._stream = packed.stream_writer(self._file, closefd=False) if container == "jsonl.zst" else self._file
        self._parquet = container == "parquet"

    def write(self, table: pa.Table) -> None:
        made: list[dict[str, Any]] = []
        buffer = io.BytesIO()
        for row in table.to_pylist():
            try:
                rows = self._rows(row)
                buffer.write(b"".join(orjson.dumps(item) + b"\n" for item in rows))
                made += rows
            except RowError as error:
                self._reject(row, error)
            except orjson.JSONEncodeError as error:  # half a surrogate pair, escaped in the JSON of a call or a tool
                self._reject(row, RowError("not_exact", f"it cannot be written as JSON: {error}"))
        self.made += len(made)
        if self._parquet:
            self._stream.write_table(pa.Table.from_pylist([self._flat(row) for row in made], schema=self._schema))
        else:
            self._stream.write(buffer.getbuffer())

    def _rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if self._halved:
            return [formats.write(half, "labelled", "kto") for half in labels.labelled(row)]
        return [formats.write(row, self._table, self._form, self._formatting)]

    def _flat(self, row: dict[str, Any]) -> dict[str, Any]:
        """In a table every row has one type: tools, which are JSON of any shape, become text."""
        tool_value = row.get("tools")
        return {**row, "tools": spelled(tool_value)} if "tools" in row and not isinstance(tool_value, str) else row

    def _reject(self, row: dict[str, Any], error: RowError) -> None:
        self.rejected[f"export:{error.reason}"] += 1
        shown = orjson.dumps({name: value for name, value in row.items() if value is not None}).decode()
        self.rejects.append({"id": row["id"], "text": shown, "operator": "export", "reason": error.reason, "detail": str(error)})

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self.abandon()

    def abandon(self) -> None:
        if self._parquet and self._stream is not None:
            self._stream.close()
        if self._file is not None:
            self._file.close()
        self._file = self._stream = None


def _schema(table: Table, form: Written, formatting: Formatting) -> pa.Schema:
    shape = {"llama_factory": formatting, "dpo": "messages", "kto": "messages"}.get(form, form)
    names = (_PAIR_FIELDS if table == "preferences" else _FIELDS)[shape]
    types = dict(_TYPES)
    if table == "preferences":
        types |= dict.fromkeys(("chosen", "rejected"), {"alpaca": _TEXT, "sharegpt": _TURN}.get(shape, pa.list_(_MESSAGE)))
    fields = [pa.field(name, types.get(name, _TEXT)) for name in names]
    return pa.schema([*fields, *([pa.field("label", pa.bool_())] if table == "labelled" else [])])


def dataset_info(name: str, formatting: Formatting, table: Table) -> bytes:
    """`dataset_info.json` of an export whose files lie in `data`."""
    entry = {name: llama_factory.describe(formatting, table, "data")}
    return orjson.dumps(entry, option=orjson.OPT_INDENT_2) + b"\n"
