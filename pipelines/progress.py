"""What a run tells while it goes: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipelines.journal import without_secrets

_LINE_EVERY_S = 15.0


def clock(seconds: float | None) -> str:
    """`3:20`, `48:36 h`, nothing for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02d} h"


def begins_anew(before: tuple[int, int], now: tuple[int, int]) -> bool:
    """True when (done, total) counts something else than before: a stage that scores rows, then takes steps, has two paces."""
    return now[0] < before[0] or (before[0] >= before[1] and now[1] != before[1])


class _Pace:
    """How long a stage will still take at its pace since it was first seen (what was resumed says nothing about that)."""

    def __init__(self, done: int, total: int) -> None:
        self._since, self._first, self._last = time.monotonic(), done, (done, total)

    def left(self, done: int, total: int) -> str:
        """`about 3:20 left`, nothing while nobody can tell."""
        if begins_anew(self._last, (done, total)):
            self._since, self._first = time.monotonic(), done
        self._last = (done, total)
        elapsed = time.monotonic() - self._since
        if done <= self._first or elapsed < 1 or done >= total:
            return ""
        return f"about {clock(elapsed * (total - done) / (done - self._first))} left"


class Display:
    """Progress of several stages at once. Safe to call from the stages' threads."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, float] = {}
        self._paces: dict[str, _Pace] = {}
        self._began = time.monotonic()
        self._bars: Progress | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[stage]:<14}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def line(self, text: str) -> None:
        """One line, with the seconds since the start."""
        self.console.print(f"[{time.monotonic() - self._began:6.1f} s] {without_secrets(text)}", markup=False)

    def stage(self, name: str, text: str) -> None:
        """A stage's change of state: always told."""
        with self._lock:
            if self._bars is not None and name in self._tasks and text.startswith(("done", "FAILED")):
                self._bars.remove_task(self._tasks.pop(name))
        self.line(f"{name}: {text}")

    def progress(self, name: str, done: int, total: int, note: str) -> None:
        """How far a stage is; on a terminal a bar, elsewhere a line every 15 seconds at most."""
        with self._lock:
            if name not in self._paces:
                self._paces[name] = _Pace(done, total)
            left = self._paces[name].left(done, total)
            if self._bars is not None:
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=total, stage=name, note=note, left="")
                self._bars.update(self._tasks[name], completed=done, total=total, note=note, left=left)
                return
            now = time.monotonic()
            if now - self._told.setdefault(name, now) < _LINE_EVERY_S:
                return
            self._told[name] = now
        self.line(f"{name}: {done:,} of {total:,} {note}{left and ', '}{left}")
