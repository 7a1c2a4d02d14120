"""What ordering the waiting prompts by their beginnings saves: share of prompt tokens found in the prefix cache, and seconds.

Questions about documents, shuffled, more documents than the cache can hold at a time and more questions than the engine
runs at a time, as in a long run: once handed to the engine in sweeps over their tokens (operators/synthesis/prefixes.py),
once as they arrive. Both sides draw the same replies and are timed from rows in to Parquet out.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import arguments, publish
from benchmarks.synthesis.side import Side
from benchmarks.synthesis.throughput import CACHE, texts
from operators.synthesis.engine import EngineSettings
from operators.synthesis.packaged import resolve_model

_QUESTIONS = 6
_SETTINGS = {"max_running": 4, "max_model_len": 1280, "kv_cache_gb": 0.125}


def main() -> None:
    options = arguments(__doc__ or "")
    documents = 6 if options.quick else 12
    model = resolve_model("packaged:smollm2-135m-instruct", str(CACHE))
    found: dict[str, list[dict[str, Any]]] = {"grouped": [], "as_they_arrive": []}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        sides = {}
        for name in found:
            settings = EngineSettings(model=model, device="cpu", group_prefixes=name == "grouped", **_SETTINGS)
            sides[name] = stack.enter_context(Side("danlu", settings.model_dump(), folder / f"{name}.log"))
        for number in range(options.rounds):
            prompts = _write(folder / f"{number}.parquet", documents, number)
            for name in found if number % 2 == 0 else reversed(found):
                answer = sides[name].ask({"prompts": str(prompts), "samples": 1, "out": str(folder / f"{name}-{number}")})
                found[name].append(answer)
                print(f"round {number + 1}/{options.rounds} {name}: {answer}", file=sys.stderr)
    figures: dict[str, Any] = {
        name: {
            "hit_rate": statistics.median(answer["cached_tokens"] / answer["prompt_tokens"] for answer in answers),
            "seconds": statistics.median(answer["seconds"] for answer in answers),
            "cpu_s": statistics.median(answer["cpu_s"] for answer in answers),
            "prompt_tokens": answers[0]["prompt_tokens"],
        }
        for name, answers in found.items()
    }
    pairs = zip(found["as_they_arrive"], found["grouped"], strict=True)
    ratio = {"vs_as_they_arrive": statistics.median(plain["seconds"] / grouped["seconds"] for plain, grouped in pairs)}
    data = (
        f"{_QUESTIONS} questions to each of {documents} documents of 3,600 characters from examples/data, shuffled, replies of 4 "
        f"tokens, {_SETTINGS['max_running']} at a time, a key-value cache of {_SETTINGS['kv_cache_gb']} GiB"
    )
    publish("synthesis.prefixes", ratio, figures, data=data, quick=options.quick)


def _write(path: Path, documents: int, seed: int) -> Path:
    draw = random.Random(seed)
    rows = [
        {"id": f"{d}-{q}", "prompt": f"{text[:3600]}\n\nQuestion {q}: what is said?", "max_tokens": 4, "seed": 10 * d + q}
        for d, text in enumerate(draw.sample(texts()[1], documents))
        for q in range(_QUESTIONS)
    ]
    draw.shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


if __name__ == "__main__":
    main()
