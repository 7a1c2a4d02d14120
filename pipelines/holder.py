"""Who holds a run's directory, seen from another process: the lock of a local run, the lease of one on an object store."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from dataclasses import dataclass

import psutil

from cluster import lease, storage

_LOCK = re.compile(r"process (\d+) on (\S+)(?: since (\S+))?")


@dataclass(frozen=True)
class Holder:
    """The process that holds the directory, or was the last to hold it. `since` is ISO 8601, None of an older version's lock."""

    host: str
    process: int
    since: str | None
    alive: bool

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" + (f" since {self.since}" if self.since else "")


def look(run_directory: str) -> Holder | None:
    """The last holder, alive or not; None where no run ever held the directory, or the last one gave a remote lease back.

    A local lock is taken shared for a moment, which `runner.hold` waits out; where the lock is held, the kernel tells it, also
    after a `kill -9`. A lease counts as alive for 90 seconds after it was renewed (cluster.lease).
    """
    if storage.is_remote(run_directory):
        held = lease.look(run_directory)
        return None if held is None else Holder(held.host, held.process, held.since, held.alive)
    path = storage.local_path(storage.join(run_directory, ".lock"))
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        return None
    with file:
        match = _LOCK.match(file.read())
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False
        except BlockingIOError:
            alive = True
    if match is None:
        return Holder("an unknown host", 0, None, alive) if alive else None
    holder = Holder(match[2], int(match[1]), match[3], alive)
    if alive and holder.host == socket.gethostname() and holder.process != os.getpid() and not psutil.pid_exists(holder.process):
        return Holder(holder.host, 0, holder.since, alive)  # a child of a killed run still has the file open
    return holder
