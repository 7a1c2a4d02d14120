from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import connect

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import os
os.environ["RAY_ADDRESS"] = "10.255.255.1:1"
from cluster import connect
first = connect.connect(cpus=3, object_store_bytes=128 << 20)
again = connect.connect()
import ray
stores = [node["Resources"]["object_store_memory"] for node in ray.nodes()]
print(first == again, first.cpus, first.started_here, stores == [128 << 20])
import ipaddress, psutil
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
open_to = {ipaddress.ip_address(c.laddr.ip) for p in family for c in p.net_connections() if c.status == "LISTEN"}
print(bool(open_to), [str(ip) for ip in open_to if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback])
connect.disconnect()
connect.disconnect()
print(ray.is_initialized())
"""


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_that_was_there_before_is_used_and_stays() -> None:
    import ray

    found = connect.connect()
    assert (found.cpus, found.started_here) == (4.0, False)
    assert found.address == ray.get_runtime_context().gcs_address
    connect.disconnect()
    assert ray.is_initialized()


def test_a_local_ray_is_started_once_and_ended_whatever_the_environment_names() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.splitlines() == ["True 3.0 True True", "True []", "False"], done.stderr


def test_no_ray_at_an_address_is_a_connection_error() -> None:
    script = (
        "from cluster import connect\ntry:\n    connect.connect('127.0.0.1:1')\nexcept ConnectionError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert "no Ray answers at '127.0.0.1:1'" in done.stdout, done.stderr
