"""What the models were asked and what it cost: one line a stage that called one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.report.figures import number, percent
from pipelines.report.view import RunView, StageView


@dataclass(frozen=True)
class Spending:
    """`calls` and tokens are those behind the stage's rows; `drawn` is what the last run of the stage did not find in its cache."""

    stage: StageView
    model: str
    calls: float
    prompt_tokens: float
    completion_tokens: float
    drawn: float
    prefix_hits: str | None  # share of drawn prompt tokens that the engine did not have to compute
    cost: str | None


def spendings(run: RunView) -> list[Spending]:
    """One entry for each stage that called a model."""
    found = []
    for stage in run.stages:
        if stage.manifest is None or not stage.count("calls"):
            continue
        timings = stage.timings
        prompt = timings.get("drawn_prompt_tokens", 0)
        found.append(
            Spending(
                stage,
                _model(stage),
                stage.count("calls"),
                stage.count("prompt_tokens"),
                stage.count("completion_tokens"),
                timings.get("drawn_calls", 0),
                percent(timings.get("prefix_tokens", 0), prompt) if prompt else None,
                cost(timings),
            )
        )
    return found


def cost(timings: dict[str, Any]) -> str | None:
    """`0.12 USD`, if the recipe states prices."""
    return f"{number(timings['cost'])} {timings.get('currency', '')}".strip() if "cost" in timings else None


def _model(stage: StageView) -> str:
    generator = stage.manifest.config.get("generator") if stage.manifest is not None else None
    name = str(generator.get("model", "")) if isinstance(generator, dict) else ""
    return name.rstrip("/").rsplit("/", 1)[-1]
