"""One corpus and its deduplication on 1, 2 and 4 Ray nodes of one CPU each, on one machine.

Four nodes share the cores of two here: what is measured then is what more nodes cost, not what they bring. The driver
joins each cluster as it would join any other; the stages' own seconds count, not the start. Bytes are the same throughout.

Then what idle nodes cost Ray's control process: its CPU beside 2 to 16 of them, each checked once a second (Ray's default is
once in three).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from benchmarks.corpus import material
from benchmarks.measure import ROOT, arguments, publish
from tests.cluster.nodes import CONFIGURATION, Nodes

_CONTROL_S = 30.0


def main() -> None:
    options = arguments(__doc__ or "")
    megabytes = 24 if options.quick else 240
    seconds: dict[int, list[dict[str, float]]] = {1: [], 2: [], 4: []}
    bytes_of: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        description = material.build(place / "corpus", megabytes, part_megabytes=4)
        _, text_bytes = material.documents_and_bytes(place / "corpus")
        read = {"format": "parquet", "path": str(place / "corpus" / "*.parquet"), "max_unit_bytes": 1 << 20}
        chain = ["fix_text", {"detect_language": {"keep": ["en", "zh"]}}, "gopher_quality"]
        stages = {
            "web": {"kind": "corpus", "read": read, "operators": chain},
            "clean": {"kind": "dedup", "input": "web", "method": "minhash", "threshold": 0.8},
        }
        (place / "recipe.yaml").write_text(yaml.safe_dump({"name": "nodes", "seed": 17, "stages": stages}))
        for turn in range(options.rounds):
            for count in seconds if turn % 2 == 0 else reversed(seconds):
                runs = place / f"{turn}-{count}"
                seconds[count].append(_run(place, runs, count))
                bytes_of.setdefault(_digest(runs), f"{count} nodes")
                print(f"round {turn + 1}/{options.rounds}, {count} nodes: {seconds[count][-1]}", file=sys.stderr)
    if len(bytes_of) != 1:
        raise RuntimeError(f"the number of nodes changed the bytes: {bytes_of}")
    middle = {count: {stage: median(one[stage] for one in found) for stage in ("web", "clean")} for count, found in seconds.items()}
    total = {count: sum(found.values()) for count, found in middle.items()}
    figures: dict[str, Any] = {"stage_seconds": middle, "mb_a_second": {count: text_bytes / 1e6 / total[count] for count in total}}
    with tempfile.TemporaryDirectory() as folder:
        figures["control_process_ms_a_second"] = load = _control_load(Path(folder), (1, 2, 4) if options.quick else (2, 4, 8, 16))
        figures["control_process_ms_a_second_and_node"] = float(np.polyfit(list(load), list(load.values()), 1)[0])
    figures |= {"speedup": {count: total[1] / total[count] for count in total}, "cores": os.cpu_count()}
    publish("cluster.nodes", {}, figures, data=description, quick=options.quick)


def _run(place: Path, runs: Path, count: int) -> dict[str, float]:
    nodes = Nodes(place)
    try:
        for _ in range(count):
            nodes.add(cpus=1)
        command = [sys.executable, "-m", "pipelines", "run", str(place / "recipe.yaml"), "--runs", str(runs)]
        command += ["--workers", str(count), "--address", nodes.address]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **CONFIGURATION}, check=True, capture_output=True)
    finally:
        nodes.close()
    record = json.loads((runs / "nodes" / "run.json").read_text())
    return {name: float(stage["seconds"]) for name, stage in record["stages"].items()}


def _control_load(place: Path, counts: tuple[int, ...]) -> dict[int, float]:
    """Milliseconds of CPU a second that Ray's control process takes beside so many nodes."""
    nodes, found = Nodes(place), {}
    try:
        added = 0
        for count in counts:
            for _ in range(count - added):
                nodes.add(cpus=1)
            added = count
            time.sleep(15.0)  # what their start costs is over
            before = sum(nodes.control.cpu_times()[:2])
            time.sleep(_CONTROL_S)
            found[count] = (sum(nodes.control.cpu_times()[:2]) - before) / _CONTROL_S * 1e3
            print(f"{count} idle nodes: {found[count]:.1f} ms/s", file=sys.stderr)
    finally:
        nodes.close()
    return found


def _digest(runs: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((runs / "nodes").glob("*/*/**/*")):
        if path.suffix in (".parquet", ".bits"):
            digest.update(path.relative_to(runs).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
