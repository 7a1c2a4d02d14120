"""What a running run says of itself: `status.json` beside run.json, for `danlu status` in another shell.

The file is written by a thread of its own, whole and at most every few seconds (on an object store every 15), so that neither a
stage nor the schedule ever waits for it. It holds a few numbers for each stage, nothing that grows with units.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster import storage
from pipelines.journal import Journal, Level, redacted
from pipelines.progress import begins_anew

NAME = "status.json"
LOCAL_S, REMOTE_S = 2.0, 15.0
STILL_S = 30.0
"""Written at least so often, so that a reader can tell a run that computes from one that is gone."""


class Heartbeat:
    """Writes status.json and the log while a run goes; leave it with `end`, else the run counts as killed.

    `statuses` tells the state of each stage by name; `told` is called once when the files cannot be written, for a full disk
    must not end a run that may still commit.
    """

    def __init__(self, run_directory: str, run: str, statuses: Callable[[], dict[str, str]], told: Callable[[str], None]) -> None:
        self._directory, self._run, self._statuses, self._told = run_directory, run, statuses, told
        self._every = REMOTE_S if storage.is_remote(run_directory) else LOCAL_S
        self._journal = Journal(run_directory, run)
        self._since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._lock = threading.Lock()
        self._stages: dict[str, dict[str, Any]] = {}
        self._state, self._message = "running", ""
        self._ended = threading.Event()
        self._troubled = False
        self._thread = threading.Thread(target=self._beat, name="status", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._state == "running":
            self.end("failed", str(error) if error is not None else "")

    def end(self, state: str, message: str = "") -> None:
        """Write the last status: `done`, `failed` or `stopped`."""
        if self._state == "displaced":
            return
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        self._state, self._message = state, message
        self.log("error" if state == "failed" else "info", f"run {state}", **({"why": message} if message else {}))
        self._write()

    def abandon(self) -> None:
        """Write nothing more: the directory is another run's now."""
        self._ended.set()
        self._state = "displaced"

    def log(self, level: Level, message: str, *, stage: str | None = None, unit: int | str | None = None, **numbers: Any) -> None:
        """A line of the run's log."""
        self._guarded(lambda: self._journal.write(level, message, stage=stage, unit=unit, **numbers))

    def started(self, stage: str) -> None:
        with self._lock:
            entry = self._stages.setdefault(stage, {"failures": 0, "retried": 0, "set_aside": 0})
            entry.update(started=time.time(), first=None, tokens_per_second=None)
        self.log("info", "started", stage=stage)

    def failed(self, stage: str, message: str) -> None:
        with self._lock:
            self._stages.setdefault(stage, {"failures": 0, "retried": 0, "set_aside": 0})["failures"] += 1
        self.log("error", "failed", stage=stage, why=message)

    def progress(self, stage: str, done: int, total: int, note: str) -> None:
        """How far a stage is; `first` is where it was when it began in this run, for the pace."""
        with self._lock:
            entry = self._stages.setdefault(stage, {"failures": 0, "retried": 0, "set_aside": 0})
            before = (entry.get("done", 0), entry.get("total", 0))
            entry.update(done=done, total=total, note=note, seen=time.time())
            if not entry.get("first") or begins_anew(before, (done, total)):
                entry["first"] = [entry["seen"], done]

    def measured(self, stage: str, numbers: dict[str, Any]) -> None:
        """The pace in tokens, of a stage that tells one."""
        pace = numbers.get("tokens_per_second")
        if isinstance(pace, int | float) and math.isfinite(pace):
            with self._lock:
                entry = self._stages.setdefault(stage, {"failures": 0, "retried": 0, "set_aside": 0})
                entry["tokens_per_second"] = round(float(pace), 3)

    def event(self, stage: str, message: str, facts: dict[str, Any]) -> None:
        """A unit was tried again (`attempts` in all), is handed out again (`attempt` is its next), or rows of it were set aside."""
        facts = dict(facts)
        unit = facts.pop("unit", None)
        with self._lock:
            entry = self._stages.setdefault(stage, {"failures": 0, "retried": 0, "set_aside": 0})
            entry["retried"] += 1 if "attempt" in facts else max(0, int(facts.get("attempts", 1)) - 1)
            entry["set_aside"] += int(facts.get("set_aside", 0))
        self.log("warning", message, stage=stage, unit=unit, **facts)

    def _beat(self) -> None:
        written, before = 0.0, ""
        while not self._ended.wait(self._every):
            now = self._snapshot()
            shown = json.dumps({**now, "updated": 0}, sort_keys=True)
            if shown != before or time.time() - written > STILL_S:
                self._write(now)
                written, before = time.time(), shown
            else:
                self._guarded(self._journal.flush)

    def _snapshot(self) -> dict[str, Any]:
        statuses = self._statuses()
        with self._lock:
            stages = {name: {"status": status, **self._stages.get(name, {})} for name, status in statuses.items()}
        return {
            "version": 1,
            "run": self._run,
            "state": self._state,
            "message": self._message,
            "holder": {"host": socket.gethostname(), "process": os.getpid(), "since": self._since},
            "updated": time.time(),
            "stages": stages,
        }

    def _write(self, snapshot: dict[str, Any] | None = None) -> None:
        data = json.dumps(redacted(snapshot or self._snapshot()), indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self._guarded(lambda: storage.write_bytes(storage.join(self._directory, NAME), data))
        self._guarded(self._journal.flush)

    def _guarded(self, write: Callable[[], None]) -> None:
        if self._state == "displaced":
            return
        try:
            write()
        except OSError as error:
            if not self._troubled:
                self._troubled = True
                self._told(f"status.json and the log could not be written, the run goes on: {error}")
