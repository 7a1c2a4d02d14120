"""Random faults for some minutes: `python -m tests.faults.soak [--minutes 20] [--seed N]`, which `make soak` runs.

A recipe (corpus, deduplication, tokenizer, packing) runs on a cluster of real nodes, again and again in fresh directories, while
workers, supervised children, nodes, the control process and the driver itself are killed or frozen at random. Whenever a run
has ended, its Parquet, bitmaps and flat files must be those of an undisturbed run to the byte, and its ledgers balance. The
seed is printed first; the same seed draws the same faults, though they meet the run at other moments.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from operators import shards
from tests.cluster.nodes import CONFIGURATION, Node, Nodes
from tests.faults.test_kill_run import outcome, write_recipe

_PAUSE_S = (2.0, 12.0)
_MOST_ATTEMPTS = 60  # of one recipe; more means that it does not get on at all


class Soak:
    """A cluster, a run on it, and what was done to both."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory, self._random = directory, random.Random(seed)
        self._nodes = Nodes(directory, redis=True)
        self._others: list[Node] = [self._nodes.add(cpus=2)]
        self.done: Counter[str] = Counter()
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self, name: str, disturbed: bool, until: float) -> dict[str, str]:
        """One run of the recipe to its end, started again whenever it ends early; what it wrote."""
        place = self._directory / name
        place.mkdir()
        write_recipe(place)
        for attempt in range(_MOST_ATTEMPTS):
            self._start(place)
            assert self._driver is not None
            while self._driver.poll() is None:
                pause = time.monotonic() + self._random.uniform(*_PAUSE_S)
                while time.monotonic() < pause and self._driver.poll() is None:
                    time.sleep(0.05)
                if disturbed and self._driver.poll() is None and time.monotonic() < until:
                    self._disturb()
            if self._driver.returncode == 0:
                for stage in (place / "runs" / "killed-limit-200").glob("*/*/manifest.json"):
                    shards.load_manifest(str(stage.parent)).ledger.check(str(stage))
                return outcome(place)
            print(f"{name}: attempt {attempt + 1} ended with {self._driver.returncode}, again", flush=True)
        raise AssertionError(f"{name} did not come to its end: " + (place / "log").read_text("utf-8")[-4000:])

    def _start(self, place: Path) -> None:
        command = [sys.executable, "-m", "pipelines", "run", "recipe.yaml", "--limit", "200", "--workers", "4"]
        with (place / "log").open("ab") as log:
            self._driver = subprocess.Popen(
                [*command, "--address", self._nodes.address], cwd=place, env={**os.environ, **CONFIGURATION},
                stdout=log, stderr=log,
            )  # fmt: skip

    def _disturb(self) -> None:
        fault = self._random.choice(
            [self._kill_worker, self._kill_child, self._lose_node, self._freeze, self._control, self._kill_driver]
        )
        name = fault.__name__.strip("_")
        if fault():
            self.done[name] += 1
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)

    def _busy(self, word: str) -> list[psutil.Process]:
        found = []
        for node in self._others:
            for process in node.workers():
                try:
                    if word in " ".join(process.cmdline()) and "IDLE" not in " ".join(process.cmdline()):
                        found.append(process)
                except psutil.Error:
                    continue
        return found

    def _kill(self, word: str) -> bool:
        found = self._busy(word)
        if not found:
            return False
        self._random.choice(found).kill()
        return True

    def _kill_worker(self) -> bool:
        return self._kill("ray::")

    def _kill_child(self) -> bool:
        return self._kill("operators.supervise")

    def _lose_node(self) -> bool:
        """One of the nodes is lost, and another one comes."""
        lost = self._others.pop(self._random.randrange(len(self._others)))
        lost.kill()
        self._others.append(self._nodes.add(cpus=2))
        return True

    def _freeze(self) -> bool:
        """A node stands still: for a moment, or so long that it is given up."""
        node = self._random.choice(self._others)
        frozen = node.processes()
        node.signal(signal.SIGSTOP, frozen)
        time.sleep(self._random.choice([2.0, 15.0]))
        node.signal(signal.SIGCONT, frozen)
        if not node.raylet.is_running() or node.raylet.status() == psutil.STATUS_ZOMBIE:
            self._others.remove(node)
        if len(self._others) < 2:
            self._others.append(self._nodes.add(cpus=2))
        return True

    def _control(self) -> bool:
        self._nodes.kill_control_process()
        return True

    def _kill_driver(self) -> bool:
        assert self._driver is not None
        self._driver.kill()
        return True

    def close(self) -> None:
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
        self._nodes.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    print(f"seed {given.seed}: python -m tests.faults.soak --minutes {given.minutes:g} --seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="danlu-soak-", ignore_cleanup_errors=True) as folder:
        soak = Soak(Path(folder), given.seed)
        try:
            wanted = soak.run("undisturbed", disturbed=False, until=0.0)
            until, runs = time.monotonic() + 60 * given.minutes, 0
            while time.monotonic() < until:
                found = soak.run(f"run-{runs}", disturbed=True, until=until)
                differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
                if differing:
                    print(f"seed {given.seed}: run {runs} differs in {differing[:10]}", flush=True)
                    return 1
                runs += 1
        finally:
            soak.close()
    faults = ", ".join(f"{name} {count}" for name, count in sorted(soak.done.items()))
    print(f"seed {given.seed}: {runs} runs, {len(wanted)} files each, all as undisturbed; faults: {faults}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
