"""Work units of rows: Ray tasks (operators/tasks.py), each of which hands its unit to a supervised child of its process.

Text never enters the object store: the child reads a unit, works and commits it (operators/supervise.py). A unit that is run
twice commits once.

Tasks, not an actor pool: Ray keeps the processes of finished tasks, so their supervised children serve stage after stage.
An actor pool starts a process and a child for each worker of each stage, which took longer than the work of a small one.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from typing import Any

from operators.stage import StageContext
from operators.supervise import Limits, Supervisor
from operators.tasks import run_tasks

_IDLE_S = 30.0
"""A child that had no unit for this long is ended: it may hold models of hundreds of megabytes."""


class _Kept:
    """The supervised children of this process, by what they serve; one unit at a time, as a Ray task has the process alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[Hashable, tuple[Supervisor, float]] = {}
        self._watched = False

    def run(self, target: str, limits: Limits, unit: Any) -> tuple[Any, dict[str, Any]]:
        """The result of a unit, and what went wrong on the way to it (nothing, as a rule)."""
        # A child sees the GPUs and the import path that its own start was given.
        key = (target, limits, os.environ.get("CUDA_VISIBLE_DEVICES"), tuple(sys.path))
        with self._lock:
            supervisor, _ = self._children.pop(key, (None, 0.0))
        supervisor = supervisor or Supervisor(target, limits)
        try:
            result = supervisor.run(unit)
        except BaseException:  # also Ray's wish to cancel, in the middle of a conversation
            supervisor.close()
            raise
        with self._lock:
            self._children[key] = (supervisor, time.monotonic())
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._end_idle, daemon=True).start()
        return result, _trouble(supervisor, unit)

    def _end_idle(self) -> None:
        while True:
            time.sleep(_IDLE_S / 4)
            with self._lock:
                for key, (supervisor, used) in list(self._children.items()):
                    if time.monotonic() - used > _IDLE_S:
                        del self._children[key]
                        supervisor.close()


_KEPT = _Kept()
_TOLD = 8  # attempts and rows of one unit that are told by name


def _number(unit: Any) -> Any:
    """The number of a unit among those of its stage, as it is told."""
    number = unit.get("unit") if isinstance(unit, dict) else None
    return number.get("index") if isinstance(number, dict) else number


def _trouble(supervisor: Supervisor, unit: Any) -> dict[str, Any]:
    if not supervisor.failed:
        return {}
    return {
        "unit": _number(unit),
        "attempts": len(supervisor.failed) + 1,
        "failed": supervisor.failed[:_TOLD],
        "set_aside": len(supervisor.set_aside),
        "rows": {str(row): how for row, how in sorted(supervisor.set_aside.items())[:_TOLD]},
    }


def _run_unit(target: str, limits: Limits, unit: dict[str, Any]) -> dict[str, Any]:
    """What a task does: hand its unit to a supervised child of its process. What went wrong on the way comes back."""
    return _KEPT.run(target, limits, unit)[1]


def run_units(
    context: StageContext,
    target: str,
    units: Sequence[dict[str, Any]],
    limits: Limits,
    *,
    already: int = 0,
    num_cpus: float = 1,
    num_gpus: float = 0,
    note: str = "units",
) -> None:
    """Run `target` (see operators.supervise) on every unit; returns when all have committed.

    `already` units were committed before and count in the progress. Raises what a unit raised (as the cause of Ray's
    error), and Cancelled when the user stops the run between two units.
    """
    total = already + len(units)
    context.progress(already, total, note)
    jobs = ((target, limits, unit) for unit in units)
    finished = already
    name, deadline_s = target.partition(":")[2], limits.deadline_s
    for _, trouble in run_tasks(
        context, _run_unit, jobs, deadline_s=deadline_s, num_cpus=num_cpus, num_gpus=num_gpus, name=name,
        number=lambda job: _number(units[job]),
    ):  # fmt: skip
        finished += 1
        if trouble:
            context.event("unit retried", trouble)
        context.progress(finished, total, note)
