"""A worker that outlives what it works on: each unit is done by a child process under a memory limit and a deadline.

A document that crashes a native library, hangs it or fills the memory ends the child, not the Ray actor. The supervisor
learns from the child which rows were in work, bisects them down to the guilty row with probes that write nothing,
and runs the unit again with that row set aside. Everything else of the unit is kept.

Parent and child speak lines of JSON: tasks on the child's standard input, messages on its standard output (moved to
another descriptor first, so that a library that prints cannot garble it).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from cluster.startup import defer_pandas
from operators.config import SettingsError

_POLL_S = 0.1
_START_S = 60.0  # a child may take this long to say its first word

READING = "while reading: "
"""How the failure of a row begins in `Task.set_aside` when its reader failed, not the work on what was read."""


class UnitError(RuntimeError):
    """A unit that cannot be done and is no single row's fault; the message says what to do."""


@dataclass(frozen=True)
class Limits:
    """What one child may use: resident memory in bytes, and seconds without progress (one batch of rows, or reading on)."""

    memory_bytes: int = 4 << 30
    deadline_s: float = 600.0
    max_set_aside: int = 100  # rows of one unit; more means that the operator is broken, not the data


@dataclass
class Attempt:
    """How one attempt ended. `how` is empty on success; `rows` are the rows in work when it failed, None while reading."""

    result: Any = None
    how: str = ""
    detail: str = ""
    rows: tuple[int, int] | None = None
    fatal: bool = False


