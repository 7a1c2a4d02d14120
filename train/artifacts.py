"""Directories that libraries insist on having on a local disk: models, checkpoints, memory maps.

A stage's directory may be a URI. What lies there is copied once to this machine (`train.node_cache`); what is made here is
built in a temporary directory and then becomes visible at its destination, whole or not at all (a local directory by rename,
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
from train import node_cache
from train.node_cache import Remote, cache_directory

__all__ = ["MARKER", "building", "cache_directory", "is_complete", "local_directory", "local_file", "publish", "write_marker"]

MARKER = "complete.json"


def local_file(path: str, sha256: str | None = None) -> Path:
    """The file on this machine's disk; a remote one is fetched once into the node's cache and held to `sha256` where given.

    Raises FileNotFoundError, or node_cache.CacheError.
    """
    if not storage.is_remote(path):
        found = storage.local_path(path)
        if not found.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return found
    [entry] = storage.list_files(path)
    name = path.rsplit("/", 1)[-1]
    directory = node_cache.fetch(_key([path, entry.size, sha256 or entry.mtime_ns]), [Remote(path, name, entry.size, sha256)])
    return directory / name


def local_directory(path: str) -> Path:
    """The directory on this machine's disk; a remote one is fetched once, held to the checksums of its `complete.json`.

    Raises FileNotFoundError when there is none, or node_cache.CacheError.
    """
    if not storage.is_remote(path):
        found = storage.local_path(path)
        if not found.is_dir():
            raise FileNotFoundError(f"no such directory: {path}")
        return found
    entries = storage.list_files(path)
    marked = any(entry.relative == MARKER for entry in entries)
    sums = json.loads(storage.read_bytes(storage.join(path, MARKER))).get("sha256", {}) if marked else {}
    files = [Remote(entry.path, entry.relative, entry.size, sums.get(entry.relative)) for entry in entries]
    return node_cache.fetch(_key([path, [[e.relative, e.size, e.mtime_ns] for e in entries]]), files)


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


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
    """List the files of a finished directory with their sizes and SHA-256 in `complete.json`, which is written last and synced."""
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
    sums = {name: storage.sha256_of(str(local / name)) for name in files}
    storage.write_bytes(str(local / MARKER), json.dumps({"files": files, "sha256": sums}, indent=1).encode())


def is_complete(path: str) -> bool:
    """True when the directory has a marker and every file it lists has the listed size."""
    marker = storage.join(path, MARKER)
    if not storage.exists(marker):
        return False
    files = json.loads(storage.read_bytes(marker))["files"]
    return all(
        storage.exists(storage.join(path, name)) and storage.size(storage.join(path, name)) == size for name, size in files.items()
    )
