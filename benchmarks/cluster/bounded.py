"""A corpus several times larger than memory: corpus and deduplication stages in a control group that may not use more.

The kernel ends whatever goes beyond the limit, so the run ending well is the result; the highest use (page cache, which the kernel
takes back, included) and that of the processes alone are told. Needs root and the memory controller (cgroup v1 or v2).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.corpus import material
from benchmarks.measure import ROOT, arguments, publish

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Group:
    """A control group with a limit on memory. Raises PermissionError, FileNotFoundError where there can be none."""

    def __init__(self, limit_bytes: int) -> None:
        self._v1 = (_V1 / "memory.limit_in_bytes").exists()
        self._path = (_V1 if self._v1 else _V2) / f"danlu-bench-{os.getpid()}"
        self._path.mkdir()
        (self._path / ("memory.limit_in_bytes" if self._v1 else "memory.max")).write_text(str(limit_bytes))

    def join(self) -> None:
        (self._path / "cgroup.procs").write_text(str(os.getpid()))

    def resident(self) -> int:
        """Bytes of anonymous and shared memory now: what cannot be given back."""
        stat = dict(line.split()[:2] for line in (self._path / "memory.stat").read_text().splitlines())
        names = ("total_rss", "total_shmem") if self._v1 else ("anon", "shmem")
        return sum(int(stat.get(name, 0)) for name in names)

    def peak(self) -> int:
        return int((self._path / ("memory.max_usage_in_bytes" if self._v1 else "memory.peak")).read_text())

    def processes(self) -> list[int]:
        return [int(line) for line in (self._path / "cgroup.procs").read_text().split()]

    def close(self) -> None:
        for pid in self.processes():
            try:
                psutil.Process(pid).kill()
            except psutil.NoSuchProcess:
                continue
        for _ in range(100):
            try:
                self._path.rmdir()
                return
            except OSError:  # what was killed is still there
                time.sleep(0.1)


def _by_name(processes: list[int]) -> dict[str, float]:
    """Resident megabytes of the largest processes, those of one name together; what they share counts for each."""
    found: Counter[str] = Counter()
    for pid in processes:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            line = process.cmdline()
            supervised = "operators.supervise" in line
            name = "a unit's child" if supervised else line[0] if line and line[0].startswith("ray::") else process.name()
            found[name] += process.memory_info().rss
    return {name: count / 1e6 for name, count in found.most_common(6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-gib", type=float, default=3.0)
    parser.add_argument("--times", type=float, default=4.0, help="text in multiples of the memory")
    options = arguments("", parser)
    memory = int(options.memory_gib * (1 << 30))
    text = memory * (0.1 if options.quick else options.times)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        place = Path(folder)
        description = material.build(place / "corpus", text / 1e6)
        documents, text_bytes = material.documents_and_bytes(place / "corpus")
        read = {"format": "parquet", "path": str(place / "corpus" / "*.parquet"), "max_unit_bytes": 64 << 20}
        chain = ["fix_text", {"detect_language": {"keep": ["en", "zh"]}}, "gopher_quality"]
        stages = {
            "web": {"kind": "corpus", "read": read, "operators": chain},
            "clean": {"kind": "dedup", "input": "web", "method": "minhash", "threshold": 0.8},
        }
        recipe = place / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"name": "bounded", "seed": 17, "stages": stages}))
        found: dict[str, Any] = {"resident": 0, "driver": 0, "who": {}}
        group, ended = Group(memory), threading.Event()
        try:
            began = time.monotonic()
            run = subprocess.Popen(
                [sys.executable, "-m", "pipelines", "run", str(recipe), "--runs", str(place / "runs")],
                cwd=ROOT,
                preexec_fn=group.join,
            )

            def watch() -> None:
                while not ended.wait(0.2):
                    if (now := group.resident()) > found["resident"]:
                        found["resident"], found["who"] = now, _by_name(group.processes())
                    try:
                        found["driver"] = max(found["driver"], psutil.Process(run.pid).memory_info().rss)
                    except psutil.NoSuchProcess:
                        return

            threading.Thread(target=watch, daemon=True).start()
            code = run.wait()
            ended.set()
            seconds, peak = time.monotonic() - began, group.peak()
        finally:
            group.close()
        if code:
            raise RuntimeError(f"the run ended with {code} in {memory >> 20} MiB")
        (manifest,) = (place / "runs" / "bounded" / "clean").glob("*/manifest.json")
        ledger = json.loads(manifest.read_text())["ledger"]
    publish(
        "cluster.bounded",
        {},
        {
            "memory_limit_mb": memory / 1e6,
            "text_mb": text_bytes / 1e6,
            "text_over_memory": text_bytes / memory,
            "documents": documents,
            "seconds": seconds,
            "mb_a_second": text_bytes / 1e6 / seconds,
            "peak_resident_mb": found["resident"] / 1e6,
            "peak_with_page_cache_mb": peak / 1e6,
            "processes_at_the_peak_mb": found["who"],
            "driver_peak_mb": found["driver"] / 1e6,
            "clean": ledger,
        },
        data=description,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
