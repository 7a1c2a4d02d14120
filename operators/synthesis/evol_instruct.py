"""Evol-Instruct (Xu et al. 2023, "WizardLM", arXiv 2304.12244): instructions made harder, round by round.

In each round an instruction is rewritten by one operation (five in depth, one in breadth, drawn per item), the rewrite
is answered, and four eliminations decide: it adds nothing (judged by the model, and by ROUGE-L with its parent), the
reply is a short apology, the reply has only punctuation and stop words, or the rewrite copied words of the prompt. What
fails returns to the pool and is tried again next round; what succeeds takes its parent's place.

Items go through their rounds side by side, each a fixed distance behind the one before: while item i is rewritten for
the first time, item i - 256 is judged and answered, item i - 512 is rewritten for the second time, and so on. Nothing
waits for the slowest of a round, the input may still be growing, and memory holds a few hundred items a round. Novelty
is decided in that fixed order, so rows do not depend on the order of completion. Where settings differ from the paper
and its code: docs/evol_instruct.md.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from operators import tables
from operators.config import Settings
from operators.synthesis import heuristics, prompts
from operators.synthesis.flow import Flow, Watched, ask, asks_nothing, attempt
from operators.synthesis.generator import Generator, Usage
from operators.synthesis.heuristics import InstructionRules
from operators.synthesis.novelty import NoveltyPool, recall, rouge_l
from operators.synthesis.requests import Reject, Reply, Request, SamplingSettings, request_seed
from operators.synthesis.rows import Account, Provenance, instruction_row
from operators.synthesis.self_instruct import SIMILARITY_FLOOR, again
from operators.synthesis.task_parsing import shown_examples
from operators.synthesis.texts import Texts

Operation = Literal["constraint", "deepen", "concretize", "reasoning", "complicate", "breadth"]
OPERATIONS: tuple[Operation, ...] = ("constraint", "deepen", "concretize", "reasoning", "complicate", "breadth")

Row = dict[str, Any]

UNIT_ROWS = 256  # input rows of a unit of work
_LAG = 256  # items between one step of an item and its next: what is in flight at most, for each step of a round

_COPIED = {
    "en": re.compile(r"original prompt|rewritten prompt|new prompt|write only the", re.IGNORECASE),
    "zh": re.compile(r"原来的提示|改写后?的?提示|新的提示|只写出"),
}
_STATEMENT = re.compile(
    r"(?:I'm|I am|I've|I'll|I can|Here is|Here's|Here are|Sure|Certainly|Of course|好的|当然|以下是)\b", re.IGNORECASE
)
"""Openings of an answer: a weak model often answers the prompt that it was asked to rewrite."""

_LEAD = re.compile(r"^\s*(?:(?:new |rewritten |created )?prompt|(?:新的?|改写后的)?提示)\s*[:：]\s*", re.IGNORECASE)
_EQUAL = {"en": re.compile(r"\s*equal", re.IGNORECASE), "zh": re.compile(r"\s*相同")}
_DIFFERENT = {"en": re.compile(r"\s*not equal", re.IGNORECASE), "zh": re.compile(r"\s*(?:不同|不相同)")}
_JUDGE = SamplingSettings(temperature=0, max_tokens=4)


class EvolSettings(Settings):
    """How instructions are evolved."""

    rounds: int = Field(default=1, ge=1, le=16, description="rounds; the paper has 4")
    operations: dict[Operation, float] = Field(
        default={name: 1.0 for name in OPERATIONS}, description="weights of the operations; 0 leaves one out"
    )
    added_length: dict[str, tuple[int, int]] = Field(
        default={"en": (10, 20), "zh": (15, 30)},
        description="what an in-depth rewrite is asked to add: words (en), characters (zh); the paper: 10 to 20 words",
    )
    most_added: float | None = Field(
        default=None, gt=0, description="reject in-depth rewrites that add more than this many times the upper end of added_length"
    )
    judge: bool = Field(default=True, description="ask the model whether the rewrite adds something (elimination 1)")
    judge_unclear: Literal["keep", "drop"] = Field(default="keep", description="a rewrite whose judge says neither equal nor not")
    max_parent_similarity: float = Field(
        default=0.9, gt=0, le=1, description="a rewrite with this ROUGE-L F to its parent, or more, adds nothing"
    )
    min_parent_recall: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="in depth, share of the parent's tokens that a rewrite keeps in order; below, it lost the topic",
    )
    max_similarity: float = Field(default=0.95, gt=0, le=1, description="likewise to any instruction before it")
    rules: InstructionRules = Field(default=InstructionRules(), description="rules for rewritten instructions")
    apology_words: int = Field(default=80, ge=0, description="a reply with `sorry` is dropped when shorter (elimination 2)")
    attempts: int = Field(default=2, ge=1, le=8, description="draws of a reply that is cut or empty, at most")
    evolve_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.05, max_tokens=96), description="drawing rewrites"
    )
    answer_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.3, top_p=0.9, repetition_penalty=1.1, max_tokens=128), description="drawing answers"
    )
    ban_stock_phrases: bool = Field(
        default=False, description="forbid phrases such as `As an AI language model` in the prompt that asks for answers"
    )
    prompts: str | None = Field(default=None, description="folder with <language>/<name>.txt that replace the project's prompts")


@dataclass(frozen=True)
class Instruction:
    """An instruction of the pool: its row, its text with the input in it, its language."""

    id: str
    text: str
    lang: str


@dataclass
class Failure:
    """A rewrite that was eliminated: its text as far as there is one, why, and the step that did it."""

    text: str
    why: Reject
    step: str


@dataclass
class Turn:
    """One item in one round."""

    parent: Instruction
    id: str
    operation: Operation
    rewrite: Watched[str | Failure]
    similarity: float | None = None
    failure: Failure | None = None  # found by the novelty test, or by the token cap
    text: str = ""  # the rewrite, once it was found new
    answer: Watched[str | Failure] | None = None
    replies: list[str] = field(default_factory=list)
    asked: bool = True

    @property
    def answered(self) -> str | None:
        """The answer of a turn that succeeded."""
        found = self.answer.value if self.answer is not None else None
        return found if isinstance(found, str) else None


Known = Mapping[int, Mapping[int, tuple[str, str]]]
"""The new rewrites of a unit that was made before: place in the unit -> round -> (id, text)."""


@dataclass
class _Item:
    """An input row on its way through the rounds."""

    number: int
    row: Row
    current: Instruction | None  # None: it is no single turn, or the token cap has been reached
    turns: list[Turn] = field(default_factory=list)
    known: Mapping[int, tuple[str, str]] | None = None  # of an item whose unit was made before: its new rewrites


@dataclass
class EvolUnit:
    """What a unit of input rows became. `rewrites` are (item's place in the unit, round, id, text) of all that were new: with
    the input all that the novelty of later units depends on."""

    number: int
    account: Account
    usage: Usage
    rewrites: list[tuple[int, int, str, str]]


def parse_rewrite(reply: Reply, parent: str, lang: str, operation: str, settings: EvolSettings) -> str | Reject:
    """The rewritten instruction of a reply, or why it is no use (eliminations 3 and 4 for the instruction, and the rules)."""
    if reply.truncated:
        return Reject("truncated")
    text = _LEAD.sub("", reply.text).strip().strip('"“”').strip()
    if not text:
        return Reject("empty")
    if _COPIED[lang].search(text):
        return Reject("copied_prompt")
    if heuristics.without_content(text):
        return Reject("no_content")
    copied = heuristics.copies(text, shown_examples(prompts.load(f"evol_{operation}", lang, settings.prompts)))
    if copied is not None:
        return copied
    similarity = rouge_l(parent, text)
    if similarity >= settings.max_parent_similarity:
        return Reject("adds_nothing", similarity)
    if operation != "breadth":
        kept = recall(parent, text)
        if kept < settings.min_parent_recall:
            return Reject("lost_topic", kept)
        added = heuristics.length_of(text, lang) - heuristics.length_of(parent, lang)
        if settings.most_added is not None and added > settings.most_added * settings.added_length.get(lang, (0, added))[1]:
            return Reject("adds_too_much", added)
    if _STATEMENT.match(text):
        return Reject("no_instruction")
    return heuristics.check_instruction(text, lang, settings.rules) or text


def parse_judgement(reply: Reply, lang: str) -> bool | None:
    """True when the judge finds the two instructions equal, None when it says neither."""
    if _DIFFERENT[lang].match(reply.text):
        return False
    return True if _EQUAL[lang].match(reply.text) else None


def check_answer(instruction: str, reply: Reply, lang: str, settings: EvolSettings) -> Reject | None:
    """Why the answer to an evolved instruction eliminates it (eliminations 2 and 3), or None."""
    if reply.truncated:
        return Reject("truncated")
    text = reply.text.strip()
    if not text:
        return Reject("empty")
    words = heuristics.length_of(text, lang)
    if re.search(r"\bsorry\b|抱歉|对不起", text, re.IGNORECASE) and words < settings.apology_words:
        return Reject("apology", words)
    if heuristics.without_content(text):
        return Reject("no_content")
    return heuristics.check_instance(instruction, "", text, lang, settings.rules.min_script)


class EvolInstruct:
    """The method as a stream of units; a pure function of settings, input rows and replies.

    `limit`: only that many of the first items are evolved. Memory: the items within 2 x rounds x 256 rows, and for the
    novelty test the index and ids of all instructions so far, about 0.4 kB each.
    """

    def __init__(
        self,
        settings: EvolSettings,
        generator: Generator,
        model: str,
        seed: int,
        limit: int | None = None,
        unit_rows: int = UNIT_ROWS,
        lag: int = _LAG,
    ) -> None:
        self.settings, self.generator, self.model, self.seed = settings, generator, model, seed
        self._limit, self._unit_rows, self._lag = limit, unit_rows, lag
        self._operations = [name for name in OPERATIONS if settings.operations.get(name, 0) > 0]
        if not self._operations:
            raise ValueError("evol_instruct: every operation has weight 0")
        self._seen = NoveltyPool(settings.max_similarity, min(SIMILARITY_FLOOR, settings.max_similarity))
        self._seen_ids = Texts()
        self._evolving = 0  # items that were or are evolved
        self._units: dict[int, list[_Item]] = {}  # under way, by number
        self._usage: dict[int, Usage] = {}
        self._open: deque[tuple[int, Turn | None, Watched[Any] | None]] = deque()  # (unit, ...) of each outcome to come

    def units(self, rows: Iterable[Row | None], known: Callable[[int], Known | None] = lambda unit: None) -> Iterator[EvolUnit]:
        """Units in order, each when all its items have been through all rounds. `rows` may give None for "nothing yet".

        `known(unit)` gives the new rewrites of a unit that was made before, which is not made again then; None for others.
        """
        for outcome in self.generator.run(self._source(rows, known)):
            unit, turn, watched = self._open.popleft()
            if watched is None:
                yield self._close(unit)
                continue
            watched.settle()
            self._usage[unit].merge(outcome.usage)
            assert turn is not None
            turn.replies += [reply.text for reply in outcome.replies]
            turn.asked = turn.asked and outcome.admitted

    # --- the order of the requests

    def _source(self, rows: Iterable[Row | None], known: Callable[[int], Known | None]) -> Iterator[tuple[int, Flow[Any]] | None]:
        steps = 2 * self.settings.rounds
        lanes: list[deque[_Item]] = [deque() for _ in range(steps - 1)]  # items that have taken step j and wait for the next
        made: Known | None = None
        number = 0
        for row in rows:
            if row is None:
                yield None
                continue
            unit, place = divmod(number, self._unit_rows)
            if place == 0:
                made = known(unit)
            item = self._item(number, row)
            if made is not None:
                item.known = made.get(place, {})
            else:
                self._units.setdefault(unit, []).append(item)
            number += 1
            yield from self._rewrite(item, 0)
            lanes[0].append(item)
            for step in range(1, steps):
                if len(lanes[step - 1]) <= self._lag:
                    break
                yield from self._advance(lanes, step)
        for step in range(1, steps):
            while lanes[step - 1]:
                yield from self._advance(lanes, step)
        unit, place = divmod(number, self._unit_rows)
        if (place or not number) and made is None:  # the last unit is not full; without any input there is one all the same
            yield from self._end(unit)

    def _advance(self, lanes: list[deque[_Item]], step: int) -> Iterator[tuple[int, Flow[Any]] | None]:
        item = lanes[step - 1].popleft()
        yield from self._rewrite(item, step // 2) if step % 2 == 0 else self._answer(item, step // 2)
        if step < len(lanes):
            lanes[step].append(item)
        elif item.known is None and item.number % self._unit_rows == self._unit_rows - 1:
            yield from self._end(item.number // self._unit_rows)

    def _end(self, unit: int) -> Iterator[tuple[int, Flow[Any]] | None]:
        """A mark behind the last request of a unit: when its turn among the outcomes comes, the unit is complete."""
        self._units.setdefault(unit, [])
        self._usage.setdefault(unit, Usage())
        self._open.append((unit, None, None))
        yield 0, asks_nothing(None)

    def _item(self, number: int, row: Row) -> _Item:
        messages = row["messages"] or []
        if [message["role"] for message in messages] != ["user", "assistant"]:
            return _Item(number, row, None)
        text = messages[0]["content"] or ""
        self._see(row["id"], text)
        if self._limit is not None and self._evolving >= self._limit:
            return _Item(number, row, None)
        self._evolving += 1
        return _Item(number, row, Instruction(row["id"], text, row["lang"] or heuristics.language_of(text)))

    def _see(self, identity: str, text: str) -> None:
        self._seen.add(text)
        self._seen_ids.append(identity)

    def _emit(self, item: _Item, turn: Turn, watched: Watched[Any], bound: int) -> Iterator[tuple[int, Flow[Any]] | None]:
        unit = item.number // self._unit_rows
        self._usage.setdefault(unit, Usage())
        self._open.append((unit, turn, watched))
        yield bound, watched.play()

    def _rewrite(self, item: _Item, number: int) -> Iterator[tuple[int, Flow[Any]] | None]:
        """Step 2n: ask for the item's rewrite of round n."""
        if item.known is not None or item.current is None:
            return
        if number:
            last = item.turns[-1]
            while last.answer is not None and not last.answer.ended:
                yield None
            if not last.asked:
                item.current = None  # the token cap has been reached
                return
            if last.answered is not None:
                item.current = Instruction(last.id, last.text, last.parent.lang)
        parent = item.current
        weights = [self.settings.operations[name] for name in self._operations]
        operation = random.Random(f"{self.seed}:{number}:{parent.id}").choices(self._operations, weights)[0]
        identity = tables.stable_id("evol_instruct", self.seed, number, parent.id)
        turn = Turn(parent, identity, operation, Watched(self._draw_rewrite(parent, identity, operation)))
        item.turns.append(turn)
        yield from self._emit(item, turn, turn.rewrite, self.settings.attempts * self.settings.evolve_sampling.max_tokens)

    def _answer(self, item: _Item, number: int) -> Iterator[tuple[int, Flow[Any]] | None]:
        """Step 2n + 1: test the rewrite of round n for novelty, then have it judged and answered."""
        if item.known is not None:
            if number in item.known:
                self._see(*item.known[number])
            return
        if item.current is None:
            return
        turn = item.turns[-1]
        while not turn.rewrite.ended:
            yield None
        found = turn.rewrite.value
        if not isinstance(found, str):
            turn.failure = found
            turn.asked = found is not None
            return
        decided = self._seen.admit([found])
        turn.similarity = similarity = float(decided.similarity[0])
        if not decided.accepted[0]:
            nearest = self._seen_ids[int(decided.nearest[0])]
            turn.failure = Failure(found, Reject("not_novel", similarity, nearest), turn.operation)
            return
        turn.text = found
        self._seen_ids.append(turn.id)
        turn.answer = Watched(self._draw_answer(turn))
        bound = self.settings.attempts * self.settings.answer_sampling.max_tokens + (
            _JUDGE.max_tokens if self.settings.judge else 0
        )
        yield from self._emit(item, turn, turn.answer, bound)

    # --- what is asked

    def _draw_rewrite(self, parent: Instruction, identity: str, operation: Operation) -> Flow[str | Failure]:
        step, said = f"evol_{operation}", ""
        least, most = self.settings.added_length.get(parent.lang, (10, 20))
        values = {"instruction": parent.text, "least": str(least), "most": str(most)}

        def parse(reply: Reply) -> str | Reject:
            nonlocal said
            said = reply.text
            return parse_rewrite(reply, parent.text, parent.lang, operation, self.settings)

        found = yield from attempt(
            lambda turn: self._request(identity, parent.lang, step, self.settings.evolve_sampling, values, turn),
            parse,
            self.settings.attempts,
        )
        return Failure(said or parent.text, found, operation) if isinstance(found, Reject) else found

    def _draw_answer(self, turn: Turn) -> Flow[str | Failure]:
        lang, said = turn.parent.lang, ""
        if self.settings.judge:
            values = {"first": turn.parent.text, "second": turn.text}
            reply = yield from ask(self._request(turn.id, lang, "judge_gain", _JUDGE, values))
            if reply.unanswered is not None:
                return Failure(turn.text, reply.unanswered, "judge")
            equal = parse_judgement(reply, lang)
            if equal:
                return Failure(turn.text, Reject("judged_equal"), "judge")
            if equal is None and self.settings.judge_unclear == "drop":
                return Failure(turn.text, Reject("judged_unclear", detail=reply.text), "judge")

        def parse(reply: Reply) -> str | Reject:
            nonlocal said
            said = reply.text
            return check_answer(turn.text, reply, lang, self.settings) or reply.text.strip()

        found = yield from attempt(
            lambda number: self._request(turn.id, lang, "answer", self.settings.answer_sampling, {"prompt": turn.text}, number),
            parse,
            self.settings.attempts,
        )
        return Failure(f"{turn.text}\n\n{said}", found, "answer") if isinstance(found, Reject) else found

    def _request(
        self, identity: str, lang: str, step: str, sampling: SamplingSettings, values: dict[str, str], turn: int = 0
    ) -> Request:
        seed = request_seed(self.seed, step, identity, *again(turn)) if sampling.temperature or turn else 0
        messages = prompts.load(step, lang, self.settings.prompts).render(**values)
        if step == "answer" and self.settings.ban_stock_phrases:
            messages = prompts.with_system_line(messages, prompts.load("ban", lang, self.settings.prompts).sections[0][1])
        return Request(messages, sampling, seed)

    # --- what came of it

    def _close(self, number: int) -> EvolUnit:
        """The account of a unit: its input rows, then its evolved rows round by round."""
        items = self._units.pop(number)
        account = Account("evol_instruct")
        for item in items:
            operation = (item.row["provenance"] or {}).get("operation") or "unknown"
            account.keep({**item.row, **({"replies": None} if self.generator.keep_replies else {})}, operation, created=False)
        rounds: dict[str, dict[str, int]] = {}
        rewrites: list[tuple[int, int, str, str]] = []
        for turn_number in range(self.settings.rounds):
            before, asked = len(account.rows), 0
            for place, item in enumerate(items):
                if turn_number < len(item.turns):
                    turn = item.turns[turn_number]
                    asked += turn.rewrite.value is not None
                    self._enter(account, turn, turn_number)
                    if turn.text:
                        rewrites.append((place, turn_number, turn.id, turn.text))
            rounds[str(turn_number)] = {"asked": asked, "kept": len(account.rows) - before}
        account.extra["rounds"] = rounds
        return EvolUnit(number, account, self._usage.pop(number), rewrites)

    def _enter(self, account: Account, turn: Turn, number: int) -> None:
        if turn.similarity is not None:
            account.score(turn.similarity)
        found = turn.answer.value if turn.answer is not None else None
        if turn.failure is None and not isinstance(found, str):
            unasked = Failure(turn.text or turn.parent.text, Reject("token_cap"), "answer" if turn.text else turn.operation)
            turn.failure = found or unasked
        if turn.failure is not None:
            account.reject(turn.id, turn.failure.text, turn.failure.why, source=turn.parent.id, step=turn.failure.step)
            return
        answer = turn.answered or ""
        provenance = Provenance(
            self.model, self.generator.revision, self._used(turn.operation, turn.parent.lang),
            {"evolve": self.settings.evolve_sampling, "answer": self.settings.answer_sampling},
            self.seed, [turn.parent.id], f"evol:{turn.operation}", number,
        )  # fmt: skip
        row = instruction_row(turn.id, turn.text, "", answer, turn.parent.lang, provenance.to_row())
        if self.generator.keep_replies:
            row["replies"] = turn.replies
        example = {"parent": turn.parent.text, "operation": turn.operation, "instruction": turn.text, "output": answer}
        account.keep(row, f"evol:{turn.operation}", example)

    def _used(self, operation: str, lang: str) -> list[prompts.Prompt]:
        judge, ban = ["judge_gain"] * self.settings.judge, ["ban"] * self.settings.ban_stock_phrases
        names = [f"evol_{operation}", *judge, "answer", *ban]
        return [prompts.load(name, lang, self.settings.prompts) for name in names]
