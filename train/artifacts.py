"""Directories that libraries insist on having on a local disk: models, checkpoints, memory maps.

A stage's directory may be a URI. What lies there is copied once to this machine; what is made here is built in a
temporary directory and then becomes visible at its destination, whole or not at all (a local directory by rename,
a remote one by uploading its `complete.json` last).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import storage

MARKER = "complete.json"


def cache_directory() -> Path:
    """Where copies of remote files live on this machine: `$DANLU_CACHE`, else `danlu` in the temporary directory."""
    path = Path(os.environ.get("DANLU_CACHE") or os.path.join(tempfile.gettempdir(), "danlu"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def local_file(path: str) -> Path:
    """The file on this machine's disk; a remote one is downloaded the first time, named by its path and size.

    Raises FileNotFoundError.
    """
    if not storage.is_remote(path):
        found = storage.local_path(path)
        if not found.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return found
    key = hashlib.sha256(f"{path}:{storage.size(path)}".encode()).hexdigest()[:32]
    target = cache_directory() / key / path.rsplit("/", 1)[-1]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(path, target)
    return target


def _download(path: str, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with storage.open_input(path) as source, open(temporary, "wb") as sink:
        while block := source.read(8 << 20):
            sink.write(block)
    os.replace(temporary, target)


def local_directory(path: str) -> Path:
    """The directory on this machine's disk; every file of a remote one is downloaded once.

    Raises FileNotFoundError when there is none.
    """
    if not storage.is_remote(path):
        found = storage.local_path(path)
        if not found.is_dir():
            raise FileNotFoundError(f"no such directory: {path}")
        return found
    entries = storage.list_files(path)
    key = hashlib.sha256(json.dumps([path, [[e.relative, e.size, e.mtime_ns] for e in entries]]).encode()).hexdigest()[:32]
    target = cache_directory() / key
    for entry in entries:
        copy = target / entry.relative
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            _download(entry.path, copy)
    return target


@contextmanager
def building(destination: str) -> Iterator[Path]:
    """A temporary local directory that becomes `destination` when the block ends well, with a `complete.json` in it.

    An existing destination is replaced.
    """
    if storage.is_remote(destination):
        with tempfile.TemporaryDirectory(prefix="danlu-") as scratch:
            local = Path(scratch)
            yield local
            publish(local, destination)
        return
    final = storage.local_path(destination)
    final.parent.mkdir(parents=True, exist_ok=True)
    local = final.parent / f".{final.name}.{uuid.uuid4().hex}"
    local.mkdir()
    try:
        yield local
        write_marker(local)
        if final.exists():
            shutil.rmtree(final)
        os.rename(local, final)
    finally:
        shutil.rmtree(local, ignore_errors=True)


def publish(local: Path, destination: str) -> None:
    """Upload a local directory, its marker last."""
    write_marker(local)
    names = json.loads((local / MARKER).read_text())["files"]
    for name in [*sorted(names), MARKER]:
        storage.write_bytes(storage.join(destination, name), (local / name).read_bytes())


def write_marker(local: Path) -> None:
    """List the files of a finished directory with their sizes in `complete.json`, which is written last and synced."""
    files = {
        entry.relative_to(local).as_posix(): entry.stat().st_size
        for entry in sorted(local.rglob("*"))
        if entry.is_file() and entry.name != MARKER
    }
    for name in files:
        descriptor = os.open(local / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    storage.write_bytes(str(local / MARKER), json.dumps({"files": files}, indent=1).encode())


def is_complete(path: str) -> bool:
    """True when the directory has a marker and every file it lists has the listed size."""
    marker = storage.join(path, MARKER)
    if not storage.exists(marker):
        return False
    files = json.loads(storage.read_bytes(marker))["files"]
    return all(
        storage.exists(storage.join(path, name)) and storage.size(storage.join(path, name)) == size for name, size in files.items()
    )
