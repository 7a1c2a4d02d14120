"""What a running run shows while it goes: report.html written again and again, and the numbers that /metrics serves.

A thread of the driver looks at the run's directory as `danlu status` does (pipelines.status), soon after a stage ends and every
few seconds otherwise. No stage waits for it, and it takes at most a twentieth of the time, however many units there are.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster import storage
from pipelines.report.view import Now
from pipelines.status import RunStatus, Watch

FIRST_S = 2.0
"""A run that is over sooner has its report at the end alone."""
LOCAL_S, REMOTE_S = 10.0, 60.0
"""Between two looks while nothing changes its state; the browser loads the page again as often."""
_LEAST_S = 2.0  # between two looks, though stages end faster
_SHARE = 20  # a look that takes a second is followed by twenty without one
_POINTS = 400
_AXES = 64  # quantities of one stage's curves


class Curve:
    """Points of one stage's training curves: bounded, and even over the steps so far. Steps that are done again replace the old."""

    def __init__(self) -> None:
        self._points: list[dict[str, float]] = []
        self._every = 1

    def add(self, step: int, numbers: dict[str, Any]) -> None:
        """Keep the finite numbers of a step, if it is one of those that are kept."""
        while self._points and self._points[-1]["step"] >= step:
            self._points.pop()
        found = {str(k): float(v) for k, v in list(numbers.items())[:_AXES] if isinstance(v, int | float) and math.isfinite(v)}
        if step % self._every == 0 and found:
            self._points.append({**found, "step": step})
        if len(self._points) > _POINTS:
            self._every *= 2
            self._points = [point for point in self._points if point["step"] % self._every == 0]

    def points(self) -> list[dict[str, float]]:
        return list(self._points)


class Live:
    """Looks and writes until it is left; then it writes the last report, which says how the run ended.

    `told` is called once with why a page could not be written: that ends no run. `status` is what was seen last, None before
    the first look.
    """

    def __init__(self, run_directory: str, told: Callable[[str], None]) -> None:
        self._directory, self._told = run_directory, told
        self._every = REMOTE_S if storage.is_remote(run_directory) else LOCAL_S
        self._lock = threading.Lock()
        self._curves: dict[str, Curve] = {}
        self._wake, self._ended = threading.Event(), threading.Event()
        self._abandoned, self._troubled = False, False
        self._thread = threading.Thread(target=self._go, name="live", daemon=True)
        self.first_s = FIRST_S
        self.status: RunStatus | None = None

    def __enter__(self) -> Live:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join()  # or it could write its page after the last one
        if self._abandoned:
            return
        from pipelines.report.build import build_report

        try:
            build_report(self._directory)
        except OSError as error:
            if kind is None:
                raise
            self._told(f"report.html could not be written: {error}")  # the error that ends the run says more

    def abandon(self) -> None:
        """Write nothing more: the directory is another run's now."""
        self._abandoned = True
        self._ended.set()

    def changed(self) -> None:
        """A stage has started or ended: look soon."""
        self._wake.set()

    def point(self, stage: str, step: int, numbers: dict[str, Any]) -> None:
        """A point of a stage's curves."""
        with self._lock:
            self._curves.setdefault(stage, Curve()).add(step, numbers)

    def _go(self) -> None:
        self._ended.wait(self.first_s)
        while not storage.exists(storage.join(self._directory, "run.json")) and not self._ended.wait(0.2):
            pass  # the run is still looking at what was done before
        watch, page = Watch(self._directory), None
        while not self._ended.is_set():
            self._wake.clear()
            begun = time.monotonic()
            try:
                self.status = watch.look()
                if page is None:  # imported here: a short run needs no templates before its end
                    from pipelines.report.build import Report

                    page = Report(self._directory)
                with self._lock:
                    curves = {stage: curve.points() for stage, curve in self._curves.items()}
                if not self._ended.is_set():
                    page.write(Now(time.time(), self._every, self.status, curves))
            except Exception as error:  # noqa: BLE001 - a page that cannot be written is told, and the run goes on
                if not self._troubled:
                    self._troubled = True
                    self._told(f"report.html could not be brought up to date, the run goes on: {type(error).__name__}: {error}")
            least = max(_LEAST_S, _SHARE * (time.monotonic() - begun))
            if self._ended.wait(least):
                return
            self._wake.wait(max(0.0, self._every - least))
