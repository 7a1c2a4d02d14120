"""Named evaluation sets: held-out conversations, documents, and questions with choices; and that none was trained on.

A set's rows are drawn by a hash of their id, so that they are the same for every model and in every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cluster import storage
from operators import shards
from operators.tokens import hashing, holdout
from train import models, sft
from train.loader import IGNORE
from train.scoring import Row, log_probabilities
from train.settings_evaluate import ScoredSet, TrainedOn

_NAMED = 5  # overlapping rows that an error names


class Overlap(ValueError):
    """An evaluation set holds rows that a model was trained on."""


@dataclass(frozen=True)
class Item:
    """One row of a set: a conversation, a document, or a question with choices (`right` is the index of the answer)."""

    id: str
    lang: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    tools: str | None = None
    text: str | None = None
    choices: tuple[str, ...] = ()
    right: int = 0

    @property
    def content(self) -> str:
        """What is compared with training rows: all that is said, or the question with its answer."""
        if self.choices:
            return _joined([self.text or "", self.choices[self.right]])
        return self.text if self.text is not None else _joined([turn["content"] for turn in self.messages])


def _joined(texts: Sequence[str | None]) -> str:
    return "\n".join(text or "" for text in texts)


def read(chosen: ScoredSet, seed: int) -> list[Item]:
    """The rows of a set. Raises ValueError that names the file and line, or what to change where there is none."""
    if chosen.choices:
        found = sorted(_choices(chosen.choices), key=lambda item: (_hash([item.id])[0], item.id))[: chosen.max_rows]
    else:
        keep: dict[str, tuple[int, Item]] = {}
        for directory in chosen.inputs:
            for batch in _batches(directory):
                if chosen.held_out:
                    batch = batch.filter(pa.array(holdout.is_held_out(batch["id"], seed, chosen.held_out)))
                ranks = hashing.hash_strings(batch["id"], 0).tolist()
                rows = batch.to_pylist()
                keep |= {row["id"]: (rank, _item(row)) for rank, row in zip(ranks, rows, strict=True)}
                if len(keep) > 2 * chosen.max_rows + 4096:
                    keep = dict(sorted(keep.items(), key=lambda pair: (pair[1][0], pair[0]))[: chosen.max_rows])
        found = [item for _, (_, item) in sorted(keep.items(), key=lambda pair: (pair[1][0], pair[0]))[: chosen.max_rows]]
    if not found:
        why = f" at a held-out share of {chosen.held_out}; raise it here and in training" if chosen.held_out else ""
        raise ValueError(f"evaluation set {chosen.name!r} has no rows{why}")
    return found


def _item(row: dict[str, Any]) -> Item:
    if "text" in row:
        return Item(row["id"], row.get("lang") or "", text=row["text"])
    return Item(row["id"], row.get("lang") or "", messages=row["messages"], tools=row.get("tools"))


def _batches(directory: str) -> Iterator[pa.RecordBatch]:
    """Rows of a finished stage: id, lang, and text or messages with tools."""
    for part in shards.parts([directory]):
        with storage.open_input(part.path) as stream:
            names = pq.read_schema(stream).names
        wanted = ["id", "text", "lang"] if "messages" not in names else ["id", "messages", "tools", "lang"]
        if "id" not in names or not {"text", "messages"} & set(names):
            raise ValueError(f"{part.path} holds neither documents nor conversations (it has {names})")
        for _, batch in shards.read(part, [name for name in wanted if name in names], batch_rows=1024):
            yield batch


def _choices(files: Sequence[str]) -> Iterator[Item]:
    for path in files:
        with storage.open_input(path) as stream:
            lines = stream.read().decode("utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _choice(path, number, line)


def _choice(path: str, number: int, line: str) -> Item:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise ValueError(f"{where}: needs `question`, a string, `choices` and `answer`")
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{where}: `choices` must be at least two strings")
    if isinstance(answer, str) and answer in choices:
        right = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.isalpha() and 0 <= ord(answer.upper()) - 65 < len(choices):
        right = ord(answer.upper()) - 65
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        right = answer
    else:
        raise ValueError(f"{where}: `answer` must be one of `choices`, its letter (A is the first) or its index from 0")
    key = str(row.get("id") or f"{path.rsplit('/', 1)[-1]}:{number}")
    return Item(key, str(row.get("lang") or ""), text=row["question"], choices=tuple(choices), right=right)


# ---------------------------------------------------------------- decontamination


def _hash(texts: Sequence[str]) -> list[int]:
    """64-bit hashes of texts without white space and case: what is the same but for these is the same row."""
    column = pc.utf8_lower(pc.replace_substring_regex(pa.array(texts, pa.large_string()), r"\s+", ""))
    return [int(value) for value in hashing.hash_strings(column, 0)]


def refuse_overlap(sets: Sequence[tuple[ScoredSet, list[Item]]], trained: Sequence[TrainedOn], seed: int) -> None:
    """Raises Overlap that names rows of sets which some model was trained on, by content (white space and case apart) or by id.

    Training rows are read once, batch by batch; rows that a training stage itself held out are none. A row of another
    stage may bear the same id, so ids count only within the stage that a set's rows come from.
    """
    guarded = [(chosen, items) for chosen, items in sets if not chosen.allow_overlap]
    if not guarded:
        return
    owner: dict[int, list[tuple[str, str]]] = {}
    for chosen, items in guarded:
        for item, digest in zip(items, _hash([item.content for item in items]), strict=True):
            owner.setdefault(digest, []).append((chosen.name, item.id))
    wanted = np.array(sorted(owner), np.uint64)
    ids = {
        directory: pa.array([item.id for _, items in guarded for item in items], pa.string())
        for directory in {directory for chosen, _ in guarded for directory in chosen.inputs}
    }
    for source in trained:
        same = ids.get(source.directory)
        for batch in _batches(source.directory):
            batch = batch.filter(pa.array(~holdout.is_held_out(batch["id"], seed, source.held_out)))
            if "text" in batch.schema.names:
                texts = batch["text"].to_pylist()
            else:
                texts = [_joined([turn["content"] for turn in turns]) for turns in batch["messages"].to_pylist()]
            hit = np.isin(np.array(_hash(texts), np.uint64), wanted)
            if same is not None:
                hit |= pc.is_in(batch["id"].cast(pa.string()), value_set=same).to_numpy(zero_copy_only=False)
            if hit.any():
                rows = batch["id"].filter(pa.array(hit)).to_pylist()[:_NAMED]
                digests = [owner[value] for value in np.array(_hash(texts), np.uint64)[hit].tolist() if value in owner]
                names = sorted({name for pairs in digests for name, _ in pairs}) or [
                    chosen.name for chosen, _ in guarded if source.directory in chosen.inputs
                ]
                raise Overlap(
                    f"evaluation set {', '.join(map(repr, names))}: stage {source.stage!r} was trained on rows of it, "
                    f"{', '.join(map(repr, rows))} of {source.input!r} among them. Take them out of the training data, give both "
                    f"the same `held_out`, or set `allow_overlap: true` on the set and call its score by that name"
                )


# ---------------------------------------------------------------- scores


def score(
    chosen: ScoredSet, items: Sequence[Item], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    length: int, batch_tokens: int, device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows {"id", "lang", "tokens", "value"}: the summed negative log-likelihood in nats of the scored tokens (replies of a
    conversation; all tokens but the first of a document), or 1.0 and 0.0 for a question answered right and wrong.

    A choice is scored by its log-likelihood after the question over its length in UTF-8 bytes (as lm-evaluation-harness's
    acc_norm: Gao et al. 2021), which does not depend on the tokenizer. Rows beyond `length` tokens lose their
    beginning if questions, else what is beyond.
    """
    if chosen.measure == "accuracy":
        return _answered(items, model, tokenizer, length, batch_tokens, device)
    rows: list[Row] = []
    owner: list[int] = []
    talks = [number for number, item in enumerate(items) if item.text is None]
    if talks:
        models.as_chat(tokenizer, model)
        encoded = sft.encode_conversations(tokenizer, [items[n].messages for n in talks], [items[n].tools for n in talks])
        for number, (ids, labels) in zip(talks, encoded, strict=True):
            marked = np.array(labels[:length], np.int64) != IGNORE
            if marked[1:].any():
                rows.append(Row(np.array(ids[:length], np.int64), marked))
                owner.append(number)
    for number, item in enumerate(items):
        if item.text is not None:
            ids = tokenizer(item.text, add_special_tokens=False)["input_ids"][:length]  # type: ignore[index]
            if len(ids) > 1:
                rows.append(Row(np.array(ids, np.int64), np.ones(len(ids), bool)))
                owner.append(number)
    sums = log_probabilities(model, rows, batch_tokens, device)
    return [
        {"id": items[number].id, "lang": items[number].lang, "tokens": row.count, "value": round(-float(value), 4)}
        for number, row, value in zip(owner, rows, sums, strict=True)
    ]


