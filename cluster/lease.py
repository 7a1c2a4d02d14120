"""One holder at a time of a folder on an object store, which knows no lock: a lease that its holder renews.

pyarrow offers no conditional upload, so a lease is claimed by writing a token, waiting, and reading back which token is there:
the last writer has it. A claimant that was slower than the wait is noticed at the next renewal. Ages are taken from the
store's own clock. What a run writes is named by its content and its unit, so two holders for a moment waste work; they
destroy nothing.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from cluster import storage
from cluster.remote import StoreGone

_LOG = logging.getLogger("danlu.storage")

SETTLE_S = 2.0
RENEW_S = 15.0
STALE_S = 90.0
"""A lease that was not renewed for so long belongs to nobody: its holder was killed or is cut off."""


class LeaseHeld(RuntimeError):
    """Somebody else holds the folder; the message says who."""


class Lease:
    """The right to write below `directory` (a URI), from `claim` to `release`.

    `lost` is called once, from the renewing thread, when another holder's token is found in the place of ours.
    """

    def __init__(self, directory: str, lost: Callable[[str], None]) -> None:
        self._path = storage.join(directory, ".lock")
        self._lost = lost
        self._token = uuid.uuid4().hex
        self._since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self) -> None:
        """Raises LeaseHeld when another holder has renewed its lease in the last 90 seconds, unless it is seen to be dead."""
        holder = self._holder()
        if holder is not None and not _dead(holder) and (age := self._age()) is not None and age < STALE_S:
            raise LeaseHeld(f"{_name(holder)} (last seen {age:.0f} s ago)")
        self._write()
        time.sleep(SETTLE_S)
        holder = self._holder()
        if holder is None or holder["token"] != self._token:
            raise LeaseHeld(_name(holder) if holder else "another process")
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder free, unless it was lost."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(timeout=RENEW_S)
        try:
            holder = self._holder()
            if holder is not None and holder["token"] == self._token:
                storage.delete(self._path)
        except StoreGone as error:
            _LOG.warning("the lease could not be given back, it runs out after %.0f s: %s", STALE_S, error)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                holder = self._holder()
                if holder is not None and holder["token"] != self._token:
                    self._lost(_name(holder))
                    return
                self._write()
            except OSError as error:  # a stage that computes meanwhile may outlast a store that was given up
                _LOG.warning("the lease could not be renewed: %s", error)

    def _write(self) -> None:
        record = {
            "token": self._token, "host": socket.gethostname(), "process": os.getpid(), "since": self._since,
            "machine": _machine(), "started": psutil.Process().create_time(),
        }  # fmt: skip
        storage.write_bytes(self._path, json.dumps(record).encode())

    def _holder(self) -> dict[str, Any] | None:
        return _read(self._path)

    def _age(self) -> float | None:
        return _age(self._path, self._token)


@dataclass(frozen=True)
class Held:
    """What a lease file says: who wrote it, when the holder began (ISO 8601), and the seconds since it was renewed."""

    host: str
    process: int
    since: str | None
    age_s: float
    dead: bool = False  # seen to be, from the same machine

    @property
    def alive(self) -> bool:
        return not self.dead and self.age_s < STALE_S


def look(directory: str) -> Held | None:
    """Who holds the folder, or held it until a kill; None when nobody does. Takes nothing, but writes a file for a moment."""
    path = storage.join(directory, ".lock")
    holder = _read(path)
    age = _age(path, uuid.uuid4().hex) if holder is not None else None
    if holder is None or age is None:
        return None
    return Held(holder["host"], int(holder["process"]), holder.get("since"), age, _dead(holder))


def _read(path: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.read_bytes(path)))
    except FileNotFoundError:
        return None


def _age(path: str, token: str) -> float | None:
    """Seconds since the lease was renewed, both times by the store's clock."""
    now = f"{path}-{token}"
    storage.write_bytes(now, b"")
    try:
        held, here = storage.modified_ns(path), storage.modified_ns(now)
    except FileNotFoundError:
        return None
    finally:
        storage.delete(now)
    return (here - held) / 1e9


def _machine() -> str:
    """What process numbers are counted in: this start of this machine, and the container; empty where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _dead(holder: dict[str, Any]) -> bool:
    """True when the holder was a process of this machine that has ended: nobody has to wait for its lease to run out."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return False
    try:
        process = psutil.Process(int(holder["process"]))
        return bool(process.create_time() != holder["started"] or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']}"
