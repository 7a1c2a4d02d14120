"""A small HTTP server for tests that says what a test tells it to say, however wrong that is."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


@dataclass
class Call:
    """A request as it came: method and path, headers with small names, the JSON body."""

    method: str
    path: str
    headers: dict[str, str]
    body: Body

    @property
    def text(self) -> str:
        """The last message."""
        return str(self.body["messages"][-1]["content"])


@dataclass
class Answer:
    """What goes back: a status and a body; or `raw` bytes, after which the connection is closed; or nothing, ever (`hang`)."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    hang: bool = False


def said(text: str, finish: str = "stop", tokens: int | None = None, **usage: Any) -> Answer:
    """A sound answer of a model."""
    counts = {"prompt_tokens": 10, "completion_tokens": max(1, len(text) // 4) if tokens is None else tokens, **usage}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Answer(body=json.dumps({"choices": [choice], "usage": counts}).encode())


def error(status: int, message: str, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    return Answer(status, json.dumps({"error": {"message": message, **fields}}).encode(), headers or {})


class Server:
    """Answers `answer(call, number)` to chat requests, counted from 0; `/models` lists a model of vLLM unless `models` is set."""

    def __init__(self, answer: Callable[[Call, int], Answer], port: int = 0) -> None:
        self.answer = answer
        self.models = Answer(body=json.dumps({"data": [{"id": "m", "owned_by": "vllm"}]}).encode())
        self.calls: list[Call] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._socket = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        try:
            with connection, connection.makefile("rb") as stream:
                while (call := _read(stream)) is not None:
                    answer = self._decide(call)
                    if answer.hang:
                        self._ended.wait(30)
                        return
                    connection.sendall(_written(answer))
                    if answer.raw is not None:
                        return
        except OSError:
            return  # the client went away
        finally:
            with self._lock:
                self._open.discard(connection)

    def _decide(self, call: Call) -> Answer:
        if call.path.endswith("/models"):
            return self.models
        with self._lock:
            number = len(self.calls)
            self.calls.append(call)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return self.answer(call, number)
        finally:
            with self._lock:
                self.under_way -= 1


def _read(stream: Any) -> Call | None:
    first = stream.readline().decode().split()
    if len(first) < 3:
        return None
    headers: dict[str, str] = {}
    while line := stream.readline().decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    data = stream.read(int(headers.get("content-length", 0)))
    return Call(first[0], first[1], headers, json.loads(data) if data else {})


def _written(answer: Answer) -> bytes:
    if answer.raw is not None:
        return answer.raw
    headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body)), **answer.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {answer.status} Whatever\r\n{head}\r\n".encode() + answer.body


@contextmanager
def serving(answer: Callable[[Call, int], Answer]) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()
