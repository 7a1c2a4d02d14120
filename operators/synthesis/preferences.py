"""Preference data from several samples of one model: pairs with a least margin, or replies labelled good and bad.

The samples of a prompt are drawn, scored (operators.synthesis.scoring) and paired. A margin is the difference of two
scores on the scorer's own scale; a pair needs `min_margin`, so ties never become pairs. Every rule that a pair must pass is
tried on the pairs of a prompt from the widest margin down: `best_worst` takes the first that passes, `all` the first
`max_pairs`. With a judge that compares (`judge: {method: pairs}`) a pair must also be one that the judge decided alike in
both orders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from operators import tables
from operators.config import Settings
from operators.synthesis import length_bias
from operators.synthesis.flow import Flow, ask_all
from operators.synthesis.requests import Reject, Reply
from operators.synthesis.rows import INSTRUCTIONS, Account, Provenance
from operators.synthesis.scoring import (
    AnswerSettings,
    OpenPrompt,
    Panel,
    Scored,
    Scores,
    ScoringSettings,
    provenance_sampling,
    sample_request,
    score,
    scoring_bound,
    templates,
)

SCORE_COLUMNS = [
    pa.field("score_chosen", pa.float32()),
    pa.field("score_rejected", pa.float32()),
    pa.field("tokens_chosen", pa.int32()),  # of the answering model; words (characters in Chinese) of imported replies
    pa.field("tokens_rejected", pa.int32()),
]

PAIRS = pa.schema([*tables.PREFERENCES, *SCORE_COLUMNS])
"""PREFERENCES with both scores and both lengths."""


LABELS = pa.schema([*INSTRUCTIONS, pa.field("label", pa.bool_()), pa.field("score", pa.float32())])
"""Conversations whose last reply is desirable (`label` true) or not, with the score that decided; for KTO (Ethayarajh et al.
2024, arXiv 2402.01306)."""


class LabelSettings(Settings):
    """Thresholds of unpaired output, on the scorer's scale."""

    good: float = Field(description="a reply with this score or more is labelled true")
    bad: float = Field(description="a reply with this score or less is labelled false; between the two it is rejected")

    @model_validator(mode="after")
    def _apart(self) -> LabelSettings:
        if self.bad >= self.good:
            raise ValueError(f"`bad` {self.bad} must be below `good` {self.good}")
        return self


class PairingSettings(Settings):
    """Which pairs are made of scored replies."""

    min_margin: float | None = Field(
        default=None,
        gt=0,
        description="least difference of the two scores, on the scorer's scale; default: 0.1 for form and agreement, a tenth of "
        "the judge's scale, 0.3 of the comparisons won, 0.5 for a reward model, any for imported rankings",
    )
    min_chosen: float | None = Field(default=None, description="least score of the chosen reply")
    pairs: Literal["best_worst", "all"] = Field(default="best_worst", description="one pair a prompt, or all that pass")
    max_pairs: int = Field(default=6, ge=1, description="`all`: most pairs of one prompt, widest margins first")
    max_length_ratio: float | None = Field(
        default=None, ge=1, description="longer over shorter reply of a pair, in tokens, at most this"
    )
    max_chosen_longer: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="most share of pairs in which the chosen reply is the longer one, kept in every unit of rows; "
        "those with the smallest margins go",
    )
    max_chosen_shorter: float | None = Field(default=None, ge=0, le=1, description="likewise where it is the shorter one")


class PreferenceSettings(AnswerSettings, ScoringSettings, PairingSettings):
    """How preferences are made."""

    samples: int = Field(default=4, ge=2, le=64, description="replies drawn for a prompt")
    unpaired: LabelSettings | None = Field(
        default=None, description="write conversations with a `label` (KTO) by these thresholds, instead of pairs"
    )

    @model_validator(mode="after")
    def _pairs_or_labels(self) -> PreferenceSettings:
        given = [name for name, field in PairingSettings.model_fields.items() if getattr(self, name) != field.default]
        if self.unpaired is not None and given:
            raise ValueError(f"`unpaired` makes no pairs, so {', '.join(given)} cannot be used with it")
        return self

    @property
    def margin(self) -> float:
        """`min_margin` or the scorer's default."""
        if self.min_margin is not None:
            return self.min_margin
        if self.scorer == "judge":
            points = self.judge.method == "points"
            return (self.judge.high - self.judge.low) / 10 if points else 0.3
        return 0.5 if self.scorer == "reward" else 0.1

    @property
    def schema(self) -> pa.Schema:
        return PAIRS if self.unpaired is None else LABELS


