"""The table at the end of a run on the terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from pipelines.report.summary import summary_table
from tests.pipelines.report.fixture_run import read_record, write_record


def _printed(run: Path, width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_table(str(run)))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_line_a_stage_with_the_counts_of_its_ledger(finished_run: Path) -> None:
    lines = {line.split()[0]: line.split() for line in _printed(finished_run)}
    assert lines["web"][:6] == ["web", "corpus", "1,244", "846", "394", "4"]
    assert lines["docs"][-1] == "reused"
    assert lines["base"][-6:] == ["300", "steps,", "loss", *lines["base"][-3:]]


def test_a_failed_stage_says_so_and_plain_output_has_no_colour(run_copy: Path) -> None:
    record = read_record(run_copy)
    record["stages"]["chat"].update(status="failed", message="Traceback\nMemoryError: 3 GiB")
    write_record(run_copy, record)
    lines = _printed(run_copy)
    line = next(line for line in lines if line.startswith("chat"))
    assert "failed, MemoryError: 3 GiB" in line
    assert "\x1b" not in "".join(lines)
