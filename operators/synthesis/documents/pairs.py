"""Second step: question and answer pairs of a chunk, each with the sentences that prove it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from operators.synthesis import heuristics, prompts
from operators.synthesis.documents import standalone, wording
from operators.synthesis.documents.grounding import Span, locate, support, unsupported_number
from operators.synthesis.documents.passage import Passage
from operators.synthesis.documents.quoting import holds_control, quoted
from operators.synthesis.documents.replies import field, labelled, objects, unpacked
from operators.synthesis.documents.settings import DocumentSettings
from operators.synthesis.novelty import rouge_l, tokenize
from operators.synthesis.requests import Reject, Reply, Request, request_seed

_ECHO = 0.9  # ROUGE-L F with the question from which an answer only repeats it


@dataclass(frozen=True)
class Asked:
    """What one request asks for: the types of its pairs, and the key points that it shows."""

    number: int
    types: tuple[wording.QuestionType, ...]
    key_points: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A question and its answer, and the words of the chunk that are to prove it."""

    question: str
    answer: str
    evidence: str
    type: wording.QuestionType


def plan(passage: Passage, key_points: Sequence[str], settings: DocumentSettings, seed: int) -> list[Asked]:
    """The requests of a chunk: types drawn by weight, no type a second time before each had its turn, key points in turn.

    A function of seed and chunk.
    """
    draw = random.Random(f"{seed}:types:{passage.id}")
    types = _drawn_types(draw, settings)
    points = itertools.cycle(key_points)
    asked: list[Asked] = []
    left = settings.pairs
    while left > 0:
        count = min(left, settings.pairs_per_request)
        shown = tuple(key_points) if count > 1 else (next(points),)
        asked.append(Asked(len(asked), tuple(itertools.islice(types, count)), shown))
        left -= count
    return asked


def _drawn_types(draw: random.Random, settings: DocumentSettings) -> itertools.chain[wording.QuestionType]:
    weights = {name: weight for name, weight in settings.question_types.items() if weight > 0}

    def rounds():  # type: ignore[no-untyped-def]
        while True:  # a weighted permutation (Efraimidis and Spirakis 2006): the largest u^(1/w) first
            keyed = [(draw.random() ** (1 / weight), name) for name, weight in weights.items()]
            yield [name for _, name in sorted(keyed, reverse=True)]

    return itertools.chain.from_iterable(rounds())


def render(asked: Asked, passage: Passage, settings: DocumentSettings, seed: int, attempt: int) -> Request:
    lang = passage.lang
    messages = prompts.load("doc_pairs", lang, settings.prompts).render(
        domain=passage.domain(settings),
        document=passage.quoted,
        key_points=quoted(wording.numbered(asked.key_points)),
        count=str(len(asked.types)),
        difficulty=wording.DIFFICULTY[settings.difficulty][lang],
        types=wording.numbered([wording.QUESTION_TYPES[name][lang] for name in asked.types]),
        form=wording.FORMS["pairs"][settings.structured][lang],
        example=wording.EXAMPLES["pairs"][settings.structured][lang],
    )
    schema = schema_of(len(asked.types)) if settings.structured else None
    return Request(messages, settings.sampling, request_seed(seed, "doc_pairs", passage.id, asked.number, attempt), attempt, schema)


def schema_of(count: int) -> str:
    """JSON schema of exactly `count` pairs. The evidence comes first, so that question and answer are written from it."""
    names = (wording.EVIDENCE, wording.QUESTION, wording.ANSWER)
    pair = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": list(names),
        "additionalProperties": False,
    }
    pairs = {"type": "array", "items": pair, "minItems": count, "maxItems": count}
    return orjson.dumps({"type": "object", "properties": {"pairs": pairs}, "required": ["pairs"]}).decode()


