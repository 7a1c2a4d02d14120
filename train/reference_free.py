"""Preference losses without a reference model: ORPO, SimPO, CPO.

The formulas are those of TRL's experimental trainers, over log-probabilities that come from the same fused kernel as
DPO's. What they average over tokens is averaged here over the tokens of the global batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def sequence_scores(name: str, scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected) float[pairs]: the log-probability of each reply: its mean over tokens for `orpo` and `simpo`.

    `scores` and `mask` are [2 * pairs, length - 1], the chosen replies first; the mask marks the tokens of replies.
    """
    totals = (scores * mask).sum(dim=1)
    if name in ("orpo", "simpo"):
        totals = totals / mask.sum(dim=1)
    chosen, rejected = totals.chunk(2)
    return chosen, rejected


def preference_loss(
    name: str, chosen: torch.Tensor, rejected: torch.Tensor, beta: float, smoothing: float = 0.0, gamma: float = 0.0
) -> torch.Tensor:
    """float[pairs]: what the comparison of the two replies adds to the loss.

    ORPO: Hong et al. 2024, equations 6 and 7 (the weight of the odds ratio is `beta`). SimPO: Meng et al. 2024, equation 6.
    CPO: Xu et al. 2024, equation 3.
    """
    if name == "orpo":
        odds = chosen - rejected - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
        return -beta * functional.logsigmoid(odds)
    margin = beta * (chosen - rejected) - (gamma if name == "simpo" else 0.0)
    return -functional.logsigmoid(margin) * (1 - smoothing) - functional.logsigmoid(-margin) * smoothing


def log_one_minus_exp(value: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(value)) for value < 0, without cancellation near 0 (Mächler 2012)."""
    return torch.where(value < -0.6931471805599453, torch.log1p(-torch.exp(value)), torch.log(-torch.expm1(value)))
