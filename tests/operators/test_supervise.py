"""A poison row costs itself alone: the child that meets it dies, the rest of the unit is kept."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from operators.supervise import Limits, Report, Supervisor, Task, UnitError

HERE = "tests.operators.test_supervise"


def poisoned(task: Task, report: Report) -> Any:
    """A unit of 40 rows in batches of 8; the arguments say which row does what. Counts runs in a file."""
    given = task.arguments
    kept = []
    for start in range(0, 40, 8):
        rows = [row for row in range(start, start + 8) if row not in task.set_aside]
        if task.probe is not None:
            rows = [row for row in rows if task.probe[0] <= row < task.probe[1]]
        if not rows:
            continue
        with report.rows(rows[0], rows[-1] + 1):
            for row in rows:
                harm(given["harm"].get(str(row)))
        kept += rows
    return {"kept": kept, "set_aside": {str(row): how for row, how in task.set_aside.items()}}


def harm(what: str | None) -> None:
    if what == "segfault":
        ctypes.string_at(0)
    if what == "exit":
        os._exit(7)
    if what == "hang":
        time.sleep(60)
    if what == "memory":
        _hoard = [bytearray(64 << 20) for _ in range(40)]
        time.sleep(60)
    if what == "exception":
        raise ValueError("a row that the operator cannot do")
    if what == "print":
        print("a library that prints to standard output", flush=True)
        os.write(1, b"and writes to its descriptor\n")


def reader(task: Task, report: Report) -> Any:
    """A reader that ends its process before it knows of any row."""
    report.alive()
    if task.unreadable is None:
        os.abort()
    return {"unreadable": task.unreadable}


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor(f"{HERE}:poisoned", Limits(memory_bytes=700 << 20, deadline_s=2.0, max_set_aside=5))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("segfault", "SIGSEGV"),
        ("exit", "status 7"),
        ("hang", "no progress for 2 s"),
        ("memory", "memory above 700 MiB"),
        ("exception", "ValueError: a row that the operator cannot do"),
    ],
)
def test_one_poison_row_is_set_aside_and_the_others_are_kept(supervisor: Supervisor, what: str, told: str) -> None:
    result = supervisor.run({"harm": {"13": what}})
    assert list(result["set_aside"]) == ["13"]
    assert told in result["set_aside"]["13"]
    assert result["kept"] == [row for row in range(40) if row != 13]


def test_several_poison_rows_of_different_kinds_are_each_set_aside(supervisor: Supervisor) -> None:
    result = supervisor.run({"harm": {"0": "segfault", "7": "exception", "39": "exit"}})
    assert sorted(result["set_aside"], key=int) == ["0", "7", "39"]
    assert len(result["kept"]) == 37


def test_a_unit_in_which_every_row_fails_is_an_error_and_not_an_empty_result(supervisor: Supervisor) -> None:
    with pytest.raises(UnitError, match="more than 5 rows had to be set aside"):
        supervisor.run({"harm": {str(row): "exception" for row in range(40)}})


def test_what_a_library_prints_does_not_garble_the_conversation(supervisor: Supervisor) -> None:
    assert len(supervisor.run({"harm": {"3": "print"}})["kept"]) == 40


def test_a_crash_while_reading_sets_the_whole_unit_aside() -> None:
    made = Supervisor(f"{HERE}:reader", Limits())
    try:
        assert "SIGABRT" in made.run({})["unreadable"]
    finally:
        made.close()


def test_the_child_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        f"import sys, time; sys.path[:0] = {[str(Path.cwd())]!r}\n"
        "from operators.supervise import Limits, Supervisor\n"
        f"s = Supervisor('{HERE}:poisoned', Limits())\n"
        "s.run({'harm': {}})\n"
        "print(s._child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
