"""Evol-Instruct (Xu et al. 2023, "WizardLM", arXiv 2304.12244): instructions made harder, round by round.

In each round every instruction of the pool is rewritten by one operation (five in depth, one in breadth, drawn per
item), the rewrite is answered, and four eliminations decide: it adds nothing (judged by the model, and by ROUGE-L with
its parent), the reply is a short apology, the reply has only punctuation and stop words, or the rewrite copied words of
the prompt. What fails returns to the pool and is tried again next round; what succeeds takes its parent's place.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from operators import tables
from operators.config import Settings
from operators.synthesis import heuristics, prompts
from operators.synthesis.generator import Generator
from operators.synthesis.heuristics import InstructionRules
from operators.synthesis.novelty import NoveltyPool, recall, rouge_l
from operators.synthesis.requests import Reject, Reply, Request, SamplingSettings, request_seed
from operators.synthesis.rows import Account, Provenance, instruction_row

Operation = Literal["constraint", "deepen", "concretize", "reasoning", "complicate", "breadth"]
OPERATIONS: tuple[Operation, ...] = ("constraint", "deepen", "concretize", "reasoning", "complicate", "breadth")

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


class EvolSettings(Settings):
    """How instructions are evolved."""

    rounds: int = Field(default=1, ge=1, le=16, description="rounds; the paper has 4")
    operations: dict[Operation, float] = Field(
        default={name: 1.0 for name in OPERATIONS}, description="weights of the operations; 0 leaves one out"
    )
    judge: bool = Field(default=True, description="ask the model whether the rewrite adds something (elimination 1)")
    max_parent_similarity: float = Field(
        default=0.9, gt=0, le=1, description="a rewrite with this ROUGE-L F to its parent, or more, adds nothing"
    )
    min_parent_recall: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="in depth, share of the parent's tokens that a rewrite keeps in order; below, it lost the topic",
    )
    max_similarity: float = Field(default=0.95, gt=0, le=1, description="likewise to any other instruction")
    rules: InstructionRules = Field(default=InstructionRules(), description="rules for rewritten instructions")
    apology_words: int = Field(default=80, ge=0, description="a reply with `sorry` is dropped when shorter (elimination 2)")
    evolve_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.05, max_tokens=96), description="drawing rewrites"
    )
    answer_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.3, top_p=0.9, repetition_penalty=1.1, max_tokens=128), description="drawing answers"
    )
    prompts: str | None = Field(default=None, description="folder with <language>/<name>.txt that replace the project's prompts")


@dataclass(frozen=True)
class Instruction:
    """An instruction of the pool: its row, its text with the input in it, its language."""

    id: str
    text: str
    lang: str


@dataclass
class EvolRound:
    """What one round made."""

    number: int
    account: Account
    asked: int = 0


def parse_rewrite(reply: Reply, parent: str, lang: str, operation: str, settings: EvolSettings) -> str | Reject:
    """The rewritten instruction of a reply, or why it is no use (eliminations 3 and 4 for the instruction, and the rules)."""
    if reply.truncated:
        return Reject("truncated")
    text = _LEAD.sub("", reply.text).strip().strip('"“”').strip()
    if _COPIED[lang].search(text):
        return Reject("copied_prompt")
    if heuristics.without_content(text):
        return Reject("no_content")
    similarity = rouge_l(parent, text)
    if similarity >= settings.max_parent_similarity:
        return Reject("adds_nothing", similarity)
    kept = recall(parent, text)
    if operation != "breadth" and kept < settings.min_parent_recall:
        return Reject("lost_topic", kept)
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
    words = heuristics.length_of(text, lang)
    if re.search(r"\bsorry\b|抱歉|对不起", text, re.IGNORECASE) and words < settings.apology_words:
        return Reject("apology", words)
    if heuristics.without_content(text):
        return Reject("no_content")
    return heuristics.check_instance(instruction, "", text, lang, settings.rules.min_script)


class EvolInstruct:
    """The method as a stream of rounds; a pure function of settings, pool and replies."""

    def __init__(
        self,
        settings: EvolSettings,
        pool: Sequence[Instruction],
        generator: Generator,
        model: str,
        seed: int,
        limit: int | None = None,
    ) -> None:
        self.settings, self.generator, self.model, self.seed = settings, generator, model, seed
        self._current = list(pool)
        self._limit = limit
        self._kept = 0
        self._operations = [name for name in OPERATIONS if settings.operations.get(name, 0) > 0]
        if not self._operations:
            raise ValueError("evol_instruct: every operation has weight 0")
        self._seen = NoveltyPool()
        self._seen_ids = [item.id for item in pool]
        for item in pool:
            self._seen.add(item.text)
        self.stopped = ""

    def rounds(self) -> Iterator[EvolRound]:
        """The rounds, fewer when the token cap is reached. `stopped` says why they ended."""
        for number in range(self.settings.rounds):
            made = self._round(number)
            self._kept += len(made.account.rows)
            if not self._current:
                self.stopped = "no_input"
            elif self.generator.exhausted or not made.asked:
                self.stopped = "token_cap"
            elif self._limit is not None and self._kept >= self._limit:
                self.stopped = "limit"
            elif number + 1 == self.settings.rounds:
                self.stopped = "rounds"
            yield made
            if self.stopped:
                return

    def _round(self, number: int) -> EvolRound:
        made = EvolRound(number, Account("evol_instruct"))
        settings = self.settings
        parents: dict[str, Instruction] = {}
        chosen: dict[str, str] = {}
        tasks: list[Instruction] = []  # candidates, before a rewrite is known they carry their parent's text
        for parent in self._current:
            identity = tables.stable_id("evol_instruct", self.seed, number, parent.id)
            parents[identity] = parent
            draw = random.Random(f"{self.seed}:{number}:{parent.id}")
            chosen[identity] = draw.choices(self._operations, [settings.operations[name] for name in self._operations])[0]
            tasks.append(Instruction(identity, parent.text, parent.lang))

        rewritten: list[Instruction] = []
        for task, reply in self._ask(
            made, tasks, lambda t: f"evol_{chosen[t.id]}", settings.evolve_sampling, lambda t: {"instruction": t.text}
        ):
            made.asked += 1
            parsed = parse_rewrite(reply, task.text, task.lang, chosen[task.id], settings)
            if isinstance(parsed, str):
                similarity, nearest = self._seen.nearest(parsed)
                made.account.score(similarity)
                if similarity >= settings.max_similarity:
                    parsed = Reject("not_novel", similarity, self._seen_ids[nearest])
            if isinstance(parsed, Reject):
                made.account.reject(task.id, reply.text, parsed, source=parents[task.id].id, step=chosen[task.id])
            else:
                rewritten.append(Instruction(task.id, parsed, task.lang))

        judged = rewritten
        if settings.judge:
            judged = []
            greedy = SamplingSettings(temperature=0, max_tokens=4)
            for task, reply in self._ask(
                made, rewritten, lambda t: "judge_gain", greedy, lambda t: {"first": parents[t.id].text, "second": t.text}
            ):
                if parse_judgement(reply, task.lang):
                    made.account.reject(task.id, task.text, Reject("judged_equal"), source=parents[task.id].id, step="judge")
                else:
                    judged.append(task)

        evolved: dict[str, Instruction] = {}
        for task, reply in self._ask(made, judged, lambda t: "answer", settings.answer_sampling, lambda t: {"prompt": t.text}):
            why = check_answer(task.text, reply, task.lang, settings)
            if why is None and self._limit is not None and self._kept + len(made.account.rows) >= self._limit:
                why = Reject("left_over", detail="limit")
            if why is not None:
                made.account.reject(task.id, f"{task.text}\n\n{reply.text}", why, source=parents[task.id].id, step="answer")
                continue
            parent, operation = parents[task.id], chosen[task.id]
            provenance = Provenance(
                self.model, self.generator.revision, self._used(operation, task.lang),
                {"evolve": settings.evolve_sampling, "answer": settings.answer_sampling},
                self.seed, [parent.id], f"evol:{operation}", number,
            )  # fmt: skip
            row = instruction_row(task.id, task.text, "", reply.text.strip(), task.lang, provenance.to_row())
            example = {"parent": parent.text, "operation": operation, "instruction": task.text, "output": reply.text.strip()}
            made.account.keep(row, f"evol:{operation}", example)
            evolved[parent.id] = task
            self._seen.add(task.text)
            self._seen_ids.append(task.id)
        self._current = [evolved.get(item.id, item) for item in self._current]
        return made

    def _used(self, operation: str, lang: str) -> list[prompts.Prompt]:
        names = [f"evol_{operation}", *(["judge_gain"] if self.settings.judge else []), "answer"]
        return [prompts.load(name, lang, self.settings.prompts) for name in names]

    def _ask(
        self,
        made: EvolRound,
        tasks: list[Instruction],
        step: Callable[[Instruction], str],
        sampling: SamplingSettings,
        values: Callable[[Instruction], dict[str, str]],
    ) -> Iterator[tuple[Instruction, Reply]]:
        """One request a task; tasks that the token cap or the model's length leaves out are rejected here."""
        requests = [
            Request(
                prompts.load(step(task), task.lang, self.settings.prompts).render(**values(task)),
                sampling,
                request_seed(self.seed, step(task), task.id) if sampling.temperature else 0,
            )
            for task in tasks
        ]
        for task, reply in zip(tasks, self.generator.ask(requests), strict=True):
            if reply is None:
                made.account.reject(task.id, task.text, Reject("token_cap"), step=step(task))
            elif reply.finish_reason == "prompt_too_long":
                made.account.reject(task.id, task.text, Reject("prompt_too_long", reply.prompt_tokens), step=step(task))
            else:
                yield task, reply