class Report:
    """The child's side of the conversation: tells which rows are in work, so that a crash can be traced to them."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self.current: tuple[int, int] | None = None

    @contextlib.contextmanager
    def rows(self, start: int, stop: int) -> Iterator[None]:
        """Around the work on rows [start, stop) of the unit."""
        self.current = (start, stop)
        self._send({"rows": [start, stop]})
        yield
        self.current = None
        self._send({"rows": None})

    @contextlib.contextmanager
    def reading(self, row: int) -> Iterator[None]:
        """Around the reading of one row by a library that may crash or hang on it, so that the row alone is set aside."""
        self.current = (row, row + 1)
        self._send({"rows": [row, row + 1], "reading": True})
        yield
        self.current = None
        self._send({"rows": None})

    def alive(self) -> None:
        """Progress while reading."""
        self._send({"rows": list(self.current) if self.current else None})


@dataclass
class Task:
    """What a target function is given: its arguments, the rows to set aside ({row: reason}), and for a probe the only
    rows to work on (nothing is to be written then). `unreadable` is set when reading itself ends the process."""

    arguments: dict[str, Any]
    set_aside: dict[int, str] = field(default_factory=dict)
    probe: tuple[int, int] | None = None
    unreadable: str | None = None


class Supervisor:
    """Runs units of one target function (`module:function`, called as `target(task, report) -> JSON value`) in a child."""

    def __init__(self, target: str, limits: Limits) -> None:
        self._target, self._limits = target, limits
        self._child: subprocess.Popen[bytes] | None = None
        self._awake = False  # whether the child has said its first word: a busy machine may take long to start it
        self._buffer = b""
        self.failed: list[str] = []  # how the attempts at the last unit ended that did not succeed, probes left out
        self.set_aside: dict[int, str] = {}  # the rows of the last unit that were quarantined, and why

    def run(self, arguments: dict[str, Any]) -> Any:
        """The target's result for one unit. Raises UnitError, SettingsError or OSError (message of the child)."""
        task = Task(arguments)
        strays = 0
        self.failed, self.set_aside = [], task.set_aside
        while True:
            attempt = self._attempt(task)
            if not attempt.how:
                return attempt.result
            self.failed.append(attempt.how)
            if attempt.fatal:
                raise UnitError(attempt.detail)
            if attempt.rows is None:
                strays += 1
                if strays >= 2:  # reading ends the process twice: set the whole unit aside
                    task.unreadable = attempt.how
                if strays >= 4:
                    raise UnitError(f"unit {_brief(arguments)} ends its process ({attempt.how}) even when it is only set aside")
                continue
            guilty, how = self._bisect(task, attempt)
            if guilty is None:
                strays += 1
                if strays >= 3:
                    raise UnitError(
                        f"unit {_brief(arguments)}: rows {attempt.rows[0]}..{attempt.rows[1] - 1} ended the process three times "
                        f"({attempt.how}), but none of them does so alone; give a unit more memory or a smaller batch"
                    )
                continue
            task.set_aside[guilty] = how
            if len(task.set_aside) > self._limits.max_set_aside:
                raise UnitError(
                    f"unit {_brief(arguments)}: more than {self._limits.max_set_aside} rows had to be set aside; "
                    f"last: row {guilty}: {how}"
                )

    def _bisect(self, task: Task, attempt: Attempt) -> tuple[int | None, str]:
        """The first row that fails by itself, and how; None when the failure does not come back."""
        assert attempt.rows is not None
        low, high = attempt.rows
        how = ""
        while True:
            if high - low == 1:
                last = self._attempt(Task(task.arguments, task.set_aside, (low, high)))
                return (low, last.how) if last.how else (None, how)
            middle = (low + high) // 2
            probe = self._attempt(Task(task.arguments, task.set_aside, (low, middle)))
            if probe.how:
                high, how = middle, probe.how
            else:
                low = middle

    def close(self) -> None:
        """End the child, if it runs."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                if stream is not None:
                    stream.close()
            self._child = None

    def _attempt(self, task: Task) -> Attempt:
        child = self._ensure_child()
        assert child.stdin is not None and child.stdout is not None
        message = {
            "target": self._target,
            "arguments": task.arguments,
            "set_aside": task.set_aside,
            "probe": task.probe,
            "unreadable": task.unreadable,
        }
        try:
            child.stdin.write(json.dumps(message).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            return self._ended(child, None, "")
        rows: tuple[int, int] | None = None
        phase = ""
        heard = time.monotonic()
        while True:
            line, open_pipe = self._read_line(child)
            if line is not None:
                heard = time.monotonic()
                self._awake = True
                answer = json.loads(line)
                if "rows" in answer:
                    rows = tuple(answer["rows"]) if answer["rows"] else None
                    phase = READING if answer.get("reading") else ""
                elif "result" in answer:
                    return Attempt(result=answer["result"])
                else:
                    return Attempt(
                        how=phase + answer["error"], detail=answer["detail"], rows=rows, fatal=answer["fatal"] or rows is None
                    )
                continue
            if not open_pipe:
                return self._ended(child, rows, "", phase)
            if time.monotonic() - heard > (self._limits.deadline_s if self._awake else max(_START_S, self._limits.deadline_s)):
                return self._ended(child, rows, f"no progress for {self._limits.deadline_s:.0f} s", phase)
            if _resident(child.pid) > self._limits.memory_bytes:
                return self._ended(child, rows, f"memory above {self._limits.memory_bytes >> 20} MiB", phase)

    def _read_line(self, child: subprocess.Popen[bytes]) -> tuple[bytes | None, bool]:
        """A line if one came within the polling interval, and whether the pipe is still open."""
        assert child.stdout is not None
        if b"\n" not in self._buffer:
            ready, _, _ = select.select([child.stdout], [], [], _POLL_S)
            if not ready:
                return None, True
            data = os.read(child.stdout.fileno(), 1 << 16)
            if not data:
                return None, False
            self._buffer += data
            if b"\n" not in self._buffer:
                return None, True
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line, True

    def _ended(self, child: subprocess.Popen[bytes], rows: tuple[int, int] | None, how: str, phase: str = "") -> Attempt:
        if how:
            child.kill()
        code = child.wait()
        if not how:
            how = f"process ended by {signal.Signals(-code).name}" if code < 0 else f"process exited with status {code}"
        self.close()
        return Attempt(how=phase + how, detail=how, rows=rows)

    def _ensure_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._buffer, self._awake = b"", False
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
            self._child = subprocess.Popen(
                [sys.executable, "-m", "operators.supervise"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        return self._child


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _brief(arguments: dict[str, Any]) -> str:
    unit = arguments.get("unit", {})
    return f"{unit.get('index', '?')} ({unit.get('path', '?')})" if isinstance(unit, dict) else str(unit)


def serve() -> None:
    """The child: do tasks until standard input closes, which it also does when the parent dies."""
    defer_pandas()
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            channel.write(json.dumps(message).encode() + b"\n")
            channel.flush()

    pending: list[bytes] = []
    arrived = threading.Condition()

    def listen() -> None:
        for line in sys.stdin.buffer:
            with arrived:
                pending.append(line)
                arrived.notify()
        os._exit(0)  # the parent is gone: whatever is in work will be done again from its unit

    threading.Thread(target=listen, daemon=True).start()
    send({"rows": None})
    while True:
        with arrived:
            arrived.wait_for(lambda: bool(pending))
            message = json.loads(pending.pop(0))
        report = Report(send)
        task = Task(
            message["arguments"],
            {int(row): reason for row, reason in message["set_aside"].items()},
            tuple(message["probe"]) if message["probe"] else None,
            message["unreadable"],
        )
        try:
            module, _, function = message["target"].partition(":")
            send({"result": getattr(importlib.import_module(module), function)(task, report)})
        except Exception as error:  # noqa: BLE001 - every failure of a unit is told to the parent, which decides
            fatal = isinstance(error, SettingsError | OSError | MemoryError) or report.current is None
            detail = str(error) if isinstance(error, SettingsError | OSError) else traceback.format_exc(limit=-6)
            send({"error": f"{type(error).__name__}: {str(error)[:300]}", "detail": detail, "fatal": fatal})


if __name__ == "__main__":
    serve()
