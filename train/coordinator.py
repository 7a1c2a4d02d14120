"""The desk between the stages of a run and its training workers: an actor that hands out one job at a time.

It imports no framework, so that its process starts fast and stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_ATTEMPTS = 4
"""How often a job is handed out before its own deaths are blamed on it."""


@dataclass
class _Job:
    number: int
    job: dict[str, Any]
    incarnations: list[str] = field(default_factory=list)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)  # rank -> {"error", "details", "cancelled", "result"}
    progress: tuple[int, int, str, dict[str, Any]] | None = None
    cancelled: bool = False
    outcome: dict[str, Any] | None = None


class Coordinator:
    """Hands one job at a time to the workers and collects what they report. Holds nothing that grows."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._current: _Job | None = None
        self._count = 0
        self._stopping = False

    # for the driver

    def submit(self, job: dict[str, Any]) -> int:
        if self._current is not None and self._current.outcome is None:
            raise RuntimeError("the training group has a job already")
        self._count += 1
        self._current = _Job(self._count, job)
        return self._count

    def cancel(self, number: int) -> None:
        if self._current is not None and self._current.number == number:
            self._current.cancelled = True

    def status(self, number: int) -> dict[str, Any]:
        """Progress so far and, when over, the outcome."""
        job = self._current
        if job is None or job.number != number:
            raise RuntimeError(f"job {number} is unknown")
        return {
            "progress": job.progress,
            "outcome": job.outcome,
            "attempts": len(job.incarnations),
        }

    def stop(self) -> None:
        self._stopping = True

    # for the workers

    def next(self, incarnation: str, last: int) -> dict[str, Any] | None:
        """The job to do after job `last`: {"number", "job"}, {"stop": True}, or None for now."""
        if self._stopping:
            return {"stop": True}
        job = self._current
        if job is None or job.outcome is not None or job.number == last:
            return None
        if incarnation not in job.incarnations:
            job.incarnations.append(incarnation)
            job.reports.clear()
            if len(job.incarnations) > MAX_ATTEMPTS:
                text = f"the training workers died {MAX_ATTEMPTS} times during this job (out of memory is the usual cause)"
                job.outcome = {"error": text, "details": ""}
                return None
        return {"number": job.number, "job": job.job}

    def step(self, number: int, done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        """Note progress; True once the job is to stop."""
        job = self._current
        if job is None or job.number != number:
            return True
        job.progress = (done, total, note, metrics)
        return job.cancelled

    def report(self, number: int, incarnation: str, rank: int, report: dict[str, Any]) -> None:
        """What became of the job on one worker."""
        job = self._current
        if job is None or job.number != number or job.outcome is not None or job.incarnations[-1] != incarnation:
            return
        job.reports[rank] = report
        if len(job.reports) == self._workers:
            failed = [job.reports[r] for r in sorted(job.reports) if job.reports[r].get("error")]
            # A worker's own error says more than "another worker failed".
            failed.sort(key=lambda item: item["secondary"])
            job.outcome = failed[0] if failed else {"result": job.reports[0]["result"]}

    def settled(self, number: int) -> bool:
        """True when all workers have reported; asked with an error in hand until then."""
        job = self._current
        return job is None or job.number != number or job.outcome is not None

    def give_up(self, number: int, error: dict[str, Any]) -> None:
        """End a job whose workers could not agree: its error is the one given."""
        job = self._current
        if job is not None and job.number == number and job.outcome is None:
            job.outcome = error
