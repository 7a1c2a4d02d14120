"""Storage on a real S3 server: the same behaviour as on disk, through 503s, broken and slow answers, and a killed server."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import lease, remote, storage
from tests.cluster.object_store import BUCKET, Line, ObjectStore, free_ports
from tests.faults.test_disk_full import corpus_units, files, run_corpus, write_rows


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an emulator of Google's store, which holds the bucket."""
    program = Path(sys.executable).parent / "gcp-storage-emulator"
    if not program.exists():
        pytest.skip("gcp-storage-emulator is not installed")
    (port,) = free_ports(1)
    with open(tmp_path_factory.mktemp("google") / "log", "wb") as log:
        process = subprocess.Popen(
            [program, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    for _ in range(240):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.25)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def google(emulator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", emulator)


@pytest.mark.slow
@pytest.mark.usefixtures("google")
def test_google_s_store_behaves_alike(tmp_path: Path) -> None:
    folder = f"gs://{BUCKET}/{tmp_path.name}"
    names = ["a b.txt", "中文/ＡＢ.txt", "q+a&b=c.txt"]
    for name in names:
        storage.write_bytes(f"{folder}/{name}", name.encode())
    assert [entry.relative for entry in storage.list_files(folder)] == sorted(names)
    assert [storage.read_bytes(entry.path).decode() for entry in storage.list_files(folder)] == sorted(names)
    assert storage.list_directories(folder) == [f"{folder}/中文"]
    storage.delete(f"{folder}/中文")
    assert not storage.exists(f"{folder}/中文/ＡＢ.txt")
    data = content(100_000)  # the emulator answers one connection at a time, and one that is read in pieces stays open
    (tmp_path / "large.gz").write_bytes(data)
    storage.publish(str(tmp_path / "large.gz"), f"{folder}/large.gz")
    assert storage.read_bytes(f"{folder}/large.gz") == data
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{folder}/missing")


@pytest.mark.slow
@pytest.mark.usefixtures("google")
def test_a_corpus_stage_on_google_s_store_has_the_bytes_of_a_local_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 1200)
    folder = f"gs://{BUCKET}/{tmp_path.name}"
    storage.write_bytes(f"{folder}/in.jsonl", (tmp_path / "in.jsonl").read_bytes())
    here, there = (corpus_units(f"{place}/in.jsonl", f"{place}/docs") for place in (tmp_path, folder))
    run_corpus(here)
    run_corpus(there)
    assert len(there) > 1 and files(f"{folder}/docs") == files(str(tmp_path / "docs"))


def test_google_s_store_without_credentials_is_told_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    began = time.monotonic()
    with pytest.raises(PermissionError, match=r"gs://: Google's client has no credentials \(Cannot open .*none\.json"):
        storage.read_bytes(f"gs://{BUCKET}/x")
    assert time.monotonic() - began < 60, "not the whole patience"


@pytest.fixture
def folder(line: Line, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def test_names_are_taken_literally_and_found_again(folder: str) -> None:
    names = ["a b.txt", "中文/ＡＢ.txt", "100%25.txt", "q+a&b=c.txt", "x#y.txt"]
    for name in names:
        storage.write_bytes(f"{folder}/{name}", name.encode())
    found = storage.list_files(folder)
    assert [entry.relative for entry in found] == sorted(names)
    assert [storage.read_bytes(entry.path).decode() for entry in found] == sorted(names)
    assert [entry.relative for entry in storage.list_files(f"{folder}/**/*b.txt")] == ["a b.txt"]
    assert storage.list_directories(folder) == [f"{folder}/中文"]
    storage.delete(f"{folder}/中文")
    assert not storage.exists(f"{folder}/中文/ＡＢ.txt")


def test_what_is_published_arrives_byte_for_byte_whatever_its_name(folder: str, tmp_path: Path) -> None:
    for name, data in {"a.gz": gzip.compress(b"x" * 1000), "b.zst": b"no zstd", "c.parquet": content(12 << 20), "d": b""}.items():
        local = tmp_path / name
        local.write_bytes(data)
        storage.publish(str(local), f"{folder}/{name}")
        assert storage.read_bytes(f"{folder}/{name}") == data
        assert not local.exists()


def test_a_store_that_is_too_busy_is_asked_again(folder: str, line: Line) -> None:
    line.refused = 7
    storage.write_bytes(f"{folder}/x", b"kept")
    line.refused = 7
    assert storage.read_bytes(f"{folder}/x") == b"kept"
    assert line.refused == 0
    line.refused = 4
    assert storage.list_files(folder)[0].size == 4


def test_an_answer_that_breaks_off_is_read_on_and_nothing_twice(folder: str, line: Line) -> None:
    data = content(3 << 20)
    storage.write_bytes(f"{folder}/x", data)
    line.cut, line.cut_after = 2, 300_000
    assert storage.read_bytes(f"{folder}/x") == data
    table = pa.table({"text": [f"第 {n} 行" for n in range(50_000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=1000)
    storage.write_bytes(f"{folder}/t.parquet", buffer.getvalue())
    line.cut, line.cut_after = 2, 5_000
    with storage.open_input(f"{folder}/t.parquet") as stream:
        assert pq.ParquetFile(stream).read_row_group(17).equals(table.slice(17_000, 1000))
    assert line.cut < 2


def test_slow_answers_are_waited_for(folder: str, line: Line) -> None:
    line.delay_s = 0.7
    storage.write_bytes(f"{folder}/x", b"slow")
    assert storage.read_bytes(f"{folder}/x") == b"slow"


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_loses_no_write_and_no_read(folder: str, object_store: ObjectStore) -> None:
    data = content(20 << 20)
    storage.write_bytes(f"{folder}/read", data)
    read: list[bytes] = []

    def work(act: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=act)
        thread.start()
        return thread

    def read_slowly() -> None:
        with storage.open_input(f"{folder}/read") as stream:
            while block := stream.read(1 << 20):
                read.append(block)
                time.sleep(0.1)

    def write_many() -> None:
        for number in range(20):
            storage.write_bytes(f"{folder}/many/{number}", bytes([number]) * 1000)
            time.sleep(0.1)

    threads = [work(read_slowly), work(write_many)]
    time.sleep(0.7)
    object_store.kill()
    time.sleep(2)
    object_store.start()
    for thread in threads:
        thread.join(timeout=120)
    assert b"".join(read) == data
    assert [storage.read_bytes(f"{folder}/many/{number}")[:1] for number in range(20)] == [bytes([n]) for n in range(20)]


def test_a_store_that_never_answers_is_given_up_with_its_name(folder: str, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not again for every file that a run which ends wants to write."""
    waited: list[float] = []
    clock = itertools.count(0.0, 60.0)
    monkeypatch.setattr("cluster.remote.time", types.SimpleNamespace(sleep=waited.append, monotonic=lambda: next(clock)))
    monkeypatch.setenv("DANLU_STORAGE_PATIENCE_S", "100")
    line.refused = 10_000
    with pytest.raises(remote.StoreGone, match=rf"s3://{BUCKET} at {line.endpoint} has not answered for 120 s \(2 tries"):
        storage.read_bytes(f"{folder}/x")
    with pytest.raises(remote.StoreGone, match=r"\(1 tries"):
        storage.write_bytes(f"{folder}/x", b"x")
    line.refused = 0
    storage.write_bytes(f"{folder}/x", b"x")
    line.refused = 10_000
    with pytest.raises(remote.StoreGone, match=r"for 120 s \(2 tries"):
        storage.read_bytes(f"{folder}/x")
    assert len(waited) == 2, "of the three that were given up"
    remote._given_up.clear()


def test_an_object_is_as_it_was_while_the_store_refuses_its_successor(
    folder: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_STORAGE_PATIENCE_S", "1")
    storage.write_bytes(f"{folder}/run.json", b"the one before")
    refusals = 40

    def write(stream: object) -> None:
        line.refused = refusals
        raise OSError("AWS Error SLOW_DOWN during PutObject operation")

    with pytest.raises(remote.StoreGone):
        storage.upload(f"{folder}/run.json", 5, write)
    line.refused = 0
    remote._given_up.clear()
    assert storage.read_bytes(f"{folder}/run.json") == b"the one before"


def test_an_empty_folder_that_is_known_and_not_listed_holds_nothing(folder: str, object_store: ObjectStore) -> None:
    storage.write_bytes(f"{folder}/a/x", b"x")
    object_store.empty_folder(f"{folder[5:]}/a/.scratch")
    assert storage.exists(f"{folder}/a/.scratch")
    assert storage.list_all(f"{folder}/a/.scratch") == storage.list_directories(f"{folder}/a/.scratch") == []
    storage.delete(f"{folder}/a/.scratch")
    assert [entry.relative for entry in storage.list_all(f"{folder}/a")] == ["x"]


def test_wrong_credentials_and_missing_files_are_told_at_once(folder: str, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{folder}/nothing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    remote._s3.cache_clear()
    answered = line.answered
    with pytest.raises(OSError, match=r"ACCESS_DENIED|SIGNATURE"):
        storage.read_bytes(f"{folder}/x")
    assert line.answered - answered <= 4
    remote._s3.cache_clear()


def test_a_file_that_changes_while_it_is_read_is_an_error(folder: str, line: Line) -> None:
    storage.write_bytes(f"{folder}/x", content(2 << 20))
    with storage.open_input(f"{folder}/x") as stream:
        stream.read(1 << 20)
        storage.write_bytes(f"{folder}/x", b"another")
        line.cut, line.cut_after = 4, 100
        with pytest.raises(OSError, match="has changed while it was read"):
            stream.read(1 << 20)


def test_credentials_in_a_path_are_refused() -> None:
    with pytest.raises(ValueError, match="belong in the environment") as refused:
        storage.resolve("s3://key:secret@bucket/x")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("message", "transient"),
    [
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server", True),
        ("AWS Error SLOW_DOWN during PutObject operation", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation", True),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted", True),
        ("AWS Error ACCESS_DENIED during HeadObject operation (HTTP status 403)", False),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", False),
        ("Parquet magic bytes not found in footer", False),
    ],
)
def test_only_what_may_pass_is_asked_again(message: str, transient: bool) -> None:
    assert remote.is_transient(OSError(message)) is transient
    assert not remote.is_transient(FileNotFoundError(message))


def test_a_folder_has_one_holder_and_a_dead_one_is_succeeded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.3)
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    lost: list[str] = []
    first, second = lease.Lease(folder, lost.append), lease.Lease(folder, lost.append)
    first.claim()
    with pytest.raises(lease.LeaseHeld, match=r"process \d+ on \S+ \(last seen"):
        second.claim()
    first.release()
    assert not storage.exists(f"{folder}/.lock")
    second.claim()
    monkeypatch.setattr(lease, "STALE_S", -1.0)  # as if it had been cut off for long
    third = lease.Lease(folder, lost.append)
    third.claim()
    deadline = time.monotonic() + 30
    while not lost and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(lost) == 1
    second.release()
    assert storage.exists(f"{folder}/.lock"), "what belongs to another holder stays"
    third.release()
    assert not storage.exists(f"{folder}/.lock")


def test_a_holder_that_died_on_this_machine_is_succeeded_at_once_and_one_elsewhere_after_its_lease(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    child = subprocess.Popen(["sleep", "60"])
    record = {
        "token": "t", "host": "h", "process": child.pid, "since": "s", "machine": lease._machine(),
        "started": psutil.Process(child.pid).create_time(),
    }  # fmt: skip
    storage.write_bytes(f"{folder}/.lock", json.dumps(record).encode())
    mine = lease.Lease(folder, lambda holder: None)
    with pytest.raises(lease.LeaseHeld, match=f"process {child.pid} on h"):
        mine.claim()
    child.kill()
    child.wait()
    held = lease.look(folder)
    assert held is not None and not held.alive
    storage.write_bytes(f"{folder}/.lock", json.dumps({**record, "machine": "another"}).encode())
    with pytest.raises(lease.LeaseHeld, match=f"process {child.pid} on h"):
        mine.claim()
    monkeypatch.setattr(lease, "STALE_S", 0.0)  # as if 90 seconds had gone by
    mine.claim()
    mine.release()


def test_a_lease_that_cannot_be_renewed_for_a_while_is_renewed_when_the_store_answers(
    folder: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SETTLE_S", "RENEW_S"):
        monkeypatch.setattr(lease, name, 0.1)
    monkeypatch.setenv("DANLU_STORAGE_PATIENCE_S", "0")
    mine = lease.Lease(folder, lambda holder: None)
    mine.claim()
    before = storage.modified_ns(f"{folder}/.lock")
    line.refused = 8
    deadline = time.monotonic() + 60
    while line.refused:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while storage.modified_ns(f"{folder}/.lock") == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    mine.release()


def test_of_many_claimants_at_once_one_holds(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 2.0)
    held: list[lease.Lease] = []

    def claim() -> None:
        mine = lease.Lease(folder, lambda holder: None)
        try:
            mine.claim()
        except lease.LeaseHeld:
            return
        held.append(mine)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    held[0].release()
