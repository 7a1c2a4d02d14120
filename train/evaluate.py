"""Evaluation: held-out perplexity by language and source, preference accuracy, and replies side by side.

Documents, pairs and prompts are divided among the workers; every number is put together on the first one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cluster import storage
from operators import shards
from operators.ledger import Ledger
from operators.tokens import hashing, holdout
from operators.tokens.encode import Encoder
from train import dpo, evaluation_sets, finetune, models, retention, samples
from train.errors import JobCancelled
from train.parallel import Workers
from train.scoring import Row, log_probabilities
from train.settings_evaluate import RETENTION, EvaluateJob, NamedModel, ScoredSet

ALL = "*"
"""Stands for every language or every source in a row of the perplexity table."""

SCORES = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),  # perplexity, preference, loss (of a set), accuracy (of a set)
        pa.field("id", pa.string(), nullable=False),  # of the document or pair
        pa.field("lang", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),  # summed negative log-likelihood in nats; chosen less rejected; 1 is right
        pa.field("set", pa.string(), nullable=False),  # of `sets`, else empty
    ]
)

MATRIX = pa.schema(
    [
        pa.field("order", pa.int64(), nullable=False),  # of the fine-tune in the chain, from 0
        pa.field("model", pa.string(), nullable=False),
        pa.field("task", pa.int64(), nullable=False),  # the fine-tune that was to learn this set
        pa.field("set", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),  # accuracy, or minus nats a token: larger is better
        pa.field("learnt", pa.float64()),  # the score right after that fine-tune; null before it
        pa.field("forgotten", pa.float64()),  # the best score since then less this one; null before it
    ]
)


@dataclass(frozen=True)
class Document:
    """A held-out document: `text` only as long as it is scored."""

    id: str
    text: str
    lang: str
    source: str


def run(job: EvaluateJob, directory: str, workers: Workers) -> dict[str, Any]:
    """Returns {"perplexity", "preference_accuracy", "preference_accuracy_vs_reference", "preference_pairs", "sets", "changes",
    "retention", "samples", "documents", "timings"} and writes one row a score to `directory`/parts.

    Raises JobCancelled, ValueError when nothing is held out or a model's tokenizer cannot chat, evaluation_sets.Overlap
    before any model is loaded when a set holds rows that were trained on.
    """
    finished = workers.share(samples.read_result(directory) if workers.first else None)
    if finished is not None:
        return finished
    documents, pairs = workers.together(lambda: (_documents(job, workers), _pairs(job, workers)))
    sets = workers.together(lambda: [(chosen, evaluation_sets.read(chosen, job.seed)) for chosen in job.sets])
    workers.on_first(lambda: evaluation_sets.refuse_overlap(sets, job.trained_on, job.seed))
    prompts = list(enumerate(job.prompts))[workers.rank :: workers.world]
    scores: list[dict[str, Any]] = []
    replies: dict[int, dict[str, str]] = {}
    units = 3 * len(job.models)
    for number, named in enumerate(job.models):

        def evaluate_one(named: NamedModel = named, number: int = number) -> None:
            model, tokenizer = models.load(named.path), models.load_tokenizer(named.path)
            model.to(workers.device).eval()  # type: ignore[arg-type]
            scores.extend(_document_scores(job, named, model, documents, workers.device))
            scores.extend(_pair_scores(job, named, model, tokenizer, pairs, workers.device))
            scores.extend(_set_scores(job, named, model, tokenizer, sets, workers))
            for index, prompt in prompts:
                replies.setdefault(index, {})[named.name] = reply(model, tokenizer, prompt.text, job.max_new_tokens)

        workers.together(evaluate_one)
        if workers.stop_requested(3 * (number + 1), units, "measures", {"model": named.name}):
            raise JobCancelled(f"stopped after evaluating {named.name}")
    everything = [row for part in workers.gather(scores) for row in part]
    answered = {index: texts for part in workers.gather(replies) for index, texts in part.items()}

    def write() -> dict[str, Any]:
        order = {named.name: number for number, named in enumerate(job.models)}
        everything.sort(key=lambda row: (order[row["model"]], row["measure"], row["set"], row["id"]))
        if 0 not in shards.committed_units(directory):
            writer = shards.UnitWriter(directory, 0)
            writer.write(pa.Table.from_pylist(everything, schema=SCORES))
            writer.commit(Ledger(created=len(everything), kept=len(everything)))
        tables = summary(job, everything)
        if job.retention:
            _write_matrix(storage.join(directory, RETENTION), tables["retention"], tables["sets"])
        result = {
            **tables,
            "samples": [
                {"prompt": prompt.text, "lang": prompt.lang, "replies": answered[index]} for index, prompt in enumerate(job.prompts)
            ],
            "timings": {"workers": workers.world, "device": workers.device.type},
        }
        return samples.write_result(directory, result)

    return workers.share(workers.on_first(write))


def _write_matrix(path: str, found: dict[str, Any], scored: Sequence[dict[str, Any]]) -> None:
    """The retention matrix, one row a cell (see MATRIX)."""
    measures = {row["set"]: row["measure"] for row in scored}
    rows = []
    for place, (model, line) in enumerate(zip(found["models"], found["scores"], strict=True)):
        for number, (name, value) in enumerate(zip(found["sets"], line, strict=True)):
            best = max(other[number] for other in found["scores"][number : place + 1]) if place >= number else None
            rows.append(
                {
                    "order": place, "model": model, "task": number, "set": name, "measure": measures[name], "score": value,
                    "learnt": found["scores"][number][number] if place >= number else None,
                    "forgotten": round(best - value, 6) if best is not None else None,
                }
            )  # fmt: skip
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=MATRIX), stream, compression="zstd")
    storage.write_bytes(path, stream.getvalue())


def summary(job: EvaluateJob, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tables, from the rows of SCORES. Rows with source `*` (and language `*`) are totals."""
    table = []
    for named in job.models:
        mine = [row for row in scores if row["model"] == named.name and row["measure"] == "perplexity"]
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in mine:
            for key in ((ALL, ALL), (row["lang"], ALL), (row["lang"], row["source"])):
                groups.setdefault(key, []).append(row)
        for (lang, source), rows in sorted(groups.items()):
            nats, tokens = math.fsum(row["value"] for row in rows), sum(row["tokens"] for row in rows)
            table.append(
                {
                    "model": named.name, "lang": lang, "source": source, "documents": len(rows), "tokens": tokens,
                    "perplexity": round(math.exp(min(700.0, nats / tokens)), 4),
                }
            )  # fmt: skip
    margins = {
        named.name: {r["id"]: r["value"] for r in scores if r["model"] == named.name and r["measure"] == "preference"}
        for named in job.models
    }
    reference = margins.get(job.reference or "", {})
    counted = len(next(iter(margins.values())))
    accuracy = {name: round(sum(v > 0 for v in m.values()) / len(m), 6) for name, m in margins.items() if m}
    against = {
        name: round(sum(v > reference[key] for key, v in m.items()) / len(m), 6)
        for name, m in margins.items()
        if m and reference and name != job.reference
    }
    return {
        "perplexity": table,
        "documents": len({row["id"] for row in scores if row["measure"] == "perplexity"}),
        "preference_accuracy": accuracy,
        "preference_accuracy_vs_reference": against,
        "preference_pairs": counted,
        **_sets_summary(job, scores),
    }


