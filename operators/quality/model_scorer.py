"""Scores by a Hugging Face sequence classifier on an actor pool: quality, education value, toxicity, any of them.

Work units are runs of kept rows. Each is read once, scored in batches of similar length and written with one more
column, in the supervised child of an actor that keeps the model loaded. A batch's composition depends on the unit
alone, so a retry gives the same bytes on the same kind of device.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from operators import shards, tables
from operators.config import SettingsError
from operators.dispatch import run_units
from operators.ledger import Ledger, merge_stats
from operators.stage import StageContext
from operators.supervise import Limits, Report, Task
from operators.text.language import set_column
from operators.tokens.window import Span, read_span, spans

Activation = Literal["auto", "softmax", "sigmoid", "none"]

_UNIT_ROWS = 8192
_WINDOW_ROWS = 512  # sorted by length together
_CHARACTERS_A_TOKEN = 16  # text beyond this many characters a token is not looked at; no usual tokenizer packs more


@dataclass(frozen=True)
class Scoring:
    """One classifier and how its answer becomes a number."""

    model: str
    column: str
    label: str | None
    activation: Activation
    max_tokens: int
    batch_tokens: int
    device: str
    minimum: float | None


class Classifier:
    """A sequence classifier on one device.

    Raises SettingsError when the directory holds no classifier in safetensors, or the label is not one of its labels.
    """

    def __init__(self, scoring: Scoring) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._torch, self._scoring = torch, scoring
        if scoring.device == "cpu":
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(scoring.model, trust_remote_code=False, local_files_only=True)
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(
                scoring.model,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32 if scoring.device == "cpu" else torch.bfloat16,
            )
        except (OSError, ValueError) as error:
            raise SettingsError(f"model {scoring.model}: no sequence classifier with safetensors weights: {error}") from error
        self._model.to(scoring.device).eval()
        config = self._model.config
        self._padless = config.pad_token_id is None  # a decoder that reads its answer off the last token of a row
        labels = {str(name): int(index) for index, name in config.id2label.items()}
        if scoring.label is None and config.num_labels > 1:
            raise SettingsError(f"model {scoring.model} has the labels {sorted(labels)}: say by `label` which one is the score")
        if scoring.label is not None and scoring.label not in labels:
            raise SettingsError(f"model {scoring.model} has no label {scoring.label!r}; it has {sorted(labels)}")
        self._output = 0 if scoring.label is None else labels[scoring.label]
        several = config.problem_type == "multi_label_classification"
        automatic: Activation = "sigmoid" if several else "softmax" if config.num_labels > 1 else "none"
        self._activation = automatic if scoring.activation == "auto" else scoring.activation

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float32[texts], rounded to 4 decimals, NaN for a text without a token. Texts are cut to their first `max_tokens`."""
        scoring = self._scoring
        heads = [text[: scoring.max_tokens * _CHARACTERS_A_TOKEN] for text in texts]
        ids = self._tokenizer(heads, truncation=True, max_length=scoring.max_tokens, padding=False)["input_ids"]
        return self.score_encoded([{"input_ids": row} for row in ids])

    def score_encoded(self, encodings: Sequence[Mapping[str, list[int]]]) -> np.ndarray:
        """float32[encodings] as `score`, of what the tokenizer made of each text (`input_ids`, perhaps `token_type_ids`)."""
        torch, scoring = self._torch, self._scoring
        lengths = np.array([len(encoding["input_ids"]) for encoding in encodings])
        found = np.full(len(encodings), np.nan)
        with torch.inference_mode():
            for rows in batches_by_length(lengths, scoring.batch_tokens):
                rows = rows[lengths[rows] > 0]
                if not len(rows):
                    continue
                batch = self._padded([encodings[row] for row in rows])
                logits = self._model(**batch).logits.float()
                if self._activation == "softmax":
                    logits = logits.softmax(-1)
                elif self._activation == "sigmoid":
                    logits = logits.sigmoid()
                found[rows] = logits[:, self._output].cpu().numpy()
        return np.round(found, 4).astype(np.float32)

    def _padded(self, encodings: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """The encodings as tensors of one length.

        A decoder without a padding token takes for a row's last token the last that is not `config.pad_token_id`. The end
        token would be wrong for it, since rows end with that; so it gets an id with which no row of the batch ends.
        """
        torch, device = self._torch, self._scoring.device
        if not self._padless:
            return dict(self._tokenizer.pad([dict(encoding) for encoding in encodings], return_tensors="pt").to(device))
        rows = [encoding["input_ids"] for encoding in encodings]
        ends = {row[-1] for row in rows}
        padding = next(token for token in range(len(ends) + 1) if token not in ends)
        self._model.config.pad_token_id = padding
        length = max(map(len, rows))
        ids = [row + [padding] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def batches_by_length(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows in runs of ascending length, each of at most `batch_tokens` tokens with padding (but at least one row)."""
    order = np.argsort(lengths, kind="stable")
    first = 0
    while first < len(order):
        last = first + 1
        while last < len(order) and lengths[order[last]] * (last + 1 - first) <= batch_tokens:
            last += 1
        yield order[first:last]
        first = last


@functools.lru_cache(maxsize=2)
def _classifier(scoring: Scoring) -> Classifier:
    return Classifier(scoring)


def score_stage(context: StageContext, inputs: Sequence[str], scoring: Scoring, limits: Limits, *, num_gpus: float = 0) -> None:
    """Score the kept rows of finished stages into parts of their own."""
    units = spans(shards.parts(inputs), _UNIT_ROWS)
    done = shards.committed_numbers(context.directory)
    todo = [
        {
            "unit": {"index": index, "path": span.parts[0].path},
            "span": asdict(span),
            "scoring": asdict(scoring),
            "directory": context.directory,
        }
        for index, span in enumerate(units)
        if index not in done
    ]
    run_units(context, "operators.quality.model_scorer:score_unit", todo, limits, already=len(units) - len(todo), num_gpus=num_gpus)
    context.finish(stats={"units": len(units)})


def score_unit(task: Task, report: Report) -> dict[str, Any]:
    """One run of rows in the supervised child: read, score, write, commit. A probe only scores."""
    given = task.arguments
    raw = given["span"]
    span = Span(tuple(shards.Part(**part) for part in raw["parts"]), raw["skip"], raw["rows"])
    scoring = Scoring(**given["scoring"])
    report.alive()
    classifier = _classifier(scoring)
    report.alive()
    writer = shards.UnitWriter(given["directory"], given["unit"]["index"]) if task.probe is None else None
    ledger, stats = Ledger(), dict[str, Any]()
    if task.unreadable is not None:
        raise RuntimeError(
            f"{span.parts[0].path}: reading {span.rows} rows of a finished stage ends the process: {task.unreadable}"
        )
    aside, position = np.array(sorted(task.set_aside), np.int64), 0
    for batch in _windows(span):
        rows = np.arange(position, position + batch.num_rows)
        position += batch.num_rows
        chosen = ~np.isin(rows, aside)
        if task.probe is not None:
            chosen &= (rows >= task.probe[0]) & (rows < task.probe[1])
        healthy, scores = batch.filter(pa.array(chosen)), np.zeros(0, np.float32)
        if healthy.num_rows:
            with report.rows(int(rows[chosen][0]), int(rows[chosen][-1]) + 1):
                scores = classifier.score(pc.fill_null(healthy["text"], "").to_pylist())
        if writer is None:
            continue
        ledger.rows_in += batch.num_rows
        _write(writer, ledger, stats, set_column(healthy, scoring.column, pa.array(scores, from_pandas=True)), scores, scoring)
        guilty = np.isin(rows, aside)
        if guilty.any():
            ledger.quarantined += int(guilty.sum())
            ids = batch["id"].filter(pa.array(guilty)).to_pylist()
            writer.reject(tables.rejects_table(tables.crashed(ids, rows[guilty].tolist(), task.set_aside, "score")))
    if writer is None:
        return {}
    writer.commit(ledger, stats)
    return {"unit": given["unit"]["index"], "rows": ledger.kept}


def _write(
    writer: shards.UnitWriter, ledger: Ledger, stats: dict[str, Any], table: pa.Table, scores: np.ndarray, scoring: Scoring
) -> None:
    kept = scores >= np.float32(scoring.minimum) if scoring.minimum is not None else np.ones(len(scores), bool)
    writer.write(table.filter(pa.array(kept)))
    ledger.kept += int(kept.sum())
    tenths = Counter(f"{value:.1f}" for value in np.floor(scores[~np.isnan(scores)].astype(np.float64) * 10 + 1e-6) / 10)
    merge_stats(stats, {"quality" if scoring.column == "quality" else "scores": dict(sorted(tenths.items()))})
    low = table.filter(pa.array(~kept))
    if low.num_rows:
        ledger.rejected["score:low"] += low.num_rows
        count = low.num_rows
        columns = {
            "id": low["id"],
            "text": low["text"],
            "source": low["source"],
            "operator": pa.array(["score"] * count),
            "reason": pa.array(["low"] * count),
            "value": low[scoring.column],
            "detail": pa.nulls(count, pa.string()),
            "quarantined": pa.array(np.zeros(count, bool)),
        }
        writer.reject(pa.table(columns).cast(tables.REJECTS))


def _windows(span: Span) -> Iterator[pa.Table]:
    """All columns of the span's rows, 512 rows at a time whatever the row groups are."""
    with storage.open_input(span.parts[0].path) as stream:
        columns = pq.read_schema(stream).names
    pending: list[pa.RecordBatch] = []
    rows = 0
    for batch in read_span(span, columns):
        while rows + batch.num_rows >= _WINDOW_ROWS:
            head = batch.slice(0, _WINDOW_ROWS - rows)
            yield pa.Table.from_batches([*pending, head])
            batch, pending, rows = batch.slice(head.num_rows), [], 0
        if batch.num_rows:
            pending.append(batch)
            rows += batch.num_rows
    if pending:
        yield pa.Table.from_batches(pending)
