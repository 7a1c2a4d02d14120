"""Refusals and honest "I don't know", told apart: the first are kept only up to a share of the set, the second are wanted.

A reply is judged by its beginning, where a refusal shows itself. "I'm sorry, but I don't have that information" is
honest, "I'm sorry, but I can't help with that" refuses; of a reply that holds both, the one that comes first counts.
Patterns: `patterns/LANG/refusals.txt`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.synthesis.curate import patterns
from operators.synthesis.curate.set_operator import ReadKeys, Removed, SetOperator, gather, surplus
from operators.synthesis.curate.turns import REPLIES, Said, Turns

WINDOW = 240  # characters of a reply's beginning


def refuses(replies: Said) -> tuple[np.ndarray, np.ndarray]:
    """(refuses bool[messages], says that it does not know bool[messages]); never both."""
    begin = pc.replace_substring_regex(pc.utf8_slice_codeunits(replies.text, 0, WINDOW), "’", "'")
    refusal, unknown = patterns.load("refusals", "refusal"), patterns.load("refusals", "unknown")
    no, know_not = refusal.matches(begin), unknown.matches(begin)
    both = np.flatnonzero(no & know_not)
    if len(both):  # sparse
        texts = begin.take(pa.array(both))
        earlier = np.array([refusal.place(text) < unknown.place(text) for text in texts.to_pylist()])
        no[both], know_not[both] = earlier, ~earlier
    return no, know_not


class RefusalShareSettings(Settings):
    """How many refusals a set may keep."""

    max_share: float = Field(default=0.02, ge=0, lt=1, description="most refusals, as a share of the rows that are kept")


class RefusalShare(SetOperator):
    """Keep refusals only up to a share of the kept set; which ones stay is chosen by a seeded hash of the id.

    A conversation refuses if one of its replies does. Replies that say honestly that they do not know are counted apart
    and always kept. The value of
    a reject is the share of refusals before. Statistics: `refusals`, `unknown`, `refusals_kept`.
    """

    name: ClassVar[str] = "refusal_share"
    settings = RefusalShareSettings

    def files(self) -> list[str]:
        return patterns.files("refusals")

    def keys(self, table: pa.Table) -> dict[str, pa.Array]:
        replies = Turns(table).of(*REPLIES)
        no, know_not = refuses(replies)
        return {"refuses": pa.array(replies.any(no)), "unknown": pa.array(replies.any(know_not))}

    def resolve(self, read: ReadKeys, seed: int) -> Removed:
        found = gather(read, ["refuses", "unknown"], seed)
        refusing = np.flatnonzero(found["refuses"])
        total, share = len(found["refuses"]), self.config.max_share
        bound = int(np.floor(share * (total - len(refusing)) / (1 - share) + 1e-9))
        gone = surplus(refusing, found["draw"], bound)
        stats = {"refusals": len(refusing), "unknown": int(found["unknown"].sum()), "refusals_kept": len(refusing) - len(gone)}
        return Removed.of(found["ordinal"][gone], "refusal", round(len(refusing) / max(1, total), 6), stats=stats)
