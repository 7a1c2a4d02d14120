"""Deduplicate a shard directory with our stage, from nothing running to the kept rows written; prints one JSON line.

usage: python -m benchmarks.corpus.peers.danlu_dedup INPUT OUTPUT BANDS ROWS [WORKERS]

`INPUT` and `OUTPUT` are shard directories. Ray is started here, and everything it starts is a child of this process, so
that whoever watches the process tree counts it all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

_INPUT, _OUTPUT, _BANDS, _ROWS = sys.argv[1:5] if len(sys.argv) > 4 else ("", "", "14", "8")


def tree_cpu_s() -> float:
    """CPU seconds so far of this process, its living descendants and the ended ones that were waited for."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


def write_kept(part: Any, path: str) -> int:
    """Write the rows of a part that stay; how many."""
    import pyarrow.parquet as pq

    from operators import shards

    writer, rows = None, 0
    for _, batch in shards.read(part, ["id", "text"], 2048):
        writer = writer or pq.ParquetWriter(path, batch.schema, compression="zstd", use_dictionary=False)
        writer.write_batch(batch)
        rows += batch.num_rows
    if writer is not None:
        writer.close()
    return rows


def main() -> None:
    workers = int(sys.argv[5]) if len(sys.argv) > 5 else os.cpu_count() or 1
    import ray

    from cluster.connect import start_local

    start_local(workers, 256 << 20)
    started = tree_cpu_s()
    from operators import shards
    from operators.config import parse
    from operators.dedup.options import DedupOptions
    from operators.dedup.stage import run_dedup
    from operators.stage import StageContext

    options = parse(
        DedupOptions,
        {
            "method": "minhash",
            "exact": False,
            "shingles": "words",
            "permutations": int(_BANDS) * int(_ROWS),
            "bands": int(_BANDS),
            "rows": int(_ROWS),
        },
        "dedup",
    )
    context = StageContext(
        stage="dedup",
        kind="dedup",
        directory=_OUTPUT,
        fingerprint="benchmark",
        config={},
        inputs={"input": _INPUT},
        seed=0,
        workers=workers,
    )
    begun = time.perf_counter()
    run_dedup(context, options, ["input"])
    deduplicated, wall_s = tree_cpu_s(), time.perf_counter() - begun
    kept = Path(_OUTPUT) / "kept"
    kept.mkdir()
    task = ray.remote(write_kept).options(num_cpus=1)
    parts = shards.parts([_OUTPUT])
    rows = sum(ray.get([task.remote(part, str(kept / f"part-{number:05d}.parquet")) for number, part in enumerate(parts)]))
    written = tree_cpu_s()
    line = {
        "kept": rows,
        "cpu_s": {"start": started, "dedup": deduplicated - started, "write": written - deduplicated},
        "wall_s": wall_s,
        "driver_rss": psutil.Process().memory_info().rss,
        "exchanged_bytes": shards.load_manifest(_OUTPUT).stats["exchanged_bytes"],
        "phases": shards.load_timings(_OUTPUT)["phases"],
    }
    ray.shutdown()
    print(json.dumps(line))


if __name__ == "__main__":
    main()
