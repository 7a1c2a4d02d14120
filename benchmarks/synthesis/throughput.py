"""Generation from rows in to Parquet out beside bare vLLM and ray.data.llm: generated tokens a second, engine start excluded.

All sides get the same prompts of mixed lengths (short instructions, passages, and questions that share a long document),
the same lengths of replies, the same seed for each prompt and the same settings of the engine; with n = 2 we ask for two
samples with a seed of each, vLLM for `n=2`. Each side is a process of its own (`generating.py`) that loads its engine and
then waits; a side whose turn it is not is stopped (SIGSTOP), so that sides do not take each other's cores. Each round has
prompts of its own, so that no side finds the previous round in its prefix cache.

Bare vLLM has its engine's core in its own process, as ours has; `--sides danlu vllm vllm_core` also times its default, a
core in a second process, and `vs_vllm` is then against the faster of the two. Nothing but `LLM.generate` is timed there;
with us everything is: reading, rendering, tokenising, the reply cache with its syncs, the stage's Parquet files and its
manifest.

`--model PATH --device gpu` measures another model, such as a larger one with random weights, on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, arguments, publish
from benchmarks.synthesis.side import Side, SideFailed
from operators.synthesis.engine import EngineSettings
from operators.synthesis.packaged import resolve_model

_DATA = ROOT / "examples" / "data"
_SIDES = ("danlu", "vllm", "vllm_core", "ray_data_llm")
CACHE = ROOT / "runs" / ".cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct", help="as in a recipe: packaged:NAME or a folder")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--prompts", type=int, help="prompts of a task, a multiple of 32 (default 96, quick 32)")
    parser.add_argument("--running", type=int, default=64, help="requests in one batch of the engine")
    parser.add_argument("--sides", nargs="+", default=["danlu", "vllm", "ray_data_llm"], choices=_SIDES)
    options = arguments(__doc__ or "", parser)
    count = options.prompts or (32 if options.quick else 96)
    model = resolve_model(options.model, str(CACHE))
    settings = EngineSettings(
        model=model, device=options.device, max_running=options.running, enforce_eager=options.device == "cpu"
    )
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        tasks = {(n, r): _write(folder / f"n{n}-{r}.parquet", count, 100 * n + r) for n in (1, 2) for r in range(options.rounds)}
        sides: dict[str, Side] = {}
        failed: dict[str, str] = {}
        for name in options.sides:
            given = settings.model_dump()
            if name == "ray_data_llm":  # one sample a prompt is all that it keeps
                given["tasks"] = [str(tasks[1, r]) for r in range(options.rounds)]
            try:
                sides[name] = stack.enter_context(Side(name, given, folder / f"{name}.log"))
            except SideFailed as error:
                if name != "ray_data_llm":
                    raise
                failed[name] = str(error)[-1500:]
            print(f"{name}: {failed.get(name, 'ready')}", file=sys.stderr)
        found = _rounds(sides, tasks, options.rounds, folder, failed)
    figures: dict[str, Any] = {
        key: {side: _summary(answers) for side, answers in by_side.items()} for key, by_side in found.items()
    }
    if failed:
        figures["failed"] = failed
    data = (
        f"{count} prompts a round of 20 to 900 tokens from examples/data (a third share one of {_DOCUMENTS} documents), "
        f"replies of up to 16, 48 and 96 tokens, {settings.max_running} at a time, {options.model} on {options.device}"
    )
    publish("synthesis.throughput", _ratios(figures), figures, data=data, quick=options.quick)


def _rounds(
    sides: dict[str, Side], tasks: dict[tuple[int, int], Path], rounds: int, folder: Path, failed: dict[str, str]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Answers by `n1` and `n2`, side and round; a peer that breaks off is left out from there on."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"n1": {}, "n2": {}}
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        for samples in (1, 2):
            for name in names:
                if name in failed or (samples == 2 and name == "ray_data_llm"):
                    continue
                out = folder / f"{name}-{samples}-{number}"
                task = {"prompts": str(tasks[samples, number]), "samples": samples, "out": str(out)}
                try:
                    answer = sides[name].ask(task)
                except SideFailed as error:
                    if name != "ray_data_llm":
                        raise
                    failed[name] = str(error)[-1500:]
                    continue
                found[f"n{samples}"].setdefault(name, []).append(answer)
                rate = answer["completion_tokens"] / answer["seconds"]
                print(f"round {number + 1}/{rounds} n={samples} {name}: {rate:.1f} tokens/s, {answer}", file=sys.stderr)
    for by_side in found.values():
        _check_equal_work(by_side)
    return found


def _check_equal_work(by_side: dict[str, list[dict[str, Any]]]) -> None:
    """All sides answered every prompt, read the same prompts, and wrote about as much. Raises RuntimeError."""
    for answers in zip(*by_side.values(), strict=False):
        for key, tolerance in (("replies", 0.0), ("prompt_tokens", 0.0), ("completion_tokens", 0.1)):
            values = [answer[key] for answer in answers]
            if max(values) - min(values) > tolerance * max(values):
                raise RuntimeError(f"the sides did not do the same work: {key} {dict(zip(by_side, values, strict=True))}")


def _summary(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rates = [answer["completion_tokens"] / answer["seconds"] for answer in answers]
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_of_rounds": [float(f"{rate:.4g}") for rate in rates],
        "cpu_s_per_1000_tokens": statistics.median(1000 * a["cpu_s"] / a["completion_tokens"] for a in answers),
        **{key: answers[0][key] for key in ("replies", "prompt_tokens", "completion_tokens", "cached_tokens")},
    }


def _ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds of our rate over theirs in the same round."""

    def against(key: str, *peers: str) -> float | None:
        own = figures[key].get("danlu")
        rivals = [figures[key][peer]["tokens_per_s_of_rounds"] for peer in peers if peer in figures[key]]
        if own is None or not rivals:
            return None
        best = [max(rates) for rates in zip(*rivals, strict=True)]
        return statistics.median(a / b for a, b in zip(own["tokens_per_s_of_rounds"], best, strict=True))

    found = {
        "vs_vllm": against("n1", "vllm", "vllm_core"),
        "vs_vllm_n2": against("n2", "vllm", "vllm_core"),
        "vs_ray_data_llm": against("n1", "ray_data_llm"),
    }
    return {name: value for name, value in found.items() if value is not None}


