"""Starting or joining Ray."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from dataclasses import dataclass

import psutil

_MOST_OBJECT_STORE_BYTES = 2 << 30
_LEAST_OBJECT_STORE_BYTES = 256 << 20


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
    256 MiB and 2 GiB, because text never enters it. No dashboard, no usage report.

    Raises ConnectionError when there is no Ray at `address`.
    """
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's C++ core says on the driver's standard error
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            memory = psutil.virtual_memory().total
            store = object_store_bytes or min(_MOST_OBJECT_STORE_BYTES, max(_LEAST_OBJECT_STORE_BYTES, memory // 5))
            ray.init(
                num_cpus=cpus or max(4, 2 * (os.cpu_count() or 1)),
                object_store_memory=store,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
    resources = ray.cluster_resources()
    return Connection(ray.get_runtime_context().gcs_address, resources.get("CPU", 0.0), resources.get("GPU", 0.0), address is None)


def disconnect() -> None:
    """Leave Ray; ends it when `connect` started it here."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def gpu_count() -> int:
    """GPUs of this machine, by the driver's own tool; 0 without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0
