"""The workers of a training job: who I am, what all of us agree on, and how far we are.

One process, `torchrun` and a Ray Train group differ only in how a `Workers` comes about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from train.errors import JobError

T = TypeVar("T")


class Report(Protocol):
    """Called by the first worker after each step. Returns True once the user has asked to stop."""

    def __call__(self, done: int, total: int, note: str, metrics: dict[str, Any]) -> bool: ...


def _silent(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
    return False


@dataclass
class Workers:
    """This process's place among the workers of a job. Collectives are no-ops for one process."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Report = _silent

    @property
    def first(self) -> bool:
        return self.rank == 0

    @classmethod
    def here(cls, report: Report = _silent) -> Workers:
        """This process under `torchrun` (its environment variables decide), inside an initialised group, or alone."""
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not dist.is_initialized():
            return cls(0, 1, device, report)
        return cls(dist.get_rank(), dist.get_world_size(), device, report)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over workers, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: T | None) -> T:
        """The first worker's value, for all."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in order of rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every worker; if it fails on any, all of them raise. Keeps nobody waiting in a collective.

        The worker's own error is raised where it happened, JobError elsewhere. `action` must hold no collective.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # noqa: BLE001  told to all workers, then raised again
            failure = error
        told = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        problems = [problem for problem in told if problem]
        if failure is not None:
            raise failure
        if problems:
            raise JobError(problems[0])
        return result  # type: ignore[return-value]

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Run `action` on the first worker while the others wait; a failure there is raised by all."""
        return self.together(lambda: action() if self.first else None)

    def stop_requested(self, done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        """Report a step and learn, all workers alike, whether to stop."""
        flag = torch.zeros(1, device=self.device)
        if self.first and self.report(done, total, note, metrics):
            flag += 1
        return bool(self.sum(flag).item())
