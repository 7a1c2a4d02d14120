"""Replies drawn from a model in training: every token's draw is a function of (seed, position, sample, place).

The token of a reply is drawn by the Gumbel-max trick (Maddison, Tarlow and Minka 2014, section 2): the largest of log-probability
plus Gumbel noise is a sample of the distribution. The noise of a vocabulary entry is a hash of the reply's key, the place in the
reply and the entry, so no generator has a state: what a prompt is answered does not depend on which worker answers it, on what
else is in its batch, or on whether the run was resumed (beyond the rounding of logits, which could tip a tie).
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from train.mixture import _mix
from train.settings_alignment import GrpoSettings

_PLACE, _ENTRY = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_BITS = 24  # of a uniform draw, as many as a float32 holds


def keys(seed: int, positions: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """int64 key of each reply: position of its prompt in the stream of samples, number of the reply in its group."""
    return _mix(seed, positions, samples).view(np.int64)


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to the scores of each row, so that the greatest is a draw from their softmax.

    `row_keys` are int64[rows], on the scores' device; `start` is the length of the (padded) prompts.
    """

    def __init__(self, row_keys: torch.Tensor, start: int) -> None:
        self._keys, self._start = row_keys, start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        place = input_ids.shape[1] - self._start
        entries = torch.arange(scores.shape[1], device=scores.device)
        mixed = _scramble((self._keys + _wrapped(place * _PLACE))[:, None] + entries[None, :] * _wrapped(_ENTRY))
        uniform = (_shifted(mixed, 64 - _BITS).double() + 0.5) / (1 << _BITS)
        noise = -torch.log(-torch.log(uniform))
        return scores.double().add_(noise)  # type: ignore[return-value]


def _wrapped(value: int) -> int:
    """The signed 64-bit integer with the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right that fills with zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _scramble(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), in arithmetic that wraps."""
    value = (value ^ _shifted(value, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _wrapped(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def processors(settings: GrpoSettings, row_keys: torch.Tensor, start: int) -> LogitsProcessorList:
    """What makes greedy search a sampling by the settings, in the order in which transformers applies them."""
    chain = LogitsProcessorList()
    if settings.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        chain.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        chain.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p is not None:
        chain.append(MinPLogitsWarper(settings.min_p))
    chain.append(GumbelNoise(row_keys, start))
    return chain
