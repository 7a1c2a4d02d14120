"""The linter names doubts about a recipe that would run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipelines.check import lint
from pipelines.recipe import parse_recipe

SEEDS = {"kind": "self_instruct", "seeds": "seeds.jsonl"}
SERVER = {"model": "m", "endpoint": {"url": "http://127.0.0.1:1/v1"}}


def warnings(**stages: dict[str, Any]) -> str:
    return "\n".join(lint(parse_recipe(json.dumps({"name": "x", "stages": stages}))))


def test_a_server_without_a_cap_is_a_doubt_and_with_one_it_is_none() -> None:
    assert "stages.tasks: asks a server without `max_generated_tokens`" in warnings(tasks={**SEEDS, "generator": SERVER})
    assert "max_generated_tokens" not in warnings(tasks={**SEEDS, "generator": SERVER, "max_generated_tokens": 1000})
    assert "max_generated_tokens" not in warnings(tasks=SEEDS)


@pytest.mark.parametrize(
    ("source", "doubted"),
    [("tasks", True), ("harder", True), ("kept", False), ("human", False)],
)
def test_training_on_what_a_model_wrote_and_nothing_curated_is_a_doubt(source: str, doubted: bool) -> None:
    found = warnings(
        tasks=SEEDS,
        harder={"kind": "evol_instruct", "input": "tasks"},
        kept={"kind": "curate", "input": "harder", "operators": ["stock_phrases"]},
        human={"kind": "conversations", "path": "a.jsonl", "format": "alpaca"},
        base={"kind": "pretrain", "input": "human", "steps": 1, "model": {"layers": 1}},
        chat={"kind": "sft", "model": "base", "input": {source: 1}, "steps": 1, "learning_rate": 0.0001},
    )
    assert ("stages.chat: trains on rows that a model wrote" in found) == doubted
