"""Files by one spelling: a local path, `file://`, `s3://`, `gs://` and `hdfs://` behave alike.

Nothing here relies on rename of a remote object. A file becomes visible whole or not at all: local files are written
beside their destination and linked in, remote ones are a single upload that the store makes visible at its end.
A store that fails to answer is asked again (`cluster.remote`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import fs as pafs

from cluster import disk, remote

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://")
_GLOB = re.compile(r"[*?\[]")
_BLOCK = 8 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file found by `list_files`: its full path, its path relative to the root that was asked for, size in bytes."""

    path: str
    relative: str
    size: int
    mtime_ns: int


def is_remote(path: str) -> bool:
    """True for every URI except `file://`."""
    return bool(_SCHEME.match(path)) and not path.startswith("file://")


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path inside it.

    Raises ValueError when the scheme is not one that pyarrow knows, or when a URI holds credentials.
    """
    if is_remote(path):
        return remote.open_filesystem(path)
    if path.startswith("file://"):
        try:
            return pafs.FileSystem.from_uri(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"cannot open {path!r}: {error}") from error
    return pafs.LocalFileSystem(), os.path.abspath(path)


def absolute(path: str, base: str) -> str:
    """`path` as it is if absolute or a URI, otherwise below `base`."""
    if _SCHEME.match(path) or os.path.isabs(path):
        return path
    return join(base, path)


def join(base: str, *names: str) -> str:
    """Join with one `/`, for local paths and URIs."""
    return "/".join([base.rstrip("/") or "/", *(name.strip("/") for name in names)])


def exists(path: str) -> bool:
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def size(path: str) -> int:
    """Size in bytes. Raises FileNotFoundError."""
    filesystem, inner = resolve(path)
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(path)
    return int(info.size or 0)


def modified_ns(path: str) -> int:
    """When a file was last written, in nanoseconds since 1970 by the clock of its store. Raises FileNotFoundError."""
    filesystem, inner = resolve(path)
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(path)
    return int(info.mtime_ns or 0)


def make_directory(path: str) -> None:
    filesystem, inner = resolve(path)
    filesystem.create_dir(inner, recursive=True)


def list_files(pattern: str) -> list[FileEntry]:
    """The files that a path, directory or glob names, in order of their relative path.

    A directory is listed recursively; names starting with `.` or `_` are left out. `*` does not cross `/`, `**` does.
    Raises FileNotFoundError when nothing matches.
    """
    match = _GLOB.search(pattern)
    root = pattern if match is None else pattern[: pattern.rfind("/", 0, match.start()) + 1] or "."
    filesystem, inner = resolve(root)
    info = filesystem.get_file_info(inner)
    if match is None and info.type == pafs.FileType.File:
        return [FileEntry(pattern, os.path.basename(inner), int(info.size), int(info.mtime_ns or 0))]
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(f"no such file or directory: {pattern}")
    prefix = inner.rstrip("/") + "/"
    wanted = None if match is None else re.compile(_translate(pattern[len(root) :] if root != "." else pattern))
    found = []
    for entry in filesystem.get_file_info(_below(inner, True)):
        if entry.type != pafs.FileType.File:
            continue
        relative = entry.path[len(prefix) :] if entry.path.startswith(prefix) else entry.path
        if any(name.startswith((".", "_")) for name in relative.split("/")):
            continue
        if wanted is None or wanted.match(relative):
            found.append(FileEntry(join(root, relative), relative, int(entry.size), int(entry.mtime_ns or 0)))
    if not found:
        raise FileNotFoundError(f"no file matches: {pattern}")
    return sorted(found, key=lambda entry: entry.relative)


def _translate(glob: str) -> str:
    """A regular expression for a glob in which `*` stops at `/` and `**` does not."""
    pieces = []
    for piece in re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", glob):
        if piece in ("**", "**/"):
            pieces.append("(?:.*/)?" if piece.endswith("/") else ".*")
        elif piece == "*":
            pieces.append("[^/]*")
        elif piece == "?":
            pieces.append("[^/]")
        elif piece.startswith("["):
            pieces.append(fnmatch.translate(piece)[4:-3])
        else:
            pieces.append(re.escape(piece))
    return "".join(pieces) + r"\Z"


def open_input(path: str) -> pa.NativeFile:
    """A seekable reader."""
    filesystem, inner = resolve(path)
    return filesystem.open_input_file(inner)


def read_bytes(path: str) -> bytes:
    with open_input(path) as stream:
        return stream.read()


_READERS, _AHEAD = 32, 256


def read_each(paths: Iterable[str]) -> Iterator[bytes]:
    """The content of many small files in their order, remote ones fetched beside each other; a few hundred are in memory."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting = iter(paths)
        while ahead := list(itertools.islice(waiting, _AHEAD)):
            yield from (pool.map(read_bytes, ahead) if is_remote(ahead[0]) else map(read_bytes, ahead))


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file; a reader sees the old content or the new, never a part."""
    if is_remote(path):
        upload(path, len(data), lambda stream: stream.write(data))
        return
    _, inner = resolve(path)
    temporary = _write_beside(inner, data)
    os.replace(temporary, inner)


def create_if_absent(path: str, data: bytes) -> bool:
    """Create a file unless it exists; False when it was there already. Atomic for local files.

    On an object store the check and the upload are two steps: two writers of one unit may both succeed, which is
    harmless because a unit's content depends on the unit alone.
    """
    if is_remote(path):
        if exists(path):
            return False
        write_bytes(path, data)
        return True
    _, inner = resolve(path)
    temporary = _write_beside(inner, data)
    try:
        os.link(temporary, inner)
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)


def _write_beside(inner: str, data: bytes) -> str:
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    temporary = os.path.join(os.path.dirname(inner), f".{os.path.basename(inner)}.{uuid.uuid4().hex}")
    try:
        with disk.writing(temporary), open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    return temporary


def scratch_file(directory: str) -> str:
    """A fresh local path to write before `publish`: beside the destination when that is local, else in the temp folder."""
    if is_remote(directory):
        return os.path.join(tempfile.gettempdir(), f"danlu-{uuid.uuid4().hex}")
    _, inner = resolve(directory)
    os.makedirs(os.path.join(inner, ".scratch"), exist_ok=True)
    return os.path.join(inner, ".scratch", uuid.uuid4().hex)


def publish(local: str, destination: str) -> None:
    """Move a finished local file to its destination, visible at once; the destination may exist with the same content."""
    if is_remote(destination):
        with open(local, "rb") as source:
            upload(destination, os.path.getsize(local), lambda stream: _blocks(source, stream))
        os.unlink(local)
        return
    _, inner = resolve(destination)
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    with disk.writing(local), open(local, "rb") as source:
        os.fsync(source.fileno())
    os.replace(local, inner)


def upload(destination: str, size: int, write: Callable[[BinaryIO], object]) -> None:
    """Make a remote object of `size` bytes of what `write` writes; it is called again, from the first byte, where the store
    fails to answer. A reader sees the object whole or not at all."""
    filesystem, inner = resolve(destination)

    def attempt() -> None:
        try:
            # by default pyarrow compresses what has a name that ends in .gz, compressed as it may be
            with filesystem.open_output_stream(inner, compression=None) as stream:
                write(stream)
        finally:
            # A stream is completed when it is closed, even after an error: what it made of several parts must be whole, or
            # go. What fits one request is there whole or as it was before.
            if size > _BLOCK:
                made = filesystem.get_file_info(inner)
                if made.type == pafs.FileType.File and made.size != size:
                    filesystem.delete_file(inner)
                    if sys.exc_info()[0] is None:
                        raise OSError(f"{destination}: unexpected end of stream, {made.size} of {size} bytes arrived")

    filesystem.handler.patiently(destination, attempt)


def _blocks(source: BinaryIO, stream: BinaryIO) -> None:
    """Copy a file from its first byte."""
    source.seek(0)
    while block := source.read(_BLOCK):
        stream.write(block)


def delete(path: str) -> None:
    """Remove a file or a directory tree; nothing happens if it is absent."""
    filesystem, inner = resolve(path)
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif info.type == pafs.FileType.File:
        filesystem.delete_file(inner)


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open_input(path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def local_path(path: str) -> Path:
    """The local path behind a path or `file://` URI. Raises ValueError for a remote one."""
    if is_remote(path):
        raise ValueError(f"{path!r} is not on this machine's disk")
    return Path(resolve(path)[1])


def list_beside(path: str) -> list[FileEntry]:
    """The files directly in a directory, hidden ones too, in order; none when it does not exist."""
    return list_all(path, recursive=False)


def list_all(path: str, recursive: bool = True) -> list[FileEntry]:
    """Every file below a directory, those that `list_files` leaves out too, in order; none when it does not exist."""
    filesystem, inner = resolve(path)
    if filesystem.get_file_info(inner).type != pafs.FileType.Directory:
        return []
    prefix = inner.rstrip("/") + "/"
    found = []
    for entry in filesystem.get_file_info(_below(inner, recursive)):
        if entry.type == pafs.FileType.File:
            relative = entry.path.removeprefix(prefix)
            found.append(FileEntry(join(path, relative), relative, int(entry.size), int(entry.mtime_ns or 0)))
    return sorted(found, key=lambda entry: entry.relative)


def _below(inner: str, recursive: bool) -> pafs.FileSelector:
    """What lies below a folder; some stores know an empty one when they are asked for it, and not when it is listed."""
    return pafs.FileSelector(inner, recursive=recursive, allow_not_found=True)


def list_directories(path: str) -> list[str]:
    """The directories directly below a directory, in order; empty when it does not exist."""
    filesystem, inner = resolve(path)
    if filesystem.get_file_info(inner).type != pafs.FileType.Directory:
        return []
    found = [e.base_name for e in filesystem.get_file_info(_below(inner, False)) if e.type == pafs.FileType.Directory]
    return [join(path, name) for name in sorted(found) if not name.startswith(".")]


def copy(source: str, destination: str) -> None:
    """Copy one file; the copy appears whole."""
    local = scratch_file(destination.rsplit("/", 1)[0])
    try:
        with open_input(source) as stream, disk.writing(local), open(local, "wb") as target:
            while block := stream.read(_BLOCK):
                target.write(block)
        publish(local, destination)
    except BaseException:
        if os.path.exists(local):
            os.unlink(local)
        raise
