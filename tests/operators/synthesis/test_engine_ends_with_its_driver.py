"""`kill -9` of the driver leaves no engine behind: not while it loads, and not after."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]

_DRIVER = """
import sys, time
import ray
from operators.synthesis.engine import EngineSettings, start_engine
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, configure_logging=False)
engine = start_engine(EngineSettings(max_model_len=256), sys.argv[1])
if sys.argv[2] == "loaded":
    engine.wait_ready()
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "loaded"])
def test_nothing_outlives_a_killed_driver(model_cache: Path, moment: str) -> None:
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(model_cache), moment], stdout=subprocess.PIPE, cwd=ROOT)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"started\n"
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not any("VllmWorker" in _title(process) for process in family):
        assert time.monotonic() < deadline, "the engine's actor did not appear"
        time.sleep(0.5)
        family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=90)
    assert not alive, f"left behind: {[_title(process) for process in alive]}"


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