def _sets_summary(job: EvaluateJob, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"sets": a row a model and set, "changes": see retention.changes, "retention": see retention.matrix}; none without sets."""
    table = []
    for named in job.models:
        for chosen in job.sets:
            rows = [row for row in scores if row["model"] == named.name and row["set"] == chosen.name]
            tokens = sum(row["tokens"] for row in rows)
            if not rows:
                raise ValueError(f"evaluation set {chosen.name!r}: {named.name} could be scored on none of its rows")
            total = math.fsum(row["value"] for row in rows)
            value = total / len(rows) if chosen.measure == "accuracy" else total / tokens
            table.append(
                {
                    "model": named.name, "set": chosen.name, "measure": chosen.measure, "rows": len(rows), "tokens": tokens,
                    "value": round(value, 6),
                }
            )  # fmt: skip
    result: dict[str, Any] = {"sets": table} if table else {}
    if job.before:
        result["changes"] = retention.changes(table, job.before)
    if job.retention:
        result["retention"] = retention.matrix(table, job.retention)
    return result


def _set_scores(
    job: EvaluateJob,
    named: NamedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[tuple[ScoredSet, list[evaluation_sets.Item]]],
    workers: Workers,
) -> list[dict[str, Any]]:
    """This worker's share of the rows of SCORES of all named sets."""
    length = min(job.length, model.config.max_position_embeddings)
    found = []
    for chosen, items in sets:
        mine = items[workers.rank :: workers.world]
        for row in evaluation_sets.score(chosen, mine, model, tokenizer, length, job.batch_tokens, workers.device):
            found.append({"model": named.name, "measure": chosen.measure, "source": "", "set": chosen.name, **row})
    return found


