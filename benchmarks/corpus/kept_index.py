"""What a kept index costs: bytes a document, and the time to compare a tenth of new documents with it instead of everything anew.

The labelled near-duplicates (versions of the same files) in two stages, nine tenths and then the rest, beside one stage
over all of them; both must remove the same of the new rows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks import measure
from benchmarks.corpus.near_dup import DATA
from operators import shards
from operators.dedup import index
from operators.ledger import Ledger
from operators.stage import StageContext
from pipelines.stages.dedup import DedupStage

_PART_ROWS = 500


def main() -> None:
    arguments = measure.arguments(__doc__ or "")
    table = pq.read_table(DATA / "docs.parquet", columns=["id", "text"])
    table = table.slice(0, 1000) if arguments.quick else table
    cut = len(table) * 9 // 10
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
    figures: dict[str, Any] = {"documents": len(table), "text_bytes": table["text"].nbytes}
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        sources = {name: _write(run, name, rows) for name, rows in (("old", table.slice(0, cut)), ("new", table.slice(cut)))}
        _dedup(run, "warm", {"new": sources["new"]})
        for name, settings in (("bands", {}), ("verified", {"verify": True})):
            whole, whole_s = _dedup(run, f"{name}-whole", sources, **settings)
            _dedup(run, f"{name}-old", {"old": sources["old"]}, index=name, **settings)
            fresh, fresh_s = _dedup(run, f"{name}-new", {"new": sources["new"]}, index=name, **settings)
            ids = set(table["id"].slice(cut).to_pylist())
            if {key for key in whole if key in ids} != fresh:
                raise RuntimeError(f"{name}: the index and one pass over everything remove different rows")
            (first, *_) = index.generations(str(run / name))
            figures[name] = {
                "bytes_per_document": first.size["bytes"] / first.record["rows"],
                "bytes_per_document_by_kind": {key: size / first.record["rows"] for key, size in first.record["bytes"].items()},
                "removed_of_new": len(fresh),
                "new_against_index_s": fresh_s,
                "everything_s": whole_s,
            }
    ray.shutdown()
    measure.publish("corpus.kept_index", {}, figures, data="near_dup/docs.parquet", quick=arguments.quick)


def _write(run: Path, name: str, table: pa.Table) -> str:
    directory = str(run / name / "source")
    for unit, start in enumerate(range(0, len(table), _PART_ROWS)):
        piece, writer = table.slice(start, _PART_ROWS), shards.UnitWriter(directory, unit)
        writer.write(piece)
        writer.commit(Ledger(len(piece), 0, len(piece)))
    shards.finish(directory, stage=name, kind="corpus", fingerprint="source", config={}, inputs={})
    return directory


def _dedup(run: Path, name: str, inputs: dict[str, str], **settings: Any) -> tuple[set[str], float]:
    """(ids of the removed rows, wall seconds)."""
    directory = str(run / name / name)
    context = StageContext(name, "dedup", directory, name, {}, inputs, seed=17, workers=2, base_directory=str(run))
    DedupStage.model_validate({"input": list(inputs), "bands": 14, "rows": 8, **settings}).run(context)
    tables = shards.load_manifest(directory).files["removed"]
    gone = {key for each in tables for key in pq.read_table(f"{directory}/{each}", columns=["id"])["id"].to_pylist()}
    return gone, float(shards.load_timings(directory)["seconds"])


if __name__ == "__main__":
    main()
