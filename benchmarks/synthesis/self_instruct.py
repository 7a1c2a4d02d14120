"""Self-Instruct without a model: from recorded replies to rows, and the novelty loop by itself.

`vs_distilabel`: recorded lists of tasks become instruction rows with an answer each, beside distilabel's SelfInstruct and
TextGeneration steps on the same texts. Danlu applies its rules, the novelty test against seeds and everything accepted,
the classification step, provenance and the reply cache meanwhile; distilabel's steps do nothing of the kind. The
candidates that both read out of the replies are compared. Rates are candidates per CPU second.

`vs_rouge_score_loop`: which of the candidates are new, beside the loop of the original algorithm (rouge_score against the
whole pool, one process). Both must accept the same candidates.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Usage, arguments, interleave, peer_python, process, publish

_SCRIPT = ROOT / "benchmarks" / "synthesis" / "peers" / "self_instruct.py"
_OWN = ROOT / ".venv" / "bin" / "python"
_SEEDS = ROOT / "examples" / "data" / "seed_tasks_en.jsonl"
_PACK = ROOT.parent / "shared" / "data" / "instruct" / "alpaca_en.jsonl"
_TASKS_A_LIST = 8


def main() -> None:
    options = arguments(__doc__ or "")
    candidates, described = _candidates()
    seeds = [json.loads(line)["instruction"] for line in _SEEDS.read_text("utf-8").splitlines()]
    material = {
        "seeds": seeds,
        "candidates": candidates[: 300 if options.quick else 1500],
        "lists": [candidates[n : n + _TASKS_A_LIST] for n in range(0, len(candidates), _TASKS_A_LIST)],
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "material.json"
        path.write_text(json.dumps(material), "utf-8")
        python = {"danlu": _OWN, "danlu_novelty": _OWN}
        peer = peer_python("distilabel")
        names = ["danlu", "distilabel", "danlu_novelty", "rouge_score_loop"]
        found = interleave({name: _side(name, python.get(name, peer), path) for name in names}, options.rounds)
    output = {name: usages[0].output for name, usages in found.items()}
    seconds = {name: statistics.median(usage.cpu_s for usage in usages) for name, usages in found.items()}
    rates = {name: output[name]["rows"] / seconds[name] for name in names}
    _compare(output)
    figures: dict[str, Any] = {
        "candidates_per_cpu_s": rates,
        "candidates": {name: output[name]["rows"] for name in names},
        "rows_kept_by_danlu": output["danlu"]["kept"],
        "new_by_both_loops": len(output["danlu_novelty"]["accepted"]),
        "distilabel_version": output["distilabel"]["version"],
    }
    ratio = {
        "vs_distilabel": rates["danlu"] / rates["distilabel"],
        "vs_rouge_score_loop": rates["danlu_novelty"] / rates["rouge_score_loop"],
    }
    publish("synthesis.self_instruct", ratio, figures, data=described, quick=options.quick)


def _candidates() -> tuple[list[str], str]:
    """Real instructions and, for every fifth, one with a word changed somewhere, which the novelty test should catch."""
    if not _PACK.exists():
        raise FileNotFoundError(f"{_PACK}: this benchmark reads 2,500 English Alpaca instructions from the data pack")
    texts = dict.fromkeys(" ".join(json.loads(line)["instruction"].split()) for line in _PACK.read_text("utf-8").splitlines())
    draw = random.Random(5)
    made: list[str] = []
    for number, text in enumerate(texts):
        made.append(text)
        if number % 5 == 0:
            words = text.split()
            words[draw.randrange(len(words))] = "another"
            made.append(" ".join(words))
    return made, f"{len(made)} instructions: Alpaca (English, the first 2,500 of the data pack), a fifth again with a word changed"


def _side(name: str, python: Path, material: Path) -> Callable[[], Usage]:
    def run() -> Usage:
        usage = process([python, _SCRIPT, name, material], env={"PYTHONPATH": str(ROOT)} if python == _OWN else None)
        return Usage(usage.output["cpu_s"], usage.wall_s, usage.peak_bytes, usage.output)

    return run


def _compare(output: dict[str, Any]) -> None:
    """Raises RuntimeError unless both novelty loops accept the same, and both chains read the same tasks."""
    if output["danlu_novelty"]["accepted"] != output["rouge_score_loop"]["accepted"]:
        raise RuntimeError("the novelty loops accept different candidates")
    ours = {text.split("\n\n")[0] for text in output["danlu"]["texts"]}
    theirs = {" ".join(text.split()) for text in output["distilabel"]["texts"]}
    if ours != theirs:
        raise RuntimeError(f"the chains read different tasks: {sorted(ours ^ theirs)[:6]}")


if __name__ == "__main__":
    main()
