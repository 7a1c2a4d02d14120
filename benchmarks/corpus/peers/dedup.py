"""A whole near-deduplication by one tool, as its documentation runs it; prints one JSON line and writes the kept ids.

usage: PYTHON dedup.py TOOL PARQUET_DIRECTORY SCRATCH BANDS ROWS

Reads Parquet, compares runs of five words, keeps one document of each cluster and writes the kept ones. One worker process
each: the comparison is in CPU seconds, and more workers only add start-up. Kept ids go to SCRATCH/kept.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def _parquet_ids(paths: Iterable[Path]) -> list[str]:
    import pyarrow.parquet as pq

    return [each for path in paths for each in pq.ParquetFile(path).read(columns=["id"])["id"].to_pylist()]


def datatrove(source: Path, scratch: Path, bands: int, rows: int) -> list[str]:
    """Its four stages, one task a file and one a bucket."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.logging import logger

    logger.remove()
    config = MinhashConfig(n_grams=5, num_buckets=bands, hashes_per_bucket=rows)
    reader = ParquetReader(str(source), glob_pattern="*.parquet", read_metadata=False)
    signatures, buckets, removals, kept = (str(scratch / name) for name in ("signatures", "buckets", "removals", "kept"))
    files = len(list(source.glob("*.parquet")))
    stages = [
        ([reader, MinhashDedupSignature(signatures, config)], files),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], bands),
        ([MinhashDedupCluster(buckets, removals, config=config)], 1),
        ([reader, MinhashDedupFilter(removals), ParquetWriter(kept, compression="zstd")], files),
    ]
    for number, (pipeline, tasks) in enumerate(stages):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(scratch / f"logs-{number}")).run()
    return _parquet_ids(sorted(Path(kept).glob("*.parquet")))


def text_dedup(source: Path, scratch: Path, bands: int, rows: int) -> list[str]:
    """Its command line, with its faster hash."""
    settings = {
        "path": "parquet", "data_files": source / "*.parquet", "split": "train",
        "cache_dir": scratch / "cache", "output": scratch / "kept", "column": "text",
        "ngram": 5, "min_length": 5, "num_perm": bands * rows, "b": bands, "r": rows, "hash_func": "xxh3",
        "num_proc": 1, "batch_size": 10000,
    }  # fmt: skip
    arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, "-m", "text_dedup.minhash", *arguments], check=True, stdout=sys.stderr, env=_offline(scratch))
    import pyarrow as pa

    ids: list[str] = []
    for path in sorted((scratch / "kept").glob("*.arrow")):
        ids += pa.ipc.open_stream(str(path)).read_all()["id"].to_pylist()
    return ids


def data_juicer(source: Path, scratch: Path, bands: int, rows: int) -> list[str]:
    """`dj-process` in its default mode (Hugging Face datasets)."""
    return _data_juicer(source, scratch, bands, rows, "default", "document_minhash_deduplicator")


def data_juicer_ray(source: Path, scratch: Path, bands: int, rows: int) -> list[str]:
    """`dj-process` on Ray, with its balanced union-find."""
    return _data_juicer(source, scratch, bands, rows, "ray", "ray_bts_minhash_deduplicator")


def _data_juicer(source: Path, scratch: Path, bands: int, rows: int, executor: str, operator: str) -> list[str]:
    settings = {"tokenization": "space", "window_size": 5, "lowercase": True, "num_permutations": bands * rows, "num_bands": bands,
                "num_rows_per_band": rows}  # fmt: skip
    recipe = {
        "project_name": "benchmark", "executor_type": executor, "dataset_path": str(source), "np": 1, "text_keys": "text",
        "export_path": str(scratch / "kept" / "kept.parquet"), "open_tracer": False, "process": [{operator: settings}],
    }  # fmt: skip
    if executor == "ray":
        recipe |= {"ray_address": "local", "export_path": str(scratch / "kept"), "export_type": "parquet"}
    (scratch / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [str(Path(sys.executable).parent / "dj-process"), "--config", str(scratch / "recipe.yaml")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_offline(scratch))
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return _parquet_ids(sorted((scratch / "kept").rglob("*.parquet")))


def _offline(scratch: Path) -> dict[str, str]:
    """A fresh cache, or a second run would find the first one's results; no network; no GPU."""
    caches = {"HF_HOME": str(scratch / "hf"), "HF_DATASETS_CACHE": str(scratch / "hf" / "datasets"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **caches, "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    tool, source, scratch, bands, rows = sys.argv[1:]
    folder = Path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    ids = globals()[tool](Path(source), folder, int(bands), int(rows))
    (folder / "kept.txt").write_text("\n".join(ids))
    print(json.dumps({"kept": len(ids)}))


if __name__ == "__main__":
    main()
