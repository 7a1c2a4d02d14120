"""The steps of a chunk joined in a flow: key points, then pairs or dialogues, then their checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from operators import tables
from operators.synthesis import prompts
from operators.synthesis.documents import answers, dialogues, key_points, pairs
from operators.synthesis.documents.answers import Agreement, Exchange
from operators.synthesis.documents.grounding import Span
from operators.synthesis.documents.passage import Passage
from operators.synthesis.documents.settings import DocumentSettings
from operators.synthesis.flow import Flow, ask_all, attempt, attempt_all
from operators.synthesis.novelty import NoveltyPool
from operators.synthesis.requests import Reject, Reply, Request
from operators.synthesis.rows import INSTRUCTIONS, Account, Provenance, instruction_row

OPERATOR = "document_instruct"

EVIDENCE = pa.struct(
    [
        pa.field("message", pa.int32()),  # index of the assistant's message that it proves
        pa.field("start", pa.int64()),  # characters [start, end) of the document
        pa.field("end", pa.int64()),
        pa.field("score", pa.float32()),  # 1 = quoted literally
    ]
)
DOCUMENT_INSTRUCTIONS = pa.schema(
    [
        *INSTRUCTIONS,
        pa.field("source_id", pa.string()),  # id of the document
        pa.field("span_start", pa.int64()),  # characters [span_start, span_end) of its text hold all the evidence
        pa.field("span_end", pa.int64()),
        pa.field("span_text", pa.large_string()),  # the document's text there
        pa.field("evidence", pa.list_(EVIDENCE)),
        pa.field("key_points", pa.list_(pa.string())),
        pa.field("question_type", pa.string()),
        pa.field("persona", pa.string()),  # who asks, in dialogues
        pa.field("grounding", pa.float32()),  # likeness of the weakest evidence to the document, 0 to 1
        pa.field("agreement_with_document", pa.float32()),
        pa.field("agreement_without_document", pa.float32()),
        pa.field("consistency", pa.float32()),
    ]
)
"""INSTRUCTIONS with the place in the document that each row comes from, and what was measured of it."""


@dataclass(frozen=True)
class Candidate:
    """A pair or a dialogue whose form is sound and whose evidence was found."""

    id: str
    turns: tuple[tuple[str, str, Span | None], ...]  # what the user says, what the assistant replies, evidence in the chunk
    type: str
    persona: str | None = None

    @property
    def question(self) -> str:
        return self.turns[0][0]

    def exchanges(self) -> list[Exchange]:
        """What is answered again: each turn that states something."""
        found = []
        history: list[tuple[str, str]] = []
        for user, assistant, span in self.turns:
            if span is not None:
                found.append(Exchange(tuple(history), user, assistant))
            history += [("user", user), ("assistant", assistant)]
        return found

    def shown(self) -> str:
        return "\n\n".join(f"{user}\n\n{assistant}" for user, assistant, _ in self.turns)


@dataclass(frozen=True)
class Maker:
    """Who generates, for provenance, and the run's seed."""

    model: str
    revision: str
    seed: int


