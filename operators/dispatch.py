"""Work units on Ray Data: one `map_batches` call over a pool of tasks, one small row back for each unit.

Text never enters the object store: a child process reads a unit, works and commits it (operators/supervise.py). Ray Data
brings scheduling and retries after a node is lost; a unit that is run twice commits once.

Tasks, not an actor pool: Ray keeps the processes of finished tasks, so their supervised children serve stage after stage.
An actor pool starts a process and a child for each worker of each stage, which took longer than the work of a small one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data

from cluster.placement import placement
from operators.stage import StageContext
from operators.supervise import Limits, Supervisor

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


def _trouble(supervisor: Supervisor, unit: Any) -> dict[str, Any]:
    if not supervisor.failed:
        return {}
    number = unit.get("unit") if isinstance(unit, dict) else None
    return {
        "unit": number.get("index") if isinstance(number, dict) else number,
        "attempts": len(supervisor.failed) + 1,
        "failed": supervisor.failed[:_TOLD],
        "set_aside": len(supervisor.set_aside),
        "rows": dict(sorted(supervisor.set_aside.items())[:_TOLD]),
    }


@dataclass(frozen=True)
class _RunUnit:
    """What a task does: hand its unit to a supervised child of its process."""

    target: str
    limits: Limits

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done = [_KEPT.run(self.target, self.limits, json.loads(item)) for item in batch["unit"]]
        return {
            "result": np.array([json.dumps(result) for result, _ in done], dtype=object),
            "trouble": np.array([json.dumps(trouble) for _, trouble in done], dtype=object),
        }


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
    if not units:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # one line per executor and stage: the runner tells progress
    blocks = ray.data.from_items([{"unit": json.dumps(unit)} for unit in units], override_num_blocks=len(units))
    # Ray ends the process of every GPU task by default; here the child holds the GPU, and is ended when idle.
    options: dict[str, Any] = {"num_gpus": num_gpus, "max_calls": 0} if num_gpus else {}
    if where := placement("generate" if num_gpus else "cpu"):
        options["resources"] = where
    run_unit: Any = _RunUnit(target, limits).__call__
    done = blocks.map_batches(
        run_unit,
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=max(1, min(context.workers, len(units)))),
        num_cpus=num_cpus,
        batch_format="numpy",
        **options,
    )
    finished = already
    for batch in done.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0):
        finished += 1
        if trouble := json.loads(batch["trouble"][0]):
            context.event("unit retried", trouble)
        context.progress(finished, total, note)
        context.check_cancelled()
