"""The run's log: one JSON object a line in `log.jsonl`, or in pieces below `log/` where the run lies in an object store.

    {"time": "2026-05-01T10:00:00.000Z", "level": "info", "run": "web", "stage": "pages", "message": "done", "seconds": 12.1}

It is bounded: a local file is moved to `log.1.jsonl` (and so on) at a size, and the oldest goes; of pieces the oldest go.
Credentials are taken out before a line is kept: values of the environment under names such as `..._TOKEN`, and whatever has the
shape of a key of a known service, a password in a URL, or a random value behind a name such as `api_key =`.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

from cluster import storage
from operators.text import secrets

Level = Literal["info", "warning", "error"]

MAX_BYTES = 8 << 20
"""Size at which `log.jsonl` is moved aside; each of the older files is about as large."""
KEPT_FILES = 4
"""Older files that stay beside `log.jsonl`."""
KEPT_PIECES = 512
"""Pieces that stay in an object store; one holds what came between two writings of status.json."""
_MAX_TEXT = 4000  # characters of one value: the start of a long message says what went wrong
_BUFFERED_BYTES = 4 << 20  # lines kept for a store that does not answer; then the oldest go, and their number is told
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
_NO_SECRET = re.compile(r"^(true|false|none|auto|\d{1,6}|(/|\./|~/).*)$", re.IGNORECASE)  # flags, numbers, places of files


class Journal:
    """Appends to a run's log. Thread-safe; use it while the run's directory is held. Raises OSError when it cannot write."""

    def __init__(self, run_directory: str, run: str) -> None:
        self._directory, self._run = run_directory, run
        self._remote = storage.is_remote(run_directory)
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._dropped = 0
        self._last_piece = 0

    def write(self, level: Level, message: str, *, stage: str | None = None, unit: int | str | None = None, **numbers: Any) -> None:
        """Add one line. Locally it is with the system when this returns; for an object store it waits for `flush`."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record: dict[str, Any] = {"time": now, "level": level, "run": self._run}
        record |= {key: value for key, value in (("stage", stage), ("unit", unit)) if value is not None}
        record |= {"message": message, **numbers}
        line = json.dumps(redacted(record), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if not self._remote:
                self._append(line)
                return
            self._waiting.append(line)
            self._waiting_bytes += len(line)
            while self._waiting_bytes > _BUFFERED_BYTES:
                self._waiting_bytes -= len(self._waiting.pop(0))
                self._dropped += 1

    def flush(self) -> None:
        """Write what waits for an object store as one piece, and remove the oldest pieces beyond the bound."""
        with self._lock:
            lines, dropped = self._waiting, self._dropped
            self._waiting, self._waiting_bytes, self._dropped = [], 0, 0
        if not lines:
            return
        if dropped:
            lost = {"level": "warning", "run": self._run, "message": "lines of the log were lost: the store did not answer"}
            lines = [json.dumps({**lost, "lines": dropped}).encode() + b"\n", *lines]
        self._last_piece = max(time.time_ns() // 1000, self._last_piece + 1)
        folder = storage.join(self._directory, "log")
        storage.write_bytes(storage.join(folder, f"{self._last_piece:018d}.jsonl"), b"".join(lines))
        pieces = storage.list_files(folder)
        for entry in pieces[: max(0, len(pieces) - KEPT_PIECES)]:
            storage.delete(entry.path)

    def _append(self, line: bytes) -> None:
        path = storage.local_path(storage.join(self._directory, "log.jsonl"))
        if path.exists() and path.stat().st_size + len(line) > MAX_BYTES:
            for number in range(KEPT_FILES, 0, -1):
                older = path.with_name(f"log.{number - 1}.jsonl") if number > 1 else path
                if older.exists():
                    os.replace(older, path.with_name(f"log.{number}.jsonl"))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def read(run_directory: str) -> Iterator[dict[str, Any]]:
    """The lines of a run's log, oldest first. A line torn by a crash is left out."""
    names = [f"log.{number}.jsonl" for number in range(KEPT_FILES, 0, -1)] + ["log.jsonl"]
    paths = [path for name in names if storage.exists(path := storage.join(run_directory, name))]
    if storage.exists(folder := storage.join(run_directory, "log")):
        paths += [entry.path for entry in storage.list_all(folder) if entry.relative.endswith(".jsonl")]
    for path in paths:
        for line in storage.read_bytes(path).splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def redacted(value: Any) -> Any:
    """A plain value with credentials taken out of its texts and long texts cut."""
    if isinstance(value, dict):
        return {str(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = without_secrets(str(value))
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ... ({len(text):,} characters)"


def masked(value: Any) -> Any:
    """A plain value with credentials taken out of its texts, nothing cut: what manifests and run.json hold of a recipe."""
    if isinstance(value, dict):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def without_secrets(text: str) -> str:
    """A text with credentials taken out."""
    for name, secret in os.environ.items():
        if len(secret) >= 6 and _SECRET_NAME.search(name) and not _NO_SECRET.match(secret) and secret in text:
            text = text.replace(secret, f"[{name}]")
    data = text.encode("utf-8", "surrogatepass")
    pieces, end = [], 0
    for start, stop in secrets.find(data):
        pieces += [data[end:start], b"[secret]"]
        end = stop
    return b"".join([*pieces, data[end:]]).decode("utf-8", "backslashreplace") if pieces else text
