"""Novelty by ROUGE-L: cost of a pair, of 50,000 candidates against a pool of 50,000, and growth to a pool of a million.

Three questions, each side in its own process on one core, from strings to results, the results compared:

* a pair: F of pairs of instructions, by rouge_score, two packages in Rust, and by us. Ours are all pairs of the texts; the
  peers do a sample of them, and every one of their scores must equal ours to the last bit;
* a pool: the nearest of the pool for each candidate, if F >= 0.7. RapidFuzz computes every pair by `process.cdist` (one
  character for each distinct token, Indel similarity = ROUGE-L F) and takes the highest; its encoding and our index are
  both in the time. Decisions, scores and nearest texts must be the same;
* growth: time for 10,000 candidates at pools of 10,000, 100,000 and 1,000,000 texts.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpus import material
from benchmarks.measure import ROOT, Usage, arguments, interleave, peer_python, process, publish
from operators.synthesis.novelty import tokens

_SCRIPT = ROOT / "benchmarks" / "synthesis" / "peers" / "similarity.py"
_OWN = ROOT / ".venv" / "bin" / "python"
_INSTRUCTIONS = ROOT.parent / "shared" / "data" / "instruct" / "alpaca_en.jsonl"
_SEEDS = ROOT / "examples" / "data" / "seed_tasks.jsonl"
_THRESHOLD = 0.7
_SENTENCE = {"en": re.compile(r"(?<=[.!?])\s+|\n+"), "zh": re.compile(r"(?<=[。！？])|\n+")}
_GROWTH = ("texts", "build_s", "candidates_s", "bytes_a_text", "rejected")
_SAMPLES = {"rouge_score": 20_000, "rouge_score_lcs": 20_000, "rouge_score_rs": 200_000, "rouge_rust": 200_000}


def main() -> None:
    options = arguments(__doc__ or "")
    figures: dict[str, Any] = {}
    ratio: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        described = [_pairs(folder, options.quick, options.rounds, ratio, figures)]
        size = 5_000 if options.quick else 50_000
        described.append(_pool(folder, "en", size, options.rounds, ratio, figures))
        described.append(_pool(folder, "zh", min(size, 10_000), options.rounds, ratio, figures))
        sizes = [1_000, 10_000, 50_000] if options.quick else [10_000, 100_000, 1_000_000]
        described.append(_growth(folder, sizes, figures))
    publish("synthesis.novelty", ratio, figures, data="; ".join(described), quick=options.quick)


def _side(tool: str, task: Path, environment: str = "rouge") -> Callable[[], Usage]:
    """One timed run in an own process; its CPU seconds are those of the measured part alone."""
    python = _OWN if tool.startswith("danlu") else peer_python(environment)

    def run() -> Usage:
        out = task.with_name(f"{task.stem}-{tool}.npz")
        usage = process([python, _SCRIPT, tool, task, out], env={"PYTHONPATH": str(ROOT)})
        with np.load(out) as arrays:
            found = dict(arrays)
        return Usage(usage.output["cpu_s"], usage.output["wall_s"], usage.peak_bytes, found)

    return run


def _write(path: Path, task: dict[str, Any], small: dict[str, Any]) -> Path:
    """A task; `small` replaces its long lists for the warm-up."""
    path.write_text(json.dumps({**task, "small": {**task, **small}}), "utf-8")
    return path


# --- a pair


def _pairs(folder: Path, quick: bool, rounds: int, ratio: dict[str, float], figures: dict[str, Any]) -> str:
    source = _INSTRUCTIONS if _INSTRUCTIONS.exists() else _SEEDS
    texts = [json.loads(line)["instruction"] for line in source.read_text("utf-8").splitlines()]
    draw = np.random.default_rng(11)
    sides, drawn = {}, {}
    for tool, count in _SAMPLES.items():
        drawn[tool] = draw.integers(len(texts), size=(count // (10 if quick else 1), 2))
        task = {"texts": texts, "pairs": drawn[tool].tolist()}
        sides[tool] = _side(tool, _write(folder / f"{tool}.json", task, {"pairs": task["pairs"][:10]}))
    sides["danlu"] = _side("danlu", _write(folder / "danlu.json", {"texts": texts}, {}))
    found = interleave(sides, rounds)
    matrix = found["danlu"][0].output["matrix"]
    cost = {"danlu": statistics.median(usage.cpu_s for usage in found["danlu"]) / matrix.size}
    for tool, pairs in drawn.items():
        cost[tool] = statistics.median(usage.cpu_s for usage in found[tool]) / len(pairs)
        if not np.array_equal(found[tool][0].output["f"], matrix[pairs[:, 0], pairs[:, 1]]):
            raise RuntimeError(f"{tool} has other scores than ours")
        ratio[f"vs_{tool}"] = cost[tool] / cost["danlu"]
    figures["pair"] = {
        "ns": {tool: seconds * 1e9 for tool, seconds in cost.items()},
        "equal_scores": sum(map(len, drawn.values())),
        "pairs_of_ours": matrix.size,
    }
    return f"{source.name}: {len(texts)} instructions"


# --- a pool


@functools.cache
def _sentences(language: str) -> list[str]:
    """Distinct sentences and lines of real documents, of the length of instructions, in an order of their own."""
    (documents,), _ = material.real_texts((language,))
    found: dict[str, None] = {}
    for document in documents:
        for piece in _SENTENCE[language].split(document.as_py()):
            size = len(tokens.tokenize(piece))
            if 5 <= size <= 60:
                found[piece.strip()] = None
    ordered = list(found)
    random.Random(13).shuffle(ordered)
    return ordered


def _edited(texts: list[str], draw: random.Random) -> Iterator[str]:
    """Endless variants: a text in which some tokens are those of another text, a tenth to a half of them."""
    while True:
        words, other = _words(draw.choice(texts)), _words(draw.choice(texts))
        share = draw.uniform(0.1, 0.5)
        yield "".join(draw.choice(other) if draw.random() < share else word for word in words)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+\s*|\S\s*", text) or [text]


def _enough(texts: list[str], count: int, draw: random.Random) -> list[str]:
    more = _edited(texts, draw)
    return texts[:count] + [next(more) for _ in range(count - len(texts))]


def _pool(folder: Path, language: str, size: int, rounds: int, ratio: dict[str, float], figures: dict[str, Any]) -> str:
    draw = random.Random(17)
    texts = _enough(_sentences(language), 2 * size, draw)
    variants = _edited(texts[:size], draw)
    candidates = [next(variants) if draw.random() < 0.2 else text for text in texts[size:]]  # a fifth resemble the pool
    task = {"pool": texts[:size], "candidates": candidates, "tokens": tokens.PATTERN, "threshold": _THRESHOLD}
    small = {"pool": texts[:3000], "candidates": candidates[:50]}
    path = _write(folder / f"pool-{language}.json", task, small)
    lower = _write(folder / f"lower-{language}.json", {**task, "floor": 0.5}, small)
    part = _write(folder / f"part-{language}.json", {**task, "candidates": candidates[: size // 10]}, small)
    found = interleave({"danlu": _side("danlu_pool", path), "rapidfuzz": _side("rapidfuzz", path)}, rounds)
    once = interleave({"floor_0.5": _side("danlu_pool", lower), "rapidfuzz_cutoff": _side("rapidfuzz_cutoff", part)}, 1)
    cost = {name: statistics.median(usage.cpu_s for usage in usages) for name, usages in {**found, **once}.items()}
    cost["rapidfuzz_cutoff"] *= 10  # told the threshold it is no faster; a tenth of the candidates shows that
    ours, theirs = found["danlu"][0].output, found["rapidfuzz"][0].output
    rejected = ours["best"] >= _THRESHOLD
    near = theirs["best"] >= _THRESHOLD - 1e-6  # float32: a tie may come out on either side
    if not (np.array_equal(rejected, near) and np.abs(ours["best"] - theirs["best"])[rejected].max(initial=0) < 1e-6):
        raise RuntimeError("RapidFuzz decides otherwise")
    same = (ours["index"] == theirs["index"])[rejected]
    if same.mean() < 0.999:  # equal similarities of pairs of other lengths may differ in float32's last bit
        raise RuntimeError("RapidFuzz finds other texts")
    suffix = "" if language == "en" else f"_{language}"
    ratio[f"vs_rapidfuzz{suffix}"] = cost["rapidfuzz"] / cost["danlu"]
    figures[f"pool_{language}"] = {
        "candidates": len(candidates),
        "pool": size,
        "cpu_s": cost,
        "ns_a_pair": {name: seconds / size / len(candidates) * 1e9 for name, seconds in cost.items()},
        "rejected": int(rejected.sum()),
        "same_nearest": float(same.mean()),
    }
    return f"{2 * size} distinct sentences of {language} documents, a fifth of the candidates edited from the pool"


# --- growth


def _growth(folder: Path, sizes: list[int], figures: dict[str, Any]) -> str:
    count = sizes[0] if sizes[0] > 1000 else 1000
    draw = random.Random(19)
    texts = [text for pair in zip(_sentences("en"), _sentences("zh"), strict=False) for text in pair]
    texts = _enough(texts, sizes[-1] + count, draw)
    draw.shuffle(texts)
    for floor in (_THRESHOLD, 0.5):
        task = {"pool": texts[:-count], "candidates": texts[-count:], "sizes": sizes, "threshold": _THRESHOLD, "floor": floor}
        small = {"pool": texts[:3000], "candidates": texts[-50:], "sizes": [10, 3000]}
        found = _side("danlu_growth", _write(folder / "growth.json", task, small))().output
        rows = found["figures"]
        figures[f"growth_floor_{floor}"] = {
            "pools": [
                dict(zip(("texts", "build_s", "candidates_s", "bytes_a_text", "rejected"), row, strict=True))
                for row in rows.tolist()
            ],
            "us_a_candidate": (rows[:, 2] / count * 1e6).tolist(),
            "exponent": math.log(rows[-1, 2] / rows[0, 2]) / math.log(sizes[-1] / sizes[0]),
            "admit_s": float(found["admit_s"]),
        }
    return f"growth: {len(texts)} English and Chinese sentences, in equal parts, and edited ones once those are used up"


if __name__ == "__main__":
    main()
