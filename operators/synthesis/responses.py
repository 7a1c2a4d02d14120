"""New replies to given prompts: all samples, the best one, or rejection sampling until one passes.

Rejection sampling keeps replies that a scorer accepts and trains on them (RAFT, Dong et al. 2023, arXiv 2304.06767; Llama
2, Touvron et al. 2023, section 3.2.3). `keep: first_passing` draws one sample after another and stops at the first that
passes, `keep: best` draws all and keeps the one with the highest score that passes. Every reply drawn is accounted for:
a prompt's row counts as kept when a reply to it is, and is rejected (`none_passed`) otherwise; a reply that is not kept is
a created row that was rejected, with its reason.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from operators import tables
from operators.synthesis.flow import Flow, ask_all
from operators.synthesis.preferences import messages_of, note
from operators.synthesis.requests import Reject, Reply
from operators.synthesis.rows import INSTRUCTIONS, Account, Provenance
from operators.synthesis.scoring import (
    AnswerSettings,
    OpenPrompt,
    Panel,
    Scored,
    Scorer,
    ScoringSettings,
    provenance_sampling,
    sample_request,
    score,
    scoring_bound,
    templates,
)

RESPONSES = pa.schema(
    [
        *INSTRUCTIONS,
        pa.field("score", pa.float32()),  # on the scorer's scale, after the length penalty
        pa.field("form", pa.float32()),
        pa.field("scores", pa.string()),  # JSON of the parts of the score: agreement, criteria of the judge, ...
        pa.field("tokens", pa.int32()),  # length of the reply, in tokens of the answering model
    ]
)
"""INSTRUCTIONS with what was measured of the last reply."""


class ResponseSettings(AnswerSettings, ScoringSettings):
    """How prompts are answered anew."""

    scorer: Scorer = Field(default="form", description="form, agreement, judge or reward: see docs/preferences.md")
    keep: Literal["all", "best", "first_passing"] = Field(
        default="all", description="every reply that passes; the best of them; or draw until one passes, at most `samples`"
    )
    minimum: float | None = Field(default=None, description="least score of a reply that passes, on the scorer's scale")
    min_form: float = Field(default=0.5, ge=0, le=1, description="least form of a reply that passes")
    keep_truncated: bool = Field(default=False, description="let replies pass that were cut off at `max_tokens`")

    @model_validator(mode="after")
    def _can_be_scored(self) -> ResponseSettings:
        alone = self.samples == 1 or self.keep == "first_passing"
        if alone and self.scorer == "agreement" and self.agreement == "samples" and self.agreement_weight > 0:
            raise ValueError(
                "agreement with other samples needs several at once: choose `agreement: reference` or another scorer, "
                "or `keep: best` with `samples` above 1"
            )
        if alone and self.scorer == "judge" and self.judge.method == "pairs":
            raise ValueError("a judge of pairs needs several replies at once: choose `judge: {method: points}`, or `keep: best`")
        if alone and self.length_penalty:
            raise ValueError("`length_penalty` compares the lengths of several replies: it needs `keep: all` or `best`")
        if not self.samples > 1 and self.keep == "best":
            raise ValueError("`keep: best` needs `samples` above 1")
        return self


def response_flow(prompt: OpenPrompt, settings: ResponseSettings, panel: Panel) -> tuple[int, Flow[Account]]:
    """(most completion tokens, flow) that answers one prompt anew."""
    bound = settings.samples * settings.sampling.max_tokens
    if settings.keep == "first_passing":
        return bound + settings.samples * scoring_bound(1, settings), _until_one_passes(prompt, settings, panel)
    return bound + scoring_bound(settings.samples, settings), _all_at_once(prompt, settings, panel)


def check(sample: Scored, settings: ResponseSettings) -> Reject | None:
    """Why a scored reply does not pass, or None."""
    if not sample.text:
        return Reject("empty")
    if sample.truncated and not settings.keep_truncated:
        return Reject("truncated", sample.tokens)
    if sample.form < settings.min_form:
        return Reject("form", sample.form)
    if sample.score is None:
        return sample.why or Reject("no_score")
    if settings.minimum is not None and sample.score < settings.minimum:
        return Reject("below_minimum", sample.score)
    return None


def _all_at_once(prompt: OpenPrompt, settings: ResponseSettings, panel: Panel) -> Flow[Account]:
    account = Account("responses")
    if (why := _unfit(prompt, settings)) is not None:
        account.reject(prompt.id, prompt.text, why, created=False)
        return account
    requests = [sample_request(prompt, settings, panel.seed, "responses", number) for number in range(settings.samples)]
    replies = yield from ask_all(requests)
    answered = [(number, reply) for number, reply in enumerate(replies) if reply.unanswered is None]
    for number, reply in enumerate(replies):
        _reject_unanswered(account, prompt, panel, number, reply)
    scores = yield from score(prompt, answered, settings, panel, settings.prompts)
    note(account, prompt.lang, scores)
    passing: list[Scored] = []
    texts: set[str] = set()
    for sample in scores.samples:
        failed = check(sample, settings)
        if failed is None and sample.text in texts:
            failed = Reject("duplicate_reply")
        if failed is None:
            texts.add(sample.text)
            passing.append(sample)
        else:
            _reject(account, prompt, panel, sample, failed)
    if settings.keep == "best" and passing:
        best = max(passing, key=lambda sample: (sample.score or 0.0, -sample.number))
        for sample in passing:
            if sample is not best:
                _reject(account, prompt, panel, sample, Reject("not_best", sample.score))
        passing = [best]
    for sample in passing:
        _keep(account, prompt, settings, panel, sample)
    _close(account, prompt)
    return account


def _until_one_passes(prompt: OpenPrompt, settings: ResponseSettings, panel: Panel) -> Flow[Account]:
    account = Account("responses")
    if (why := _unfit(prompt, settings)) is not None:
        account.reject(prompt.id, prompt.text, why, created=False)
        return account
    drawn = 0
    for number in range(settings.samples):
        replies = yield from ask_all([sample_request(prompt, settings, panel.seed, "responses", number)])
        drawn += 1
        if _reject_unanswered(account, prompt, panel, number, replies[0]):
            break  # too long or refused: so would be the next
        scores = yield from score(prompt, [(number, replies[0])], settings, panel, settings.prompts)
        counted = Account("responses")
        note(counted, prompt.lang, scores)
        account.merge(counted)
        sample = scores.samples[0]
        failed = check(sample, settings)
        if failed is None:
            _keep(account, prompt, settings, panel, sample)
            break
        _reject(account, prompt, panel, sample, failed)
    account.extra["draws"] = {str(drawn): 1}
    _close(account, prompt)
    return account


def _unfit(prompt: OpenPrompt, settings: ResponseSettings) -> Reject | None:
    needs_reference = settings.scorer == "agreement" and settings.agreement == "reference" and settings.agreement_weight > 0
    return Reject("no_reference") if needs_reference and prompt.reference is None else None


def _identity(prompt: OpenPrompt, panel: Panel, number: int) -> str:
    return tables.stable_id("responses", panel.seed, prompt.id, tables.content_hash(prompt.messages), number)


def _reject(account: Account, prompt: OpenPrompt, panel: Panel, sample: Scored, why: Reject) -> None:
    account.reject(_identity(prompt, panel, sample.number), sample.text, why, source=prompt.id, step="samples")


def _reject_unanswered(account: Account, prompt: OpenPrompt, panel: Panel, number: int, reply: Reply) -> bool:
    why = reply.unanswered
    if why is not None:
        account.reject(_identity(prompt, panel, number), "", why, source=prompt.id, step="samples")
    return why is not None


def _keep(account: Account, prompt: OpenPrompt, settings: ResponseSettings, panel: Panel, sample: Scored) -> None:
    provenance = Provenance(
        panel.model, panel.revision, templates(prompt, settings, settings), {}, panel.seed, [prompt.id], "response", sample.number
    ).to_row()
    row: dict[str, Any] = {
        "id": _identity(prompt, panel, sample.number),
        "messages": [*messages_of(prompt), {"role": "assistant", "content": sample.text}],
        "lang": prompt.lang,
        "provenance": {**provenance, "sampling": provenance_sampling(settings, settings, panel)},
        "score": sample.score,
        "form": sample.form,
        "scores": json.dumps(sample.parts, sort_keys=True) if sample.parts else None,
        "tokens": sample.tokens,
    }
    example = {"prompt": prompt.text, "reply": sample.text, "score": sample.score}
    account.keep(row, "response", example, created=bool(account.rows))


def _close(account: Account, prompt: OpenPrompt) -> None:
    """Enter the prompt's own row where no reply to it was kept."""
    if not account.rows:
        account.reject(prompt.id, prompt.text, Reject("none_passed"), created=False)
