"""A unit whose reader ends its process on one row, for tests of the supervisor."""

from __future__ import annotations

import os
from typing import Any

from operators.supervise import Report, Task


def read_rows(task: Task, report: Report) -> Any:
    """Six rows; the library aborts on row 2, and an exception escapes it on row 4."""
    first, last = task.probe or (0, 6)
    for row in range(first, last):
        if row in task.set_aside:
            continue
        with report.reading(row):
            if row == 2:
                os.abort()
            if row == 4:
                raise ValueError("not this one")
    return task.set_aside