def _answered(
    items: Sequence[Item], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    length: int, batch_tokens: int, device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    chat = bool(tokenizer.chat_template)
    rows: list[Row] = []
    for item in items:
        question = item.text or ""
        if chat:
            head = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        else:
            head = question
        start = tokenizer(str(head), add_special_tokens=False)["input_ids"]
        for choice in item.choices:
            # What follows a question is another word; in Chinese no space stands between.
            lead = " " if not chat and question[-1:].isascii() and not question[-1:].isspace() else ""
            tail = tokenizer(lead + choice, add_special_tokens=False)["input_ids"][: length - 1]  # type: ignore[index]
            kept = start[-(length - len(tail)) :]  # type: ignore[index]
            if not kept or not tail:
                raise ValueError(f"question {item.id!r} or one of its choices has no token")
            mark = np.zeros(len(kept) + len(tail), bool)
            mark[len(kept) :] = True
            rows.append(Row(np.array([*kept, *tail], np.int64), mark))
    sums = log_probabilities(model, rows, batch_tokens, device)
    found, place = [], 0
    for item in items:
        scores = sums[place : place + len(item.choices)] / [len(choice.encode()) for choice in item.choices]
        tokens = sum(row.count for row in rows[place : place + len(item.choices)])
        place += len(item.choices)
        # Rounded before they are compared, so that a tie is one on every machine; of equals the first counts.
        right = int(np.argmax(np.round(scores, 6))) == item.right
        found.append({"id": item.id, "lang": item.lang, "tokens": tokens, "value": float(right)})
    return found
