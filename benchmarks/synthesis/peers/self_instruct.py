"""One side of `benchmarks.synthesis.self_instruct`, in an interpreter of its own: `python self_instruct.py SIDE MATERIAL`.

MATERIAL is a JSON file: `seeds` (instructions), `lists` (recorded replies, each a list of tasks), `candidates` (tasks in
order, for the novelty loops). Prints one JSON line: CPU seconds of the measured part, rows, what was decided.

Sides: `danlu` and `distilabel` turn recorded replies into instruction rows with an answer each; `danlu_novelty` and
`rouge_score_loop` decide which candidates are new. The loop is the one that Wang et al. (2023, section 2.2) describe: each
candidate is scored by ROUGE-L against every seed and everything accepted before it, and joins them if all scores are below
0.7. It is written from that description, with the package that the authors' code uses, in one process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

LIMIT = 0.7
ANSWER = "It depends on what is meant, but in short this is how it is usually done and why."


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def rouge_score_loop(material: dict[str, Any]) -> dict[str, Any]:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    pool = list(material["seeds"])
    accepted = []
    started = cpu_s()
    for number, candidate in enumerate(material["candidates"]):
        if max(scorer.score(candidate, text)["rougeL"].fmeasure for text in pool) < LIMIT:
            pool.append(candidate)
            accepted.append(number)
    return {"cpu_s": cpu_s() - started, "rows": len(material["candidates"]), "accepted": accepted}


def danlu_novelty(material: dict[str, Any]) -> dict[str, Any]:
    from operators.synthesis.novelty import NoveltyPool

    NoveltyPool().nearest("compiled before the clock starts")
    warm = NoveltyPool()
    warm.add("compiled before the clock starts")
    warm.nearest("compiled before it starts")
    accepted = []
    started = cpu_s()
    pool = NoveltyPool()
    for text in material["seeds"]:
        pool.add(text)
    for number, candidate in enumerate(material["candidates"]):
        if pool.nearest(candidate)[0] < LIMIT:
            pool.add(candidate)
            accepted.append(number)
    return {"cpu_s": cpu_s() - started, "rows": len(material["candidates"]), "accepted": accepted}


def distilabel(material: dict[str, Any]) -> dict[str, Any]:
    """distilabel's steps on the same recorded texts: tasks from lists, then an answer to each. No rules, no novelty test."""
    import distilabel as package
    from distilabel.models import LLM
    from distilabel.steps.tasks import SelfInstruct, TextGeneration

    class Replay(LLM):
        replies: tuple[str, ...] = ()
        position: int = 0

        def load(self) -> None:
            super().load()

        @property
        def model_name(self) -> str:
            return "replay"

        def generate(self, inputs: Any, num_generations: int = 1, **more: Any) -> Any:
            made = []
            for _ in inputs:
                reply = self.replies[self.position] if self.replies else ANSWER
                self.position += 1
                made.append({"generations": [reply], "statistics": {"input_tokens": [10], "output_tokens": [10]}})
            return made

    replies = ["\n".join(tasks) for tasks in material["lists"]]
    write, answer = SelfInstruct(llm=Replay(replies=tuple(replies)), num_instructions=8), TextGeneration(llm=Replay())
    write.load()
    answer.load()
    context = "\n".join(material["seeds"][:4])
    started, clock = cpu_s(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    for first in range(0, len(replies), 50):  # 50 rows: distilabel's own default batch
        batch = [{"input": context} for _ in replies[first : first + 50]]
        lists = next(write.process(batch))
        tasks = [{"instruction": task} for made in lists for task in made["instructions"]]
        texts += [task["instruction"] for task in tasks]
        for begin in range(0, len(tasks), 50):
            rows += next(answer.process(tasks[begin : begin + 50]))
    spent = cpu_s() - started
    return {
        "cpu_s": spent,
        "wall_s": time.perf_counter() - clock,
        "rows": len(rows),
        "texts": texts,
        "version": package.__version__,
    }


def danlu(material: dict[str, Any]) -> dict[str, Any]:
    """The method on the same recorded texts: rules, novelty, classification, answers, provenance, replies in the cache."""
    from operators.synthesis.cache import ReplyCache
    from operators.synthesis.generator import Generator
    from operators.synthesis.seeds import SeedTask
    from operators.synthesis.self_instruct import SelfInstruct, SelfInstructSettings

    danlu_novelty({"seeds": ["a warm start"], "candidates": ["compiles what it needs"]})
    seeds = [SeedTask(f"s{n}", "", text, (("", "fine"),), False, "en") for n, text in enumerate(material["seeds"])]
    settings = SelfInstructSettings(
        target=10**9, calls_per_round=50, max_rounds=-(-len(material["lists"]) // 50), min_yield=0, languages={"en": 1.0},
        example_length={}, inputs="referred", classification="model",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        engine = _Engine(material["lists"])
        started, clock = cpu_s(), time.perf_counter()
        generator = Generator(lambda: engine, "replay", ReplyCache(scratch, "tasks"))
        texts: list[str] = []
        kept = 0
        for made in SelfInstruct(settings, seeds, generator, "replay", 17).rounds():
            texts += [row["messages"][0]["content"] for row in made.account.rows]
            texts += [reject["text"] for reject in made.account.rejects if reject["text"]]  # lists beyond the last are empty
            kept += len(made.account.rows)
        spent = cpu_s() - started
    return {"cpu_s": spent, "wall_s": time.perf_counter() - clock, "rows": len(texts), "kept": kept, "texts": texts}


class _Engine:
    """Plays recorded lists back in the order of the requests for lists, and one answer to everything else."""

    revision = "replay"
    in_flight = 256

    def __init__(self, lists: list[list[str]]) -> None:
        self._lists = iter(lists)

    def open(self) -> _Engine:
        self._waiting: list[tuple[int, Any]] = []
        return self

    def submit(self, requests: Any) -> None:
        from operators.synthesis.requests import Reply

        for number, request in requests:
            if request.messages[-1][1].startswith("1. "):
                tasks = next(self._lists, [])
                text = "\n".join(f"{place + 5}. {task}" for place, task in enumerate(tasks))
            else:
                text = "No" if request.sampling.max_tokens == 3 else ANSWER
            self._waiting.append((number, Reply(text, "stop", 10, 10)))

    def collect(self, timeout_s: float) -> Any:
        found, self._waiting = self._waiting, []
        return found

    def close(self) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


if __name__ == "__main__":
    sides = {"danlu": danlu, "distilabel": distilabel, "danlu_novelty": danlu_novelty, "rouge_score_loop": rouge_score_loop}
    with open(sys.argv[2], encoding="utf-8") as stream:
        result = sides[sys.argv[1]](json.load(stream))
    print(json.dumps(result))
