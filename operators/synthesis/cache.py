"""The reply cache: no reply is paid for twice, whatever becomes of the run that asked for it.

Replies live in `<directory>/*.jsonl`, one JSON object a line, appended and synced batch by batch. A reply is found by
`Request.key`, so changing a parser, a filter or a threshold reads the same replies again, while another model, prompt,
sampling setting or seed does not find them. A line torn by a crash is skipped.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable

import orjson

from cluster import storage
from operators.synthesis.requests import Reply


class ReplyCache:
    """Replies by key. In memory there is only where each lies: about 200 bytes a reply.

    Thread-safe. Locally a cache appends to `<name>.jsonl` (processes may share it: each write is one append); on an
    object store every batch is an object of its own. All files of the directory are read.
    """

    def __init__(self, directory: str, name: str) -> None:
        self._directory, self._name = directory, name
        self._lock = threading.Lock()
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._remote = storage.is_remote(directory)
        if storage.exists(directory):
            try:
                entries = storage.list_files(storage.join(directory, "*.jsonl"))
            except FileNotFoundError:
                entries = []
            for entry in entries:
                self._index(entry.path)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Reply | None:
        """The reply to a request, if it has been received before."""
        with self._lock:
            place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        path, offset, size = place
        with storage.open_input(path) as stream:
            stream.seek(offset)
            row = orjson.loads(stream.read(size))
        return Reply(row["text"], row["finish"], row["prompt_tokens"], row["completion_tokens"])

    def put(self, replies: Iterable[tuple[str, Reply]]) -> None:
        """Store replies; they are on disk when this returns. Raises OSError when they cannot be (a full disk)."""
        rows = [(key, _line(key, reply)) for key, reply in replies]
        if not rows:
            return
        data = b"".join(line for _, line in rows)
        with self._lock:
            if self._remote:
                path, offset = storage.join(self._directory, f"{self._name}-{uuid.uuid4().hex}.jsonl"), 0
                storage.write_bytes(path, data)
            else:
                path = storage.join(self._directory, f"{self._name}.jsonl")
                offset = self._append(path, data)
            for key, line in rows:
                self._places[bytes.fromhex(key)] = (path, offset, len(line))
                offset += len(line)

    def _append(self, path: str, data: bytes) -> int:
        """Append whole lines and sync; returns the offset of the first. A torn tail is closed with a line end before."""
        inner = storage.local_path(path)
        inner.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(inner, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                data = b"\n" + data
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            # another process may have appended meanwhile: the write ended where this descriptor now stands
            return os.lseek(descriptor, 0, os.SEEK_CUR) - len(data) + (data[:1] == b"\n")
        finally:
            os.close(descriptor)

    def _index(self, path: str) -> None:
        offset = 0
        with storage.open_input(path) as stream:
            rest = b""
            while block := stream.read(8 << 20):
                lines = (rest + block).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    self._remember(path, offset, line)
                    offset += len(line) + 1
            self._remember(path, offset, rest)

    def _remember(self, path: str, offset: int, line: bytes) -> None:
        if not line:
            return
        try:
            key = bytes.fromhex(orjson.loads(line)["key"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return  # torn by a crash: the reply is drawn again
        self._places[key] = (path, offset, len(line))


def _line(key: str, reply: Reply) -> bytes:
    row = {
        "key": key,
        "text": reply.text,
        "finish": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
