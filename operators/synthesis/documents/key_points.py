"""First step: the key points of a chunk. They steer the questions towards what matters, and stay with the rows as a column."""

from __future__ import annotations

import json

from operators.synthesis import prompts
from operators.synthesis.documents import wording
from operators.synthesis.documents.grounding import support
from operators.synthesis.documents.passage import Passage
from operators.synthesis.documents.quoting import holds_control
from operators.synthesis.documents.replies import numbered, objects, text_of
from operators.synthesis.documents.settings import DocumentSettings
from operators.synthesis.requests import Messages, Reject, Reply, Request, request_seed

_SCHEMA = (
    '{"type":"object","properties":{"key_points":{"type":"array","items":{"type":"string"},"minItems":1,"maxItems":%d}},'
    '"required":["key_points"]}'
)
_MIN_CHARACTERS = 4


def messages(passage: Passage, settings: DocumentSettings) -> Messages:
    return prompts.load("doc_key_points", passage.lang, settings.prompts).render(
        domain=passage.domain(settings),
        document=passage.quoted,
        count=str(settings.key_points),
        form=wording.FORMS["key_points"][settings.structured][passage.lang],
        example=wording.EXAMPLES["key_points"][settings.structured][passage.lang],
    )


def render(passage: Passage, settings: DocumentSettings, seed: int, attempt: int) -> Request:
    schema = _SCHEMA % settings.key_points if settings.structured else None
    where = request_seed(seed, "doc_key_points", passage.id, attempt)
    return Request(messages(passage, settings), settings.key_point_sampling, where, attempt, schema)


def parse(reply: Reply, passage: Passage, settings: DocumentSettings) -> list[str] | Reject:
    """The key points that the chunk supports, without repeats. A list that was cut off gives its whole items."""
    found: list[str] = []
    for item in objects(reply.text):
        listed = next((value for value in item.values() if isinstance(value, list)), None)
        found += [text_of(value) for value in listed or ()]
    if not found and reply.truncated:  # JSON or a list that breaks off: the last item may be half
        found = (_strings(reply.text) or numbered(reply.text)[:-1]) or []
    elif not found:
        found = numbered(reply.text)
    points = list(dict.fromkeys(point for point in found if len(point) >= _MIN_CHARACTERS))
    if not points:
        return Reject("truncated" if reply.truncated else "malformed" if reply.text.strip() else "empty")
    scored = [(support(point, passage.text), point) for point in points if not holds_control(point)]
    held = [point for score, point in scored if score >= settings.grounding.min_support]
    if not held:
        return Reject("not_grounded", max((score for score, _ in scored), default=0.0), json.dumps(points[:8], ensure_ascii=False))
    return held[: settings.key_points]


def _strings(text: str) -> list[str]:
    """The complete strings of a JSON list that breaks off."""
    place = text.find("[")
    found: list[str] = []
    decoder = json.JSONDecoder(strict=False)
    while 0 <= place < len(text):
        place = text.find('"', place + 1)
        if place < 0:
            break
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError:
            break
        found.append(text_of(value))
    return found
