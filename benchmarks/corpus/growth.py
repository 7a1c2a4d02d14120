"""How deduplication grows: time, memory and bytes exchanged at 1x, 4x and 16x the text.

The stage runs from Parquet to removal bitmaps, and the kept rows are written, as in `benchmarks.corpus.dedup`. `growth` is the
exponent of each quantity between the sizes, log(ratio) / log(4): 1 is linear, 0 flat. Ray's start is apart, because it does
not grow. The driver's memory is read after the run.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.corpus import material
from benchmarks.corpus.dedup import as_shards, own_dedup
from benchmarks.measure import Usage, arguments, interleave, publish


def main() -> None:
    options = arguments(__doc__ or "")
    sizes = [8, 32, 128] if options.quick else [128, 512, 2048]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch, described = Path(folder), []
        for size in sizes:
            described.append(material.build(scratch / f"material-{size}", size))
            as_shards(scratch / f"material-{size}", scratch / f"shards-{size}")
        sides = {str(size): (lambda size=size: own_dedup(scratch / f"shards-{size}", scratch / f"out-{size}", 2)) for size in sizes}
        found = interleave(sides, options.rounds)
        for size in sizes:
            documents, text_bytes = material.documents_and_bytes(scratch / f"material-{size}")
            figures[f"{size}mb"] = _summary(found[str(size)], documents, text_bytes)
    for small, large in itertools.pairwise(sizes):
        before, after = figures[f"{small}mb"], figures[f"{large}mb"]
        names = ("dedup_wall_s", "dedup_and_write_cpu_s", "peak_mb", "driver_rss_mb", "exchanged_mb")
        figures[f"growth_{small}_to_{large}"] = {
            name: math.log(after[name] / before[name]) / math.log(large / small) for name in names
        }
    publish("corpus.growth", {}, figures, data="; ".join(described), quick=options.quick)


def _summary(usages: list[Usage], documents: int, text_bytes: int) -> dict[str, Any]:
    outputs = [usage.output for usage in usages]
    return {
        "documents": documents,
        "text_mb": text_bytes / 1e6,
        "start_cpu_s": statistics.median(output["cpu_s"]["start"] for output in outputs),
        "dedup_and_write_cpu_s": statistics.median(output["cpu_s"]["dedup"] + output["cpu_s"]["write"] for output in outputs),
        "dedup_wall_s": statistics.median(output["wall_s"] for output in outputs),
        "peak_mb": statistics.median(usage.peak_bytes for usage in usages) / 1e6,
        "driver_rss_mb": statistics.median(output["driver_rss"] for output in outputs) / 1e6,
        "exchanged_mb": outputs[0]["exchanged_bytes"] / 1e6,
        "exchanged_bytes_per_document": outputs[0]["exchanged_bytes"] / documents,
        "phases_wall_s": outputs[-1]["phases"],
        "kept": outputs[0]["kept"],
    }


if __name__ == "__main__":
    main()