def choose(scores: Scores, settings: PairingSettings, min_margin: float) -> list[tuple[Scored, Scored, float]] | Reject:
    """(chosen, rejected, margin) of the pairs that pass, widest margin first, or why none does.

    Equal margins fall to the earlier samples, equal texts count once. The reason is that of the widest pair.
    """
    first: dict[str, Scored] = {}
    for sample in scores.samples:
        if sample.score is not None:
            first.setdefault(sample.text, sample)
    scored = list(first.values())
    if len(scored) < 2:
        why = next((sample.why for sample in scores.samples if sample.why is not None), None)
        return why if why is not None else Reject("tie", 0.0)
    candidates = [(a, b, round((a.score or 0) - (b.score or 0), 4)) for a in scored for b in scored]
    candidates = [pair for pair in candidates if pair[2] > 0]
    candidates.sort(key=lambda pair: (-pair[2], pair[0].number, pair[1].number))
    if not candidates:
        return Reject("tie", 0.0)
    found: list[tuple[Scored, Scored, float]] = []
    reason: Reject | None = None
    for chosen, rejected, margin in candidates:
        why = _check(chosen, rejected, margin, scores, settings, min_margin)
        if why is None:
            found.append((chosen, rejected, margin))
            if settings.pairs == "best_worst" or len(found) == settings.max_pairs:
                break
        elif reason is None:
            reason = why
        if margin < min_margin:
            break  # the rest is narrower still
    if found:
        return found
    assert reason is not None
    return reason


def _check(
    chosen: Scored, rejected: Scored, margin: float, scores: Scores, settings: PairingSettings, min_margin: float
) -> Reject | None:
    if margin < min_margin:
        return Reject("margin", margin)
    if chosen.form == 0:
        return Reject("none_good", chosen.score)
    if settings.min_chosen is not None and (chosen.score or 0) < settings.min_chosen:
        return Reject("below_minimum", chosen.score)
    if scores.better is not None:
        i, j = sorted((chosen.number, rejected.number))
        if (i, j) in scores.compared or chosen.parts.get("won") is None:
            if scores.better.get((i, j)) is not (chosen.number == i):
                return Reject("inconsistent", margin)
        else:
            return Reject("not_compared", margin)
    ratio = max(chosen.tokens, rejected.tokens) / max(1, min(chosen.tokens, rejected.tokens))
    if settings.max_length_ratio is not None and round(ratio, 4) > settings.max_length_ratio:
        return Reject("length_ratio", round(ratio, 4))
    return None


def preference_flow(prompt: OpenPrompt, settings: PreferenceSettings, panel: Panel) -> tuple[int, Flow[Account]]:
    """(most completion tokens, flow) that draws and scores the samples of one prompt and makes pairs or labels, or a reject."""
    bound = settings.samples * settings.sampling.max_tokens + scoring_bound(settings.samples, settings)
    return bound, _prefer(prompt, settings, panel)


def _prefer(prompt: OpenPrompt, settings: PreferenceSettings, panel: Panel) -> Flow[Account]:
    account = Account("preferences")
    if settings.scorer == "agreement" and settings.agreement == "reference" and prompt.reference is None:
        account.reject(prompt.id, prompt.text, Reject("no_reference"), created=False)
        return account
    requests = [sample_request(prompt, settings, panel.seed, "preferences", number) for number in range(settings.samples)]
    replies = yield from ask_all(requests)
    answered = [(number, reply) for number, reply in enumerate(replies) if reply.unanswered is None]
    if len(answered) < 2:
        account.reject(prompt.id, prompt.text, _first_unanswered(replies), created=False)
        return account
    scores = yield from score(prompt, answered, settings, panel, settings.prompts)
    note(account, prompt.lang, scores)
    if settings.unpaired is not None:
        _label(account, prompt, scores, settings, settings.unpaired, panel)
        return account
    found = choose(scores, settings, settings.margin)
    if isinstance(found, Reject):
        account.reject(prompt.id, shown(prompt, scores), found, created=False)
        return account
    for place, (best, worst, margin) in enumerate(found):
        identity = tables.stable_id("preferences", panel.seed, prompt.id, *([place] if place else []))
        row = pair_row(identity, prompt, best, worst, margin, _provenance(prompt, settings, panel, "preference"))
        example = {"prompt": prompt.text, "chosen": best.text, "rejected": worst.text, "margin": margin}
        account.keep(row, "preference", example, created=place > 0)
    return account


