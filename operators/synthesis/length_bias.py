"""How much a scorer, and the pairs made with it, favour long replies: measured by sums that add up over rows and units.

Within each prompt, scores and the log2 of lengths in tokens are centred, and the sums of their products kept; so what is
measured is whether the longer of two replies *to one prompt* scores higher, not whether hard prompts get long answers.
From the sums come Pearson's correlation, the slope (points for each doubling of the length), the share of pairs whose
chosen reply is the longer one, and the geometric mean of the ratio of lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from operators.ledger import merge_stats
from operators.synthesis.requests import Reject
from operators.synthesis.rows import Account

SCORE_SUMS = ("samples", "length_square", "raw_square", "raw_product", "score_square", "score_product")


def score_sums(scored: Sequence[tuple[int, float, float]]) -> dict[str, float]:
    """Sums over the replies to one prompt, each (tokens, score before the length penalty, score after it)."""
    count = len(scored)
    if count < 2:
        return {}
    x, y, z = (_centred(column) for column in zip(*((math.log2(n), raw, after) for n, raw, after in scored), strict=True))

    def product(a: Sequence[float], b: Sequence[float]) -> float:
        return math.fsum(i * j for i, j in zip(a, b, strict=True))

    values = (float(count), product(x, x), product(y, y), product(x, y), product(z, z), product(x, z))
    return dict(zip(SCORE_SUMS, values, strict=True))


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def pair_sums(chosen: int, rejected: int) -> dict[str, float]:
    """Sums of one pair with replies of these lengths in tokens."""
    return {
        "pairs": 1,
        "chosen_longer": int(chosen > rejected),
        "chosen_shorter": int(chosen < rejected),
        "log2_ratio": math.log2(max(1, chosen) / max(1, rejected)),
    }


def bias(sums: Mapping[str, float]) -> dict[str, float | int]:
    """What the sums say; measures without data (no pair, all of one length) are left out."""
    found: dict[str, float | int] = {}
    if sums.get("samples"):
        found["samples"] = int(sums["samples"])
    spread = sums.get("length_square", 0.0)
    for name, prefix in (("raw", ""), ("score", "controlled_")):
        height, shared = sums.get(f"{name}_square", 0.0), sums.get(f"{name}_product", 0.0)
        if spread > 1e-12 and height > 1e-12:
            found[f"{prefix}correlation"] = round(shared / math.sqrt(spread * height), 4)
            found[f"{prefix}points_per_doubling"] = round(shared / spread, 4)
    if sums.get("pairs"):
        pairs = sums["pairs"]
        found["pairs"] = int(pairs)
        found["chosen_longer"] = round(sums["chosen_longer"] / pairs, 4)
        found["chosen_shorter"] = round(sums["chosen_shorter"] / pairs, 4)
        found["length_ratio"] = round(2 ** (sums["log2_ratio"] / pairs), 4)
    return found


def biases(by_lang: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | int]]:
    """`bias` of each language's sums, and of all together under `all`."""
    total: dict[str, Any] = {}
    for sums in by_lang.values():
        merge_stats(total, sums)
    return {"all": bias(total), **{lang: bias(sums) for lang, sums in sorted(by_lang.items())}} if total else {}


def sums_of_pairs(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums by language of rows with `tokens_chosen` and `tokens_rejected`."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        merge_stats(found.setdefault(row["lang"] or "unknown", {}), pair_sums(row["tokens_chosen"], row["tokens_rejected"]))
    return found


def bound_length(account: Account, longer: float | None, shorter: float | None) -> None:
    """Set pairs aside until at most the share `longer` of the account's pairs has the longer reply chosen, and at most the
    share `shorter` the shorter one (None: no bound).

    Those with the smallest margin go first, of equal ones the last; each becomes a reject `chosen_longer` or
    `chosen_shorter`.
    """
    bounds = [(1, longer, "chosen_longer"), (-1, shorter, "chosen_shorter")]
    before = -1
    while before != len(account.rows):  # what one bound takes away changes the share that the other bounds
        before = len(account.rows)
        for direction, share, reason in bounds:
            if share is not None and share < 1:
                _bound(account, direction, share, reason)


def _bound(account: Account, direction: int, share: float, reason: str) -> None:
    apart = [row["tokens_chosen"] - row["tokens_rejected"] for row in account.rows]
    places = [place for place, difference in enumerate(apart) if difference * direction > 0]
    allowed = math.floor((len(apart) - len(places)) * share / (1 - share) + 1e-9)
    by_margin = sorted(places, key=lambda place: (-account.rows[place]["margin"], place))
    for place in sorted(by_margin[allowed:], reverse=True):
        row = account.rows[place]
        account.withdraw(place, Reject(reason, row["tokens_chosen"] / max(1, row["tokens_rejected"])), row_text(row))


def row_text(row: Mapping[str, Any]) -> str:
    """A pair as the text of a reject."""
    prompt = "\n\n".join(message["content"] for message in row["prompt"])
    return f"{prompt}\n\n[chosen]\n{row['chosen'][-1]['content']}\n\n[rejected]\n{row['rejected'][-1]['content']}"
