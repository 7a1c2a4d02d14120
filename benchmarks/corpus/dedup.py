"""A whole near-deduplication from Parquet to the kept rows: read, sign, band, components, filter, write.

Every tool starts from nothing, in its own environment, and is charged for all its processes: ours with Python, Ray and
everything that Ray starts, idle or not. The peers get 50 MB of English text; ours gets the same and larger sizes, because
a fixed start weighs less on more text: a ratio `vs_<peer>` compares documents per CPU-second on the largest of ours,
`vs_<peer>_50mb` on the very same 50 MB. Parameters are the same (runs of five words, 14 bands x 8 rows); what each tool counts as a
word is its own, so kept sets are compared and reported.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.corpus import material
from benchmarks.measure import ROOT, Usage, arguments, has_peer, interleave, peer_python, process, publish
from operators import shards
from operators.ledger import Ledger

_PEERS = {"text_dedup": "text-dedup", "data_juicer": "data-juicer", "datatrove": "datatrove", "data_juicer_ray": "data-juicer"}
_SCRIPT = ROOT / "benchmarks" / "corpus" / "peers" / "dedup.py"
_BANDS, _ROWS = 14, 8


def as_shards(source: Path, directory: Path) -> None:
    """The material as a finished stage, which is what a dedup stage reads."""
    shutil.rmtree(directory, ignore_errors=True)
    for unit, path in enumerate(sorted(source.glob("part-*.parquet"))):
        writer, file = shards.UnitWriter(str(directory), unit), pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            writer.write(file.read_row_group(group))
        writer.commit(Ledger(file.metadata.num_rows, 0, file.metadata.num_rows))
    shards.finish(str(directory), stage="input", kind="corpus", fingerprint="material", config={}, inputs={})


def own_dedup(source: Path, output: Path, workers: int) -> Usage:
    """Our stage from nothing running; `output` holds what peers.danlu_dedup prints."""
    shutil.rmtree(output, ignore_errors=True)
    python = ROOT / ".venv" / "bin" / "python"
    return process([python, "-m", "benchmarks.corpus.peers.danlu_dedup", source, output, str(_BANDS), str(_ROWS), str(workers)])


def _agreement(clusters: dict[str, str], ours: set[str], theirs: set[str]) -> dict[str, Any]:
    """How far two tools find the same duplicates. Which document of a cluster stays is each tool's own choice (the first,
    or one of the largest tree), so what is compared is the clusters: of how many of ours did the other keep exactly one?"""
    held = Counter(clusters.get(each, each) for each in theirs)
    alike = sum(held[each] == 1 for each in ours)
    return {"clusters": len(ours), "clusters_alike": alike / len(ours), "kept_of_ours": len(ours & theirs), "kept": len(theirs)}


def _ids(paths: list[Path]) -> set[str]:
    return {each for path in paths for each in pq.read_table(path, columns=["id"])["id"].to_pylist()}


class _Runs:
    """The material of each size and one run of a tool on it."""

    def __init__(self, scratch: Path, sizes: list[int]) -> None:
        self.scratch, self.sizes = scratch, sizes
        self.described = [material.build(scratch / f"material-{size}", size, languages=("en",)) for size in sizes]
        for size in sizes:
            as_shards(scratch / f"material-{size}", scratch / f"shards-{size}")
        self.counts = {size: material.documents_and_bytes(scratch / f"material-{size}") for size in sizes}

    def own(self, size: int) -> Callable[[], Usage]:
        return lambda: own_dedup(self.scratch / f"shards-{size}", self.scratch / f"kept-{size}", 2)

    def peer(self, tool: str) -> Callable[[], Usage]:
        def run() -> Usage:
            target = self.scratch / tool
            shutil.rmtree(target, ignore_errors=True)
            command = [peer_python(_PEERS[tool]), _SCRIPT, tool, self.scratch / f"material-{self.sizes[0]}", target, _BANDS, _ROWS]
            return process([str(part) for part in command], timeout_s=900)

        return run

    def kept_by_us(self) -> set[str]:
        return _ids(sorted((self.scratch / f"kept-{self.sizes[0]}" / "kept").glob("*.parquet")))

    def clusters(self) -> dict[str, str]:
        """Every document that goes, and the one that stays for its cluster."""
        found: dict[str, str] = {}
        for path in sorted((self.scratch / f"kept-{self.sizes[0]}" / "removed").glob("*.parquet")):
            table = pq.read_table(path, columns=["id", "kept_id"])
            found.update(zip(table["id"].to_pylist(), table["kept_id"].to_pylist(), strict=True))
        return found

    def kept_by(self, tool: str) -> set[str]:
        return set((self.scratch / tool / "kept.txt").read_text().split("\n"))

    def summary(self, usages: list[Usage], size: int) -> dict[str, Any]:
        documents, text_bytes = self.counts[size]
        cpu_s = statistics.median(usage.cpu_s for usage in usages)
        return {
            "documents": documents,
            "text_mb": text_bytes / 1e6,
            "runs": len(usages),
            "cpu_s": cpu_s,
            "wall_s": statistics.median(usage.wall_s for usage in usages),
            "documents_per_cpu_s": documents / cpu_s,
            "mb_per_cpu_s": text_bytes / cpu_s / 1e6,
            "peak_mb": max(usage.peak_bytes for usage in usages) / 1e6,
            "kept": usages[0].output["kept"],
        }


def main() -> None:
    options = arguments(__doc__ or "")
    sizes = [4, 50] if options.quick else [50, 2000]
    once = [] if options.quick else ["datatrove", "data_juicer_ray"]  # minutes a run: not part of the rounds
    figures: dict[str, Any] = {"unavailable": {}}
    with tempfile.TemporaryDirectory() as folder:
        runs = _Runs(Path(folder), sizes)
        sides = {f"danlu_{size}mb": runs.own(size) for size in sizes}
        for tool in ("text_dedup", "data_juicer"):
            if has_peer(_PEERS[tool]):
                sides[tool] = runs.peer(tool)
            else:
                figures["unavailable"][tool] = "not installed: make peers"
        found = interleave(sides, options.rounds)
        for tool in once:
            try:
                found[tool] = [runs.peer(tool)()]
            except (RuntimeError, FileNotFoundError, subprocess.TimeoutExpired) as error:
                figures["unavailable"][tool] = str(error)[-400:]
        for size in sizes:
            figures[f"danlu_{size}mb"] = mine = runs.summary(found[f"danlu_{size}mb"], size)
            outputs = [usage.output for usage in found[f"danlu_{size}mb"]]
            for part in ("start", "dedup", "write"):
                mine[f"cpu_s_{part}"] = statistics.median(output["cpu_s"][part] for output in outputs)
            mine["driver_rss_mb"] = max(output["driver_rss"] for output in outputs) / 1e6
            mine["phases_wall_s"] = outputs[-1]["phases"]
        ours, clusters, ratio = runs.kept_by_us(), runs.clusters(), {}
        for tool in [name for name in _PEERS if name in found]:
            figures[tool] = theirs = runs.summary(found[tool], sizes[0])
            kept = runs.kept_by(tool)
            theirs["agreement"] = agreement = _agreement(clusters, ours, kept)
            if agreement["clusters_alike"] < 0.95:
                raise RuntimeError(f"{tool} finds other duplicates than we do: {agreement}")
            ratio[f"vs_{tool}"] = figures[f"danlu_{sizes[-1]}mb"]["documents_per_cpu_s"] / theirs["documents_per_cpu_s"]
            ratio[f"vs_{tool}_{sizes[0]}mb"] = figures[f"danlu_{sizes[0]}mb"]["documents_per_cpu_s"] / theirs["documents_per_cpu_s"]
        publish("corpus.dedup", ratio, figures, data="; ".join(runs.described), quick=options.quick)


if __name__ == "__main__":
    main()