def _documents(job: EvaluateJob, workers: Workers) -> list[Document]:
    """This worker's share of the held-out documents that are scored."""
    if not job.documents:
        return []
    parts = shards.parts(job.documents)
    ordinals, langs, order = [np.zeros(0, np.uint64)], [np.zeros(0, object)], [np.zeros(0, np.uint64)]
    total = 0
    for part in parts:
        with storage.open_input(part.path) as stream:
            names = pq.read_schema(stream).names
        columns = ["id", "lang"] if "lang" in names else ["id"]
        for numbers, batch in shards.read(part, columns):
            held = holdout.is_held_out(batch["id"], job.seed, job.held_out)
            total += batch.num_rows
            if held.any():
                kept = batch.filter(pa.array(held))
                ordinals.append(numbers.to_numpy()[held])
                column = kept["lang"].fill_null("") if "lang" in names else pa.array([""] * kept.num_rows)
                langs.append(np.asarray(column.to_pylist(), object))
                order.append(hashing.hash_strings(kept["id"], job.seed))
                ordinals, langs, order = _first_of_each(ordinals, langs, order, job.max_documents)
    chosen = np.sort(ordinals[0] if len(ordinals) == 1 else np.concatenate(ordinals))
    if not chosen.size:
        raise ValueError(
            f"none of {total} documents is held out at a share of {job.held_out}: raise `held_out` here and in packing"
        )
    mine = chosen[workers.rank :: workers.world]
    found: list[Document] = []
    for part in parts:
        inside = mine[(mine >= part.first_ordinal) & (mine < part.first_ordinal + part.rows)]
        if inside.size:
            found.extend(_texts(part, inside, job.max_tokens))
    return found


