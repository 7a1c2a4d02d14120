"""What a fine-tune gained and lost: models before and after on the same sets, and chains of fine-tunes task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def kept(before: float, after: float, measure: str) -> float:
    """The share of an ability that is left, 1.0 for all of it, above 1 for more than before.

    Of accuracies their ratio; of losses (nats a token) the ratio of perplexities, before over after: a perplexity that
    rises from 10 to 12.5 keeps 0.8. An accuracy of 0 can lose nothing.
    """
    if measure == "accuracy":
        return after / before if before > 0 else 1.0
    return math.exp(max(-700.0, min(700.0, before - after)))


def changes(scores: Sequence[Mapping[str, Any]], before: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row a pair of models and set: {"after", "before", "set", "measure", "before_value", "after_value", "kept", "lost"}.

    `scores` are rows {"model", "set", "measure", "value"}; `before` maps a model to what it was. `lost` is 1 - kept,
    negative where something was gained.
    """
    values = {(row["model"], row["set"]): row for row in scores}
    names = list(dict.fromkeys(row["set"] for row in scores))
    found = []
    for after, earlier in before.items():
        for name in names:
            first, last = values[earlier, name], values[after, name]
            share = kept(first["value"], last["value"], first["measure"])
            found.append(
                {
                    "after": after, "before": earlier, "set": name, "measure": first["measure"],
                    "before_value": first["value"], "after_value": last["value"],
                    "kept": round(share, 6), "lost": round(1.0 - share, 6),
                }
            )  # fmt: skip
    return found


def matrix(scores: Sequence[Mapping[str, Any]], chain: Mapping[str, str]) -> dict[str, Any]:
    """R[i][j]: the score on the task of fine-tune j after fine-tune i (Lopez-Paz & Ranzato 2017, section 3), larger is better.

    `chain` maps models, in the order they were trained, to the set each was to learn. Scores are accuracies, or minus nats a
    token. Backward transfer is the mean over earlier tasks of R[last][j] - R[j][j] (their equation 3); forgetting the mean
    of max over i < last of R[i][j] - R[last][j], from the model that learnt j on (Chaudhry et al. 2018, section 3).
    """
    models, sets = list(chain), list(chain.values())
    values = {(row["model"], row["set"]): row["value"] if row["measure"] == "accuracy" else -row["value"] for row in scores}
    grid = [[round(float(values[model, name]), 6) for name in sets] for model in models]
    last = len(models) - 1
    backward = [grid[last][j] - grid[j][j] for j in range(last)]
    forgotten = [max(grid[i][j] for i in range(j, last)) - grid[last][j] for j in range(last)]
    return {
        "models": models,
        "sets": sets,
        "scores": grid,
        "backward_transfer": round(math.fsum(backward) / last, 6) if last else 0.0,
        "average_forgetting": round(math.fsum(forgotten) / last, 6) if last else 0.0,
    }