def most_tokens(settings: DocumentSettings) -> int:
    """Completion tokens that one chunk may ask for at most."""
    rules = settings.back_translation
    again = (rules.samples + (rules.without_document != "off")) * rules.sampling.max_tokens if rules.samples else 0
    if settings.form == "alpaca":
        requests, exchanges = -(-settings.pairs // settings.pairs_per_request), settings.pairs
    else:
        requests, exchanges = settings.dialogues, settings.dialogues * settings.turns
    drawn = settings.key_point_sampling.max_tokens + requests * settings.sampling.max_tokens
    return settings.attempts * drawn + exchanges * again


def chunk_flow(passage: Passage, settings: DocumentSettings, maker: Maker) -> Flow[Account]:
    """Ask about one chunk. Every pair or dialogue that a reply gives, and every reply that gives none, is kept or rejected."""
    account = Account(OPERATOR)
    stats: Counter[str] = Counter()
    points = yield from attempt(
        partial(key_points.render, passage, settings, maker.seed),
        partial(key_points.parse, passage=passage, settings=settings),
        settings.attempts,
    )
    if isinstance(points, Reject):
        account.reject(passage.id, passage.text, points, source=passage.document, step="key_points")
        account.extra = {"steps": {"chunks_without_key_points": 1}}
        return account
    stats["key_points"] = len(points)
    make = _pairs if settings.form == "alpaca" else _dialogues
    candidates: list[Candidate] = yield from make(passage, points, settings, maker, account, stats)
    candidates = _new_within(candidates, passage, settings, account)
    stats["checked"] = len(candidates)
    kept = yield from _check(candidates, passage, points, settings, maker, account)
    stats["passed"] = kept
    stats["chunks_with_rows" if kept else "chunks_without_rows"] = 1
    merged = {"steps": dict(stats), **account.extra}
    account.extra = merged
    return account


def _pairs(
    passage: Passage,
    points: Sequence[str],
    settings: DocumentSettings,
    maker: Maker,
    account: Account,
    stats: Counter[str],
) -> Flow[list[Candidate]]:
    wanted = pairs.plan(passage, points, settings, maker.seed)
    renders = [partial(pairs.render, asked, passage, settings, maker.seed) for asked in wanted]
    replies = yield from attempt_all(renders, [partial(pairs.parse, asked=asked) for asked in wanted], settings.attempts)
    candidates: list[Candidate] = []
    for asked, found in zip(wanted, replies, strict=True):
        stats["asked"] += len(asked.types)
        if isinstance(found, Reject):
            row_id = tables.stable_id(OPERATOR, maker.seed, passage.id, asked.number)
            account.reject(row_id, "", found, source=passage.id, step="pairs")
            continue
        stats["received"] += len(found)
        for number, pair in enumerate(found):
            row_id = tables.stable_id(OPERATOR, maker.seed, passage.id, asked.number, number)
            span = (
                pairs.check_question(pair.question, passage.lang, settings)
                or pairs.check_answer(pair.question, pair.answer, passage, settings)
                or pairs.ground(pair.question, pair.answer, pair.evidence, passage, settings)
            )
            if isinstance(span, Reject):
                text = f"{pair.question}\n\n{pair.answer}"
                account.reject(row_id, text, span, source=passage.id, step="pairs")
            else:
                candidates.append(Candidate(row_id, ((pair.question, pair.answer, span),), pair.type))
    return candidates


def _dialogues(
    passage: Passage,
    points: Sequence[str],
    settings: DocumentSettings,
    maker: Maker,
    account: Account,
    stats: Counter[str],
) -> Flow[list[Candidate]]:
    scenes = dialogues.plan(passage, points, settings, maker.seed)
    renders = [partial(dialogues.render, scene, passage, settings, maker.seed) for scene in scenes]
    replies = yield from attempt_all(renders, [dialogues.parse] * len(scenes), settings.attempts)
    candidates: list[Candidate] = []
    for scene, found in zip(scenes, replies, strict=True):
        stats["asked"] += 1
        row_id = tables.stable_id(OPERATOR, maker.seed, passage.id, scene.number)
        if isinstance(found, Reject):
            account.reject(row_id, "", found, source=passage.id, step="dialogues")
            continue
        stats["received"] += 1
        checked = dialogues.check(found, scene, passage, settings)
        if isinstance(checked, Reject):
            shown = json.dumps([turn.__dict__ for turn in found], ensure_ascii=False)
            account.reject(row_id, shown, checked, source=passage.id, step="dialogues")
            continue
        stats["turns"] += len(checked)
        kind = "clarifying" if scene.clarifying else "dialogue"
        turns = tuple((turn.user, turn.assistant, turn.span) for turn in checked[: settings.turns + scene.clarifying])
        candidates.append(Candidate(row_id, turns, kind, scene.persona))
    return candidates


def _new_within(candidates: Sequence[Candidate], passage: Passage, settings: DocumentSettings, account: Account) -> list[Candidate]:
    """Without candidates whose question is much like an earlier one of the chunk: those are not worth further tokens."""
    if settings.novelty == "off":
        return list(candidates)
    pool = NoveltyPool()
    ids: list[str] = []
    new: list[Candidate] = []
    for candidate in candidates:
        similarity, nearest = pool.nearest(candidate.question)
        if similarity >= settings.max_similarity:
            why = Reject("not_novel", round(similarity, 4), ids[nearest])
            account.reject(candidate.id, candidate.shown(), why, source=passage.id, step="novelty")
            continue
        pool.add(candidate.question)
        ids.append(candidate.id)
        new.append(candidate)
    return new


def _check(
    candidates: Sequence[Candidate],
    passage: Passage,
    points: Sequence[str],
    settings: DocumentSettings,
    maker: Maker,
    account: Account,
) -> Flow[int]:
    """Answer all questions of all candidates again, beside each other, and keep what agrees."""
    rules = settings.back_translation
    exchanges = [(candidate, exchange) for candidate in candidates for exchange in candidate.exchanges()]
    requests: list[Request] = []
    ends: list[int] = []
    for number, (candidate, exchange) in enumerate(exchanges):
        requests += answers.render(exchange, passage, settings, maker.seed, f"{candidate.id}:{number}")
        ends.append(len(requests))
    replies: list[Reply] = yield from ask_all(requests)
    found: dict[str, list[Agreement | Reject]] = {}
    histograms: dict[str, Counter[str]] = {}
    for (candidate, exchange), start, end in zip(exchanges, [0, *ends], ends, strict=False):
        found.setdefault(candidate.id, []).append(answers.measure(exchange, replies[start:end], rules))
    kept = 0
    for candidate in candidates:
        measured = [item for item in found[candidate.id] if isinstance(item, Agreement)]
        why = next((item for item in found[candidate.id] if isinstance(item, Reject)), None)
        agreement = Agreement.least(measured)
        if why is None:
            for name, value in agreement.__dict__.items():
                if value is not None:
                    histograms.setdefault(f"agreement_{name}" if name != "consistency" else name, Counter())[_tenth(value)] += 1
            why = answers.judge(agreement, rules)
        if why is not None:
            account.reject(candidate.id, candidate.shown(), why, source=passage.id, step="back_translation")
            continue
        row = _row(candidate, agreement, passage, points, settings, maker)
        histograms.setdefault("grounding", Counter())[_tenth(row["grounding"])] += 1
        account.keep(row, row["provenance"]["operation"], {"question": candidate.question, "answer": candidate.turns[0][1]})
        kept += 1
    account.extra = {name: dict(sorted(counter.items())) for name, counter in histograms.items()}
    return kept


def _row(
    candidate: Candidate,
    agreement: Agreement,
    passage: Passage,
    points: Sequence[str],
    settings: DocumentSettings,
    maker: Maker,
) -> dict[str, Any]:
    evidence = [
        {"message": 2 * turn + 1, "start": passage.start + span.start, "end": passage.start + span.end, "score": span.score}
        for turn, (_, _, span) in enumerate(candidate.turns)
        if span is not None
    ]
    spans = [span for _, _, span in candidate.turns if span is not None]
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    first_user, first_assistant, _ = candidate.turns[0]
    row = instruction_row(
        candidate.id, first_user, "", first_assistant, passage.lang, _provenance(candidate, passage, settings, maker)
    )
    row["messages"] = [
        {"role": role, "content": text}
        for user, assistant, _ in candidate.turns
        for role, text in (("user", user), ("assistant", assistant))
    ]
    return {
        **row,
        "source_id": passage.document,
        "span_start": passage.start + start,
        "span_end": passage.start + end,
        "span_text": passage.text[start:end],
        "evidence": evidence,
        "key_points": list(points),
        "question_type": candidate.type,
        "persona": candidate.persona,
        "grounding": min(span.score for span in spans),
        "agreement_with_document": agreement.with_document,
        "agreement_without_document": agreement.without_document,
        "consistency": agreement.consistency,
    }


def _provenance(candidate: Candidate, passage: Passage, settings: DocumentSettings, maker: Maker) -> dict[str, Any]:
    rules = settings.back_translation
    names = ["doc_key_points", "doc_pairs" if settings.form == "alpaca" else "doc_dialogue"]
    sampling = {"key_points": settings.key_point_sampling, "write": settings.sampling}
    if rules.samples:
        names += ["doc_answer_with", *(["doc_answer_without"] if rules.without_document != "off" else [])]
        sampling["answer"] = rules.sampling
    used = [prompts.load(name, passage.lang, settings.prompts) for name in names]
    operation = f"document:{candidate.type}"
    return Provenance(maker.model, maker.revision, used, sampling, maker.seed, [passage.document], operation, 0).to_row()


def _tenth(value: float) -> str:
    return f"{min(int(value * 10), 10) / 10:.1f}"
