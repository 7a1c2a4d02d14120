"""How benchmarks measure: interleaved rounds, CPU seconds over all processes, peak memory, one JSON line at the end.

A benchmark is `python -m benchmarks.<area>.<name> [--quick]`. Both sides of a ratio run in the same run on the same data,
one after the other in every round, so that a noisy machine slows both. The peer runs in an environment of its own
(`make peers`), as a script that prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Usage:
    """What a piece of work took: CPU seconds over all its processes, wall seconds, the highest sum of resident bytes."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    output: Any = None


def arguments(description: str, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """`--quick` (a minute or two), `--rounds N`; `parser` may bring further options."""
    parser = parser or argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="less data and fewer rounds: a minute or two on two cores; writes no result"
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 3, quick 1)")
    parsed = parser.parse_args()
    parsed.rounds = parsed.rounds or (1 if parsed.quick else 3)
    return parsed


def peer_python(name: str) -> Path:
    """The interpreter of a peer's own environment. Raises FileNotFoundError that says how to make it."""
    path = Path(os.environ.get("DANLU_PEERS", ROOT / ".peers")) / name / "bin" / "python"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: `make peers` installs the environments that benchmarks compare with")
    return path


def has_peer(name: str) -> bool:
    try:
        peer_python(name)
    except FileNotFoundError:
        return False
    return True


def in_process(work: Callable[[], Any]) -> Usage:
    """Run `work` here: CPU seconds of this process and of children that end meanwhile, peak memory of the tree."""
    with _Watch(os.getpid()) as watch:
        before, start = os.times(), time.perf_counter()
        output = work()
        wall, after = time.perf_counter() - start, os.times()
    return Usage(sum(after[:4]) - sum(before[:4]), wall, watch.peak, output)


def process(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout_s: float = 3600) -> Usage:
    """Run a command to its end. CPU seconds are those of its whole tree; `output` is its last line of JSON, if any.

    Raises RuntimeError with the end of what it printed when it fails.
    """
    before, start = os.times(), time.perf_counter()
    child = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    with _Watch(child.pid) as watch:
        try:
            printed, complaints = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    wall, after = time.perf_counter() - start, os.times()
    if child.returncode:
        raise RuntimeError(f"{command[0]} ended with {child.returncode}:\n{printed[-1000:]}\n{complaints[-3000:]}")
    # children that were waited for are in the times; detached ones (Ray's daemons) only in the samples
    cpu = max(sum(after[2:4]) - sum(before[2:4]), watch.cpu_s)
    return Usage(cpu, wall, watch.peak, _last_json(printed))


def interleave(sides: Mapping[str, Callable[[], Usage]], rounds: int) -> dict[str, list[Usage]]:
    """Every side once in each round, in turn; the order turns round by round so that no side is always the first."""
    found: dict[str, list[Usage]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            usage = sides[name]()
            found[name].append(usage)
            cost = f"{usage.cpu_s:.2f} CPU s, {usage.wall_s:.2f} s, {usage.peak_bytes / 1e6:.0f} MB"
            print(f"round {number + 1}/{rounds} {name}: {cost}", file=sys.stderr)
    return found


def median_cpu(usages: Sequence[Usage]) -> float:
    return statistics.median(usage.cpu_s for usage in usages)


def publish(name: str, ratio: Mapping[str, float], figures: Mapping[str, Any], *, data: str, quick: bool) -> None:
    """Write benchmarks/results/<last part of name>.json (not for a quick run) and print the one JSON line that ends a benchmark.

    `name` is `area.name`; `ratio` maps `vs_<peer>` to ours over theirs, larger is better; `data` says what was measured on.
    """
    line = {
        "benchmark": name,
        "ratio": {peer: float(f"{value:.4g}") for peer, value in ratio.items()},
        "figures": _rounded(dict(figures)),
    }
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        result = {**line, "command": f"python -m benchmarks.{name}", "data": data, "versions": _versions(), "machine": _machine()}
        path = RESULTS / f"{name.split('.')[-1]}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
    print(json.dumps(line, ensure_ascii=False))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("ray", "pyarrow", "numpy", "numba", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # benchmarks/train/gpu.sh needs no Ray
            found[name] = metadata.version(name)
    return found


def _machine() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _last_json(printed: str) -> Any:
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return None


class _Watch:
    """Samples a process tree from a thread: the highest sum of resident bytes, CPU seconds of every process seen."""

    def __init__(self, pid: int) -> None:
        self.root, self.peak = psutil.Process(pid), 0
        self._cpu: dict[tuple[int, float], float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu.values())

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            self._sample()
            self._end.wait(_SAMPLE_S)

    def _sample(self) -> None:
        total = 0
        try:
            tree = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for one in tree:
            try:
                with one.oneshot():
                    total += one.memory_info().rss - getattr(one.memory_info(), "shared", 0) * (one is not self.root)
                    times = one.cpu_times()
                    self._cpu[(one.pid, one.create_time())] = times.user + times.system
            except psutil.Error:  # ended between listing and reading
                continue
        self.peak = max(self.peak, total)
