"""Sentence embeddings of a part's documents by a model in Hugging Face layout, stored as float16.

A unit is a part; it is done in the supervised child of an actor that keeps the model loaded. Batches are made of texts of
similar length and depend on the part alone, so a retry gives the same bytes on the same kind of device. Embeddings are
named by what they depend on: a later fingerprint of the stage (another threshold, say) takes them over.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cluster import storage
from operators import shards, tables
from operators.config import SettingsError
from operators.dedup import exchange
from operators.dispatch import run_units
from operators.quality.model_scorer import batches_by_length
from operators.stage import StageContext
from operators.supervise import Limits, Report, Task

_BATCH_ROWS = 512  # sorted by length together
_CHARACTERS_A_TOKEN = 16  # text beyond this many characters a token is not looked at; no usual tokenizer packs more


@dataclass(frozen=True)
class Embedding:
    """One model and how a text becomes a vector."""

    model: str
    column: str
    pooling: str
    prefix: str
    max_tokens: int
    batch_tokens: int
    device: str


class Embedder:
    """Mean (or first-token) pooled, L2-normalised last hidden states. Raises SettingsError for no such model in safetensors."""

    def __init__(self, embedding: Embedding) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._torch, self._embedding = torch, embedding
        if embedding.device == "cpu":
            torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        options = {"trust_remote_code": False, "local_files_only": True}
        dtype = torch.float32 if embedding.device == "cpu" else torch.bfloat16
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(embedding.model, **options)
            self._model: Any = AutoModel.from_pretrained(embedding.model, use_safetensors=True, dtype=dtype, **options)
        except (OSError, ValueError) as error:
            raise SettingsError(f"model {embedding.model}: no embedding model with safetensors weights: {error}") from error
        self._model.to(embedding.device).eval()
        self.dimensions = int(self._model.config.hidden_size)

    def embed(self, texts: list[str]) -> np.ndarray:
        """float16[texts, dimensions] of length 1; zeros for a blank text. Texts are cut to their first `max_tokens`."""
        torch, embedding = self._torch, self._embedding
        heads = [embedding.prefix + text[: embedding.max_tokens * _CHARACTERS_A_TOKEN] for text in texts]
        ids = self._tokenizer(heads, truncation=True, max_length=embedding.max_tokens, padding=False)["input_ids"]
        lengths = np.array([len(row) if text.strip() else 0 for row, text in zip(ids, texts, strict=True)])
        found = np.zeros((len(texts), self.dimensions), np.float16)
        with torch.inference_mode():
            for rows in batches_by_length(lengths, embedding.batch_tokens):
                rows = rows[lengths[rows] > 0]
                if not len(rows):
                    continue
                batch = self._tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt").to(embedding.device)
                states = self._model(**batch).last_hidden_state.float()
                if embedding.pooling == "mean":
                    mask = batch["attention_mask"].unsqueeze(-1).float()
                    pooled = (states * mask).sum(1) / mask.sum(1)
                else:
                    pooled = states[:, 0]
                found[rows] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return found


@functools.lru_cache(maxsize=1)
def _embedder(embedding: Embedding) -> Embedder:
    return Embedder(embedding)


def embed_parts(context: StageContext, parts: list[shards.Part], embedding: Embedding, limits: Limits, num_gpus: float) -> None:
    """Embed the parts that are not embedded yet, by this fingerprint of the stage or another one."""
    keys = {number: _key(context.directory, part, embedding) for number, part in enumerate(parts)}
    missing = {number: key for number, key in keys.items() if not storage.exists(_record_path(context.directory, number))}
    for number, source in _adoptable(context.directory, missing).items():
        record = json.loads(storage.read_bytes(source))
        origin = source.rsplit("/", 2)[0]
        storage.copy(storage.join(origin, record["file"]), storage.join(context.directory, record["file"]))
        storage.create_if_absent(_record_path(context.directory, number), json.dumps(record, sort_keys=True).encode())
        del missing[number]
    todo = [
        {
            "unit": {"index": number, "path": parts[number].path},
            "part": asdict(parts[number]),
            "embedding": asdict(embedding),
            "directory": context.directory,
            "key": key,
        }
        for number, key in missing.items()
    ]
    run_units(
        context, "operators.dedup.embed:embed_unit", todo, limits, already=len(parts) - len(todo), num_gpus=num_gpus, note="parts"
    )


def _key(directory: str, part: shards.Part, embedding: Embedding) -> str:
    """What the embeddings of a part depend on. Parts and bitmaps are named by their content, the model by sizes and times."""
    model = [[entry.relative, entry.size, entry.mtime_ns] for entry in storage.list_files(embedding.model)]
    removed = shards.relative_to_run(directory, part.removed) if part.removed else None
    settings = {name: value for name, value in asdict(embedding).items() if name != "model"}
    return tables.content_hash([shards.relative_to_run(directory, part.path), removed, model, settings])


def _adoptable(directory: str, missing: dict[int, str]) -> dict[int, str]:
    """Records of other fingerprints of the stage, by the number of the part they serve."""
    if not missing:
        return {}
    available: dict[str, str] = {}
    for sibling in storage.list_directories(directory.rstrip("/").rsplit("/", 1)[0]):
        folder = storage.join(sibling, "embeddings")
        if sibling == directory or not storage.exists(folder):
            continue
        for entry in storage.list_files(folder):
            if entry.relative.endswith(".json"):
                available.setdefault(json.loads(storage.read_bytes(entry.path))["key"], entry.path)
    return {number: available[key] for number, key in missing.items() if key in available}


def _record_path(directory: str, number: int) -> str:
    return storage.join(directory, "embeddings", f"{number:08d}.json")


def embed_unit(task: Task, report: Report) -> dict[str, Any]:
    """One part in the supervised child. A probe only embeds; a row that ends the process has no embedding."""
    given = task.arguments
    part, embedding = shards.Part(**given["part"]), Embedding(**given["embedding"])
    if task.unreadable is not None:
        raise RuntimeError(f"{part.path}: reading a part of a finished stage ends the process: {task.unreadable}")
    report.alive()
    embedder = _embedder(embedding)
    name = f"embeddings/{given['key']}.f16"
    file = exchange.RunFile(given["directory"], storage.join(given["directory"], name)) if task.probe is None else None
    aside, position, blank = np.array(sorted(task.set_aside), np.int64), 0, 0
    try:
        for _, batch in shards.read(part, [embedding.column], _BATCH_ROWS):
            rows = np.arange(position, position + batch.num_rows)
            position += batch.num_rows
            chosen = ~np.isin(rows, aside)
            if task.probe is not None:
                chosen &= (rows >= task.probe[0]) & (rows < task.probe[1])
            vectors = np.zeros((batch.num_rows, embedder.dimensions), np.float16)
            if chosen.any():
                texts = pc.fill_null(batch.column(embedding.column), "").to_pylist()
                with report.rows(int(rows[chosen][0]), int(rows[chosen][-1]) + 1):
                    vectors[chosen] = embedder.embed([texts[i] for i in np.flatnonzero(chosen)])
            blank += int((vectors == 0).all(axis=1).sum())
            if file is not None:
                file.append(vectors)
        if file is None:
            return {}
        file.publish()
    except BaseException:
        if file is not None:
            file.abandon()
        raise
    record = {"key": given["key"], "file": name, "rows": position, "dimensions": embedder.dimensions, "without": blank}
    storage.create_if_absent(_record_path(given["directory"], given["unit"]["index"]), json.dumps(record, sort_keys=True).encode())
    return {"unit": given["unit"]["index"], "rows": position}


def load_record(directory: str, number: int) -> dict[str, Any]:
    """Of a part: `rows` that survive, `dimensions`, `without` (rows without an embedding), `file`."""
    return dict(json.loads(storage.read_bytes(_record_path(directory, number))))


def load_vectors(directory: str, number: int) -> np.ndarray:
    """float16[surviving rows, dimensions] of a part."""
    record = load_record(directory, number)
    return np.frombuffer(storage.read_bytes(storage.join(directory, record["file"])), np.float16).reshape(-1, record["dimensions"])