_DOCUMENTS = 4


def texts() -> tuple[list[str], list[str]]:
    """(instructions, passages of at least 3,600 characters), in the order of the files."""
    tasks = [json.loads(line)["instruction"] for line in (_DATA / "seed_tasks_en.jsonl").read_text("utf-8").splitlines()]
    table = pq.read_table(_DATA / "documents.parquet", columns=["text", "language"])
    rows = zip(table["text"].to_pylist(), table["language"].to_pylist(), strict=True)
    return tasks, [text for text, language in rows if language == "en" and len(text) >= 3600]


def _write(path: Path, count: int, seed: int) -> Path:
    """The prompts of one task: a third instructions, a third passages of 400 to 2,000 characters, a third questions."""
    draw = random.Random(seed)
    instructions, documents = texts()
    shared = [text[:3000] for text in draw.sample(documents, _DOCUMENTS)]
    rows: list[dict[str, Any]] = []
    for number in range(count):
        if number % 3 == 0:
            prompt = f"{draw.choice(instructions)} ({number})"
        elif number % 3 == 1:
            text = draw.choice(documents)
            begin = draw.randrange(len(text) - 2000)
            prompt = f"Summarise this passage in one sentence.\n\n{text[begin : begin + draw.randrange(400, 2000)]}"
        else:
            prompt = f"{draw.choice(shared)}\n\nQuestion {number}: what does the text say about {draw.choice(instructions)[:60]}?"
        rows.append({"id": f"p{number}", "prompt": prompt, "max_tokens": draw.choice((16, 48, 96)), "seed": draw.randrange(2**30)})
    draw.shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


if __name__ == "__main__":
    main()
