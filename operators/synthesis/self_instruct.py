"""Self-Instruct (Wang et al. 2023, arXiv 2212.10560): new tasks bootstrapped from a handful of human-written ones.

A round asks for tasks with examples drawn from the seeds and from what was accepted in earlier rounds, sets aside what
the rules or the novelty test reject, decides which of the rest are classification tasks, and generates instances: the
output first for classification, the input first otherwise. Alpaca's variant makes whole tasks in one call.

Each request for tasks and each task's chain (classification, input, output) is a flow of its own, so nothing waits for
the slowest of a step: tasks of one call are under way while other calls are still being drawn, and the next round's
calls begin when the last task of this one was judged. What is decided (rules, novelty, examples, which tasks are
wanted) is decided in the order of the requests, so rows do not depend on the order of completion. Where the settings
differ from the paper and its code: docs/self_instruct.md.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any, TypeVar

from operators import tables
from operators.synthesis import heuristics, prompts
from operators.synthesis.flow import Flow, Watched, ask, asks_nothing, attempt
from operators.synthesis.generator import Generator, Outcome, Usage
from operators.synthesis.novelty import NoveltyPool
from operators.synthesis.requests import Messages, Reject, Reply, Request, SamplingSettings, request_seed
from operators.synthesis.rows import Account, Provenance, instruction_row
from operators.synthesis.seeds import SeedTask
from operators.synthesis.self_instruct_settings import SelfInstructSettings
from operators.synthesis.task_parsing import (
    parse_alpaca,
    parse_classification,
    parse_forms,
    parse_input,
    parse_instructions,
    parse_labelled,
    shown_examples,
)
from operators.synthesis.texts import Texts

T = TypeVar("T")

SIMILARITY_FLOOR = 0.3
"""Similarities below are counted as 0 in the histogram of novelty: the pool finds nearer texts without reading all of it."""

_CLASSIFY = SamplingSettings(temperature=0, max_tokens=3)

Pair = tuple[str, str]  # (input, output)
Parsed = str | tuple[str, Pair] | Reject  # a task, a task with its instance, or why there is none


@dataclass
class Task:
    """A task on its way: seed (human) or candidate."""

    id: str
    instruction: str
    lang: str
    parents: list[str] = field(default_factory=list)
    form: Pair | None = None  # its instance, known at once with method alpaca
    reply: str = ""  # what the model said when it made the task


@dataclass
class Round:
    """What one round made. `tasks` are those that were new, in their order: with the rows of the pool all that a later
    round depends on."""

    number: int
    account: Account
    asked: int = 0
    tasks: list[Task] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    capped: bool = False  # the token cap left something unasked


@dataclass
class _Instances:
    """What became of one task."""

    rows: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)  # (row, example)
    rejects: list[tuple[str, str, Reject, str]] = field(default_factory=list)  # (id, text, why, step)
    classification: str = ""


@dataclass
class _Call:
    """A request for tasks."""

    lang: str
    parents: list[str]
    flow: Watched[tuple[list[Parsed], str]]


@dataclass
class _Open:
    """A flow whose outcome is still to come: a call, the chain of a task, or the end of a round (neither)."""

    made: Round
    rest: Account  # of the instances; the account of the round itself holds what was decided on the tasks
    call: _Call | None = None
    task: Task | None = None


class SelfInstruct:
    """The method as a stream of rounds; a pure function of settings, seeds and replies.

    Memory: the seeds, two rounds, and for each task ever accepted its instruction, its id and its tokens for the novelty
    test, about half a kilobyte (measured: 520 bytes at 60,000 tasks of eleven words).
    """

    def __init__(
        self, settings: SelfInstructSettings, seeds: Sequence[SeedTask], generator: Generator, model: str, seed: int
    ) -> None:
        self.settings, self.generator, self.model, self.seed = settings, generator, model, seed
        self.shares = settings.shares({task.lang for task in seeds})
        self.stopped = ""
        self.kept = 0
        self._pending = 0  # tasks whose instances are being made
        self._next = 0  # number of the next round
        self._figures: dict[int, tuple[int, int, int]] = {}  # of the last rounds: asked, new tasks, rows
        self._settled = 0  # rounds that are over
        self._open: deque[_Open] = deque()
        self.pool = NoveltyPool(settings.max_similarity, min(SIMILARITY_FLOOR, settings.max_similarity))
        self._pooled = Texts()  # ids, by number in the pool
        self._machine = {lang: Texts() for lang in self.shares}  # accepted tasks short enough for an example, as JSON
        self._human: dict[str, list[Task]] = {lang: [] for lang in self.shares}
        self._origins: dict[tuple[str, str], dict[str, Any]] = {}  # provenance by (language, steps), without parents and round
        for seed_task in seeds:
            task = Task(seed_task.id, seed_task.instruction, seed_task.lang)
            task.form = next(iter(seed_task.instances), None)
            self._remember(task.id, task.instruction)
            if task.lang in self._human and self._short(task):
                self._human[task.lang].append(task)
        for lang in self.shares:  # a task that repeats the prompt's own sentence is not new either
            for role, text in self._prompt("alpaca" if settings.method == "alpaca" else "instructions", lang).sections:
                for sentence in re.split(r"(?<=[.。])\s*", Template(text).safe_substitute(count=str(settings.tasks_per_call))):
                    if role == "user" and sentence:
                        self._remember(f"prompt:{lang}", sentence)
        for lang, tasks in self._human.items():
            if not tasks:
                raise ValueError(f"no seed task in {lang!r} is short enough for an example; raise example_length[{lang!r}]")

    def restore(self, tasks: Sequence[Task], asked: int, kept: int, usage: Usage, capped: bool) -> None:
        """Take over a round that was made before, from its new tasks and its figures. To be called in the order of the
        rounds, before `rounds`."""
        self.pool.extend([task.instruction for task in tasks])
        for task in tasks:
            self._pooled.append(task.id)
            self._show(task)
        self.kept += kept
        self.generator.usage.merge(usage)
        self.generator.capped = self.generator.capped or capped
        self._figures[self._next] = (asked, len(tasks), kept)
        self._figures.pop(self._next - self.settings.yield_window - 2, None)
        self._next += 1
        self._settled += 1

    def rounds(self) -> Iterator[Round]:
        """Rounds, each when it is over, until the target, the token cap, `max_rounds`, or a yield below `min_yield`.

        `stopped` says which.
        """
        for outcome in self.generator.run(self._source()):
            opened = self._open.popleft()
            opened.made.usage.merge(outcome.usage)
            if opened.call is not None:
                opened.call.flow.settle()
                opened.made.capped |= not outcome.admitted
            elif opened.task is not None:
                opened.made.capped |= not outcome.admitted
                self._settle(opened, outcome)
            else:
                yield from self._close(opened)

    # --- the order of the requests

    def _source(self) -> Iterator[tuple[int, Flow[Any]] | None]:
        while True:
            wait = self._may_go_on()
            while wait():
                yield None
            self.stopped = self._why_stop()
            if self.stopped:
                return
            made, rest = Round(self._next, Account("self_instruct")), Account("self_instruct")
            self._next += 1
            calls = self._calls(made.number)
            bound = self.settings.attempts * self.settings.instruction_sampling.max_tokens
            for call in calls:
                self._open.append(_Open(made, rest, call=call))
                yield bound, call.flow.play()
            for number, call in enumerate(calls):
                while not call.flow.ended:
                    yield None
                for task in self._considered(made, number, call):
                    while self.kept < self.settings.target <= self._most():
                        yield None  # those under way may be enough
                    if self.kept >= self.settings.target:
                        made.account.reject(task.id, task.instruction, Reject("left_over", detail="target"), step="tasks")
                    elif task.form is not None:
                        self._enter(made.account, task, self._checked(task, [task.form], ["alpaca"], made.number, task.reply), [])
                    else:
                        self._pending += 1
                        self._open.append(_Open(made, rest, task=task))
                        yield self._bound, self._instances(task, made.number)
            self._figures[made.number] = (made.asked, len(made.tasks), 0)
            self._figures.pop(made.number - self.settings.yield_window - 2, None)
            self._open.append(_Open(made, rest))
            yield 0, asks_nothing(None)

    def _most(self) -> int:
        """Rows at most, with those under way."""
        return self.kept + self._pending * self.settings.most_instances

    def _may_go_on(self) -> Callable[[], bool]:
        """Whether it cannot be said yet if another round is wanted: an earlier round's yield, or enough rows, may come."""
        number = self._next
        return lambda: self._settled < number - 1 or self.kept < self.settings.target <= self._most()

    def _why_stop(self) -> str:
        """Why there is no further round, "" if there is one. By then the last round has asked for everything, and all
        rounds before it are over."""
        if self.kept >= self.settings.target:
            return "target"
        if self.generator.capped:
            return "token_cap"
        if self.settings.max_rounds is not None and self._next >= self.settings.max_rounds:
            return "max_rounds"
        if self._next >= self.settings.yield_window and self.recent_yield < self.settings.min_yield:
            return "low_yield"
        return ""

    @property
    def recent_yield(self) -> float:
        """The smaller of new tasks a request over the last `yield_window` rounds and rows a request over as many rounds
        that end with the last but one: the last one's rows may still be on their way."""
        window = self.settings.yield_window
        found = [self._each(range(self._next - window, self._next), 1)]
        if self._next > window:
            found.append(self._each(range(self._next - 1 - window, self._next - 1), 2))
        return min(found)

    def _each(self, rounds: range, figure: int) -> float:
        recent = [self._figures[number] for number in rounds if number in self._figures]
        asked = sum(figures[0] for figures in recent)
        return sum(figures[figure] for figures in recent) / asked if asked else 0.0

    # --- new tasks

    def _calls(self, number: int) -> list[_Call]:
        calls = []
        counts = _apportion(self.shares, self.settings.calls_per_round)
        # languages spread evenly over the round, so that a target reached early does not leave the last one out
        order = sorted(((call + 0.5) / count, lang, call) for lang, count in counts.items() for call in range(count))
        for _, lang, call in order:
            examples = self._examples(lang, number, call)
            messages = self._task_prompt(lang, examples)
            flow = self._draw_tasks(messages, lang, (number, lang, call))
            calls.append(_Call(lang, [task.id for task in examples], Watched(flow)))
        return calls

    def _draw_tasks(self, messages: Messages, lang: str, place: tuple[int, str, int]) -> Flow[tuple[list[Parsed], str]]:
        settings, said = self.settings, Reply("", "stop", 0, 0)

        def render(turn: int) -> Request:
            return Request(messages, settings.list_sampling, request_seed(self.seed, "tasks", *place, *again(turn)))

        def parse(reply: Reply) -> list[Parsed] | Reject:
            nonlocal said
            said = reply
            if settings.method == "alpaca":
                blocks = parse_alpaca(reply, _FIRST_FIELD[lang], settings.drop_reply)
                if isinstance(blocks, Reject):
                    return blocks
                return [block if isinstance(block, Reject) else (block[0], (block[1], block[2])) for block in blocks]
            tasks = parse_instructions(reply, settings.drop_reply)
            return tasks if isinstance(tasks, Reject) else list(tasks)

        found = yield from attempt(render, parse, settings.attempts)
        return ([found] if isinstance(found, Reject) else found), said.text

    def _considered(self, made: Round, number: int, call: _Call) -> Iterator[Task]:
        """The tasks of a call that the rules and the novelty test let through; the others are rejected."""
        if call.flow.value is None:
            return  # the token cap left it out
        made.asked += 1
        parsed, said = call.flow.value
        candidates: list[Task] = []
        for place, found in enumerate(parsed):
            identity = tables.stable_id("self_instruct", self.seed, made.number, number, place)
            if isinstance(found, Reject):
                made.account.reject(identity, found.detail or said, Reject(found.reason, found.value), step="tasks")
                continue
            instruction, form = (found, None) if isinstance(found, str) else found
            why = heuristics.check_instruction(instruction, call.lang, self.settings.rules)
            if why is not None:
                made.account.reject(identity, instruction, why, step="tasks")
                continue
            candidates.append(
                Task(identity, instruction, call.lang, call.parents, form, said if self.generator.keep_replies else "")
            )
        decided = self.pool.admit([task.instruction for task in candidates])
        accepted = []
        for task, new, similarity, nearest in zip(
            candidates, decided.accepted.tolist(), decided.similarity.tolist(), decided.nearest.tolist(), strict=True
        ):
            made.account.score(similarity)
            if new:
                self._pooled.append(task.id)
                accepted.append(task)
            else:
                made.account.reject(task.id, task.instruction, Reject("not_novel", similarity, self._pooled[nearest]), step="tasks")
        for task in accepted:
            made.tasks.append(task)
            self._show(task)
            yield task

    def _show(self, task: Task) -> None:
        """Let later rounds show the task as an example, if it is short enough."""
        if self._short(task):
            self._machine[task.lang].append(json.dumps([task.id, task.instruction, *(task.form or ())]))

    def _remember(self, identity: str, instruction: str) -> None:
        self.pool.add(instruction)
        self._pooled.append(identity)

    def _short(self, task: Task) -> bool:
        length = heuristics.length_of(self._example_text(task), task.lang)
        return length <= self.settings.example_length.get(task.lang, length)

    def _examples(self, lang: str, number: int, call: int) -> list[Task]:
        """In-context examples: machine-made ones as far as there are any, seeds for the rest, shuffled."""
        draw = random.Random(f"{self.seed}:{number}:{lang}:{call}")
        machine, human = self._machine[lang], self._human[lang]
        drawn = draw.sample(range(len(machine)), min(self.settings.machine_examples, len(machine)))
        chosen = []
        for row in drawn:
            identity, instruction, *form = json.loads(machine[row])
            chosen.append(Task(identity, instruction, lang, form=(form[0], form[1]) if form else None))
        wanted = self.settings.seed_examples + self.settings.machine_examples - len(chosen)
        chosen += draw.sample(human, min(wanted, len(human)))
        draw.shuffle(chosen)
        return chosen

    def _task_prompt(self, lang: str, examples: Sequence[Task]) -> Messages:
        count = str(self.settings.tasks_per_call)
        if self.settings.method == "alpaca":
            shown = "\n###\n".join(map(self._example_text, examples)) + "\n###\n" + _FIRST_FIELD[lang]
            return self._prompt("alpaca", lang).render(count=count, examples=shown)
        shown = "".join(f"{index + 1}. {self._example_text(task)}\n" for index, task in enumerate(examples))
        return self._prompt("instructions", lang).render(count=count, examples=f"{shown}{len(examples) + 1}.")

    def _example_text(self, task: Task) -> str:
        instruction = " ".join(task.instruction.split())
        if self.settings.method != "alpaca":
            return instruction
        given, output = task.form or ("", "")
        if task.lang == "zh":
            return f"指令：{instruction}\n输入：{given or '无'}\n输出：{output}"
        return f"Instruction: {instruction}\nInput: {given or 'None'}\nOutput: {output}"

    # --- instances

    @property
    def _bound(self) -> int:
        """The most completion tokens that the chain of one task may ask for."""
        settings = self.settings
        given = settings.attempts * settings.instance_sampling.max_tokens
        answer = 0 if settings.outputs == "form" else settings.attempts * settings.answer_sampling.max_tokens
        return _CLASSIFY.max_tokens + given + answer

    def _instances(self, task: Task, number: int) -> Flow[_Instances]:
        """The chain of one task: is it a classification task, then its instances."""
        settings = self.settings
        values = {"instruction": task.instruction, "count": str(settings.instances_per_task)}
        reply = yield from ask(self._request(task, "classification", _CLASSIFY, values))
        if reply.unanswered is not None:
            return _Instances(rejects=[(task.id, task.instruction, reply.unanswered, "classification")])
        answer = parse_classification(reply)
        if settings.classification == "either":
            answer = answer or heuristics.wants_label(task.instruction)
        found: list[Pair] | Reject
        most, drop = settings.instances_per_task, settings.drop_reply
        if answer:
            step = "output_first"
            found, said = yield from self._draw(
                task, step, settings.instance_sampling, values, lambda reply: parse_labelled(reply, most, drop)
            )
            steps = ["instructions", "classification", step]
        elif settings.outputs == "form":
            step = "instances"
            found, said = yield from self._draw(
                task, step, settings.instance_sampling, values, lambda reply: parse_forms(reply, most, drop)
            )
            steps = ["instructions", "classification", step]
        else:
            steps = ["instructions", "classification"]
            given: str | Reject = ""
            said = ""
            if settings.inputs == "always" or heuristics.refers_to_input(task.instruction):
                steps.append("input_first")
                given, said = yield from self._draw(
                    task, "input_first", settings.instance_sampling, values, self._parse_input(task)
                )
            if isinstance(given, Reject):
                found = given
            else:
                prompt = heuristics.join_input(task.instruction, given)
                steps.append("answer")
                output, said = yield from self._draw(task, "answer", settings.answer_sampling, {"prompt": prompt}, _parse_answer)
                found = output if isinstance(output, Reject) else [(given, output)]
        made = self._checked(task, found, steps, number, said)
        made.classification = "unclear" if answer is None else "yes" if answer else "no"
        return made

    def _parse_input(self, task: Task) -> Callable[[Reply], str | Reject]:
        def parse(reply: Reply) -> str | Reject:
            given = parse_input(reply)
            if isinstance(given, Reject):
                return given
            if not given and heuristics.refers_to_input(task.instruction):
                return Reject("missing_input")
            shown = shown_examples(self._prompt("input_first", task.lang))
            return heuristics.check_input(task.instruction, given) or heuristics.copies(given, shown) or given

        return parse

    def _draw(
        self,
        task: Task,
        step: str,
        sampling: SamplingSettings,
        values: dict[str, str],
        parse: Callable[[Reply], T | Reject],
    ) -> Flow[tuple[T | Reject, str]]:
        """(what `parse` made of the reply, the reply's text); malformed ones are drawn again."""
        said = ""

        def read(reply: Reply) -> T | Reject:
            nonlocal said
            said = reply.text
            return parse(reply)

        found = yield from attempt(lambda turn: self._request(task, step, sampling, values, turn), read, self.settings.attempts)
        return found, said

    def _request(self, task: Task, step: str, sampling: SamplingSettings, values: dict[str, str], turn: int = 0) -> Request:
        seed = request_seed(self.seed, step, task.id, *again(turn)) if sampling.temperature or turn else 0
        messages = self._prompt(step, task.lang).render(**values)
        if step == "answer" and self.settings.ban_stock_phrases:
            messages = prompts.with_system_line(messages, self._prompt("ban", task.lang).sections[0][1])
        return Request(messages, sampling, seed)

    def _checked(self, task: Task, found: list[Pair] | Reject, steps: list[str], number: int, said: str) -> _Instances:
        """The instances of a task as rows or rejects; the task's own candidate is the first of them."""
        made, step = _Instances(), steps[-1]
        if isinstance(found, Reject):
            made.rejects.append((task.id, heuristics.join_input(task.instruction, said), found, step))
            return made
        clash = Reject("contradiction") if heuristics.contradicts(found) else None
        seen: set[Pair] = set()
        for index, (given, output) in enumerate(found):
            identity = task.id if index == 0 else tables.stable_id(task.id, index)
            why = clash or heuristics.check_instance(task.instruction, given, output, task.lang, self.settings.rules.min_script)
            if why is None and step in ("output_first", "instances"):
                shown = shown_examples(self._prompt(step, task.lang))
                echo = heuristics.check_input(task.instruction, given) if given else None
                why = echo or heuristics.copies(given, shown) or heuristics.copies(output, shown)
            if why is None and (given, output) in seen:
                why = Reject("duplicate_instance")
            seen.add((given, output))
            if why is not None:
                text = f"{heuristics.join_input(task.instruction, given)}\n\n{output}"
                made.rejects.append((identity, text, why, step))
                continue
            row = instruction_row(identity, task.instruction, given, output, task.lang, self._provenance(task, steps, number))
            made.rows.append((row, {"instruction": task.instruction, "input": given, "output": output, "lang": task.lang}))
        return made

    def _settle(self, opened: _Open, outcome: Outcome[_Instances]) -> None:
        task = opened.task
        assert task is not None
        self._pending -= 1
        if outcome.value is None:
            opened.rest.reject(task.id, task.instruction, Reject("token_cap"), step="classification")
        else:
            self._enter(opened.rest, task, outcome.value, [reply.text for reply in outcome.replies])

    def _enter(self, account: Account, task: Task, made: _Instances, replies: list[str]) -> None:
        """Count what a task made, in the order of the tasks; rows beyond the target are left over."""
        for row, example in made.rows:
            if self.kept >= self.settings.target:
                account.reject(row["id"], task.instruction, Reject("left_over", detail="target"))
                continue
            self.kept += 1
            if self.generator.keep_replies:
                row["replies"] = [task.reply, *replies]
            account.keep(row, "self_instruct", example)
        for identity, text, why, step in made.rejects:
            account.reject(identity, text, why, step=step)
        if made.classification:
            counts = Counter(account.extra.get("classification", {}))
            counts[made.classification] += 1
            account.extra["classification"] = dict(sorted(counts.items()))

    def _close(self, opened: _Open) -> Iterator[Round]:
        made = opened.made
        made.account.merge(opened.rest)
        self._settled += 1
        self._figures[made.number] = (made.asked, len(made.tasks), len(made.account.rows))
        if made.asked or not made.number:
            yield made  # a round of which the cap left nothing is none

    def _provenance(self, task: Task, steps: list[str], number: int) -> dict[str, Any]:
        key = (task.lang, " ".join(steps))
        if key not in self._origins:
            sampling = {step: self._sampling_of(step) for step in steps if step != "classification"}
            ban = ["ban"] * (self.settings.ban_stock_phrases and "answer" in steps)
            used = [self._prompt(step, task.lang) for step in [*steps, *ban]]
            origin = Provenance(self.model, self.generator.revision, used, sampling, self.seed, [], "self_instruct", 0)
            self._origins[key] = origin.to_row()
        return {**self._origins[key], "parents": list(task.parents), "round": number}

    def _sampling_of(self, step: str) -> SamplingSettings:
        if step in ("instructions", "alpaca"):
            return self.settings.list_sampling
        return self.settings.answer_sampling if step == "answer" else self.settings.instance_sampling

    def _prompt(self, name: str, lang: str) -> prompts.Prompt:
        return prompts.load(name, lang, self.settings.prompts)


_FIRST_FIELD = {"en": "Instruction:", "zh": "指令："}  # how a block of the one-call variant begins


def again(turn: int) -> tuple[int, ...]:
    """The part of a seed that tells a repeated attempt from the first."""
    return (turn,) if turn else ()


def _parse_answer(reply: Reply) -> str | Reject:
    if reply.truncated:
        return Reject("truncated")
    return reply.text.strip() or Reject("empty")


def _apportion(shares: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to shares that sum to 1, by largest remainder, ties to the first."""
    counts = {key: int(share * total) for key, share in shares.items()}
    rest = sorted(shares, key=lambda key: (counts[key] - shares[key] * total, list(shares).index(key)))
    for key in rest[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def round_stats(made: Round) -> dict[str, Any]:
    """The statistics of a round, to be merged over rounds."""
    figures = {"asked": made.asked, "accepted": len(made.tasks), "kept": len(made.account.rows)}
    return {"rounds": {str(made.number): figures}, **made.account.stats(), "usage": made.usage.to_json()}
