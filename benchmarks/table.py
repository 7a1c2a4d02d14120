"""All committed results in one table, each ratio beside its goal: `python -m benchmarks.table` or `make bench`.

Reads benchmarks/results/*.json, as benchmarks write them, and the goals below. A ratio is ours over theirs, larger is better.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import RESULTS

GOALS: dict[str, dict[str, float]] = {
    "corpus.chain": {"vs_datatrove": 100, "vs_datatrove_all": 100},
    "corpus.minhash": {"vs_datatrove": 200, "vs_rensa": 6, "vs_rensa_256": 4, "vs_datasketch": 30},
    "corpus.dedup": {"vs_text_dedup": 20, "vs_data_juicer": 20, "vs_datatrove": 20},
    "synthesis.novelty": {"vs_rouge_score": 1000, "vs_rouge_score_rs": 100, "vs_rapidfuzz": 5},
    "synthesis.self_instruct": {"vs_rouge_score_loop": 100},
    "synthesis.throughput": {"vs_vllm": 0.95, "vs_vllm_n2": 0.95, "vs_ray_data_llm": 1},
    "train.gpu": {"vs_hf_trainer_1b_whole": 1, "vs_peak_1b_whole": 0.5},
    "train.step": {"vs_hf_trainer": 1.15, "vs_hf_trainer_fp32": 1.15},
    "train.pack": {"vs_datasets_map": 5, "vs_datasets_map_batched": 1.2},
    "train.loader": {"vs_memmap": 0.8},
    "train.launcher": {"vs_torchrun": 0.98},
    "cluster.scheduling": {"vs_ray_data": 1},
}
"""Benchmark -> key -> what the ratio should reach."""


def rows(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, str, str]]:
    """(benchmark, peer, measured, goal, verdict); a goal without a result is a row as well."""
    for name in sorted({*results, *GOALS}):
        result, goals = results.get(name), GOALS.get(name, {})
        ratios = result["ratio"] if result else {}
        for key in [*ratios, *(goal for goal in goals if goal not in ratios)]:
            measured, goal = ratios.get(key), goals.get(key)
            verdict = "not measured" if measured is None else "" if goal is None else "reached" if measured >= goal else "MISSED"
            yield name, key, "-" if measured is None else f"{measured:.4g}", "-" if goal is None else f"{goal:g}", verdict
        if result and not ratios:
            yield name, "(no ratio)", "-", "-", "see the file"


def main() -> None:
    found = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    results = {result["benchmark"]: result for result in found}
    table = [("benchmark", "against", "ratio", "goal", ""), *rows(results)]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, result in sorted(results.items()):
        print(f"\n{name}: {result['command']}\n  {result['data']}\n  {result['machine']}")


if __name__ == "__main__":
    main()
