"""Which chunks of a document are asked about: a few, spread over the whole document, so that its head does not dominate."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import TypeVar

from pydantic import Field

from operators.config import Settings

T = TypeVar("T")


class QuotaSettings(Settings):
    """How many chunks are asked about."""

    per_document: int = Field(default=8, ge=1, description="chunks of one document, drawn one from each of as many equal stretches")
    per_source: int | None = Field(
        default=None, ge=1, description="chunks of all documents of one source, counted in the order of the documents"
    )


def spread(items: Sequence[T], count: int, seed: int, document: str) -> list[T]:
    """`count` of the items in their order: one drawn from each of `count` stretches of equal length (stratified sampling,
    Cochran 1977, chapter 5). All of them when there are no more. A function of seed and document id."""
    total = len(items)
    if total <= count:
        return list(items)
    draw = random.Random(f"{seed}:spread:{document}")
    edges = [place * total // count for place in range(count + 1)]
    return [items[draw.randrange(low, high)] for low, high in itertools.pairwise(edges)]
