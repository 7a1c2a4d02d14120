"""Units of work for fault tests, and a driver process that runs them on a cluster: `python -m tests.faults.units ADDRESS …`.

Each attempt leaves a file that says on which node it was, each unit one file of output. The driver prints a line of JSON for
each event and each result.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.connect import connect, disconnect
from operators.stage import StageContext
from operators.tasks import run_tasks

GATED = 20  # units from this one on wait for the file `go` where the driver is told "gate"


def work(directory: str, number: int, seconds: float, how: str) -> int:
    import ray

    first = not list(Path(directory, "attempts").glob(f"{number}-*"))
    node = ray.get_runtime_context().get_node_id()
    Path(directory, "attempts", f"{number}-{node}-{os.getpid()}-{uuid.uuid4().hex}").touch()
    if how == "crash" or (how == "crash once" and first and number == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise" and number == 1:
        raise ValueError("unit one is wrong")
    if how == "gate" and number >= GATED:  # until the test has seen what it waits for
        given_up = time.monotonic() + 120
        while not Path(directory, "go").exists() and time.monotonic() < given_up:
            time.sleep(0.02)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:  # not one sleep: the time of a frozen process counts too
        time.sleep(0.02)
    storage.create_if_absent(str(Path(directory, "out", str(number))), str(number * number).encode())
    return number * number


def main() -> None:
    address, directory, how = sys.argv[1:4]
    units, workers, seconds, deadline_s = int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]), float(sys.argv[7])
    for name in ("attempts", "out"):
        Path(directory, name).mkdir(parents=True, exist_ok=True)

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    faulthandler.register(signal.SIGUSR1, all_threads=True)  # a test that waits in vain asks where it stands
    connect(address)
    context = StageContext("units", "units", directory, "", {}, {}, 0, workers=workers)
    context.event = lambda message, facts: tell({"event": message, **facts})
    tell({"ready": True})
    jobs = ((directory, number, seconds, how) for number in range(units))
    try:
        for index, result in run_tasks(context, work, jobs, deadline_s=deadline_s):
            tell({"index": index, "result": result})
        tell({"end": "done"})
    except Exception as error:  # noqa: BLE001 - told, whatever it is
        tell({"end": f"{type(error).__name__}: {error}"})
    disconnect()


if __name__ == "__main__":
    main()
