"""What it costs to keep the measures of a corpus stage, and what a replay of decisions costs beside a run.

One unit of English and Chinese documents goes through language ID, the four FineWeb filters and bad words: without measures,
with those that filters saw, and with all. `danlu decide`'s replay of one changed threshold is timed on the measures of both.
`vs_rerun` is CPU seconds of the chain over those of the replay. The replay without a change must make every decision again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, Usage, arguments, in_process, interleave, median_cpu, publish
from operators import shards
from operators.corpus import run_unit
from operators.sources.units import ReadSettings, plan_units
from operators.supervise import Report, Task
from pipelines.decide import Decision, decide

_CORPUS = ROOT.parent / "shared" / "data" / "corpus"
_OPERATORS: list[Any] = [
    "detect_language", "gopher_repetition", "gopher_quality", "fineweb_quality", "bad_words", "c4_quality",
]  # fmt: skip
_CHANGE = ["gopher_quality.min_words=100", "gopher_repetition.max_top_2_gram=0.3"]  # one stricter, one looser
_REPEATS = 20


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, size = _write(folder / "documents.parquet", 500 if options.quick else 6000)
        for measure in ("none", "seen", "all"):
            _run(folder, measure, "warm", limit=20)
        number = iter(range(10**6))
        stages: dict[str, Callable[[], Usage]] = {
            measure: lambda measure=measure: in_process(lambda: _run(folder, measure, str(next(number))))  # type: ignore[misc]
            for measure in ("none", "seen", "all")
        }
        runs = interleave(stages, options.rounds)
        replays = interleave(
            {
                measure: lambda measure=measure: in_process(lambda: _replay(str(folder / measure)))  # type: ignore[misc]
                for measure in ("seen", "all")
            },
            max(3, options.rounds),
        )
        figures: dict[str, Any] = {"documents": rows, "text_MB": size / 1e6, "documents_per_cpu_s": rows / median_cpu(runs["none"])}
        for measure in ("seen", "all"):
            [same] = decide(str(folder / measure), [])
            if same.outcome.disagreeing or same.outcome.rows != rows:
                raise SystemExit(
                    f"measure {measure}: {same.outcome.disagreeing} of {same.outcome.rows} decisions differ in the replay"
                )
            manifest = shards.load_manifest(same.directory)
            written = sum(part["bytes"] for part in manifest.measures)
            changed = replays[measure][0].output
            figures[measure] = {
                "cost_over_none": median_cpu(runs[measure]) / median_cpu(runs["none"]) - 1,
                "bytes_per_document": written / rows,
                "share_of_stage_bytes": written / sum(part["bytes"] for part in [*manifest.parts, *manifest.rejects]),
                "replayed_documents_per_cpu_s": _REPEATS * rows / median_cpu(replays[measure]),
                "rows_that_change": sum(langs.total() for _, _, langs in changed.changes()),
                "undecided": changed.kept[2] - changed.kept[1],
            }
        publish(
            "corpus.replay",
            {"vs_rerun": _REPEATS * median_cpu(runs["none"]) / median_cpu(replays["seen"])},
            figures,
            data=f"{rows} documents of data/corpus (English and Chinese by turns), {size / 1e6:.1f} MB",
            quick=options.quick,
        )


def _replay(run: str) -> Decision:
    """The changed decisions, several times over: once is too short for the clock."""
    return [decide(run, _CHANGE, examples=0) for _ in range(_REPEATS)][-1][0]


def _write(path: Path, count: int) -> tuple[int, int]:
    tables = [
        pq.read_table(_CORPUS / f"{lang}.parquet", columns=["id", "text", "source"]).slice(0, count // 2) for lang in ("en", "zh")
    ]
    table = pa.concat_tables(tables)
    pq.write_table(table, path)
    return table.num_rows, table["text"].nbytes


def _run(folder: Path, measure: str, fingerprint: str, limit: int | None = None) -> None:
    """One stage of one unit in this process, as a run that `decide` finds (its last one counts)."""
    directory = str(folder / measure / "web" / fingerprint)
    read = ReadSettings(path=str(folder / "documents.parquet"), max_unit_bytes=1 << 40)
    for unit in plan_units(read, str(folder), limit):
        given = {
            "unit": unit.to_json(), "read": read.model_dump(mode="json"), "operators": _OPERATORS, "directory": directory,
            "key": unit.key, "batch_rows": 2048, "measure": measure,
        }  # fmt: skip
        run_unit(Task(given), Report(lambda message: None))
    config = {"operators": _OPERATORS, "measure": measure}
    shards.finish(directory, stage="web", kind="corpus", fingerprint=fingerprint, config=config, inputs={})
    stages = {"web": {"directory": f"web/{fingerprint}", "status": "done", "inputs": []}}
    (folder / measure / "run.json").write_text(json.dumps({"order": ["web"], "stages": stages}))


if __name__ == "__main__":
    main()
