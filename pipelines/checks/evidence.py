"""What rules look at besides settings: manifests of finished stages, a bounded sample of their rows, configurations of models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from operators import shards
from operators.stage import Stage
from pipelines.graph import Node
from pipelines.recipe import Recipe
from pipelines.stages.training import TrainingStage, is_external, shares

SAMPLE_ROWS = 2000
_COUNTED_BYTES = 64 << 20

TUNED = ("sft", "dpo", "kto", "grpo")
ALIGNED = ("dpo", "kto", "grpo")


@dataclass
class Evidence:
    """A recipe with its plan. Everything is read when first asked for, within fixed bounds."""

    recipe: Recipe
    nodes: Mapping[str, Node] = field(default_factory=dict)
    base_directory: str = "."
    workers: int | None = None

    def training(self, *kinds: str) -> Iterator[tuple[str, TrainingStage]]:
        """Training stages of these kinds (of all, when none is named)."""
        for name, stage in self.recipe.stages.items():
            if isinstance(stage, TrainingStage) and (not kinds or stage.kind in kinds):  # type: ignore[attr-defined]
                yield name, stage

    def finished(self, name: str) -> str | None:
        """The directory of a stage that has finished: with these settings, else the newest one of other settings."""
        node = self.nodes.get(name)
        if node is None:
            return None
        if storage.exists(storage.join(node.directory, "manifest.json")):
            return node.directory
        parent = node.directory.rpartition("/")[0]
        if storage.is_remote(parent) or not os.path.isdir(parent):
            return None
        found = [entry.path for entry in os.scandir(parent) if os.path.exists(os.path.join(entry.path, "manifest.json"))]
        return max(found, key=lambda path: os.path.getmtime(os.path.join(path, "manifest.json")), default=None)

    def stats(self, name: str) -> dict[str, Any]:
        """Statistics of a finished stage, empty otherwise."""
        directory = self.finished(name)
        return dict(shards.load_manifest(directory).stats) if directory else {}

    def rows(self, name: str) -> tuple[int, str] | None:
        """(rows that a stage gives, how that is known: "" for its manifest, "file" for a count of lines); None: unknown."""
        directory = self.finished(name)
        if directory is not None:
            try:
                return sum(part.kept_rows for part in shards.parts([directory])), ""
            except (OSError, ValueError):  # an earlier run's files may be gone
                return None
        stage = self.recipe.stages.get(name)
        if stage is None or stage.kind != "conversations":  # type: ignore[attr-defined]
            return None
        paths = [storage.absolute(path, self.base_directory) for path in stage.files_at(self.base_directory)]
        paths = [path for path in paths if path.endswith(".jsonl") and storage.exists(path)]
        return (_lines(paths), "file") if paths else None

    def sample(self, name: str, columns: Sequence[str]) -> pa.Table | None:
        """At most SAMPLE_ROWS surviving rows of a finished stage, taken evenly from its parts; None where there are none."""
        directory = self.finished(name)
        if directory is None:
            return None
        try:
            parts = shards.parts([directory])
            each = max(1, SAMPLE_ROWS // max(1, len(parts)))
            batches = [batch for part in parts[:SAMPLE_ROWS] for batch in _head(part, columns, each)]
        except (OSError, ValueError, KeyError, pa.ArrowInvalid):
            return None
        return pa.Table.from_batches(batches) if batches else None

    def chain(self, name: str) -> list[str]:
        """The stages that made a stage's model, itself first; what lies outside of the recipe ends it."""
        found = [name]
        while True:
            model = getattr(self.recipe.stages.get(found[-1]), "model", None)
            if not isinstance(model, str) or model in found:
                return found
            found.append(model)
            if is_external(model):
                return found

    def model_file(self, model: str, file: str) -> dict[str, Any]:
        """A JSON file of a model at a path; empty for a packaged one, or where it cannot be read."""
        if "/" not in model:
            return {}
        path = storage.join(storage.absolute(model, self.base_directory), file)
        try:
            return dict(json.loads(storage.read_bytes(path)))
        except (OSError, ValueError):
            return {}

    def parameters(self, name: str) -> float:
        """About how many parameters the model has that a stage starts from; a billion where nothing says."""
        from pipelines.stages.training import PretrainStage

        for step in self.chain(name):
            known = self.stats(step).get("parameters") if step in self.recipe.stages else None
            if known:
                return float(known)
            stage = self.recipe.stages.get(step)
            if isinstance(stage, PretrainStage) and not isinstance(stage.model, str):
                shape = stage.model
                wide = shape.intermediate or shape.hidden * 8 // 3
                return float(shape.layers * shape.hidden * (4 * shape.hidden + 3 * wide))
        outside = self.model_file(self.chain(name)[-1], "config.json")
        if {"hidden_size", "num_hidden_layers"} <= set(outside):
            return 12.0 * outside["num_hidden_layers"] * outside["hidden_size"] ** 2
        return 1.35e8 if self.chain(name)[-1].startswith("packaged:") else 1e9


def _head(part: shards.Part, columns: Sequence[str], most: int) -> list[pa.RecordBatch]:
    with storage.open_input(part.path) as stream:
        known = set(pq.read_schema(stream).names)
    wanted = [name for name in columns if name in known]
    found, rows = [], 0
    for _, batch in shards.read(part, wanted, batch_rows=min(most, 1024)):
        found.append(batch.slice(0, most - rows))
        rows += found[-1].num_rows
        if rows >= most:
            break
    return [batch for batch in found if batch.num_rows and wanted]


def _lines(paths: Sequence[str]) -> int:
    """Lines of JSON Lines files; beyond 64 MiB estimated from the lines so far."""
    total = 0.0
    for path in paths:
        size, read, lines = storage.size(path), 0, 0
        with storage.open_input(path) as stream:
            while read < min(size, _COUNTED_BYTES) and (block := stream.read(1 << 20)):
                read += len(block)
                lines += bytes(block).count(b"\n")
        total += lines * size / read if read else 0
    return round(total)


def inputs(stage: Stage) -> dict[str, float]:
    """Inputs of a training stage with their shares, of sum 1."""
    told = {name: share.weight for name, share in shares(stage.input).items()}  # type: ignore[attr-defined]
    return {name: weight / sum(told.values()) for name, weight in told.items()}


def general_inputs(stage: Stage) -> list[str]:
    """Inputs of a training stage that are marked `general: true`."""
    return [name for name, share in shares(stage.input).items() if share.general]  # type: ignore[attr-defined]