def _first_of_each(
    ordinals: list[np.ndarray], langs: list[np.ndarray], order: list[np.ndarray], limit: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The `limit` rows of each language with the smallest hashes: memory stays bounded over any corpus."""
    joined = np.concatenate(ordinals), np.concatenate(langs), np.concatenate(order)
    keep = np.zeros(len(joined[0]), bool)
    for lang in dict.fromkeys(joined[1].tolist()):
        rows = np.flatnonzero(joined[1] == lang)
        ranked = np.lexsort((joined[0][rows], joined[2][rows]))
        keep[rows[ranked[:limit]]] = True
    return [joined[0][keep]], [joined[1][keep]], [joined[2][keep]]


def _texts(part: shards.Part, ordinals: np.ndarray, max_tokens: int) -> Iterator[Document]:
    with storage.open_input(part.path) as stream:
        names = pq.read_schema(stream).names
    columns = [name for name in ("id", "text", "source", "lang") if name in names]
    for numbers, batch in shards.read(part, columns, batch_rows=256):
        mask = np.isin(numbers.to_numpy(), ordinals)
        if not mask.any():
            continue
        for row in batch.filter(pa.array(mask)).to_pylist():
            # No token of a byte-level BPE is shorter than a byte, and few are longer than 16 characters.
            yield Document(row["id"], row["text"][: 16 * max_tokens], row.get("lang") or "", row["source"])


def _document_scores(
    job: EvaluateJob, named: NamedModel, model: PreTrainedModel, documents: list[Document], device: torch.device
) -> list[dict[str, Any]]:
    if not documents:
        return []
    encoder = Encoder((models.model_directory(named.path) / "tokenizer.json").read_bytes())
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    ids, offsets = encoder.encode(pa.array([document.text for document in documents], pa.large_string()))
    rows: list[np.ndarray] = []
    owner: list[int] = []
    length = min(job.length, model.config.max_position_embeddings)
    for number in range(len(documents)):
        tokens = ids[offsets[number] : offsets[number + 1]].astype(np.int64)
        tokens = (np.append(tokens, end) if end is not None else tokens)[: job.max_tokens]
        # Windows share one token, so that every token but the first is predicted exactly once.
        for start in range(0, max(1, len(tokens) - 1), length - 1):
            window = tokens[start : start + length]
            if len(window) > 1:
                rows.append(window)
                owner.append(number)
    sums = log_probabilities(model, [Row(row, np.ones(len(row), bool)) for row in rows], job.batch_tokens, device)
    nats, counts = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    np.subtract.at(nats, owner, sums)
    np.add.at(counts, owner, [len(row) - 1 for row in rows])
    return [
        {"model": named.name, "measure": "perplexity", "id": document.id, "lang": document.lang, "source": document.source,
         "tokens": int(counts[number]), "value": round(float(nats[number]), 4), "set": ""}
        for number, document in enumerate(documents)
        if counts[number]
    ]  # fmt: skip


def _pairs(job: EvaluateJob, workers: Workers) -> pa.Table | None:
    """This worker's share of the held-out preference pairs."""
    if not job.pairs:
        return None
    batches: list[pa.RecordBatch] = []
    rows = 0
    for batch in finetune.rows_of(job.pairs, ["id", "prompt", "chosen", "rejected", "lang"]):
        if job.pairs_held_out:
            batch = batch.filter(pa.array(holdout.is_held_out(batch["id"], job.seed, job.pairs_held_out)))
        batches.append(batch.slice(0, job.max_pairs - rows))
        rows += batches[-1].num_rows
        if rows >= job.max_pairs:
            break
    if not rows:
        return None  # a handful of pairs may leave none held out: the table then says 0 pairs
    table = pa.Table.from_batches(batches)
    return table.take(pa.array(np.arange(workers.rank, rows, workers.world)))


def _pair_scores(
    job: EvaluateJob,
    named: NamedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pa.Table | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    if pairs is None or not pairs.num_rows:
        return []
    models.as_chat(tokenizer, model)
    length = min(job.length, model.config.max_position_embeddings)
    found = []
    for batch in pairs.combine_chunks().to_batches(max_chunksize=256):
        prompts, *replies = dpo.encode_pairs(tokenizer, batch)
        sides = []
        for side in replies:
            rows = [evaluation_sets.pair_row(prompt, answer, length) for prompt, answer in zip(prompts, side, strict=True)]
            sides.append(log_probabilities(model, rows, job.batch_tokens, device))
        langs = batch["lang"].fill_null("").to_pylist()
        for number, key in enumerate(batch["id"].to_pylist()):
            found.append(
                {"model": named.name, "measure": "preference", "id": key, "lang": langs[number], "source": "",
                 "tokens": len(replies[0][number]) + len(replies[1][number]),
                 "value": round(float(sides[0][number] - sides[1][number]), 4), "set": ""}
            )  # fmt: skip
    return found


@torch.inference_mode()
def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """The greedy reply to a prompt; a model without a chat template continues the text."""
    if tokenizer.chat_template:
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    room = model.config.max_position_embeddings - max_new_tokens
    ids = encoded["input_ids"][:, -max(1, room) :].to(model.device)
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
