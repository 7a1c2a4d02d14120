"""One prompt with different answers, seen over a whole set (Self-Instruct drops a task whose outputs contradict each other).

A prompt is everything said before the last reply, an answer is that reply, both without white space at their ends and
without case. They are compared by 128-bit hashes: 42 bytes a row in the task that decides.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.dedup.exact import content_hashes
from operators.synthesis.curate.set_operator import ReadKeys, Removed, SetOperator, gather, ids_of
from operators.synthesis.curate.turns import Turns


class ContradictionsSettings(Settings):
    """Which of several answers stays."""

    keep: Literal["none", "first", "short"] = Field(
        default="none",
        description="of rows with one prompt and different answers: none stay; the first; or the first if its answer is "
        "longer than `short` (two poems do not contradict each other, two labels do)",
    )
    short: int = Field(default=60, ge=1, description="with `keep: short`: longest answer that contradicts another, in characters")


class Contradictions(SetOperator):
    """Drop rows whose prompt has another answer elsewhere in the set (`contradiction`), and copies (`duplicate`).

    Of rows that are alike in prompt and answer the first stays. The value is the number of answers that the prompt has;
    the detail names the first row with that prompt. Rows without a reply are left alone.
    """

    name: ClassVar[str] = "contradictions"
    settings = ContradictionsSettings

    def keys(self, table: pa.Table) -> dict[str, pa.Array]:
        turns = Turns(table)
        last = turns.is_last_reply()
        prompts = content_hashes(_folded(pc.fill_null(turns.before(last).by_row(), "")))
        reply = turns.all.where(last)
        answers, size = np.zeros((table.num_rows, 2), np.uint64), np.full(table.num_rows, -1, np.int64)
        answers[reply.row] = content_hashes(_folded(reply.text))
        size[reply.row] = pc.utf8_length(reply.text).to_numpy(zero_copy_only=False)
        columns = {"prompt": prompts[:, 0], "prompt_2": prompts[:, 1], "answer": answers[:, 0], "answer_2": answers[:, 1]}
        return {**{name: pa.array(values.copy()) for name, values in columns.items()}, "size": pa.array(size)}

    def resolve(self, read: ReadKeys, seed: int) -> Removed:
        found = gather(read, ["prompt", "prompt_2", "answer", "answer_2", "size"], seed)
        rows = np.flatnonzero(found["size"] >= 0)
        prompts = np.column_stack([found["prompt"][rows], found["prompt_2"][rows]])
        whole = np.column_stack([prompts, found["answer"][rows], found["answer_2"][rows]])
        _, prompt = np.unique(prompts, axis=0, return_inverse=True)
        _, first, pair = np.unique(whole, axis=0, return_index=True, return_inverse=True)
        prompt, pair = prompt.ravel(), pair.ravel()
        copy = np.arange(len(rows)) != first[pair]
        answers = np.bincount(prompt[first], minlength=int(prompt.max()) + 1 if len(prompt) else 0)
        opening = np.full(len(answers), len(rows), np.int64)
        np.minimum.at(opening, prompt, np.arange(len(rows)))
        against = (answers[prompt] > 1) & ~copy
        if self.config.keep != "none":
            stays = np.arange(len(rows)) == opening[prompt]
            if self.config.keep == "short":
                stays &= found["size"][rows] > self.config.short
            against &= ~stays
        gone = np.flatnonzero(copy | against)
        names = ids_of(read, found["ordinal"][rows[opening[prompt[gone]]]])
        return Removed(
            found["ordinal"][rows[gone]],
            pa.array(np.where(copy[gone], "duplicate", "contradiction").astype(object), pa.string()),
            pa.array(answers[prompt[gone]].astype(np.float64)),
            pa.array(names, pa.string()),
            {"prompts": len(answers), "prompts_with_several_answers": int((answers > 1).sum())},
        )


def _folded(text: pa.Array) -> pa.Array:
    return pc.utf8_lower(pc.utf8_trim_whitespace(text))
