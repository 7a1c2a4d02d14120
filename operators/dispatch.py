"""Work units on Ray Data: one `map_batches` call over an actor pool, one small row back for each unit.

Text never enters the object store: an actor's child process reads a unit, works and commits it (operators/supervise.py).
Ray Data brings scheduling, an autoscaling pool and retries after a node is lost; a unit that is run twice commits once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import ray.data

from operators.stage import StageContext
from operators.supervise import Limits, Supervisor


class UnitWorker:
    """The actor: hands each unit to its supervised child."""

    def __init__(self, target: str, limits: Limits) -> None:
        self._supervisor = Supervisor(target, limits)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = [json.dumps(self._supervisor.run(json.loads(item))) for item in batch["unit"]]
        return {"result": np.array(results, dtype=object)}

    def __del__(self) -> None:
        self._supervisor.close()


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
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(context.workers, len(units))))
    done = blocks.map_batches(
        UnitWorker,
        batch_size=1,
        compute=pool,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        fn_constructor_kwargs={"target": target, "limits": limits},
        batch_format="numpy",
    )
    finished = already
    for _ in done.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0):
        finished += 1
        context.progress(finished, total, note)
        context.check_cancelled()
