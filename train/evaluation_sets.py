"""Named evaluation sets: held-out conversations, documents, preference pairs, questions with choices; and none trained on.

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
from train import dpo, models, sft
from train.loader import IGNORE
from train.scoring import Row, log_probabilities
from train.settings_evaluate import ScoredSet, TrainedOn

_NAMED = 5  # overlapping rows that an error names


class Overlap(ValueError):
    """An evaluation set holds rows that a model was trained on."""


@dataclass(frozen=True)
class Item:
    """One row of a set: a conversation, a document, a preference pair (`messages` is its prompt), or a question with choices
    (`right` is the index of the answer)."""

    id: str
    lang: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    tools: str | None = None
    text: str | None = None
    choices: tuple[str, ...] = ()
    right: int = 0
    chosen: list[dict[str, str]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)

    @property
    def content(self) -> str:
        """What is compared with training rows: all that is said, or the question with its answer."""
        if self.choices:
            return _joined([self.text or "", self.choices[self.right]])
        if self.text is not None:
            return self.text
        return _joined([turn["content"] for turn in [*self.messages, *self.chosen, *self.rejected]])


def _joined(texts: Sequence[str | None]) -> str:
    return "\n".join(text or "" for text in texts)


def read(chosen: ScoredSet, seed: int) -> list[Item]:
    """The rows of a set. Raises ValueError that names the file and line, or what to change where there is none."""
    found = drawn(chosen, seed)
    if not found:
        why = f" at a held-out share of {chosen.held_out}; raise it here and in training" if chosen.held_out else ""
        raise ValueError(f"evaluation set {chosen.name!r} has no rows{why}")
    return found


def drawn(chosen: ScoredSet, seed: int) -> list[Item]:
    """The rows of a set, maybe none. Raises ValueError that names the file and line."""
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
    return found


def _item(row: dict[str, Any]) -> Item:
    if "text" in row:
        return Item(row["id"], row.get("lang") or "", text=row["text"])
    if "chosen" in row:
        return Item(row["id"], row.get("lang") or "", row["prompt"], chosen=row["chosen"], rejected=row["rejected"])
    return Item(row["id"], row.get("lang") or "", messages=row["messages"], tools=row.get("tools"))


def _batches(directory: str) -> Iterator[pa.RecordBatch]:
    """Rows of a finished stage: id, lang, and text, messages with tools, or pairs; of labelled replies only the good ones."""
    for part in shards.parts([directory]):
        with storage.open_input(part.path) as stream:
            names = pq.read_schema(stream).names
        if "id" not in names or not {"text", "messages", "chosen"} & set(names):
            raise ValueError(f"{part.path} holds no documents, conversations or preference pairs (it has {names})")
        wanted = ["id", "text", "lang"]
        if "messages" in names:
            wanted = ["id", "messages", "tools", "lang", "label"]
        elif "chosen" in names:
            wanted = ["id", "prompt", "chosen", "rejected", "lang"]
        for _, batch in shards.read(part, [name for name in wanted if name in names], batch_rows=1024):
            if "label" in batch.schema.names:
                batch = batch.filter(pc.fill_null(batch["label"].cast(pa.bool_()), True)).drop_columns(["label"])
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


@dataclass(frozen=True)
class Overlapping:
    """Rows of one source that stand in sets too."""

    source: TrainedOn
    ids: list[str]  # of the training rows, the first few
    sets: list[str]  # names of the sets


def _texts(batch: pa.RecordBatch) -> list[str]:
    """What each row says, as Item.content has it."""
    if "text" in batch.schema.names:
        return [text or "" for text in batch["text"].to_pylist()]
    columns = [batch[name].to_pylist() for name in ("messages", "prompt", "chosen", "rejected") if name in batch.schema.names]
    return [_joined([turn["content"] for turns in row for turn in turns or []]) for row in zip(*columns, strict=True)]


def _overlaps(
    sets: Sequence[tuple[ScoredSet, list[Item]]], trained: Sequence[TrainedOn], seed: int
) -> Iterator[tuple[Overlapping, set[tuple[str, str]]]]:
    """Batches of training rows that stand in sets, by content (white space and case apart) or by id; and (set, id) of those rows.

    Training rows are read once, batch by batch; rows that a training stage itself held out are none. A row of another
    stage may bear the same id, so ids count only within the stage that a set's rows come from.
    """
    owner: dict[int, list[tuple[str, str]]] = {}
    for chosen, items in sets:
        for item, digest in zip(items, _hash([item.content for item in items]), strict=True):
            owner.setdefault(digest, []).append((chosen.name, item.id))
    wanted = np.array(sorted(owner), np.uint64)
    named: dict[str, dict[str, list[str]]] = {}  # directory -> id -> sets
    for chosen, items in sets:
        for directory in chosen.inputs:
            for item in items:
                named.setdefault(directory, {}).setdefault(item.id, []).append(chosen.name)
    ids = {directory: pa.array(sorted(known), pa.string()) for directory, known in named.items()}
    for source in trained:
        same = ids.get(source.directory)
        for batch in _batches(source.directory):
            batch = batch.filter(pa.array(~holdout.is_held_out(batch["id"], seed, source.held_out)))
            digests = np.array(_hash(_texts(batch)), np.uint64)
            hit = np.isin(digests, wanted)
            if same is not None:
                hit |= pc.is_in(batch["id"].cast(pa.string()), value_set=same).to_numpy(zero_copy_only=False)
            if hit.any():
                rows = [str(key) for key in batch["id"].filter(pa.array(hit)).to_pylist()]
                found = {pair for value in digests[hit].tolist() for pair in owner.get(value, [])}
                if same is not None:
                    found |= {(name, key) for key in rows for name in named[source.directory].get(key, [])}
                yield Overlapping(source, rows[:_NAMED], sorted({name for name, _ in found})), found


def refuse_overlap(sets: Sequence[tuple[ScoredSet, list[Item]]], trained: Sequence[TrainedOn], seed: int) -> None:
    """Raises Overlap that names rows of sets which some model was trained on."""
    guarded = [(chosen, items) for chosen, items in sets if not chosen.allow_overlap]
    if not guarded:
        return
    for found, _ in _overlaps(guarded, trained, seed):
        raise Overlap(
            f"evaluation set {', '.join(map(repr, found.sets))}: stage {found.source.stage!r} was trained on rows of it, "
            f"{', '.join(map(repr, found.ids))} of {found.source.input!r} among them. Take them out of the training data, give "
            f"both the same `held_out`, or set `allow_overlap: true` on the set and call its score by that name"
        )


def overlapping(sets: Sequence[tuple[ScoredSet, list[Item]]], trained: Sequence[TrainedOn], seed: int) -> set[tuple[str, str]]:
    """(set, id) of the rows of sets that some model was trained on."""
    if not sets:
        return set()
    return {pair for _, found in _overlaps(sets, trained, seed) for pair in found}


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scorable:
    """A set's rows as tokens: `rows` are what a model is asked of, `groups` how many of them belong to each of `items`."""

    chosen: ScoredSet
    items: list[Item]
    rows: list[Row]
    groups: list[int]

    def scores(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Rows {"id", "lang", "tokens", "value"} from each row's summed log-probability.

        The value is the summed negative log-likelihood in nats of the scored tokens; or 1.0 and 0.0 for a question answered
        right and wrong, and for a pair whose chosen reply is likelier than the rejected one or not. A choice is
        scored by its log-likelihood after the question over its length in UTF-8 bytes (as lm-evaluation-harness's acc_norm:
        Gao et al. 2021), which does not depend on the tokenizer.
        """
        found, place = [], 0
        for item, count in zip(self.items, self.groups, strict=True):
            part = sums[place : place + count]
            tokens = sum(row.count for row in self.rows[place : place + count])
            place += count
            # Rounded before they are compared, so that a tie is one on every machine; of equals the first counts.
            if item.choices:
                lengths = [len(choice.encode()) for choice in item.choices]
                value = float(int(np.argmax(np.round(part / lengths, 6))) == item.right)
            elif item.chosen:
                value = float(np.round(part[0], 6) > np.round(part[1], 6))
            else:
                value = round(-float(part[0]), 4)
            found.append({"id": item.id, "lang": item.lang, "tokens": tokens, "value": value})
        return found


def scorable(chosen: ScoredSet, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, length: int) -> Scorable:
    """The rows of a set as tokens: replies of a conversation, all tokens but the first of a document, both replies of a pair,
    each choice of a question. Rows beyond `length` tokens lose their beginning if questions or prompts of pairs, else what
    is beyond; a row with nothing to score is left out.
    """
    made: dict[int, list[Row]] = {}
    talks = [number for number, item in enumerate(items) if item.text is None and not item.chosen]
    if talks:
        encoded = sft.encode_conversations(tokenizer, [items[n].messages for n in talks], [items[n].tools for n in talks])
        for number, (ids, labels) in zip(talks, encoded, strict=True):
            marked = np.array(labels[:length], np.int64) != IGNORE
            if marked[1:].any():
                made[number] = [Row(np.array(ids[:length], np.int64), marked)]
    pairs = [number for number, item in enumerate(items) if item.chosen]
    if pairs:
        prompts = [items[n].messages for n in pairs]
        openings, chosen_ids = dpo.encode_replies(tokenizer, prompts, [items[n].chosen for n in pairs])
        _, rejected_ids = dpo.encode_replies(tokenizer, prompts, [items[n].rejected for n in pairs])
        for number, opening, *replies in zip(pairs, openings, chosen_ids, rejected_ids, strict=True):
            made[number] = [pair_row(opening, reply, length) for reply in replies]
    for number, item in enumerate(items):
        if item.choices:
            made[number] = _choice_rows(item, tokenizer, length)
        elif item.text is not None:
            ids = tokenizer(item.text, add_special_tokens=False)["input_ids"][:length]  # type: ignore[index]
            if len(ids) > 1:
                made[number] = [Row(np.array(ids, np.int64), np.ones(len(ids), bool))]
    order = sorted(made)
    return Scorable(
        chosen, [items[n] for n in order], [row for n in order for row in made[n]], [len(made[n]) for n in order]
    )  # fmt: skip


def pair_row(prompt: list[int], reply: list[int], length: int) -> Row:
    """A reply of a pair after its prompt; a prompt too long for `length` loses its beginning, never the reply."""
    head = prompt[-max(1, length - len(reply)) :]
    ids = np.array((head + reply)[:length], np.int64)
    return Row(ids, np.arange(len(ids)) >= len(head))


def score(
    chosen: ScoredSet, items: Sequence[Item], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    length: int, batch_tokens: int, device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows {"id", "lang", "tokens", "value"} by one model (see Scorable.scores)."""
    if any(item.text is None for item in items):
        models.as_chat(tokenizer, model)
    found = scorable(chosen, items, tokenizer, length)
    return found.scores(log_probabilities(model, found.rows, batch_tokens, device))


def _choice_rows(item: Item, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Row]:
    question = item.text or ""
    chat = bool(tokenizer.chat_template)
    head = question
    if chat:
        head = str(
            tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        )
    start = tokenizer(head, add_special_tokens=False)["input_ids"]
    rows = []
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
    return rows
