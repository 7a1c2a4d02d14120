"""A bounded number of Ray tasks at a time, one small result each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from cluster.placement import placement


def run_tasks(
    function: Any, jobs: Sequence[tuple[Any, ...]], in_flight: int, check_cancelled: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, Any]]:
    """Call the remote function with each job's arguments; yields (index of the job, result) in order of completion.

    A task lost with its worker or node is retried by Ray. When a task raises, or the caller stops, the tasks in flight
    are cancelled and the error is raised; what they had committed stays.
    """
    remote = function.options(resources=placement("cpu")) if jobs else function
    running: dict[Any, int] = {}
    waiting = iter(enumerate(jobs))
    try:
        while True:
            while len(running) < max(1, in_flight) and (job := next(waiting, None)) is not None:
                running[remote.remote(*job[1])] = job[0]
            if not running:
                return
            check_cancelled()
            done, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
            for reference in done:
                index = running.pop(reference)
                yield index, ray.get(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def groups(rows: Sequence[int], least_rows: int, most_groups: int = 4096) -> list[tuple[int, int]]:
    """Cut a list of parts into runs [first, last) of at least `least_rows` rows, and at most about `most_groups` of them."""
    target = max(least_rows, -(-sum(rows) // most_groups), 1)
    found, first, total = [], 0, 0
    for index, count in enumerate(rows):
        total += count
        if total >= target:
            found.append((first, index + 1))
            first, total = index + 1, 0
    if first < len(rows):
        found.append((first, len(rows)))
    return found
