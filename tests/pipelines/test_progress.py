"""What a run tells while it goes, off a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines import progress
from pipelines.progress import Display


def test_a_line_says_how_far_a_stage_is_and_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    written = io.StringIO()
    with Display(Console(file=written)) as display:
        display.progress("base", 100, 1000, "steps")  # resumed at 100: what was done before says nothing about the pace
        clock[0] = 20.0
        display.progress("base", 200, 1000, "steps, loss 2.310")
        clock[0] = 25.0
        display.progress("base", 225, 1000, "steps")  # too soon for another line
        clock[0] = 50_000.0
        display.progress("base", 300, 1000, "steps")
        clock[0] = 60_000.0
        display.progress("base", 1000, 1000, "steps")
    lines = [line.split("] ", 1)[1] for line in written.getvalue().splitlines()]
    assert lines == [
        "base: 200 of 1,000 steps, loss 2.310, about 2:40 left",
        "base: 300 of 1,000 steps, about 48:36 h left",
        "base: 1,000 of 1,000 steps",
    ]


def test_a_stage_that_scores_rows_and_then_takes_steps_has_a_pace_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    written = io.StringIO()
    with Display(Console(file=written)) as display:
        for at, done, total in ((0, 26, 50), (15, 38, 50), (30, 50, 50), (60, 1, 44), (80, 5, 44), (110, 11, 44)):
            clock[0] = at
            display.progress("chat", done, total, "")
    lines = [line.split("about ")[1] if "about" in line else "" for line in written.getvalue().splitlines()]
    assert lines == ["0:15 left", "", "", "3:15 left", "2:45 left"]
