"""Preference pairs from several samples of one model: the best and the worst reply to a prompt, if they are far apart.

A reply's score is in [0, 1] and needs no second model:

    score = agreement_weight * agreement + (1 - agreement_weight) * form

*agreement* is the mean ROUGE-L F with the prompt's other samples, which is minimum-Bayes-risk selection (Eikema and Aziz
2020): what a model says again and again is likelier to be right than what it says once. With `agreement: reference` it
is ROUGE-L F with the row's own answer instead. *form* is 1 less what is plainly wrong with the reply: cut off (.5),
a refusal (.5), repeated 4-grams (their share), the prompt echoed (ROUGE-L F with it where above one half), another
script than the prompt's language (the share); it does not grow with length. Scores are rounded to four decimals; a pair
needs `min_margin`, so ties never become pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from operators import tables
from operators.config import Settings
from operators.synthesis import heuristics, prompts
from operators.synthesis.flow import Flow, ask_all
from operators.synthesis.novelty import rouge_l, rouge_l_matrix
from operators.synthesis.requests import Messages, Reject, Reply, Request, SamplingSettings, request_seed
from operators.synthesis.rows import Account, Provenance


class PreferenceSettings(Settings):
    """How pairs are made."""

    samples: int = Field(default=4, ge=2, le=64, description="replies drawn for a prompt")
    min_margin: float = Field(default=0.1, gt=0, le=1, description="least difference of the two scores of a pair")
    agreement: Literal["samples", "reference"] = Field(default="samples", description="what a reply is compared with")
    agreement_weight: float = Field(default=0.5, ge=0, le=1, description="weight of agreement against form")
    sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=1.0, top_p=0.95, max_tokens=96), description="drawing the samples"
    )
    prompts: str | None = Field(default=None, description="folder with <language>/answer.txt that replaces the project's prompt")


@dataclass(frozen=True)
class PreferencePrompt:
    """A conversation up to a user's turn, and the row's own answer to it."""

    id: str
    messages: Messages
    reference: str
    lang: str


@dataclass(frozen=True)
class Scored:
    """A sample with its score in [0, 1] and the two parts of it."""

    text: str
    score: float
    agreement: float
    form: float


def form_score(prompt: str, reply: Reply, lang: str) -> float:
    """1 less the faults of a reply that can be seen without understanding it, at least 0."""
    text = reply.text.strip()
    if heuristics.without_content(text):
        return 0.0
    faults = 0.5 * reply.truncated + 0.5 * heuristics.refuses(text) + heuristics.repeated_share(text)
    echo = rouge_l(prompt, text)
    faults += echo if echo > 0.5 else 0.0
    faults += 1.0 - heuristics.script_share(text, lang)
    return round(max(0.0, 1.0 - faults), 4)


def score_samples(prompt: PreferencePrompt, replies: Sequence[Reply], settings: PreferenceSettings) -> list[Scored]:
    """Scores of the samples of one prompt, in their order."""
    texts = [reply.text.strip() for reply in replies]
    if settings.agreement == "reference":
        agreement = np.array([rouge_l(prompt.reference, text) for text in texts])
    else:
        matrix = rouge_l_matrix(texts)
        np.fill_diagonal(matrix, 0.0)
        agreement = matrix.sum(axis=1) / max(1, len(texts) - 1)
    question = prompt.messages[-1][1]
    scored = []
    for text, reply, shared in zip(texts, replies, agreement.tolist(), strict=True):
        form = form_score(question, reply, prompt.lang)
        total = settings.agreement_weight * shared + (1 - settings.agreement_weight) * form
        scored.append(Scored(text, round(total, 4), round(shared, 4), form))
    return scored


def choose(scored: Sequence[Scored], min_margin: float) -> tuple[Scored, Scored, float] | Reject:
    """(chosen, rejected, margin), or why there is no pair. Equal scores fall to the earlier sample."""
    best = max(range(len(scored)), key=lambda i: (scored[i].score, -i))
    worst = min(range(len(scored)), key=lambda i: (scored[i].score, i))
    margin = round(scored[best].score - scored[worst].score, 4)
    if margin == 0 or scored[best].text == scored[worst].text:
        return Reject("tie", margin)
    if margin < min_margin:
        return Reject("margin", margin)
    if scored[best].form == 0:
        return Reject("none_good", scored[best].score)
    return scored[best], scored[worst], margin


def pair_flow(
    prompt: PreferencePrompt, settings: PreferenceSettings, revision: str, model: str, seed: int
) -> tuple[int, Flow[Account]]:
    """(most completion tokens, flow) that draws the samples of one prompt and makes a pair of them, or a reject."""
    return settings.samples * settings.sampling.max_tokens, _pair(prompt, settings, revision, model, seed)


def _pair(prompt: PreferencePrompt, settings: PreferenceSettings, revision: str, model: str, seed: int) -> Flow[Account]:
    account = Account("preferences")
    text = "\n\n".join(content for _, content in prompt.messages)
    answered = yield from ask_all(
        [
            Request(_messages(prompt, settings), settings.sampling, request_seed(seed, "preferences", prompt.id, sample), sample)
            for sample in range(settings.samples)
        ]
    )
    unanswered = next((reply.unanswered for reply in answered if reply.unanswered), None)
    if unanswered is not None:
        account.reject(prompt.id, text, unanswered, created=False)
        return account
    scored = score_samples(prompt, answered, settings)
    pair = choose(scored, settings.min_margin)
    if isinstance(pair, Reject):
        shown = json.dumps({"prompt": text, "samples": [sample.__dict__ for sample in scored]}, ensure_ascii=False)
        account.reject(prompt.id, shown, pair, created=False)
        return account
    best, worst, margin = pair
    template = prompts.load("answer", prompt.lang, settings.prompts)
    provenance = Provenance(model, revision, [template], {"answer": settings.sampling}, seed, [prompt.id], "preference", 0)
    row = {
        "id": tables.stable_id("preferences", seed, prompt.id),
        "prompt": [{"role": role, "content": content} for role, content in prompt.messages],
        "chosen": [{"role": "assistant", "content": best.text}],
        "rejected": [{"role": "assistant", "content": worst.text}],
        "margin": margin,
        "lang": prompt.lang,
        "provenance": provenance.to_row(),
    }
    example = {"prompt": text, "chosen": best.text, "rejected": worst.text, "margin": margin}
    account.keep(row, "preference", example, created=False)
    account.extra = {"pairs": 1, "margins": {f"{int(margin * 10) / 10:.1f}": 1}}
    return account


def _messages(prompt: PreferencePrompt, settings: PreferenceSettings) -> Messages:
    """The prompt as the answering template frames it: its system message, then the conversation."""
    template = prompts.load("answer", prompt.lang, settings.prompts)
    if len(prompt.messages) == 1:
        return template.render(prompt=prompt.messages[0][1])
    if prompt.messages[0][0] == "system":
        return prompt.messages
    return (*(section for section in template.sections if section[0] == "system"), *prompt.messages)
