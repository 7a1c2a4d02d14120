"""Copies of remote files on a node's own disk: fetched once, verified, bounded in size.

Below `$DANLU_CACHE` (else `danlu` in the temporary directory) `fetched/<key>/` holds the files of one remote file or
directory and, written last, `.complete.json` with their sizes and SHA-256. `locks/<key>` is locked exclusively (flock) while a
copy is fetched or removed, so that the processes of a node fetch once; a process that uses a copy holds the lock shared until it
ends, so that nothing in use is ever removed. The kernel lets locks go with their process, also after `kill -9`; what such
a process left half-written is thrown away by the next.

A copy is taken as sound when sizes and times of its files are those at its verification; otherwise, or always with
`$DANLU_CACHE_VERIFY=1`, it is read through and fetched again if it differs. Copies are removed, least recently used first, when
a new one would not fit `$DANLU_CACHE_BYTES` (`400GB`; default: half of the disk).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import storage

_RECORD = ".complete.json"
_BLOCK = 8 << 20
_PATIENCE_S = 30.0
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


class CacheError(OSError):
    """A remote file that cannot be had on this node: says which, why, and what to change."""


@dataclass(frozen=True)
class Remote:
    """One remote file: its path, its name inside the copy, its size in bytes, and its SHA-256 where somebody recorded it."""

    path: str
    name: str
    size: int
    sha256: str | None = None


def cache_directory() -> Path:
    """Where copies of remote files live on this machine: `$DANLU_CACHE`, else `danlu` in the temporary directory."""
    path = Path(os.environ.get("DANLU_CACHE") or os.path.join(tempfile.gettempdir(), "danlu"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def bound() -> int:
    """The most bytes that copies may take: `$DANLU_CACHE_BYTES`, else half of the disk. Raises ValueError for no size."""
    told = os.environ.get("DANLU_CACHE_BYTES", "").strip()
    if not told:
        return shutil.disk_usage(cache_directory()).total // 2
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", told.upper())
    if match is None:
        raise ValueError(f"DANLU_CACHE_BYTES is {told!r}: write a number of bytes, or a size such as 400GB or 64GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


_held: dict[Path, int] = {}
_held_lock = threading.Lock()


def fetch(key: str, files: Sequence[Remote]) -> Path:
    """The directory that holds copies of these files, which stay there until this process ends.

    Raises FileNotFoundError for a file that is gone, CacheError when the bytes that arrive are not those recorded or the
    copies do not fit.
    """
    directory = cache_directory() / "fetched" / key
    with _held_lock:
        lock = _lock_file(directory)
        if directory not in _held:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _fetch_or_wait(descriptor, directory, files)
            except BaseException:
                os.close(descriptor)
                raise
            _held[directory] = descriptor
        os.utime(lock)
    return directory


def _fetch_or_wait(descriptor: int, directory: Path, files: Sequence[Remote]) -> None:
    """Return with a sound copy and the lock shared; one of the processes that come here at once fetches."""
    deadline = None
    while True:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while another process fetches
        if _sound(directory, files):
            return
        try:
            # A shared lock is let go before it turns exclusive, and is lost if it can't.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline = deadline or time.monotonic() + _PATIENCE_S
            if time.monotonic() > deadline:
                raise CacheError(
                    f"the copy of {files[0].path} at {directory} is damaged, and other processes of this node use it: end them, "
                    "then run again"
                ) from None
            time.sleep(random.uniform(0.01, 0.1))
            continue
        if not _sound(directory, files):
            _fetch(directory, files)


def release() -> None:
    """Let go of all copies that this process holds: they may be removed from now on."""
    with _held_lock:
        while _held:
            os.close(_held.popitem()[1])


def _lock_file(directory: Path) -> Path:
    locks = directory.parent.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / directory.name


def _sound(directory: Path, files: Sequence[Remote]) -> bool:
    """True when the copy holds every file as it was verified."""
    try:
        record = json.loads((directory / _RECORD).read_bytes())
        always = os.environ.get("DANLU_CACHE_VERIFY") == "1"
        for file in files:
            size, digest, changed = record[file.name]
            found = (directory / file.name).stat()
            if size != file.size or found.st_size != size or digest != (file.sha256 or digest):
                return False
            if (always or found.st_mtime_ns != changed) and storage.sha256_of(str(directory / file.name)) != digest:
                return False
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, ValueError):
        return False
    return True


def _fetch(directory: Path, files: Sequence[Remote]) -> None:
    """Download all files anew. The caller holds the lock exclusively."""
    shutil.rmtree(directory, ignore_errors=True)
    record = {}
    with _evicting():
        _make_room(directory, sum(file.size for file in files))
        directory.mkdir(parents=True)
        # What is on its way counts as there, so that downloads side by side do not exceed the bound together.
        (directory / ".bytes").write_text(str(sum(file.size for file in files)))
    try:
        for file in files:
            target = directory / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = _download(file, target)
            record[file.name] = [file.size, digest, target.stat().st_mtime_ns]
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    storage.write_bytes(str(directory / _RECORD), json.dumps(record).encode())


def _download(file: Remote, target: Path) -> str:
    """The SHA-256 of what arrived."""
    digest, size = hashlib.sha256(), 0
    with storage.open_input(file.path) as source, open(target, "wb") as sink:
        while block := source.read(_BLOCK):
            digest.update(block)
            size += len(block)
            sink.write(block)
        sink.flush()
        os.fsync(sink.fileno())
    if size != file.size:
        raise CacheError(f"{file.path}: {size} bytes arrived, {file.size} were expected: was it replaced meanwhile? Run again")
    if file.sha256 is not None and digest.hexdigest() != file.sha256:
        raise CacheError(
            f"{file.path}: the bytes that arrived have SHA-256 {digest.hexdigest()}, the stage recorded {file.sha256}: the "
            "file in the store is damaged; make its stage again"
        )
    return digest.hexdigest()


@contextmanager
def _evicting() -> Iterator[None]:
    """One process of the node at a time counts and removes."""
    descriptor = os.open(_lock_file(cache_directory() / "fetched" / ".evicting"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_room(wanted: Path, size: int) -> None:
    """Remove copies that nobody uses, least recently used first, until `size` bytes fit the bound and the disk."""
    root = wanted.parent
    root.mkdir(parents=True, exist_ok=True)
    most, copies = bound(), []
    for directory in root.iterdir():
        if directory != wanted and directory.is_dir():
            lock = _lock_file(directory)
            copies.append((lock.stat().st_mtime_ns if lock.exists() else 0, directory, _bytes(directory)))
    total, in_use = sum(copy[2] for copy in copies), 0
    for _, directory, taken in sorted(copies):
        if total + size <= most and shutil.disk_usage(root).free >= size:
            return
        if _remove(directory):
            total -= taken
        else:
            in_use += taken
    free = shutil.disk_usage(root).free
    if total + size > most or free < size:
        raise CacheError(
            f"{size} bytes do not fit the local cache at {root.parent}: it may take {most}, {in_use} are in use, the disk has "
            f"{free} free; raise DANLU_CACHE_BYTES, or name a larger disk in DANLU_CACHE"
        )


def _bytes(directory: Path) -> int:
    """What a copy takes, or will take when it is complete."""
    try:
        planned = int((directory / ".bytes").read_text() or 0)
    except (FileNotFoundError, ValueError):
        planned = 0
    taken = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # its download failed meanwhile
                taken += os.stat(os.path.join(folder, name)).st_size
    return max(planned, taken)


def _remove(directory: Path) -> bool:
    """Remove a copy unless a process uses or fetches it."""
    descriptor = os.open(_lock_file(directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
