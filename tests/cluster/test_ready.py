from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.ready import wait_for_nodes

ROOT = Path(__file__).resolve().parents[2]


def test_a_head_that_never_answers_is_told_and_ends_with_an_exit_code() -> None:
    words = [sys.executable, "-m", "cluster.ready", "--address", "127.0.0.1:1", "--nodes", "1", "--timeout", "0.1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Ray answers at '127.0.0.1:1'") and "Traceback" not in done.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_nodes_are_waited_for_no_longer_than_asked() -> None:
    began = time.monotonic()
    assert wait_for_nodes("127.0.0.1:0", 1, timeout_s=60) == 1
    assert time.monotonic() - began < 30
    assert wait_for_nodes("127.0.0.1:0", 2, timeout_s=0.2) == 1
