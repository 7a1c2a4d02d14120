"""What verdicts say: acceptance with an interval, of each stratum and of the whole stage, and how far reviewers agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Estimate:
    """A share with its interval, from `judged` rows of `rows`. Without a judged row it is unknown: from 0 to 1."""

    rows: int
    judged: int
    point: float | None
    low: float
    high: float


def wilson(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson 1927); (0, 1) without a trial. Trials may be a fraction."""
    if trials <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return round(max(0.0, (middle - width) / scale), 6), round(min(1.0, (middle + width) / scale), 6)


def estimate(rows: int, values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Of one stratum of `rows` rows: `values` are the shares of its judged rows' votes that accept."""
    if not values:
        return Estimate(rows, 0, None, 0.0, 1.0)
    low, high = wilson(math.fsum(values), len(values), confidence)
    return Estimate(rows, len(values), round(math.fsum(values) / len(values), 6), low, high)


def total(strata: Sequence[Estimate], confidence: float = 0.95) -> Estimate:
    """Of all strata together, each weighted by its rows: small strata are sampled more densely than large ones.

    The interval is Wilson's at the effective number of trials, 1 / sum(weight^2 / judged) (L. Kish 1965, section 8.2, for
    strata). Strata without a verdict are left out, which the counts show.
    """
    known = [stratum for stratum in strata if stratum.point is not None]
    rows, judged = sum(stratum.rows for stratum in strata), sum(stratum.judged for stratum in strata)
    size = sum(stratum.rows for stratum in known)
    if not size:
        return Estimate(rows, 0, None, 0.0, 1.0)
    point = math.fsum(stratum.rows / size * (stratum.point or 0.0) for stratum in known)
    trials = 1 / math.fsum((stratum.rows / size) ** 2 / stratum.judged for stratum in known)
    low, high = wilson(point * trials, trials, confidence)
    return Estimate(rows, judged, round(point, 6), low, high)


@dataclass(frozen=True)
class Agreement:
    """Of two reviewers on the rows that both judged. `kappa` is None where chance alone would make them agree always."""

    first: str
    second: str
    rows: int
    agreed: float
    kappa: float | None


def agreements(votes: Mapping[str, Mapping[int, str]]) -> list[Agreement]:
    """Cohen's kappa (J. Cohen 1960) of each two reviewers with rows in common; `votes` is {reviewer: {row: verdict}}."""
    found = []
    names = sorted(votes)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            both = sorted(votes[first].keys() & votes[second].keys())
            if both:
                found.append(_agreement(first, second, [votes[first][row] for row in both], [votes[second][row] for row in both]))
    return found


def _agreement(first: str, second: str, one: Sequence[str], other: Sequence[str]) -> Agreement:
    rows = len(one)
    agreed = sum(a == b for a, b in zip(one, other, strict=True)) / rows
    left, right = Counter(one), Counter(other)
    chance = sum(left[verdict] * right[verdict] for verdict in left) / rows**2
    kappa = None if chance >= 1 - 1e-12 else round((agreed - chance) / (1 - chance), 6)
    return Agreement(first, second, rows, round(agreed, 6), kappa)
