"""Self-Instruct (Wang et al. 2023, arXiv 2212.10560): new tasks bootstrapped from a handful of human-written ones.

A round asks for tasks with examples drawn from the seeds and from what was accepted before, sets aside what the rules
or the novelty test reject, decides which of the rest are classification tasks, and generates instances: the output
first for classification, the input first otherwise. Replies are judged in the order of their requests, so rows do not
depend on the order of completion.

Where this differs from the paper's code, by setting: the number of examples (small models need few and short ones), who
writes the outputs of other tasks (`outputs: chat` lets the model answer the finished task as a chat, which small chat
models do far better than filling in a form), and one call for everything as in Alpaca (`method: alpaca`).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any, Literal

from pydantic import Field

from operators import tables
from operators.config import Settings
from operators.synthesis import heuristics, prompts
from operators.synthesis.generator import Generator
from operators.synthesis.heuristics import InstructionRules
from operators.synthesis.novelty import NoveltyPool
from operators.synthesis.requests import Messages, Reject, Reply, Request, SamplingSettings, request_seed
from operators.synthesis.rows import Account, Provenance, instruction_row
from operators.synthesis.seeds import SeedTask


class SelfInstructSettings(Settings):
    """How tasks are bootstrapped."""

    target: int = Field(default=64, ge=1, description="rows to make")
    max_rounds: int = Field(default=8, ge=1, description="rounds at most")
    calls_per_round: int = Field(default=16, ge=1, description="requests for new tasks in a round, at most")
    tasks_per_call: int = Field(default=8, ge=2, description="length of the list a request shows, examples included")
    method: Literal["self_instruct", "alpaca"] = Field(
        default="self_instruct", description="alpaca: instruction, input and output in one call"
    )
    outputs: Literal["chat", "form"] = Field(
        default="chat", description="who writes outputs of non-classification tasks; form: as in the paper"
    )
    seed_examples: int = Field(default=3, ge=1, description="seed tasks in a request; the paper's 6 suit large models")
    machine_examples: int = Field(default=1, ge=0, description="accepted tasks in a request; the paper has 2")
    example_length: dict[str, int] = Field(
        default={"en": 16, "zh": 32}, description="longest example, words (en) or characters (zh)"
    )
    inputs: Literal["referred", "always"] = Field(
        default="referred",
        description="with outputs: chat, which tasks get an input: those that refer to one, or (as in the paper) all are asked",
    )
    instances_per_task: int = Field(default=1, ge=1, le=5, description="with outputs: form, examples asked for; the paper has 5")
    languages: dict[str, float] = Field(default={"en": 0.8, "zh": 0.2}, description="share of the requests by language")
    max_similarity: float = Field(
        default=0.7, gt=0, le=1, description="a task is new when its ROUGE-L F to every other is below this"
    )
    rules: InstructionRules = Field(default=InstructionRules(), description="rules for instructions")
    instruction_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.7, top_p=0.9, presence_penalty=0.5, max_tokens=128, stop=["\n\n"]),
        description="drawing tasks; the paper: temperature .7, top_p .5, presence penalty 2",
    )
    instance_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.3, top_p=0.9, max_tokens=64), description="drawing inputs, labels and forms"
    )
    answer_sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.3, top_p=0.9, repetition_penalty=1.1, max_tokens=128),
        description="answering in chat",
    )
    prompts: str | None = Field(default=None, description="folder with <language>/<name>.txt that replace the project's prompts")

    def shares(self, available: set[str]) -> dict[str, float]:
        """The languages that have seeds, with shares that sum to 1. Raises ValueError when none is left."""
        wanted = {lang: share for lang, share in self.languages.items() if share > 0 and lang in available}
        if not wanted:
            raise ValueError(f"no seed task in the languages {sorted(self.languages)}; the seeds have {sorted(available)}")
        return {lang: share / sum(wanted.values()) for lang, share in wanted.items()}


@dataclass
class _Task:
    """A task on its way: seed (human) or candidate."""

    id: str
    instruction: str
    lang: str
    parents: list[str] = field(default_factory=list)
    form: tuple[str, str] | None = None  # (input, output), known at once with method alpaca


@dataclass
class Round:
    """What one round made."""

    number: int
    account: Account
    asked: int
    accepted: int
    starved: bool = False  # new tasks were wanted and the token cap allowed no request
    classification: Counter[str] = field(default_factory=Counter)


_ITEM = re.compile(r"^[ \t]*(?:\d{1,3}[.)、．:：]|Task \d+[.:]|任务 ?\d+[.:：])[ \t]*", re.MULTILINE)
_YES, _NO = re.compile(r"\s*(?:yes|是的?(?!否)|对)", re.IGNORECASE), re.compile(r"\s*(?:no|否|不是|不)", re.IGNORECASE)
_LABEL = re.compile(r"^\s*(?P<label>.*?)\s*\n\s*(?:Input|输入)\s*[:：]\s*(?P<input>.*)\Z", re.DOTALL | re.IGNORECASE)
_EXAMPLE = re.compile(r"^\s*(?:Example|例子) ?\d+\s*[:：]?\s*$", re.MULTILINE | re.IGNORECASE)
_FIELDS = re.compile(
    r"^\s*(?:(?:Input|输入)\s*[:：])?(?P<input>.*?)\n\s*(?:Output|输出)\s*[:：]\s*(?P<output>.*)\Z", re.DOTALL | re.IGNORECASE
)
_ALPACA = re.compile(
    r"^\s*(?:\d+[.、])?\s*(?:Instruction|指令)\s*[:：]\s*(?P<instruction>.*?)\n\s*(?:Input|输入)\s*[:：]\s*(?P<input>.*?)"
    r"\n\s*(?:Output|输出)\s*[:：]\s*(?P<output>.*)\Z",
    re.DOTALL | re.IGNORECASE,
)  # fmt: skip


def parse_instructions(reply: Reply) -> list[str | Reject]:
    """The tasks of a numbered list that the model went on with; the last is a Reject when the reply was cut inside it."""
    tasks: list[str | Reject] = [" ".join(piece.split()) for piece in _ITEM.split(reply.text)]
    tasks = [task for task in tasks if task]
    if not tasks:
        return [Reject("no_task")]
    if reply.truncated:
        tasks[-1] = Reject("truncated", detail=str(tasks[-1]))
    return tasks


def parse_alpaca(reply: Reply, first: str) -> list[tuple[str, str, str] | Reject]:
    """(instruction, input, output) of each `###`-separated block; `first` is the beginning that the prompt supplied."""
    found: list[tuple[str, str, str] | Reject] = []
    blocks = [block for block in (first + reply.text).split("###") if block.strip()]
    for number, block in enumerate(blocks):
        match = _ALPACA.match(block)
        if reply.truncated and number == len(blocks) - 1:
            found.append(Reject("truncated", detail=block.strip()))
        elif match is None:
            found.append(Reject("malformed", detail=block.strip()))
        else:
            given = match["input"].strip()
            found.append((match["instruction"].strip(), "" if heuristics.no_input(given) else given, match["output"].strip()))
    return found or [Reject("no_task")]


def parse_classification(reply: Reply) -> bool | None:
    """True or False, None when the reply says neither (taken as not a classification task, as in the paper's code)."""
    if _YES.match(reply.text):
        return True
    return False if _NO.match(reply.text) else None


def parse_input(reply: Reply) -> str | Reject:
    """The input that the model wrote for a task, "" when the task needs none."""
    if reply.truncated:
        return Reject("truncated")
    text = re.split(r"\n\s*(?:Output|Task|输出|任务)\s*[:：]", reply.text)[0].strip()
    return "" if heuristics.no_input(text) else text


def parse_labelled(reply: Reply) -> tuple[str, str] | Reject:
    """(input, label) of an output-first example."""
    if reply.truncated:
        return Reject("truncated")
    match = _LABEL.match(reply.text)
    if match is None:
        return Reject("malformed")
    return match["input"].strip(), match["label"].strip()


def parse_forms(reply: Reply, most: int) -> list[tuple[str, str]] | Reject:
    """Up to `most` (input, output) pairs; a truncated reply is rejected whole, as in the paper's code."""
    if reply.truncated:
        return Reject("truncated")
    found = []
    for block in _EXAMPLE.split(reply.text)[:most]:
        match = _FIELDS.match(block)
        if match is not None:
            given = match["input"].strip()
            found.append(("" if heuristics.no_input(given) else given, match["output"].strip()))
    return found or Reject("malformed")


class SelfInstruct:
    """The method as a stream of rounds; a pure function of settings, seeds and replies."""

    def __init__(
        self, settings: SelfInstructSettings, seeds: Sequence[SeedTask], generator: Generator, model: str, seed: int
    ) -> None:
        self.settings, self.generator, self.model, self.seed = settings, generator, model, seed
        self.shares = settings.shares({task.lang for task in seeds})
        self.pool = NoveltyPool()
        self._pooled: list[str] = []
        self._human: dict[str, list[_Task]] = {lang: [] for lang in self.shares}
        self._machine: dict[str, list[_Task]] = {lang: [] for lang in self.shares}
        self._forms = {task.id: task.instances[0] for task in seeds if task.instances}
        for task in seeds:
            self._remember(task.id, task.instruction)
            short = heuristics.length_of(self._example_text(_Task(task.id, task.instruction, task.lang)), task.lang)
            if task.lang in self._human and short <= settings.example_length.get(task.lang, short):
                self._human[task.lang].append(_Task(task.id, task.instruction, task.lang))
        for lang in self.shares:  # a task that repeats the prompt's own sentence is not new either
            for role, text in self._prompt("alpaca" if settings.method == "alpaca" else "instructions", lang).sections:
                for sentence in re.split(r"(?<=[.。])\s*", Template(text).safe_substitute(count=str(settings.tasks_per_call))):
                    if role == "user" and sentence:
                        self._remember(f"prompt:{lang}", sentence)
        for lang, tasks in self._human.items():
            if not tasks:
                raise ValueError(f"no seed task in {lang!r} is short enough for an example; raise example_length[{lang!r}]")
        self._backlog: deque[_Task] = deque()
        self.kept = 0
        self.stopped = ""

    def rounds(self) -> Iterator[Round]:
        """Rounds until the target, the token cap, `max_rounds` or two rounds without a row. `stopped` says which."""
        barren = 0
        for number in range(self.settings.max_rounds):
            made = self._round(number)
            self.kept += len(made.account.rows)
            barren = 0 if made.account.rows else barren + 1
            last = number + 1 == self.settings.max_rounds
            if self.kept >= self.settings.target:
                self.stopped = "target"
            elif self.generator.exhausted or (made.starved and not made.account.rows):
                self.stopped = "token_cap"
            elif barren == 2:
                self.stopped = "no_yield"
            elif last:
                self.stopped = "max_rounds"
            if self.stopped:
                for task in self._backlog:
                    made.account.reject(task.id, task.instruction, Reject("left_over", detail=self.stopped))
                self._backlog.clear()
            yield made
            if self.stopped:
                return

    def _round(self, number: int) -> Round:
        made = Round(number, Account("self_instruct"), 0, 0)
        need = math.ceil(1.25 * (self.settings.target - self.kept))
        if len(self._backlog) < need:
            self._bootstrap(made)
            made.starved = made.asked == 0
        batch = [self._backlog.popleft() for _ in range(min(need, len(self._backlog)))]
        if self.settings.method == "alpaca":
            for task in batch:
                assert task.form is not None
                self._finish(made, task, [task.form], ["alpaca"])
        else:
            self._instantiate(made, batch)
        return made

    # --- new tasks

    def _bootstrap(self, made: Round) -> None:
        calls: list[tuple[str, list[_Task], Request]] = []
        counts = _apportion(self.shares, self.settings.calls_per_round)
        # languages spread evenly over the round, so that a target reached early does not leave the last one out
        order = sorted(((call + 0.5) / count, lang, call) for lang, count in counts.items() for call in range(count))
        for _, lang, call in order:
            examples = self._examples(lang, made.number, call)
            seed = request_seed(self.seed, "tasks", made.number, lang, call)
            calls.append((lang, examples, Request(self._task_prompt(lang, examples), self.settings.instruction_sampling, seed)))
        for call, reply in enumerate(self.generator.ask([request for _, _, request in calls])):
            if reply is None:
                break
            made.asked += 1
            lang, examples, _ = calls[call]
            parents = [task.id for task in examples]
            for place, parsed in enumerate(self._parse_tasks(reply, lang)):
                identity = tables.stable_id("self_instruct", self.seed, made.number, call, place)
                if isinstance(parsed, Reject):
                    made.account.reject(identity, parsed.detail or reply.text, Reject(parsed.reason, parsed.value), step="tasks")
                else:
                    self._consider(made, _Task(identity, parsed[0], lang, parents, parsed[1]))

    def _parse_tasks(self, reply: Reply, lang: str) -> list[tuple[str, tuple[str, str] | None] | Reject]:
        if reply.finish_reason == "prompt_too_long":
            return [Reject("prompt_too_long", reply.prompt_tokens)]
        if self.settings.method == "alpaca":
            blocks = parse_alpaca(reply, "Instruction:" if lang == "en" else "指令：")
            return [block if isinstance(block, Reject) else (block[0], (block[1], block[2])) for block in blocks]
        return [task if isinstance(task, Reject) else (task, None) for task in parse_instructions(reply)]

    def _consider(self, made: Round, task: _Task) -> None:
        """Queue a task if the rules and the novelty test let it through."""
        why = heuristics.check_instruction(task.instruction, task.lang, self.settings.rules)
        if why is None:
            similarity, nearest = self.pool.nearest(task.instruction)
            made.account.score(similarity)
            if similarity >= self.settings.max_similarity:
                why = Reject("not_novel", similarity, self._pooled[nearest])
        if why is not None:
            made.account.reject(task.id, task.instruction, why, step="tasks")
            return
        made.accepted += 1
        self._remember(task.id, task.instruction)
        self._backlog.append(task)
        length = heuristics.length_of(self._example_text(task), task.lang)
        if length <= self.settings.example_length.get(task.lang, length):
            self._machine[task.lang].append(task)

    def _remember(self, identity: str, instruction: str) -> None:
        self.pool.add(instruction)
        self._pooled.append(identity)

    def _examples(self, lang: str, number: int, call: int) -> list[_Task]:
        """In-context examples: machine-made ones as far as there are any, seeds for the rest, shuffled."""
        draw = random.Random(f"{self.seed}:{number}:{lang}:{call}")
        machine = draw.sample(self._machine[lang], min(self.settings.machine_examples, len(self._machine[lang])))
        wanted = self.settings.seed_examples + self.settings.machine_examples - len(machine)
        chosen = machine + draw.sample(self._human[lang], min(wanted, len(self._human[lang])))
        draw.shuffle(chosen)
        return chosen

    def _task_prompt(self, lang: str, examples: Sequence[_Task]) -> Messages:
        if self.settings.method == "alpaca":
            shown = "\n###\n".join(map(self._example_text, examples)) + "\n###\n" + ("Instruction:" if lang == "en" else "指令：")
            return self._prompt("alpaca", lang).render(count=str(self.settings.tasks_per_call), examples=shown)
        shown = "".join(f"{index + 1}. {self._example_text(task)}\n" for index, task in enumerate(examples))
        count = str(self.settings.tasks_per_call)
        return self._prompt("instructions", lang).render(count=count, examples=f"{shown}{len(examples) + 1}.")

    def _example_text(self, task: _Task) -> str:
        instruction = " ".join(task.instruction.split())
        if self.settings.method != "alpaca":
            return instruction
        given, output = task.form or self._forms.get(task.id, ("", ""))
        if task.lang == "zh":
            return f"指令：{instruction}\n输入：{given or '无'}\n输出：{output}"
        return f"Instruction: {instruction}\nInput: {given or 'None'}\nOutput: {output}"

    # --- instances

    def _instantiate(self, made: Round, batch: list[_Task]) -> None:
        settings = self.settings
        greedy = SamplingSettings(temperature=0, max_tokens=3)
        kinds: list[tuple[_Task, bool]] = []
        for task, reply in self._ask(made, batch, "classification", greedy, lambda task: {"instruction": task.instruction}):
            answer = parse_classification(reply)
            made.classification["unclear" if answer is None else "yes" if answer else "no"] += 1
            kinds.append((task, bool(answer)))

        labelled = [task for task, is_classification in kinds if is_classification]
        for task, reply in self._ask(
            made, labelled, "output_first", settings.instance_sampling, lambda task: {"instruction": task.instruction}
        ):
            pair = parse_labelled(reply)
            self._finish(
                made, task, pair if isinstance(pair, Reject) else [pair], ["instructions", "classification", "output_first"], reply
            )

        others = [task for task, is_classification in kinds if not is_classification]
        if settings.outputs == "form":
            for task, reply in self._ask(made, others, "instances", settings.instance_sampling, self._form_values):
                steps = ["instructions", "classification", "instances"]
                self._finish(made, task, parse_forms(reply, settings.instances_per_task), steps, reply)
            return
        given: dict[str, str] = {}
        wanting = [task for task in others if settings.inputs == "always" or heuristics.refers_to_input(task.instruction)]
        asked = {task.id for task in wanting}
        for task in others:
            if task.id not in asked:
                given[task.id] = ""
        for task, reply in self._ask(
            made, wanting, "input_first", settings.instance_sampling, lambda task: {"instruction": task.instruction}
        ):
            parsed = parse_input(reply)
            if isinstance(parsed, Reject):
                made.account.reject(task.id, f"{task.instruction}\n\n{reply.text}", parsed, step="input_first")
            else:
                given[task.id] = parsed
        ready = [task for task in others if task.id in given]
        for task, reply in self._ask(
            made, ready, "answer", settings.answer_sampling,
            lambda task: {"prompt": heuristics.join_input(task.instruction, given[task.id])},
        ):  # fmt: skip
            steps = ["instructions", "classification", *(["input_first"] if task.id in asked else []), "answer"]
            answer_or_reject: list[tuple[str, str]] | Reject = (
                Reject("truncated") if reply.truncated else [(given[task.id], reply.text.strip())]
            )
            self._finish(made, task, answer_or_reject, steps, reply)

    def _form_values(self, task: _Task) -> dict[str, str]:
        return {"instruction": task.instruction, "count": str(self.settings.instances_per_task)}

    def _ask(
        self, made: Round, tasks: list[_Task], step: str, sampling: SamplingSettings, values: Callable[[_Task], dict[str, str]]
    ) -> Iterator[tuple[_Task, Reply]]:
        """One request a task; tasks that the token cap or the model's length leaves out are rejected here."""
        requests = [
            Request(
                self._prompt(step, task.lang).render(**values(task)),
                sampling,
                request_seed(self.seed, step, task.id) if sampling.temperature else 0,
            )
            for task in tasks
        ]
        for task, reply in zip(tasks, self.generator.ask(requests), strict=True):
            if reply is None:
                made.account.reject(task.id, task.instruction, Reject("token_cap"), step=step)
            elif reply.finish_reason == "prompt_too_long":
                made.account.reject(task.id, task.instruction, Reject("prompt_too_long", reply.prompt_tokens), step=step)
            else:
                yield task, reply

    def _finish(
        self, made: Round, task: _Task, instances: list[tuple[str, str]] | Reject, steps: list[str], reply: Reply | None = None
    ) -> None:
        """Turn the instances of a task into rows; the task's own candidate is the first of them."""
        account, step = made.account, steps[-1]
        if isinstance(instances, Reject):
            account.reject(task.id, f"{task.instruction}\n\n{reply.text if reply else ''}", instances, step=step)
            return
        clash = Reject("contradiction") if heuristics.contradicts(instances) else None
        seen: set[tuple[str, str]] = set()
        for index, (given, output) in enumerate(instances):
            identity = task.id if index == 0 else tables.stable_id(task.id, index)
            why = clash or heuristics.check_instance(task.instruction, given, output, task.lang, self.settings.rules.min_script)
            if why is None and (given, output) in seen:
                why = Reject("duplicate_instance")
            if why is None and self.kept + len(account.rows) >= self.settings.target:
                why = Reject("left_over", detail="target")
            seen.add((given, output))
            if why is not None:
                account.reject(identity, f"{heuristics.join_input(task.instruction, given)}\n\n{output}", why, step=step)
                continue
            provenance = self._provenance(task, steps, made.number).to_row()
            row = instruction_row(identity, task.instruction, given, output, task.lang, provenance)
            account.keep(
                row, "self_instruct", {"instruction": task.instruction, "input": given, "output": output, "lang": task.lang}
            )

    def _provenance(self, task: _Task, steps: list[str], number: int) -> Provenance:
        sampling: dict[str, SamplingSettings] = {}
        for step in steps:
            if step in ("instructions", "alpaca"):
                sampling[step] = self.settings.instruction_sampling
            elif step == "answer":
                sampling[step] = self.settings.answer_sampling
            elif step != "classification":
                sampling[step] = self.settings.instance_sampling
        used = [self._prompt(step, task.lang) for step in steps]
        return Provenance(self.model, self.generator.revision, used, sampling, self.seed, task.parents, "self_instruct", number)

    def _prompt(self, name: str, lang: str) -> prompts.Prompt:
        return prompts.load(name, lang, self.settings.prompts)


def _apportion(shares: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to shares that sum to 1, by largest remainder, ties to the first."""
    counts = {key: int(share * total) for key, share in shares.items()}
    rest = sorted(shares, key=lambda key: (counts[key] - shares[key] * total, list(shares).index(key)))
    for key in rest[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


def round_stats(made: Round) -> dict[str, Any]:
    """The statistics of a round, to be merged over rounds."""
    return {
        "rounds": {str(made.number): {"asked": made.asked, "accepted": made.accepted, "kept": len(made.account.rows)}},
        "classification": dict(sorted(made.classification.items())),
        **made.account.stats(),
    }
