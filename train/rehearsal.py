"""Rehearsal: raw documents among conversations, as the model read them when it was pretrained.

A fine-tune that sees some of what came before forgets less of it (Robins 1995; for language models Scialom et al. 2022, who
rehearse 1%, and Ibrahim et al. 2024, who replay 5% in continued pretraining). A document has loss on all its tokens, no chat
template, and the end-of-text token where it ends.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cluster import storage
from operators import shards
from train import finetune

_PER_CALL = 64


def holds_documents(directory: str) -> bool:
    """True for a finished stage whose rows have `text` rather than `messages`. Raises ValueError when they have neither."""
    part = next(iter(shards.parts([directory])), None)
    if part is None:
        return False
    with storage.open_input(part.path) as stream:
        names = set(pq.read_schema(stream).names)
    if "messages" in names:
        return False
    if "text" not in names:
        raise ValueError(
            f"{part.path}: its rows have neither `messages` (conversations) nor `text` (documents), but {sorted(names)}"
        )
    return True


def documents(
    directory: str, tokenizer: PreTrainedTokenizerBase, max_length: int, aside: Counter[str]
) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Ids and tokens of the pieces of documents, batch by batch: a long document gives several pieces of `max_length` tokens.

    Documents without text, and those that contain the text of a control token, are set aside and counted.
    """
    for batch in finetune.rows_of([directory], ["id", "text"]):
        kept = usable(batch, tokenizer, aside)
        for start in range(0, kept.num_rows, _PER_CALL):
            some = kept.slice(start, _PER_CALL)
            ids: list[str] = []
            tokens: list[list[int]] = []
            for key, encoded in zip(some["id"].to_pylist(), encode(tokenizer, some["text"].to_pylist()), strict=True):
                for cut in pieces(encoded, max_length):
                    ids.append(key)
                    tokens.append(cut)
            yield ids, tokens


def usable(batch: pa.RecordBatch, tokenizer: PreTrainedTokenizerBase, aside: Counter[str]) -> pa.RecordBatch:
    """The rows with a text in which nothing would be read as control."""
    text = pc.fill_null(batch["text"], "")
    empty = pc.equal(pc.binary_length(text), 0)
    control = pc.and_not(pc.match_substring_regex(text, finetune.control_pattern(tokenizer)), empty)
    for reason, found in (("empty_document", empty), ("special_token_in_text", control)):
        count = int(pc.sum(found).as_py() or 0)
        if count:
            aside[reason] += count
    return batch.filter(pc.invert(pc.or_(empty, control)))


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text and the token that ends a document. Raises ValueError for a tokenizer without such a token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer names no end-of-text token, so documents cannot be told apart; set its eos_token")
    return [[*ids, int(end)] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def pieces(tokens: list[int], max_length: int) -> list[list[int]]:
    """Consecutive pieces of at most `max_length` tokens, of equal length but for one token; none of a single token."""
    count = -(-len(tokens) // max_length)
    edges = [len(tokens) * number // count for number in range(count + 1)]
    return [tokens[a:b] for a, b in itertools.pairwise(edges) if b - a > 1]


def row_numbers(directory: str) -> int:
    """How many rows of a finished stage survive."""
    return sum(batch.num_rows for part in shards.parts([directory]) for _, batch in shards.read(part, ["id"]))


def chosen_rows(directory: str, columns: Sequence[str], rows: np.ndarray) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """(which of `rows`, the rows) of a stage, batch by batch; `rows` are numbers among the surviving ones, ascending, unique."""
    before = 0
    for batch in finetune.rows_of([directory], columns):
        first, last = np.searchsorted(rows, [before, before + batch.num_rows])
        if last > first:
            yield np.arange(first, last), batch.take(pa.array(rows[first:last] - before))
        before += batch.num_rows
