"""Log-probabilities of chosen tokens of many rows, in batches bounded by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_utils import PreTrainedModel

from train.loader import IGNORE


@dataclass(frozen=True)
class Row:
    """Token ids int64[n] and which of them are scored, bool[n]; the first never is: nothing foretells it."""

    ids: np.ndarray
    scored: np.ndarray

    @property
    def count(self) -> int:
        """Tokens scored."""
        return int(self.scored[1:].sum())


def passes(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Which rows each forward pass takes: rows of like length, at most `batch_tokens` tokens with padding (or one row)."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index))
    found = []
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(rows[order[stop]].ids) * (stop + 1 - start) <= batch_tokens:
            stop += 1
        found.append(order[start:stop])
        start = stop
    return found


def summed(model: Any, rows: Sequence[Row], device: torch.device) -> np.ndarray:
    """float64[rows]: the summed log-probabilities by one forward pass; rows are padded on the right."""
    width = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), IGNORE, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
        mask[place, : len(row.ids)] = 1
        labels[place, : len(row.ids)] = np.where(row.scored, row.ids, IGNORE)
    given, attended = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
    logits = model(input_ids=given, attention_mask=attended, use_cache=False).logits[:, :-1].float()
    targets = torch.from_numpy(labels).to(device)[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return np.asarray(-losses.view(targets.shape).double().sum(dim=1).cpu().numpy())


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, rows: Sequence[Row], batch_tokens: int, device: torch.device) -> np.ndarray:
    """float64[rows]: the summed log-probability of each row's scored tokens, given those before them."""
    result = np.zeros(len(rows))
    for chosen in passes(rows, batch_tokens):
        result[chosen] = summed(model, [rows[index] for index in chosen], device)
    return result