def _label(
    account: Account, prompt: OpenPrompt, scores: Scores, settings: PreferenceSettings, thresholds: LabelSettings, panel: Panel
) -> None:
    """Enter each sample as good, bad or rejected; the prompt's own row is rejected when no sample is kept."""
    seen: set[str] = set()
    for sample in scores.samples:
        why = sample.why
        if why is None and sample.text in seen:
            why = Reject("duplicate_reply")
        seen.add(sample.text)
        value = sample.score
        identity = tables.stable_id("preferences", panel.seed, prompt.id, "label", sample.number)
        label = None
        if why is None and value is not None:
            label = False if value <= thresholds.bad else True if value >= thresholds.good and sample.form > 0 else None
            why = Reject("between", value) if label is None else None
        if label is None:
            account.reject(identity, sample.text, why or Reject("between", value), source=prompt.id, step="samples")
            continue
        row = {
            "id": identity,
            "messages": [*messages_of(prompt), {"role": "assistant", "content": sample.text}],
            "label": label,
            "score": value,
            "lang": prompt.lang,
            "provenance": _provenance(prompt, settings, panel, "label"),
        }
        operation = "desirable" if label else "undesirable"
        account.keep(row, operation, {"prompt": prompt.text, "reply": sample.text, "label": label}, created=bool(account.rows))
    if not account.rows:
        account.reject(prompt.id, prompt.text, Reject("no_label"), created=False)


def note(account: Account, lang: str, scores: Scores) -> None:
    """Put what was measured of one prompt's replies into the account's statistics."""
    measured = [(s.tokens, s.raw, s.score) for s in scores.samples if s.raw is not None and s.score is not None]
    sums = length_bias.score_sums(measured)
    if sums:
        account.extra["length"] = {lang: sums}
    if scores.counts:
        account.extra["judge"] = dict(sorted(scores.counts.items()))
    unscored = [sample.why.reason for sample in scores.samples if sample.why is not None]
    if unscored:
        account.extra["unscored"] = {reason: unscored.count(reason) for reason in sorted(set(unscored))}


def pair_statistics(account: Account) -> dict[str, Any]:
    """Pairs, their margins in tenths, and the sums of their lengths, of the rows that an account keeps in the end."""
    margins: dict[str, int] = {}
    for row in account.rows:
        key = f"{int(row['margin'] * 10 + 1e-6) / 10:.1f}"
        margins[key] = margins.get(key, 0) + 1
    return {
        "pairs": len(account.rows),
        "margins": dict(sorted(margins.items(), key=lambda item: float(item[0]))),
        "length": length_bias.sums_of_pairs(account.rows),
    }


def shown(prompt: OpenPrompt, scores: Scores) -> str:
    """A rejected prompt with all its samples and scores, as the text of the reject."""
    samples = [
        {
            "text": s.text,
            "score": s.score,
            "form": s.form,
            "tokens": s.tokens,
            **s.parts,
            **({"why": s.why.reason} if s.why else {}),
        }
        for s in scores.samples
    ]
    return json.dumps({"prompt": prompt.text, "samples": samples}, ensure_ascii=False)


def pair_row(
    identity: str, prompt: OpenPrompt, best: Scored, worst: Scored, margin: float, provenance: dict[str, Any]
) -> dict[str, Any]:
    """One row of PAIRS."""
    return {
        "id": identity,
        "prompt": messages_of(prompt),
        "chosen": [{"role": "assistant", "content": best.text}],
        "rejected": [{"role": "assistant", "content": worst.text}],
        "margin": margin,
        "lang": prompt.lang,
        "provenance": provenance,
        "score_chosen": best.score,
        "score_rejected": worst.score,
        "tokens_chosen": best.tokens,
        "tokens_rejected": worst.tokens,
    }


def messages_of(prompt: OpenPrompt) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in prompt.messages]


def _provenance(prompt: OpenPrompt, settings: PreferenceSettings, panel: Panel, operation: str) -> dict[str, Any]:
    made = templates(prompt, settings, settings)
    row = Provenance(panel.model, panel.revision, made, {}, panel.seed, [prompt.id], operation, 0).to_row()
    return {**row, "sampling": provenance_sampling(settings, settings, panel)}


def _first_unanswered(replies: Sequence[Reply]) -> Reject:
    return next(reply.unanswered for reply in replies if reply.unanswered is not None)
