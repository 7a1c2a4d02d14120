"""Starting or joining Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from cluster import token

_MOST_OBJECT_STORE_BYTES = 2 << 30
_LEAST_OBJECT_STORE_BYTES = 256 << 20
_CONNECT_TIMEOUT_S = 10.0
_SERVERS = ("raylet", "gcs_server")
_STARTS = 3
_PULSE_S = 3.0
_RAY_GIVES_UP_S = 60.0
_HEALTH = {"health_check_failure_threshold": 60}
"""A lone node is not given up by its own control process because the machine was slow, or asleep, for a minute."""
_servers: dict[str, psutil.Process] = {}  # of the Ray that this process started

_connected_here = False  # whether this module, not the program around it, connected the process to Ray


class Pulse:
    """Whether the control process at an address (host:port) takes connections: what a driver asks that joined a cluster.

    Ray's own answer to a control process that is gone is to wait a minute and then to end the driver without a word.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._asked = self._answered = time.monotonic()
        # one that cannot be reached from here at all (a driver outside the cluster, by ray://) tells nothing
        self._known = self._answers()

    def lost(self) -> float | None:
        """Seconds since it answered, once Ray is about to give it up; None while there is hope. Asks every few seconds."""
        now = time.monotonic()
        if not self._known or now - self._asked < _PULSE_S:
            return None
        self._asked = now
        if self._answers():
            self._answered = now
        silent = now - self._answered
        patience = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", _RAY_GIVES_UP_S))  # noqa: SIM112
        return silent if silent > 0.75 * patience else None

    def _answers(self) -> bool:
        try:
            socket.create_connection((self._host.strip("[]"), self._port), timeout=2.0).close()
        except OSError:
            return False
        return True


@dataclass(frozen=True)
class Connection:
    """The Ray that this process is connected to."""

    address: str
    cpus: float
    gpus: float
    started_here: bool


def connect(address: str | None = None, cpus: int | None = None, object_store_bytes: int | None = None) -> Connection:
    """Start a local Ray sized to the machine, or join the one at `address`. Idempotent.

    Logical CPUs are at least twice the cores: engines, training workers and data tasks wait on each other, and with
    one logical CPU a core the waiting ones would starve the others. The object store is a fifth of the memory, between
    256 MiB and 2 GiB, because text never enters it. No dashboard, no usage report. A process that is connected to a Ray
    already keeps that one.

    Raises ConnectionError when there is no Ray at `address`, or none can be started, PermissionError when it asks for another
    token than ours (`cluster.token`).
    """
    import ray
    from ray.exceptions import AuthenticationError

    global _connected_here
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's C++ core says on the driver's standard error
        if address is not None:
            _check_reachable(address)
            token.use(on_this_machine=address == "auto")
            if "://" not in address and address.rpartition(":")[2].isdigit() and not token.accepted(address):
                raise token.refusal(address)
            try:
                with _quietly():
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except AuthenticationError:
                ray.shutdown()
                raise token.refusal(address) from None
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise ConnectionError(f"no Ray answers at {address!r}: {error}") from error
        else:
            memory = psutil.virtual_memory().total
            store = object_store_bytes or min(_MOST_OBJECT_STORE_BYTES, max(_LEAST_OBJECT_STORE_BYTES, memory // 5))
            start_local(cpus or max(4, 2 * (os.cpu_count() or 1)), store)
        _connected_here = True
    resources = ray.cluster_resources()
    gcs = ray.get_runtime_context().gcs_address
    return Connection(gcs, resources.get("CPU", 0.0), resources.get("GPU", 0.0), _connected_here and address is None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Ray's core, when it is asked to be quiet, says on standard error that it was: all but that line goes on at the end."""
    sys.stderr.flush()
    ours = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(ours, 2)
            os.close(ours)
            held.seek(0)
            for line in held:
                if b"Set ray log level from environment" not in line:
                    os.write(2, line)


def start_local(cpus: int, object_store_bytes: int) -> None:
    """`ray.init`, tried again where a busy machine takes longer than the 30 seconds that Ray allows its own servers.

    With a token, and on loopback: no other machine reaches its servers, and a network that comes, goes or changes its address (a
    laptop's, a container's) does not end it.
    """
    import ray
    from ray._private import ray_constants

    token.keep_private()
    before = {child.pid for child in psutil.Process().children()}
    routed = ray_constants.ENABLE_RAY_CLUSTER
    for attempt in range(_STARTS):
        try:
            ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's own switch (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) for loopback
            with _quietly():
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says, and beside any cluster that runs on this machine
                    num_cpus=cpus,
                    object_store_memory=object_store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                    _system_config=_HEALTH,
                )
            _servers.update({child.name(): child for child in psutil.Process().children() if child.name() in _SERVERS})
            return
        except Exception as error:
            ray.shutdown()
            _end([child for child in psutil.Process().children() if child.pid not in before])
            if "timed out during startup" not in str(error) or attempt == _STARTS - 1:
                raise ConnectionError(f"Ray could not be started on this machine: {error}") from error
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = routed  # joining a cluster needs the address that others reach


def _check_reachable(address: str) -> None:
    """Raises ConnectionError at once where nothing listens: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"no Ray answers at {address!r}: {error}") from error


def _end(servers: list[psutil.Process]) -> None:
    """End what a failed `ray.init` leaves running: it forgets the servers that had started."""
    for server in servers:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.kill()
    psutil.wait_procs(servers, timeout=10)


def disconnect() -> None:
    """Leave Ray if `connect` joined it, end it if `connect` started it; a Ray that was there before stays."""
    global _connected_here
    if _connected_here and connected():
        import ray

        ray.shutdown()
        _servers.clear()
    _connected_here = False


def connected() -> bool:
    """True when this process is connected to a Ray."""
    ray = sys.modules.get("ray")  # importing it takes seconds, which a run without Ray need not spend
    return ray is not None and bool(ray.is_initialized())


def gpu_count() -> int:
    """GPUs of this machine, by the driver's own tool; 0 without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def ended_servers() -> list[str]:
    """Names of the servers of a Ray started here that have ended (`raylet`, `gcs_server`); empty while all is well.

    Ray's own answer to a dead server is to wait a minute and then to end the driver without a word.
    """
    return [name for name, server in _servers.items() if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE]
