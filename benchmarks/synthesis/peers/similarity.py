"""One side of the novelty benchmark, in an environment and process of its own: similarity.py TOOL TASK.json OUT.npz

`pairs` tools score the listed pairs of texts; `nearest` tools find for each candidate the highest similarity with a pool.
Prints {"cpu_s": ..., "wall_s": ..., "pairs": ...} of the measured part: from strings to scores, on one core, after a warm-up.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["RAYON_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np  # noqa: E402 (after the number of threads)

_ROWS = 250  # candidates whose scores with the whole pool RapidFuzz holds at a time
_SURROGATES = 0xD800

Task = dict[str, Any]
Arrays = dict[str, np.ndarray]


def rouge_score(task: Task) -> Arrays:
    """The package's public call, pair by pair."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, texts = RougeScorer(["rougeL"]), task["texts"]
    return {"f": np.array([scorer.score(texts[i], texts[j])["rougeL"].fmeasure for i, j in task["pairs"]])}


def rouge_score_lcs(task: Task) -> Arrays:
    """What the package does behind its tokenizer, every text tokenised once: the least it can cost."""
    from rouge_score import tokenize
    from rouge_score.rouge_scorer import _score_lcs

    tokens = [tokenize.tokenize(text, None) for text in task["texts"]]
    return {"f": np.array([_score_lcs(tokens[i], tokens[j]).fmeasure for i, j in task["pairs"]])}


def rouge_score_rs(task: Task) -> Arrays:
    from rouge_score_rs.rouge_scorer import RougeScorer

    scorer, texts = RougeScorer(["rougeL"]), task["texts"]
    pairs = task["pairs"]
    found = scorer.score_batch([texts[i] for i, _ in pairs], [texts[j] for _, j in pairs])
    return {"f": np.array([score["rougeL"].fmeasure for score in found])}


def rouge_rust(task: Task) -> Arrays:
    """Another package in Rust; it has no call for ROUGE-L alone."""
    import fast_rouge

    texts, pairs = task["texts"], task["pairs"]
    return {"f": np.array(fast_rouge.score_batch_flat([texts[i] for i, _ in pairs], [texts[j] for _, j in pairs]).rougeL_fmeasure)}


def danlu(task: Task) -> Arrays:
    """Every pair of the texts (not the listed ones alone)."""
    from operators.synthesis.novelty import rouge_l_matrix

    return {"matrix": rouge_l_matrix(task["texts"])}


def rapidfuzz(task: Task, cutoff: float | None = None) -> Arrays:
    """process.cdist over strings in which each distinct token is one character, and the highest of each row."""
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import cdist

    find, codes = re.compile(task["tokens"]).findall, {}

    def encode(text: str) -> str:
        numbers = [codes.setdefault(token, len(codes)) for token in find(text.lower())]
        return "".join(chr(n + 1 if n + 1 < _SURROGATES else n + 0x801) for n in numbers)

    pool, candidates = [encode(text) for text in task["pool"]], [encode(text) for text in task["candidates"]]
    best, index = np.zeros(len(candidates)), np.full(len(candidates), -1)
    scores = Indel.normalized_similarity
    for begin in range(0, len(candidates), _ROWS):
        rows = cdist(candidates[begin : begin + _ROWS], pool, scorer=scores, workers=1, dtype=np.float32, score_cutoff=cutoff)
        at = rows.argmax(axis=1)
        index[begin : begin + _ROWS], best[begin : begin + _ROWS] = at, rows[np.arange(len(at)), at]
    return {"best": best, "index": index}


def rapidfuzz_cutoff(task: Task) -> Arrays:
    """The same, told the threshold, so that it may give pairs up early."""
    return rapidfuzz(task, task["threshold"])


def danlu_pool(task: Task) -> Arrays:
    from operators.synthesis.novelty import NoveltyPool

    pool = NoveltyPool(task["threshold"], task.get("floor", task["threshold"]))
    pool.extend(task["pool"])
    found = pool.matches(task["candidates"])
    return {"best": found.similarity, "index": found.nearest}


def danlu_growth(task: Task) -> Arrays:
    """Seconds to admit the candidates to pools of growing size, and the bytes of the pool."""
    from operators.synthesis.novelty import NoveltyPool

    pool, figures = NoveltyPool(task["threshold"], task["floor"]), []
    for size in task["sizes"]:
        begun = time.process_time()
        pool.extend(task["pool"][len(pool) : size])
        built = time.process_time() - begun
        begun = time.process_time()
        found = pool.matches(task["candidates"])
        figures.append((size, built, time.process_time() - begun, pool.nbytes / size, float((~found.accepted).mean())))
    begun = time.process_time()
    pool.admit(task["candidates"])
    return {"figures": np.array(figures), "admit_s": np.array(time.process_time() - begun)}


_TOOLS: dict[str, Callable[[Task], Arrays]] = {
    function.__name__: function
    for function in (
        rouge_score,
        rouge_score_lcs,
        rouge_score_rs,
        rouge_rust,
        danlu,
        rapidfuzz,
        rapidfuzz_cutoff,
        danlu_pool,
        danlu_growth,
    )
}


def main() -> None:
    tool, path, out = sys.argv[1:]
    work = _TOOLS[tool]
    with open(path, encoding="utf-8") as file:
        task = json.load(file)
    work(task["small"])
    cpu, wall = time.process_time(), time.perf_counter()
    found = work(task)
    print(json.dumps({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}))
    np.savez(out, **found)


if __name__ == "__main__":
    main()
