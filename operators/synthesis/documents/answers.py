"""Third step: the question answered again, with the document and without it, and how far the answers agree.

With the document the given answer should come back (back-translation, as in Li et al. 2023, "Self-Alignment with
Instruction Backtranslation", turned round): `with_document` is the mean ROUGE-L F of the samples with the given answer.
`consistency` is the mean F among the samples (self-consistency, Wang et al. 2022, with agreement in place of a vote).
`without_document` says what the model knew anyway. Chinese is compared character by character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from operators.synthesis import prompts
from operators.synthesis.documents.passage import Passage
from operators.synthesis.documents.settings import BackTranslationSettings, DocumentSettings
from operators.synthesis.novelty import rouge_l_matrix
from operators.synthesis.requests import Messages, Reject, Reply, Request, request_seed


@dataclass(frozen=True)
class Exchange:
    """A question with its answer, and what was said before it."""

    history: Messages
    question: str
    answer: str


@dataclass(frozen=True)
class Agreement:
    """Means of ROUGE-L F, rounded to four decimals; None where it was not measured."""

    with_document: float | None = None
    consistency: float | None = None
    without_document: float | None = None

    @classmethod
    def least(cls, several: Sequence[Agreement]) -> Agreement:
        """The lowest of each over the exchanges of a dialogue, for `without_document` the highest."""
        names = ("with_document", "consistency", "without_document")
        found = {name: [value for one in several if (value := getattr(one, name)) is not None] for name in names}
        return cls(*((max if name == "without_document" else min)(values, default=None) for name, values in found.items()))


def render(exchange: Exchange, passage: Passage, settings: DocumentSettings, seed: int, item: str) -> list[Request]:
    """The requests with the document, then the one without it if that is wanted."""
    rules = settings.back_translation
    if not rules.samples:
        return []
    names = ["doc_answer_with"] * rules.samples + ["doc_answer_without"] * (rules.without_document != "off")
    return [
        Request(
            _messages(name, exchange, passage, settings), rules.sampling, request_seed(seed, name, item, number), number
        )
        for number, name in enumerate(names)
    ]  # fmt: skip


def _messages(name: str, exchange: Exchange, passage: Passage, settings: DocumentSettings) -> Messages:
    """The document goes with the first question; later ones follow as turns of the chat."""
    said = [*exchange.history, ("user", exchange.question)]
    template = prompts.load(name, passage.lang, settings.prompts)
    opening = template.render(document=passage.quoted, question=said[0][1])
    return (*opening, *said[1:])


def measure(exchange: Exchange, replies: Sequence[Reply], rules: BackTranslationSettings) -> Agreement | Reject:
    """How far the replies (in the order of `render`) agree with the given answer and with each other."""
    for reply in replies:
        if reply.unanswered is not None:
            return reply.unanswered
    if not replies:
        return Agreement()
    matrix = rouge_l_matrix([exchange.answer, *(reply.text.strip() for reply in replies)])
    samples = rules.samples
    among = matrix[1 : 1 + samples, 1 : 1 + samples]
    consistency = None
    if samples > 1:
        consistency = round(float(among[~np.eye(samples, dtype=bool)].mean()), 4)
    without = round(float(matrix[0, 1 + samples]), 4) if len(replies) > samples else None
    return Agreement(round(float(matrix[0, 1 : 1 + samples].mean()), 4), consistency, without)


def judge(found: Agreement, rules: BackTranslationSettings) -> Reject | None:
    """Why the measured agreement rejects a row, or None."""
    if found.with_document is not None and found.with_document < rules.min_agreement:
        return Reject("disagrees_with_document", found.with_document)
    if found.consistency is not None and found.consistency < rules.min_consistency:
        return Reject("inconsistent", found.consistency)
    if rules.without_document == "reject" and found.without_document is not None and found.without_document >= rules.max_known:
        return Reject("known_without_document", found.without_document)
    return None
