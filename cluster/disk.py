"""Full disks: which one it is, how much of it is free, and what moves the files that lie on it elsewhere.

The system says that a device has no space left, as a rule without a name. What writes a large file does it in `writing`,
which names the disk. For what libraries write, `full` guesses on the same machine, soon after: of the few folders that
Danlu uses, the one with the least room.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_GO_ON = "and run the same command again: it goes on where it stopped"


class DiskFull(OSError):
    """A disk is full. The message names its folder, the machine, the room that is left and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def is_full(error: BaseException) -> bool:
    """Whether an error, of this process or told by another, is that of a full disk."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or bool(_FULL.search(str(error)))


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Around the writing of a local file. Raises DiskFull with the name of its disk."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskFull) or not is_full(error):
            raise
        folder = os.path.dirname(os.path.abspath(path))
        raise _told(error, folder, _places().get(folder, "take another --runs")) from error


def full(error: BaseException, directory: str | None = None) -> DiskFull:
    """What to raise in the place of an error that `is_full`, on the machine where it came up.

    `directory` is that of the stage (or a URI: then what lies on a node's disk is local copies and scratch alone).
    """
    if isinstance(error, DiskFull) or _GO_ON in str(error):  # told already, perhaps by another machine
        return DiskFull(str(error))
    places = _places()
    if directory is not None and os.path.isabs(directory):
        places[directory] = "take another --runs"
    folder = min(places, key=lambda folder: _room(folder)[:2])
    return _told(error, folder, places[folder])


def _places() -> dict[str, str]:
    """Folders of a node that hold copies and scratch, and how each is moved."""
    cache = os.environ.get("DANLU_CACHE")
    found = {os.path.abspath(cache): "name another folder in DANLU_CACHE"} if cache else {}
    return {**found, os.path.abspath(tempfile.gettempdir()): "name another folder in TMPDIR"}


def _told(error: BaseException, folder: str, moved: str) -> DiskFull:
    files, free, size = _room(folder)
    left = f"{_bytes(free)} of {_bytes(size)} are free" if files else "it takes no more files (inodes)"
    plain = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().splitlines()[-1]
    return DiskFull(
        f"the disk is full that holds {folder} on {socket.gethostname()}: {left} ({plain}). Make room there, or {moved}, {_GO_ON}"
    )


def _room(folder: str) -> tuple[int, int, int]:
    """Of a folder's disk (its parent's, where it is not there): 0 when it takes no more files, else 1; bytes free; bytes in all."""
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    found = os.statvfs(folder)
    return int(not found.f_files or found.f_favail > 0), found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
