"""A side of a benchmark with an engine of its own, in a process that is stopped except in its turn."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT

_START_S, _TURN_S = 600.0, 600.0


class SideFailed(RuntimeError):
    """A side ended or did not answer in time; says what it printed last."""


class Side:
    """A process of `generating.py`, stopped except in its turn."""

    def __init__(self, name: str, settings: dict[str, Any], log: Path) -> None:
        self._name, self._log = name, log
        with log.open("w") as complaints:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.synthesis.generating", name, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                cwd=ROOT,
            )
        self._root = psutil.Process(self._child.pid)
        try:
            self._line(_START_S)
        except SideFailed:
            self.__exit__()
            raise
        self._pause()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and all that it started."""
        tree = list(self._tree())
        for process in tree:
            try:
                process.resume()
            except psutil.NoSuchProcess:
                continue
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(60)
        except subprocess.TimeoutExpired:
            self._child.kill()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for process in alive:
            process.kill()
        self._child.wait()

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """The side's answer with the CPU seconds of all its processes. Raises SideFailed."""
        for process in self._tree():
            process.resume()
        before = self._cpu_s()
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(task) + "\n")
        self._child.stdin.flush()
        answer = self._line(_TURN_S)
        after = self._cpu_s()
        answer["cpu_s"] = sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
        self._pause()
        return answer

    def _tree(self) -> Iterator[psutil.Process]:
        try:
            yield from [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return

    def _pause(self) -> None:
        for process in self._tree():
            process.suspend()

    def _cpu_s(self) -> dict[int, float]:
        """CPU seconds of each process that is there; one that ends during a turn is not counted."""
        return {process.pid: sum(process.cpu_times()[:2]) for process in self._tree()}

    def _line(self, timeout_s: float) -> dict[str, Any]:
        assert self._child.stdout is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if select.select([self._child.stdout], [], [], 1.0)[0]:
                line = self._child.stdout.readline()
                if line:
                    return dict(json.loads(line))
            if self._child.poll() is not None:
                break
        else:
            raise SideFailed(f"{self._name} did not answer within {timeout_s:.0f} s: {self._log.read_text()[-3000:]}")
        raise SideFailed(f"{self._name} ended with {self._child.returncode}: {self._log.read_text()[-3000:]}")
