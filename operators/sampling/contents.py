"""What a row of any table says, and to which group it belongs: documents, conversations and preference pairs alike.

Sizes are those of the texts alone: a chat template adds a few tokens a message, which depend on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.synthesis.curate.turns import Turns
from operators.tokens.encode import Encoder

Unit = Literal["documents", "bytes", "characters", "tokens", "estimated_tokens"]
Counted = Literal["all", "replies"]

TURNS = "turns"  # the group column that tells conversations of several questions from those of one
MULTI_TURN, SINGLE_TURN = "multi_turn", "single_turn"
_SPOKEN = ("messages", "prompt", "chosen", "rejected")
_REPLIES = ("assistant", "function_call")
_ASCII_A_TOKEN, _TOKENS_A_CHARACTER = 4.0, 0.7


def text_columns(names: Sequence[str], counted: Counted, where: str) -> list[str]:
    """The columns that hold what a row says. Raises KeyError, beginning with `where`, when there is none."""
    if "text" in names:
        return ["text"]
    spoken = [name for name in _SPOKEN if name in names and not (counted == "replies" and name == "prompt")]
    if not spoken:
        raise KeyError(f"{where} has no column 'text' or 'messages', nor 'prompt' and 'chosen'; it has {list(names)}")
    return spoken


def columns_of_groups(groups: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns that groups are made of: a group may be a field of a column (`provenance.operation`) or `turns`."""
    found = []
    for group in groups:
        if group == TURNS and TURNS not in names:
            found.append("messages" if "messages" in names else "prompt")
        else:
            found.append(group if group in names else group.split(".", 1)[0])
    return found


def group_values(batch: pa.RecordBatch, group: str) -> pa.Array:
    """string[rows], empty where it is null. Raises KeyError for a field that the column lacks."""
    if group == TURNS and TURNS not in batch.schema.names:
        return turns_of(batch)
    if group in batch.schema.names:
        column: Any = batch[group]
    else:
        first, *path = group.split(".")
        column = batch[first]
        for name in path:
            if not pa.types.is_struct(column.type) or column.type.get_field_index(name) < 0:
                raise KeyError(f"column {first!r} of type {column.type} has no field {'.'.join(path)!r}")
            column = pc.struct_field(column, name)
    return pc.fill_null(column.cast(pa.string()), "")


def turns_of(batch: pa.RecordBatch) -> pa.Array:
    """string[rows]: `multi_turn` where the user speaks more than once, else `single_turn`."""
    asked = spoken(batch, "messages" if "messages" in batch.schema.names else "prompt")
    questions = np.bincount(asked.row[asked.is_role("user")], minlength=batch.num_rows)
    return pa.array(np.where(questions > 1, MULTI_TURN, SINGLE_TURN))


def spoken(batch: pa.RecordBatch, column: str) -> Turns:
    """The messages of one column."""
    return Turns(pa.table({"messages": batch[column]}))


def sizes(batch: pa.RecordBatch, unit: Unit, counted: Counted, columns: Sequence[str], encoder: Encoder | None) -> np.ndarray:
    """int64[rows] of what `columns` say, in `unit`s; with `counted` replies, of what the assistant says in conversations."""
    if unit == "documents":
        return np.ones(batch.num_rows, np.int64)
    total = np.zeros(batch.num_rows, np.int64)
    for column in columns:
        if column == "text":
            total += _measured(batch[column], unit, encoder)
            continue
        turns = spoken(batch, column)
        said = turns.of(*_REPLIES) if counted == "replies" else turns.all
        total += said.sum(_measured(said.text, unit, encoder))
    return total


def _measured(texts: Any, unit: Unit, encoder: Encoder | None) -> np.ndarray:
    if unit == "tokens":
        assert encoder is not None
        return np.diff(encoder.encode(texts)[1])
    if unit == "estimated_tokens":
        return estimated_tokens(texts)
    length = pc.binary_length if unit == "bytes" else pc.utf8_length
    return np.asarray(pc.fill_null(length(texts), 0).to_numpy(zero_copy_only=False)).astype(np.int64)


def estimated_tokens(texts: Any) -> np.ndarray:
    """int64[texts]: a token for 4 ASCII characters or for 1/0.7 others (about 1.4 Chinese characters), rounded up.

    From lengths alone: a character beyond ASCII is taken to have three bytes, as Chinese has. Tokenizers differ by a third
    and more; shares of two languages that must be met to the percent need the tokenizer of the model.
    """
    count = pc.fill_null(pc.utf8_length(texts), 0).to_numpy(zero_copy_only=False).astype(np.float64)
    size = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False).astype(np.float64)
    wide = np.minimum(count, (size - count) / 2)
    return np.ceil((count - wide) / _ASCII_A_TOKEN + wide * _TOKENS_A_CHARACTER - 1e-9).astype(np.int64)
