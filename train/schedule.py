"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from operators.config import Settings


class Schedule(Settings):
    """Warm-up, then a decay; the factor multiplies the peak learning rate."""

    warmup: float = Field(default=0.1, ge=0, description="Linear warm-up: a share of all steps if below 1, else steps.")
    shape: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="After warm-up: a half cosine down to `floor`; `wsd`, constant and then a linear decay over the "
        "last `decay` share of steps (warmup-stable-decay, Hu et al. 2024); or constant.",
    )
    floor: float = Field(default=0.1, ge=0, le=1, description="The last learning rate, as a share of the peak.")
    decay: float = Field(default=0.2, gt=0, le=1, description="For `wsd`: the share of all steps over which it decays.")

    def warmup_steps(self, steps: int) -> int:
        return min(steps, round(self.warmup * steps) if self.warmup < 1 else round(self.warmup))

    def factor(self, step: int, steps: int) -> float:
        """The factor in force during `step` (from 0) of `steps`."""
        warm = self.warmup_steps(steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.shape == "constant":
            return 1.0
        if self.shape == "cosine":
            done = (step - warm) / max(1, steps - warm)
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        start = max(warm, steps - round(self.decay * steps))
        if step < start:
            return 1.0
        return 1 - (1 - self.floor) * min(1.0, (step - start + 1) / max(1, steps - start))
