"""Lists of domains and addresses as sorted hashes: millions of lines in eight bytes each, looked up by binary search.

A list of domains may be written one a line, as a hosts file (`0.0.0.0 example.com`) or as an ad blocker's list
(`||example.com^`); `#` begins a comment. A domain blocks all hosts below it: `example.com` blocks `a.b.example.com`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator

import numba
import numpy as np

from cluster import storage
from operators.sources.streams import read_blocks
from operators.text.words import hash_bytes, hash_text

_CARRIED_BYTES = 1 << 20  # a longer line is no domain


def punycode(host: str) -> str:
    """The host in lower case with labels of other scripts in ASCII (IDNA 2003); as it is where that cannot be."""
    host = host.strip().strip(".").lower()
    if host.isascii():
        return host
    for stop in "\u3002\uff0e\uff61":
        host = host.replace(stop, ".")
    try:
        return host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        return host


def hashes(paths: Iterable[str], entries: Iterable[str], domains: bool) -> np.ndarray:
    """uint64, sorted and unique, of the lines of files (any compression that sources read) and of `entries`.

    Read once a process, and again when a file changes.
    """
    return _read(tuple((path, _stamp(path)) for path in paths), tuple(entries), domains)


def _stamp(path: str) -> int:
    return storage.size(path) if storage.is_remote(path) else os.stat(storage.local_path(path)).st_mtime_ns


@functools.lru_cache(maxsize=16)
def _read(paths: tuple[tuple[str, int], ...], entries: tuple[str, ...], domains: bool) -> np.ndarray:
    parts = [_of_lines(block, domains) for path, _ in paths for block in _whole_lines(path)]
    parts.append(_of_lines("".join(f"{entry}\n" for entry in entries).encode(), domains))
    return np.unique(np.concatenate(parts))


def _whole_lines(path: str) -> Iterator[bytes]:
    """Blocks that end with a line feed. Raises ValueError for a line that no list has."""
    rest = b""
    for block in read_blocks(path):
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = block[end:]
        else:
            rest += block
        if len(rest) > _CARRIED_BYTES:
            raise ValueError(f"{path} has a line of more than {_CARRIED_BYTES} bytes: it is no list with one entry a line")
    if rest:
        yield rest + b"\n"


def _of_lines(lines: bytes, domains: bool) -> np.ndarray:
    data = np.frombuffer(lines, np.uint8)
    found, other = _hash_lines(data, domains)
    extra = [lines[start:end].decode("utf-8", "replace") for start, end in other.tolist()]  # sparse: lines that are not ASCII
    converted = [punycode(text) if domains else text.strip() for text in extra]
    return np.concatenate([found, np.array([hash_text(text) for text in converted], np.uint64)])


@numba.njit(cache=True, nogil=True)
def _hash_lines(data, domains):  # type: ignore[no-untyped-def]
    """(uint64 hash of every ASCII line that is an entry, int64[n, 2] start and end of every other line)."""
    count = 0
    for byte in data:
        count += byte == 10
    found, other = np.empty(count, np.uint64), np.empty((count, 2), np.int64)
    entries = others = begin = 0
    lowered = np.empty(1 << 12, np.uint8)
    for i in range(len(data)):
        if data[i] != 10:
            continue
        start, end = begin, i
        begin = i + 1
        while start < end and data[start] <= 32:
            start += 1
        if start == end or data[start] == 35 or data[start] == 33:  # empty, # or !
            continue
        if domains:
            for j in range(start, end):
                if data[j] == 35:
                    end = j
                    break
        while end > start and data[end - 1] <= 32:
            end -= 1
        if domains:
            for j in range(end - 1, start - 1, -1):  # the last field of a hosts file's line
                if data[j] <= 32:
                    start = j + 1
                    break
            while end > start and (data[end - 1] == 94 or data[end - 1] == 46 or data[end - 1] == 47):  # ^ . /
                end -= 1
            while start < end and (data[start] == 124 or data[start] == 42 or data[start] == 46):  # | * .
                start += 1
        if start == end or end - start > len(lowered):
            continue
        ascii_only = True
        for j in range(start, end):
            byte = data[j]
            ascii_only = ascii_only and byte < 128
            lowered[j - start] = byte + 32 if domains and 65 <= byte <= 90 else byte
        if ascii_only:
            found[entries] = hash_bytes(lowered, 0, end - start)
            entries += 1
        else:
            other[others, 0], other[others, 1] = start, end
            others += 1
    return found[:entries].copy(), other[:others].copy()


@numba.njit(cache=True, nogil=True)
def _contains(table, value):  # type: ignore[no-untyped-def]
    low, high = 0, len(table)
    while low < high:
        middle = (low + high) // 2
        if table[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low < len(table) and table[low] == value


@numba.njit(cache=True, nogil=True)
def listed_suffix(data, offsets, table):  # type: ignore[no-untyped-def]
    """int64[rows]: where in its host the longest listed domain begins, in bytes; -1 where none is listed.

    `data` and `offsets` are the buffers of a column of hosts, as `punycode` writes them.
    """
    out = np.full(len(offsets) - 1, -1, np.int64)
    if not len(table):
        return out
    for row in range(len(offsets) - 1):
        first, last = offsets[row], offsets[row + 1]
        for start in range(first, last):
            if (start == first or data[start - 1] == 46) and _contains(table, hash_bytes(data, start, last)):
                out[row] = start - first
                break
    return out


@numba.njit(cache=True, nogil=True)
def listed(data, offsets, table):  # type: ignore[no-untyped-def]
    """bool[rows]: whether the whole text of a row is in the list."""
    out = np.zeros(len(offsets) - 1, np.bool_)
    for row in range(len(offsets) - 1):
        out[row] = (
            len(table) > 0
            and offsets[row] < offsets[row + 1]
            and _contains(table, hash_bytes(data, offsets[row], offsets[row + 1]))
        )
    return out


@numba.njit(cache=True, nogil=True)
def count_words(data, offsets, table):  # type: ignore[no-untyped-def]
    """int32[rows]: how many different listed words stand in a row between signs; a word is a run of a-z and 0-9."""
    out = np.zeros(len(offsets) - 1, np.int32)
    if not len(table):
        return out
    seen = np.zeros(64, np.uint64)
    for row in range(len(offsets) - 1):
        start, count = offsets[row], 0
        for i in range(offsets[row], offsets[row + 1] + 1):
            inside = i < offsets[row + 1] and (97 <= data[i] <= 122 or 48 <= data[i] <= 57)
            if inside:
                continue
            if i > start and count < len(seen):
                value = hash_bytes(data, start, i)
                if _contains(table, value):
                    new = True
                    for k in range(count):
                        new = new and seen[k] != value
                    if new:
                        seen[count] = value
                        count += 1
            start = i + 1
        out[row] = count
    return out