def parse(reply: Reply, asked: Asked) -> list[Pair] | Reject:
    """The complete pairs of a reply, at most as many as were asked for."""
    found = [_pair(item) for item in unpacked(objects(reply.text), "pairs")] or _from_lines(reply)
    pairs = [Pair(*texts, kind) for texts, kind in zip([texts for texts in found if all(texts[:2])], asked.types, strict=False)]
    if pairs:
        return pairs
    return Reject("truncated" if reply.truncated else "malformed" if reply.text.strip() else "empty")


def _pair(item: dict[str, Any]) -> tuple[str, str, str]:
    texts = (field(item, *(word.casefold() for word in (name, *wording.LABELS[name]))) for name in _FIELDS)
    question, answer, evidence = texts
    return question, answer, evidence


_FIELDS = (wording.QUESTION, wording.ANSWER, wording.EVIDENCE)


def _from_lines(reply: Reply) -> list[tuple[str, str, str]]:
    found: list[dict[str, str]] = []
    labels = {name: wording.LABELS[name] for name in _FIELDS}
    for label, text in labelled(reply.text, labels):
        if not found or label in found[-1]:
            found.append({})
        found[-1][label] = text
    if reply.truncated and found:
        found.pop()  # its last field may be half
    return [(item.get("question", ""), item.get("answer", ""), item.get("evidence", "")) for item in found]


def check_question(question: str, lang: Literal["en", "zh"], settings: DocumentSettings, first: bool = True) -> Reject | None:
    """Why a question is no use, or None. `first`: nothing was said before it, so it must stand alone."""
    short = heuristics.length_of(question, lang)
    if first and short < settings.min_question.get(lang, 0):
        return Reject("question_too_short", short)
    if found := holds_control(question):
        return Reject("control_token", detail=found)
    if found := standalone.vague_reference(question, lang):
        return Reject("vague_reference", detail=found)
    if first and (found := standalone.dangling(question, lang)):
        return Reject("vague_reference", detail=found)
    if found := standalone.stock_phrase(question):
        return Reject("stock_phrase", detail=found)
    share = heuristics.script_share(question, lang)
    if lang == "zh" and share < 0.2:
        return Reject("wrong_language", share)
    return None


def check_answer(question: str, answer: str, passage: Passage, settings: DocumentSettings) -> Reject | None:
    """Why an answer is no use, whatever proves it, or None."""
    lang = passage.lang
    if not answer.strip() or heuristics.without_content(answer):
        return Reject("empty_answer")
    length = heuristics.length_of(answer, lang)
    if length < settings.min_answer.get(lang, 0):
        return Reject("answer_too_short", length)
    if found := holds_control(answer):
        return Reject("control_token", detail=found)
    if heuristics.refuses(answer):
        return Reject("refusal")
    if found := standalone.stock_phrase(answer):
        return Reject("stock_phrase", detail=found)
    if found := standalone.vague_reference(answer, lang):
        return Reject("vague_reference", detail=found)
    echo = round(rouge_l(question, answer), 4)
    if echo >= _ECHO:
        return Reject("answer_is_question", echo)
    repeated = heuristics.repeated_share(answer)
    if repeated > 0.3:
        return Reject("repetitive", repeated)
    if lang == "zh" and (share := heuristics.script_share(answer, lang)) < 0.2 and length > 8:
        return Reject("wrong_language", share)
    return None


def ground(question: str, answer: str, evidence: str, passage: Passage, settings: DocumentSettings) -> Span | Reject:
    """Where the evidence stands in the chunk, in characters of the chunk, or why the answer is not grounded in it."""
    rules = settings.grounding
    span = locate(evidence, passage.text)
    if span.score < rules.min_evidence:
        return Reject("not_grounded", span.score, evidence)
    length = len(tokenize(passage.text[span.start : span.end]))
    if length < rules.min_evidence_tokens:
        return Reject("evidence_too_short", length, evidence)
    texts = (passage.text, *passage.headings)
    if rules.numbers and (number := unsupported_number(answer, question, *texts)):
        return Reject("unsupported_number", detail=number)
    held = support(answer, *texts)
    return Reject("unsupported_answer", held) if held < rules.min_support else span
