"""A run as the report sees it: run.json, and of each stage its manifest and timings, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cluster import storage
from operators import shards
from pipelines.status import RunStatus, StageStatus

CHOOSING_KINDS = ("score", "select", "mix")
SYNTHESIS_KINDS = ("self_instruct", "evol_instruct", "document_instruct", "responses")
TRAINING_KINDS = ("pretrain", "sft", "dpo", "kto", "reward", "grpo")
DIAGNOSIS_FILE = "diagnosis.json"  # of a run, what `danlu diagnose` found out


@dataclass(frozen=True)
class Now:
    """What is known of a run at work. `as_of` is seconds since the epoch, `every_s` how often the page is written; `curves` are the
    points of training stages so far, which no manifest holds yet."""

    as_of: float
    every_s: float
    status: RunStatus
    curves: Mapping[str, list[dict[str, Any]]]

    def stage(self, name: str) -> StageStatus | None:
        return next((stage for stage in self.status.stages if stage.name == name), None)


@dataclass(frozen=True)
class StageView:
    """One stage. `status` is done, pending, failed, running, or missing (said to be done, but its record is unreadable)."""

    name: str
    kind: str
    directory: str
    relative: str
    inputs: list[str]
    status: str
    seconds: float
    reused: bool
    started: float | None = None  # seconds since the epoch, where the runner noted it
    manifest: shards.Manifest | None = None
    timings: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    now: StageStatus | None = None  # while the run goes
    points: list[dict[str, Any]] = field(default_factory=list)  # of a curve that goes on

    @property
    def stats(self) -> dict[str, Any]:
        return self.manifest.stats if self.manifest is not None else {}

    def count(self, *keys: str) -> int | float:
        """A number of the statistics by its path, 0 where the stage did not count it."""
        value: Any = self.stats
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, int | float) else 0

    def counts(self, *keys: str) -> dict[str, int | float]:
        """A mapping of numbers of the statistics by its path, empty where the stage has none."""
        value: Any = self.stats
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            return {}
        return {str(name): number for name, number in value.items() if isinstance(number, int | float)}

    @property
    def state(self) -> str:
        """The status as it is shown: a finished stage that was not redone is `reused`, one that was stopped `interrupted`."""
        if self.status == "pending" and self.seconds > 0:
            return "interrupted"
        return "reused" if self.status == "done" and self.reused else self.status


@dataclass(frozen=True)
class RunView:
    """All that the report knows about a run, in the order in which its stages were planned."""

    directory: str
    name: str
    recipe_text: str
    stages: list[StageView]
    started: str
    seconds: float
    machine: dict[str, Any]
    command: str
    message: str | None
    limit: int | None = None
    now: Now | None = None

    @property
    def running(self) -> list[StageView]:
        return [stage for stage in self.stages if stage.now is not None and stage.status == "running"]

    def of_kind(self, *kinds: str) -> list[StageView]:
        return [stage for stage in self.stages if stage.kind in kinds]

    def stage(self, name: str) -> StageView:
        return next(stage for stage in self.stages if stage.name == name)


def load_run(run_directory: str, now: Now | None = None, finished: MutableMapping[str, StageView] | None = None) -> RunView:
    """Read `run.json` and every manifest it leads to. `finished` keeps stages with a manifest, which are not read again.

    Raises FileNotFoundError when there is no run.json, ValueError when it is no JSON of a run. A stage whose manifest
    is absent or damaged is part of the view, with its problem.
    """
    run_directory = run_directory.rstrip("/")
    path = storage.join(run_directory, "run.json")
    if not storage.exists(path):
        raise FileNotFoundError(f"{path} does not exist: {run_directory} is no run (the runner writes run.json when it starts)")
    try:
        record = json.loads(storage.read_bytes(path))
        entries = record["stages"]
        order = [name for name in record.get("order", entries) if name in entries]
        order += [name for name in entries if name not in order]
        stages = [_load_stage(run_directory, name, entries[name], now, {} if finished is None else finished) for name in order]
        started = str(record.get("started") or "")
        seconds = float(record.get("seconds") or 0.0)
        if now is not None:
            seconds = max(seconds, now.as_of - datetime.fromisoformat(started).timestamp())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); run the recipe again to write it anew") from error
    return RunView(
        directory=run_directory,
        name=str(record.get("recipe") or run_directory.rsplit("/", 1)[-1]),
        recipe_text=str(record.get("recipe_text") or ""),
        stages=stages,
        started=started,
        seconds=seconds,
        machine=dict(record.get("machine") or {}),
        command=str(record.get("command") or ""),
        message=str(record["message"]) if record.get("message") else None,
        limit=record.get("limit"),
        now=now,
    )


def _load_stage(
    run_directory: str, name: str, entry: dict[str, Any], now: Now | None, finished: MutableMapping[str, StageView]
) -> StageView:
    relative = str(entry.get("directory") or "")
    directory = storage.join(run_directory, relative) if relative else ""
    if directory in finished:
        return finished[directory]
    status = str(entry.get("status") or "pending")
    seen = now.stage(name) if now is not None else None
    if seen is not None and seen.status == "running" and status == "pending":
        status = "running"  # run.json is written when stages end
    manifest, timings, problem = None, {}, entry.get("message")
    if status == "done":
        try:
            manifest = shards.load_manifest(directory)
            timings = shards.load_timings(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            status, problem = "missing", f"{type(error).__name__}: {error}"
    view = StageView(
        name=name,
        kind=str(entry.get("kind") or "?"),
        directory=directory,
        relative=relative,
        inputs=[str(item) for item in entry.get("inputs") or []],
        status=status,
        seconds=float(entry.get("seconds") or (seen.seconds if seen is not None and status == "running" else 0.0) or 0.0),
        reused=bool(entry.get("reused")),
        started=_number(entry.get("started", timings.get("started"))),
        manifest=manifest,
        timings=timings,
        problem=None if problem is None else str(problem),
        now=seen,
        points=list(now.curves.get(name, [])) if now is not None else [],
    )
    if manifest is not None:
        finished[directory] = view
    return view


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
