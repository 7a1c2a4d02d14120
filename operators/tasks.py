"""Work units as plain Ray tasks: a bounded number at a time, one small result each, whatever happens to workers and nodes.

A task that a lost worker or node takes with it is handed out again, here and not by Ray, so that each such loss is counted and
told, and a unit that keeps ending its workers ends the stage instead of going on for ever. At the end of a stage, when
nothing waits any more, a unit that takes far longer than the others is given to a second node as well: a node that is slow,
hangs or is cut off delays a stage by no more than that. Units commit by content, so it does not matter which copy ends first.

Plain tasks rather than a Ray Data pipeline: see docs/scale.md for what both cost a unit.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import disk
from cluster.placement import placement
from operators.stage import StageContext

DEADLINE_S = 600.0
"""A unit that takes longer, while nothing else waits, is given to a second node; sooner where the others were much faster."""

_SLOW = 4.0  # times the median of the units before
_LEAST_SLOW_S = 10.0
_LOOK_S = 2.0  # between two looks for such units
_COPIES = 2
_CRASHES = 5  # of a worker process, with one unit; more means that the unit is to blame, not a machine
_LOSSES = 20  # of nodes, and of the memory of a node, with one unit
_REMEMBERED = 4096  # results

_NODE_LOST = (
    exceptions.NodeDiedError, exceptions.ObjectLostError, exceptions.OwnerDiedError, exceptions.TaskUnschedulableError,
)  # fmt: skip
_LOST = (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, *_NODE_LOST)


class UnitLost(RuntimeError):
    """A unit whose tasks ended too often without a result; the message says how."""


@ray.remote
def _run(function: Callable[..., Any], directory: str, *arguments: Any) -> tuple[str, Any]:
    try:
        return ray.get_runtime_context().get_node_id(), function(*arguments)
    except Exception as error:
        if disk.is_full(error):  # which disk only this machine can tell
            raise disk.full(error, directory) from error
        raise


@dataclass
class _Unit:
    """A unit that is out: its arguments, the tasks that do it, when it was handed out first, and the losses so far."""

    arguments: tuple[Any, ...]
    began: float = 0.0
    tasks: list[Any] = field(default_factory=list)
    copies: set[str] = field(default_factory=set)
    crashes: int = 0
    losses: int = 0


def run_tasks(
    context: StageContext,
    function: Callable[..., Any],
    jobs: Iterable[tuple[Any, ...]],
    *,
    in_flight: int | None = None,
    deadline_s: float = DEADLINE_S,
    num_cpus: float = 1,
    num_gpus: float = 0,
    name: str = "",
    describe: Callable[[int], str] | None = None,
    number: Callable[[int], Any] = lambda job: job,
) -> Iterator[tuple[int, Any]]:
    """Call `function` with each job's arguments; yields (index of the job, result) in order of completion.

    `jobs` is taken as tasks are handed out, `in_flight` at a time (default: the stage's workers). The driver holds those alone.
    `number` gives a job's unit as the log is to name it.

    Raises what Ray raises for an error of the function (`RayTaskError`; `.cause` is the error itself), or RuntimeError from it
    that says `describe(index) failed`, where that is given; UnitLost, and Cancelled. Tasks in flight are cancelled then, and
    when the caller stops; what they had committed stays.
    """
    # Ray ends the process of every GPU task by default; here a child may hold the GPU, and is ended when idle.
    gpu: dict[str, Any] = {"num_gpus": num_gpus, "max_calls": 0} if num_gpus else {}
    options = {
        "num_cpus": num_cpus, "resources": placement("generate" if num_gpus else "cpu"), "max_retries": 0,
        "scheduling_strategy": "SPREAD", "name": f"{context.stage}:{name or function.__name__.strip('_')}", **gpu,
    }  # fmt: skip
    flight = _Flight(
        context, function, iter(enumerate(jobs)), max(1, in_flight or context.workers), deadline_s, options, describe, number
    )
    try:
        yield from flight.results()
    finally:
        flight.cancel()


class _Flight:
    def __init__(
        self, context: StageContext, function: Callable[..., Any], jobs: Iterator[tuple[int, tuple[Any, ...]]], most: int,
        deadline_s: float, options: dict[str, Any], describe: Callable[[int], str] | None, number: Callable[[int], Any],
    ) -> None:  # fmt: skip
        self._context, self._jobs, self._most, self._deadline_s = context, jobs, most, deadline_s
        self._function, self._options, self._describe, self._number = function, options, describe, number
        self._units: dict[int, _Unit] = {}
        self._running: dict[Any, int] = {}
        self._again: deque[int] = deque()
        self._exhausted = False
        self._brought: deque[tuple[float, str]] = deque(maxlen=_REMEMBERED)  # results: when, from which node
        self._durations: deque[float] = deque(maxlen=200)
        self._looked = 0.0

    def results(self) -> Iterator[tuple[int, Any]]:
        while True:
            self._hand_out()
            if not self._units:
                return
            self._context.check_cancelled()
            ready, rest = ray.wait(list(self._running), num_returns=1, timeout=0.5)
            if ready and rest:
                ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
            for task in ready:
                if (index := self._running.pop(task, None)) is None:
                    continue  # a copy of it came in a moment ago
                unit = self._units[index]
                unit.tasks.remove(task)
                try:
                    node, result = ray.get(task)
                except _LOST as error:
                    self._lost(index, unit, error)
                    continue
                except exceptions.RayTaskError as error:
                    if self._describe is None:
                        raise
                    raise RuntimeError(f"{self._describe(index)} failed: {error.cause}") from error
                self._brought.append((time.monotonic(), node))
                self._durations.append(time.monotonic() - unit.began)
                del self._units[index]
                self._end(unit)
                yield index, result
            if self._exhausted:
                self._copy_the_slow()

    def cancel(self) -> None:
        for unit in self._units.values():
            self._end(unit)

    def _end(self, unit: _Unit) -> None:
        for task in unit.tasks:
            self._running.pop(task, None)
            ray.cancel(task)

    def _hand_out(self) -> None:
        while len(self._units) - len(self._again) < self._most:
            if self._again:
                index = self._again.popleft()
            else:
                job = next(self._jobs, None)
                if job is None:
                    self._exhausted = True
                    return
                index = job[0]
                self._units[index] = _Unit(job[1])
            self._units[index].began = time.monotonic()
            self._start(index, self._options)

    def _start(self, index: int, options: dict[str, Any]) -> None:
        unit = self._units[index]
        task = _run.options(**options).remote(self._function, self._context.directory, *unit.arguments)
        unit.tasks.append(task)
        self._running[task] = index

    def _lost(self, index: int, unit: _Unit, error: Exception) -> None:
        """A task ended without a result and through no error of the function. Raises UnitLost when it was once too often."""
        how = str(error).strip().partition("\n")[0]
        if isinstance(error, exceptions.WorkerCrashedError):
            unit.crashes += 1
        else:
            unit.losses += 1
        if isinstance(error, exceptions.OutOfMemoryError):
            self._most = max(1, self._most - 1)  # fewer beside each other from now on
        self._context.event(
            "unit started again", {"unit": self._number(index), "attempt": unit.crashes + unit.losses + 1, "failed": [how]}
        )
        if unit.crashes >= _CRASHES or unit.losses >= _LOSSES:
            raise UnitLost(
                f"{self._options['name']}: unit {self._number(index)} was lost {unit.crashes + unit.losses} times with its worker "
                f"or node, last: {how}; what was committed stays: look at that machine's memory and Ray's logs, then run again"
            ) from None
        if not unit.tasks:  # no copy is out
            self._again.append(index)

    def _copy_the_slow(self) -> None:
        """Give units that take too long to a second node: the one that brought most results since they were handed out.

        Where a unit runs is not asked: a node that is slow, frozen or cut off brings few results, or none. Should a copy go
        to the same node after all, the next one goes elsewhere.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        limit = self._deadline_s
        if len(self._durations) >= 3:
            limit = min(limit, max(_LEAST_SLOW_S, _SLOW * statistics.median(self._durations)))
        slow = [
            index
            for index, unit in self._units.items()
            if unit.tasks and len(unit.copies) < _COPIES and now - unit.began > limit * (1 + len(unit.copies))
        ]
        if not slow:
            return
        nodes = ray.nodes()
        alive = _alive(nodes, self._options["resources"])
        if len(alive) < 2 and all(node["Alive"] for node in nodes):  # of a node that was lost Ray may not tell that its tasks are
            return
        latest = {node: when for when, node in self._brought}
        for index in slow:
            unit = self._units[index]
            others = [node for node in alive if node not in unit.copies]
            if not others:
                continue
            since = Counter(node for when, node in self._brought if when > unit.began)
            node = max(others, key=lambda node: (since[node], latest.get(node, 0.0)))
            unit.copies.add(node)
            told = {"unit": self._number(index), "seconds": round(now - unit.began), "to": node}
            self._context.event("unit copied", told)
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            self._start(index, {**self._options, "scheduling_strategy": strategy})


def _alive(nodes: list[dict[str, Any]], resources: dict[str, float]) -> list[str]:
    """Ids of the living nodes that have a CPU and what else is asked for."""
    return [
        node["NodeID"]
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and all(node["Resources"].get(name) for name in resources)
    ]
