"""What goes from stage to stage in an estimate, and what finished runs say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.fit import Model
from cluster.plan import Estimate
from cluster.rates import Assumptions, Rates
from operators import shards
from operators.stage import Stage
from pipelines.graph import Node
from pipelines.recipe import Recipe

_FOOTERS = 64
_TEXT_COLUMNS = ("text", "messages", "prompt", "chosen", "rejected", "conversations")


@dataclass(frozen=True)
class Flow:
    """Rows as a stage gives them. `text`: bytes of what a model would read; `parts`: files; `chinese`: share of the bytes.

    `rows` and `text` are None where nothing says. `length` and `vocab` are of packed rows and tokenizers; `native`: the
    tokenizer was learnt from these very languages. `model` is the model that a stage made.
    """

    rows: float | None = None
    text: float | None = None
    parts: float = 1
    chinese: float = 0.0
    tokens: float | None = None
    length: int | None = None
    vocab: int | None = None
    native: bool = True
    model: Model | None = None
    stored: float = 0.0  # bytes on disk

    @property
    def known(self) -> bool:
        return self.rows is not None and self.text is not None

    def tokens_per_byte(self, assume: Assumptions, native: bool | None = None, vocab: int | None = None) -> float:
        """Of a tokenizer that was learnt from such text (`native`), then by its size, or of one made for English."""
        native = self.native if native is None else native
        if not native:
            return self.chinese * assume.tokens_per_byte_zh_foreign + (1 - self.chinese) * assume.tokens_per_byte_en
        mixed = self.chinese * assume.tokens_per_byte_zh + (1 - self.chinese) * assume.tokens_per_byte_en
        return float(mixed * (32_000 / (vocab or self.vocab or 32_000)) ** assume.vocabulary_exponent)

    def kept(self, rows: float, text: float | None = None) -> Flow:
        """The same with a share of the rows, and of the text (by default the same share)."""
        return replace(
            self,
            rows=None if self.rows is None else self.rows * rows,
            text=None if self.text is None else self.text * (rows if text is None else text),
        )


def together(flows: Sequence[Flow]) -> Flow:
    """Several inputs as one."""
    if len(flows) == 1:
        return flows[0]
    known = all(flow.known for flow in flows) and bool(flows)
    text = sum(flow.text or 0.0 for flow in flows)
    return Flow(
        rows=sum(flow.rows or 0.0 for flow in flows) if known else None,
        text=text if known else None,
        parts=sum(flow.parts for flow in flows),
        chinese=sum(flow.chinese * (flow.text or 0.0) for flow in flows) / text if text else 0.0,
        stored=sum(flow.stored for flow in flows),
    )


@dataclass
class Notes:
    """What went into a stage's estimate besides its settings."""

    assumed: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass
class Walk:
    """A recipe on its way through the stages: what they give, and what is known of them from runs."""

    recipe: Recipe
    rates: Rates
    base_directory: str
    limit: int | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    run_directories: tuple[str, ...] = ()  # where earlier runs of the recipe lie, the one to be planned first
    flows: dict[str, Flow] = field(default_factory=dict)
    estimates: list[Estimate] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)

    @property
    def assume(self) -> Assumptions:
        return self.rates.assumptions

    def assumed(self, name: str, value: float) -> float:
        """Note that a ratio was assumed; returns it."""
        self.notes.assumed[name] = value
        return value

    def measured(self, name: str, value: float) -> float:
        """Note that a ratio comes from an earlier run; returns it."""
        self.notes.measured[name] = value
        return value

    def finished(self, name: str) -> str | None:
        """The directory of the stage if it has finished with these very settings."""
        node = self.nodes.get(name)
        return node.directory if node and storage.exists(storage.join(node.directory, "manifest.json")) else None

    def past(self, name: str, stage: Stage) -> tuple[str, shards.Manifest] | None:
        """The newest finished directory of the stage with other settings or in a trial run, for its ratios."""
        found: list[tuple[int, str]] = []
        for run in self.run_directories:
            for directory in storage.list_directories(storage.join(run, name)):
                path = storage.join(directory, "manifest.json")
                if storage.exists(path):
                    found.append((storage.modified_ns(path), directory))
        for _, directory in sorted(found, reverse=True):
            manifest = shards.load_manifest(directory)
            if manifest.kind == stage.kind:
                return directory, manifest
        return None

    def kept_share(self, name: str, stage: Stage, otherwise: float) -> float:
        """The share of rows that a stage keeps: of an earlier run, else the one assumed."""
        past = self.past(name, stage)
        if past is not None and past[1].ledger.rows_in:
            return self.measured("kept", past[1].ledger.kept / past[1].ledger.rows_in)
        return self.assumed("kept", otherwise)


def flow_of_finished(directory: str, inputs: Sequence[Flow]) -> Flow:
    """What a finished stage gives: rows and parts by its manifest, bytes of text by the footers of some of its parts."""
    manifest = shards.load_manifest(directory)
    parts = shards.parts([directory])
    rows = float(sum(part.kept_rows for part in parts))
    chosen = parts if len(parts) <= _FOOTERS else [parts[int(i)] for i in np.linspace(0, len(parts) - 1, _FOOTERS)]
    text = counted = 0.0
    for part in chosen:
        try:
            with storage.open_input(part.path) as stream:
                metadata = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError):  # an earlier run's files may be gone: its ratios then come from the others
            continue
        counted += metadata.num_rows
        for group in range(metadata.num_row_groups):
            described = metadata.row_group(group)
            for index in range(described.num_columns):
                column = described.column(index)
                if column.path_in_schema.split(".")[0] in _TEXT_COLUMNS:
                    text += column.total_uncompressed_size
    stats = manifest.stats
    below = together(inputs) if inputs else Flow()
    tokens = float(stats["tokens"]) if isinstance(stats.get("tokens"), int | float) else None
    length = manifest.config.get("length") if manifest.kind == "pack" else None
    return Flow(
        rows=rows,
        text=text / counted * rows if counted else (0.0 if not rows else None),
        parts=max(1, len(parts)),
        chinese=_chinese(stats, below.chinese),
        tokens=tokens,
        length=int(length) if length else None,
        vocab=int(stats["vocab_size"]) if isinstance(stats.get("vocab_size"), int) else below.vocab,
        stored=float(sum(part["bytes"] for part in manifest.parts)),
    )


def _chinese(stats: dict[str, Any], otherwise: float) -> float:
    """The share of Chinese bytes, from the lengths by language that a corpus stage counts (3 bytes a character)."""
    lengths = stats.get("lengths")
    if not isinstance(lengths, dict) or not lengths:
        return otherwise
    sizes = {
        language: sum(1.5 * 2 ** int(power.removeprefix("2^")) * count for power, count in counts.items())
        * (3 if language == "zh" else 1)
        for language, counts in lengths.items()
    }
    total = sum(sizes.values())
    return sizes.get("zh", 0.0) / total if total else otherwise
