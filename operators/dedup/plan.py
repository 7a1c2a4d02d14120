"""What every unit of a dedup stage knows: the rows that are compared, how they are numbered, and who may go.

Ordinals number all rows in the order index, references, inputs: rows of a kept index come first, then those of stages
that are only compared with, then the rows that may go. Smaller ordinals are preferred as a match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster import storage
from operators import shards
from operators.dedup import exchange
from operators.dedup.index import Generation, KnownPart
from operators.dedup.options import DedupOptions
from operators.dedup.removed import Numbering


@dataclass(frozen=True)
class Plan:
    """`known` are the parts of the index, `parts` the references' and then the inputs', `source` n a number over both.

    `protected` says of each part whether its rows never go; `ranks` orders the parts of inputs that have precedence.
    """

    directory: str
    parts: list[shards.Part]
    options: DedupOptions
    partitions: int
    references: int = 0
    protected: list[bool] = field(default_factory=list)
    ranks: list[int] | None = None
    labels: list[str | None] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    known: list[KnownPart] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    generation: str | None = None

    @property
    def firsts(self) -> np.ndarray:
        """uint64[sources + 1]: the first ordinal of each source, and the number of all rows."""
        sources: list[shards.Part | KnownPart] = [*self.known, *self.parts]
        total = sources[-1].first_ordinal + sources[-1].rows if sources else 0
        return np.array([*(source.first_ordinal for source in sources), total], np.uint64)

    @property
    def base(self) -> int:
        """The first ordinal of the inputs: rows before it are only compared with."""
        return int(self.firsts[len(self.known) + self.references])

    @property
    def verifies(self) -> bool:
        return self.options.finds_near and self.options.verify

    @property
    def sketches(self) -> bool:
        """Whether similarity is estimated; where pairs are verified, only for later stages that use the index."""
        options = self.options
        return options.finds_near and options.similarity and (not options.verify or self.generation is not None)

    @property
    def numbering(self) -> Numbering:
        known = [(part.generation, part.first_ordinal - part.first_row) for part in self.known]
        own = zip(self.labels, self.starts, strict=True)
        labels, origins = zip(*known, *own, strict=True) if known or self.parts else ((), ())
        return Numbering(self.firsts, list(labels), np.array(origins, np.int64))

    def source(self, number: int) -> int:
        """The source that part `number` is."""
        return len(self.known) + number

    def path(self, *names: str) -> str:
        return storage.join(exchange.keys_directory(self.directory), *names)


def make_plan(
    directory: str,
    options: DedupOptions,
    inputs: Sequence[tuple[str, str]],
    references: Sequence[tuple[str, str]] = (),
    input_priority: bool = False,
    generations: Sequence[Generation] = (),
    grow: str | None = None,
) -> Plan:
    """`inputs` and `references` are (stage, directory); a reference that is an input too stays part of the result."""
    options = options.with_shape()
    never = {name for name, _ in references}
    only = [(name, path) for name, path in references if name not in dict(inputs)]
    known: list[KnownPart] = []
    for generation in generations:
        known += generation.parts(known[-1].first_ordinal + known[-1].rows if known else 0)
    ordinal = known[-1].first_ordinal + known[-1].rows if known else 0
    parts: list[shards.Part] = []
    protected: list[bool] = []
    ranks: list[int] = []
    labels: list[str | None] = []
    starts: list[int] = []
    base = ordinal
    for rank, (name, path) in enumerate([*only, *inputs]):
        if rank <= len(only):
            base = ordinal  # references count their rows each for itself, all inputs together
        for part in shards.parts([path]):
            parts.append(dataclasses.replace(part, first_ordinal=ordinal))
            ordinal += part.rows
            protected.append(name in never)
            ranks.append(rank)
            labels.append(name if rank < len(only) else None)
            starts.append(base)
    rows = sum(part.rows for part in parts)
    return Plan(
        directory, parts, options, partitions_for(rows, options), sum(label is not None for label in labels), protected,
        ranks if input_priority else None, labels, starts, known, [each.name for each in generations], grow,
    )  # fmt: skip


_PARTITION_BYTES = 64 << 20


def partitions_for(rows: int, options: DedupOptions) -> int:
    """Pieces of the key space; depends on the inputs and settings alone, never on the cluster."""
    record_bytes = 16 * options.shape[0] if options.finds_near else 24
    return options.partitions or min(4096, max(1, -(-rows * record_bytes // _PARTITION_BYTES)))
