"""Runs whose every file lies in a real S3 server: the bytes of a local run, whatever happens to the server meanwhile."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from cluster import storage
from cluster.remote import StoreGone
from operators import shards
from operators.corpus import run_unit
from operators.supervise import Report, Task
from tests.cluster.object_store import ACCESS, BUCKET, SECRET, Line, ObjectStore
from tests.conftest import ROOT
from tests.faults.test_disk_full import corpus_units, files, run_corpus, write_rows
from tests.faults.test_kill_run import RUN, STAGES, comparable, finish, outcome, start, write_recipe, write_whole_recipe
from tests.operators.synthesis.server import Server, said


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    found = ObjectStore(tmp_path_factory.mktemp("store"))
    yield found
    found.kill()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("local")
    write_recipe(directory)
    finish(start(directory), directory)
    return outcome(directory)


def on_store(directory: Path, store: ObjectStore, runs: str, endpoint: str | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "run", "recipe.yaml", "--limit", "200", "--runs", f"s3://{BUCKET}/{runs}"]
    environment = {**os.environ, **store.environment(endpoint), "PYTHONPATH": str(ROOT)}
    with (directory / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log, text=True)


def client(store: ObjectStore) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        access_key=ACCESS, secret_key=SECRET, endpoint_override=f"127.0.0.1:{store.port}", scheme="http", region="us-east-1"
    )


def stored(store: ObjectStore, runs: str) -> dict[str, str]:
    """As `outcome`, of a run in the store."""
    filesystem, root = client(store), f"{BUCKET}/{runs}/{RUN}"
    found = {}
    for entry in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        relative = entry.path.removeprefix(root + "/")
        wanted = entry.path.endswith((".parquet", ".bits")) or entry.base_name in ("tokens.bin", "tokenizer.json")
        if entry.type == fs.FileType.File and wanted and relative.split("/")[0] in STAGES:
            with filesystem.open_input_stream(entry.path) as stream:
                found[relative] = hashlib.sha256(stream.read()).hexdigest()
    return dict(sorted(found.items()))


def begun(store: ObjectStore, runs: str, what: str) -> Callable[[], bool]:
    def seen() -> bool:
        selector = fs.FileSelector(f"{BUCKET}/{runs}/{RUN}", recursive=True, allow_not_found=True)
        return any(what in entry.path for entry in client(store).get_file_info(selector))

    return seen


def wait(process: subprocess.Popen[str], directory: Path, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert process.poll() is None, (directory / "log").read_text("utf-8")[-3000:]
        assert time.monotonic() < deadline, (directory / "log").read_text("utf-8")[-3000:]
        time.sleep(0.2)


@pytest.mark.slow
def test_everything_on_the_store_has_the_bytes_of_a_local_run_and_every_command_works_there(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, shards, replies, tokens (mapped from a verified local copy), checkpoints, models and scores."""
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    for path in (ROOT / "examples" / "data").iterdir():
        if path.is_file():
            storage.write_bytes(f"s3://{BUCKET}/data/{path.name}", path.read_bytes())
    model = Server(lambda call, number: said("答 " + hashlib.sha256(call.text.encode()).hexdigest()))
    write_whole_recipe(tmp_path / "local", str(ROOT / "examples" / "data"), model.url)
    write_whole_recipe(tmp_path / "s3", f"s3://{BUCKET}/data", model.url)
    finish(start(tmp_path / "local", "--train-workers", "1"), tmp_path / "local")
    run, arguments = f"s3://{BUCKET}/everything/{RUN}", ("--runs", f"s3://{BUCKET}/everything", "--train-workers", "1")
    finish(start(tmp_path / "s3", *arguments), tmp_path / "s3")
    model.close()
    there = {entry.relative: storage.sha256_of(entry.path) for entry in storage.list_all(run)}
    folder = tmp_path / "local" / "runs" / RUN
    here = {str(p.relative_to(folder)): storage.sha256_of(str(p)) for p in folder.rglob("*") if p.is_file()}
    assert comparable(there) == comparable(here)
    kinds = {name.rsplit(".", 1)[-1] for name in comparable(there)}
    assert {"parquet", "bits", "bin", "json", "safetensors"} <= kinds
    assert list((tmp_path / "cache" / "fetched").glob("*/tokens.bin")), "tokens are mapped from a copy"

    def danlu(*words: str) -> str:
        command = [sys.executable, "-m", "pipelines", *words]
        made = subprocess.run(
            command, cwd=tmp_path / "s3", env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        return made.stdout + made.stderr

    assert '"state": "done"' in danlu("status", run, "--json")
    [part, *_] = [entry for entry in storage.list_files(f"{run}/web") if "/parts/" in entry.path]
    with storage.open_input(part.path) as stream:
        document = pq.read_table(stream)["id"][0].as_py()
    assert "sequence" in danlu("trace", run, document)
    danlu("clean", run)
    storage.delete(f"{run}/report.html")
    danlu("report", run)
    assert "killed" in storage.read_bytes(f"{run}/report.html").decode()
    assert comparable({entry.relative: storage.sha256_of(entry.path) for entry in storage.list_all(run)}) == comparable(here)
    # the last checkpoint and all after it are gone, as after a kill: training goes on from step 3 to the same model
    for stage in ("base", "chat", "scores"):
        [directory] = storage.list_directories(f"{run}/{stage}")
        for entry in storage.list_all(directory):
            if stage != "base" or "step-00000003" not in entry.relative:
                storage.delete(entry.path)
    kept = {entry.relative: entry.mtime_ns for entry in storage.list_all(f"{run}/base")}
    finish(start(tmp_path / "s3", *arguments), tmp_path / "s3")
    assert kept.items() <= {entry.relative: entry.mtime_ns for entry in storage.list_all(f"{run}/base")}.items()
    again = {entry.relative: storage.sha256_of(entry.path) for entry in storage.list_all(run)}
    assert comparable(again) == comparable(here)


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_run_and_away_for_a_minute(
    tmp_path: Path, store: ObjectStore, local: dict[str, str]
) -> None:
    write_recipe(tmp_path)
    process = on_store(tmp_path, store, "away")
    wait(process, tmp_path, begun(store, "away", "/units/"))
    store.kill()
    time.sleep(60)
    assert process.poll() is None, (tmp_path / "log").read_text("utf-8")[-3000:]
    store.start()
    finish(process, tmp_path)
    assert stored(store, "away") == local


@pytest.mark.slow
def test_slow_answers_and_bursts_of_503_change_nothing(tmp_path: Path, store: ObjectStore, local: dict[str, str]) -> None:
    write_recipe(tmp_path)
    line = Line(store.port)
    line.delay_s = 0.05
    process = on_store(tmp_path, store, "busy", line.endpoint)
    wait(process, tmp_path, begun(store, "busy", "/docs/"))
    for _ in range(5):
        line.refused, line.cut = 20, 3
        time.sleep(2)
    finish(process, tmp_path)
    line.close()
    assert stored(store, "busy") == local


@pytest.mark.slow
def test_a_driver_killed_on_the_store_goes_on_at_once_with_the_same_command_and_a_second_run_is_refused(
    tmp_path: Path, store: ObjectStore, local: dict[str, str]
) -> None:
    """On the same machine it is seen that the holder is dead; elsewhere its lease runs out (tests/cluster/test_remote.py)."""
    write_recipe(tmp_path)
    process = on_store(tmp_path, store, "killed")
    wait(process, tmp_path, begun(store, "killed", "/units/"))
    refused = on_store(tmp_path, store, "killed")
    assert refused.wait(60) == 2
    assert f"is in use by process {process.pid} on " in (tmp_path / "log").read_text("utf-8")
    process.kill()
    process.wait()
    finish(on_store(tmp_path, store, "killed"), tmp_path)
    assert stored(store, "killed") == local


@pytest.mark.slow
def test_an_outage_longer_than_the_patience_is_told_with_the_stores_name_and_the_same_command_goes_on(
    tmp_path: Path, store: ObjectStore, local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    monkeypatch.setenv("DANLU_STORAGE_PATIENCE_S", "5")
    process = on_store(tmp_path, store, "gone")
    wait(process, tmp_path, begun(store, "gone", "/units/"))
    store.kill()
    code = process.wait(180)
    store.start()
    log = (tmp_path / "log").read_text("utf-8")
    assert code == 1, log[-3000:]
    assert f"s3://{BUCKET} at {store.endpoint} has not answered for" in log and "Traceback" not in log, log[-3000:]
    assert "the same command goes on where it stopped" in log
    finish(on_store(tmp_path, store, "gone"), tmp_path)
    assert stored(store, "gone") == local


@pytest.fixture
def units(tmp_path: Path, line: Line) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Units of a corpus stage that reads from the store and writes to it; the files that they are to make."""
    write_rows(tmp_path / "in.jsonl", 1200)
    storage.write_bytes(f"s3://{BUCKET}/{tmp_path.name}/in.jsonl", (tmp_path / "in.jsonl").read_bytes())
    calm = corpus_units(str(tmp_path / "in.jsonl"), str(tmp_path / "calm"))
    run_corpus(calm)
    folder = f"s3://{BUCKET}/{tmp_path.name}"
    return corpus_units(f"{folder}/in.jsonl", f"{folder}/docs"), files(calm[0]["directory"])


def at(moment: int, act: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """What hears a unit's messages, and acts on the one of that number."""
    heard = itertools.count()
    return lambda message: act() if next(heard) == moment else None


def test_a_server_killed_while_a_unit_is_read_and_started_again_changes_nothing(
    units: tuple[list[dict[str, Any]], dict[str, str]], object_store: ObjectStore
) -> None:
    stages, wanted = units
    back = threading.Timer(2.0, object_store.start)

    def kill() -> None:
        object_store.kill()
        back.start()

    run_corpus(stages, at(15, kill))
    back.join()
    assert files(stages[0]["directory"]) == wanted


def test_bursts_of_503_broken_and_slow_answers_while_units_are_done_change_nothing(
    units: tuple[list[dict[str, Any]], dict[str, str]], line: Line
) -> None:
    stages, wanted = units
    line.delay_s = 0.01

    def disturb() -> None:
        line.refused, line.cut, line.cut_after = 8, 2, 5000

    run_corpus(stages, at(13, disturb))
    assert line.refused == 0
    assert files(stages[0]["directory"]) == wanted


def test_units_that_a_store_is_gone_for_end_with_its_name_and_go_on_where_they_stopped(
    units: tuple[list[dict[str, Any]], dict[str, str]], line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, wanted = units
    monkeypatch.setenv("DANLU_STORAGE_PATIENCE_S", "0.5")

    def refuse() -> None:
        line.refused = 10_000

    with pytest.raises(StoreGone, match=f"s3://{BUCKET} at {line.endpoint} has not answered"):
        run_corpus(stages, at(15, refuse))
    line.refused = 0
    directory = stages[0]["directory"]
    assert 0 < len(shards.committed_numbers(directory)) < len(stages)
    assert not storage.exists(storage.join(directory, "manifest.json"))
    run_corpus(stages)
    assert files(directory) == wanted


def test_the_requests_of_a_unit_are_few(units: tuple[list[dict[str, Any]], dict[str, str]], line: Line) -> None:
    """What docs/storage.md tells: an upload for the rows and one for the time; the record is looked for, then made."""
    stages, _ = units
    before = line.answered
    run_unit(Task(stages[0]), Report(lambda message: None))
    reading = 2
    assert line.answered - before == reading + 5
