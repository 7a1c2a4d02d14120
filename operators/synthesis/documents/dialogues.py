"""Second step, in several turns: dialogues about a chunk, with coreference, questions back, and a user with a character."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from operators.synthesis import prompts
from operators.synthesis.documents import standalone, wording
from operators.synthesis.documents.grounding import Span
from operators.synthesis.documents.pairs import check_answer, check_question, ground
from operators.synthesis.documents.passage import Passage
from operators.synthesis.documents.quoting import quoted
from operators.synthesis.documents.replies import field, labelled, objects, unpacked
from operators.synthesis.documents.settings import DocumentSettings
from operators.synthesis.requests import Reject, Reply, Request, request_seed


@dataclass(frozen=True)
class Scene:
    """What one request asks for."""

    number: int
    persona: str
    clarifying: bool
    key_points: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """What the user says and what the assistant replies, with the words of the chunk that are to prove it."""

    user: str
    assistant: str
    evidence: str


@dataclass(frozen=True)
class GroundedTurn:
    """A turn whose evidence was found; `span` is None for a question back, which proves nothing."""

    user: str
    assistant: str
    span: Span | None


def plan(passage: Passage, key_points: Sequence[str], settings: DocumentSettings, seed: int) -> list[Scene]:
    """The dialogues of a chunk: a persona for each, some with a question back. A function of seed and chunk."""
    draw = random.Random(f"{seed}:scenes:{passage.id}")
    personas = list(settings.personas[passage.lang])
    draw.shuffle(personas)
    return [
        Scene(number, personas[number % len(personas)], draw.random() < settings.clarifying, tuple(key_points))
        for number in range(settings.dialogues)
    ]


def render(scene: Scene, passage: Passage, settings: DocumentSettings, seed: int, attempt: int) -> Request:
    lang = passage.lang
    turns = settings.turns + scene.clarifying
    messages = prompts.load("doc_dialogue", lang, settings.prompts).render(
        domain=passage.domain(settings),
        document=passage.quoted,
        key_points=quoted(wording.numbered(scene.key_points)),
        turns=str(turns),
        persona=scene.persona,
        difficulty=wording.DIFFICULTY[settings.difficulty][lang],
        clarifying=(wording.CLARIFYING if scene.clarifying else wording.NOT_CLARIFYING)[lang],
        form=wording.FORMS["dialogue"][settings.structured][lang],
        example=wording.EXAMPLES["dialogue"][settings.structured][lang],
    )
    schema = schema_of(turns) if settings.structured else None
    where = request_seed(seed, "doc_dialogue", passage.id, scene.number, attempt)
    return Request(messages, settings.sampling, where, attempt, schema)


def schema_of(turns: int) -> str:
    """JSON schema of exactly `turns` turns."""
    names = (wording.USER, wording.EVIDENCE, wording.ASSISTANT)
    turn = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": list(names),
        "additionalProperties": False,
    }
    listed = {"type": "array", "items": turn, "minItems": turns, "maxItems": turns}
    return orjson.dumps({"type": "object", "properties": {"turns": listed}, "required": ["turns"]}).decode()


def parse(reply: Reply) -> list[Turn] | Reject:
    """The turns of a reply. Messages that do not alternate, beginning with the user, are `not_alternating`."""
    found = unpacked(objects(reply.text), "turns")
    if found and not any(item.keys() & {"role", "from", "messages", "conversations"} for item in found):
        names = (wording.USER, wording.ASSISTANT, wording.EVIDENCE)
        turns = [
            Turn(*(field(item, *(word.casefold() for word in (name, *wording.LABELS[name]))) for name in names)) for item in found
        ]
    else:
        spoken = _messages(reply)
        if reply.truncated and spoken:
            spoken.pop()
        while spoken and spoken[-1][0] != wording.ASSISTANT:
            spoken.pop()
        speakers = [label for label, _ in spoken if label != wording.EVIDENCE]
        if speakers != [wording.USER, wording.ASSISTANT] * (len(speakers) // 2):
            return Reject("not_alternating", len(speakers))
        turns = _paired(spoken)
    whole = []
    for turn in turns:  # what follows a turn without words has nothing to refer to
        if not turn.user or not turn.assistant:
            break
        whole.append(turn)
    if not whole:
        return Reject("truncated" if reply.truncated else "malformed" if reply.text.strip() else "empty")
    return whole


def _messages(reply: Reply) -> list[tuple[str, str]]:
    """(speaker or evidence, words) in their order, from JSON messages or from labelled lines."""
    roles = {"user": wording.USER, "human": wording.USER, "assistant": wording.ASSISTANT, "gpt": wording.ASSISTANT}
    found = []
    for item in unpacked(unpacked(objects(reply.text), "messages"), "conversations"):
        role = roles.get(field(item, "role", "from").casefold())
        if role == wording.ASSISTANT and (evidence := field(item, "evidence")):
            found.append((wording.EVIDENCE, evidence))
        if role:
            found.append((role, field(item, "content", "value")))
    labels = {name: wording.LABELS[name] for name in (wording.USER, wording.ASSISTANT, wording.EVIDENCE)}
    return found or labelled(reply.text, labels)


def _paired(spoken: list[tuple[str, str]]) -> list[Turn]:
    turns: list[Turn] = []
    said = evidence = ""
    for label, words in spoken:
        if label == wording.USER:
            said, evidence = words, ""
        elif label == wording.EVIDENCE:
            evidence = words
        else:
            turns.append(Turn(said, words, evidence))
            evidence = ""
    return turns


def check(turns: Sequence[Turn], scene: Scene, passage: Passage, settings: DocumentSettings) -> list[GroundedTurn] | Reject:
    """The dialogue up to its first turn that is no use, if enough is left of it and it hangs together; otherwise why not."""
    good: list[GroundedTurn] = []
    why: Reject | None = None
    back = 0
    for number, turn in enumerate(turns):
        why = check_question(turn.user, passage.lang, settings, first=number == 0)
        if why is None and any(turn.user == before.user for before in good):
            why = Reject("repeated_question")
        if why is not None:
            break
        if scene.clarifying and number == 0:
            if not standalone.asks(turn.assistant) or standalone.vague_reference(turn.assistant, passage.lang):
                why = Reject("no_clarifying_question", detail=turn.assistant)
                break
            good.append(GroundedTurn(turn.user, turn.assistant, None))
            continue
        why = check_answer(turn.user, turn.assistant, passage, settings)
        if why is not None:
            break
        said = " ".join(before.user for before in good)
        span = ground(f"{said} {turn.user}", turn.assistant, turn.evidence, passage, settings)
        if isinstance(span, Reject):
            why = span
            break
        back += number > 0 and standalone.refers_back(turn.user, passage.lang)
        good.append(GroundedTurn(turn.user, turn.assistant, span))
    questions = sum(turn.span is not None for turn in good)
    if questions < settings.min_turns:
        return why or Reject("too_few_turns", questions)
    if back < settings.min_back_references:
        return Reject("no_back_reference", back)
    return good
