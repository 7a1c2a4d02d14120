"""Phases of a global stage as Ray tasks: plain functions of (plan, number) that commit a unit each.

Shared by all stages that exchange keys. The driver holds the numbers of the units and nothing that grows with rows; a
unit whose record exists is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import ray

from operators import shards
from operators.dedup import exchange
from operators.stage import StageContext
from operators.tasks import run_tasks

_IN_FLIGHT = 2  # tasks handed out for each worker, so that none waits for the driver


class Plan(Protocol):
    """What every unit of a stage knows."""

    @property
    def directory(self) -> str: ...
    @property
    def parts(self) -> list[shards.Part]: ...


Unit = Callable[[Any, int], None]


class Phase(NamedTuple):
    """`of_parts`: unit n works on part n (for messages)."""

    name: str
    run: Unit
    units: int
    of_parts: bool = False


def run_phases(context: StageContext, plan: Plan, phases: Sequence[Phase]) -> dict[str, float]:
    """Run the missing units of each phase in order; seconds by phase.

    Raises RuntimeError that names the phase and the part (or unit) that failed, and Cancelled.
    """
    total, done, seconds = sum(phase.units for phase in phases), 0, dict[str, float]()
    for phase in phases:
        begun = time.time()
        _run_phase(context, plan, phase, done, total)
        done += phase.units
        seconds[phase.name] = round(time.time() - begun, 3)
    return seconds


def _run_phase(context: StageContext, plan: Plan, phase: Phase, done: int, total: int) -> None:
    """Run the missing units of one phase, a bounded number at a time."""
    name, function, count, of_parts = phase
    finished = exchange.committed(plan.directory, name)
    missing = [number for number in range(count) if number not in finished]
    completed = done + count - len(missing)
    context.progress(completed, total, "units")
    if not missing:
        return

    def describe(job: int) -> str:
        where = plan.parts[missing[job]].path if of_parts else missing[job]
        return f"{context.kind} stage {context.stage}: {name} of {where}"

    shared = ray.put(plan)
    jobs = ((shared, number) for number in missing)
    in_flight = _IN_FLIGHT * max(1, context.workers)
    for _ in run_tasks(context, function, jobs, in_flight=in_flight, name=name, describe=describe, number=missing.__getitem__):
        completed += 1
        context.progress(completed, total, "units")
