"""Runs whose every file lies in a real S3 server: the bytes of a local run, whatever happens to the server meanwhile."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from pyarrow import fs

from tests.cluster.object_store import ACCESS, BUCKET, SECRET, Line, ObjectStore
from tests.conftest import ROOT
from tests.faults.test_kill_run import STAGES, finish, outcome, start, write_recipe

RUN = "killed-limit-200"
TRAINING = {
    "base": {
        "kind": "pretrain", "input": "tokens", "steps": 6, "batch_sequences": 4, "checkpoint_every": 3,
        "model": {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1},
    },
}  # fmt: skip


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
def test_a_whole_run_on_the_store_has_the_bytes_of_a_local_one_and_trains(
    tmp_path: Path, store: ObjectStore, local: dict[str, str]
) -> None:
    write_recipe(tmp_path)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text("utf-8"))
    recipe["stages"] |= TRAINING
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
    finish(on_store(tmp_path, store, "whole"), tmp_path)
    assert stored(store, "whole") == local
    names = [entry.path for entry in client(store).get_file_info(fs.FileSelector(f"{BUCKET}/whole/{RUN}/base", recursive=True))]
    assert any(name.endswith("model.safetensors") for name in names), names
    again = on_store(tmp_path, store, "whole")
    finish(again, tmp_path)
    assert (tmp_path / "log").read_text("utf-8").count("done before") == len(STAGES) + 1
    environment = {**os.environ, **store.environment(), "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-m", "pipelines", "status", f"s3://{BUCKET}/whole/{RUN}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "done" in told.stdout + told.stderr


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
def test_a_driver_killed_on_the_store_goes_on_with_the_same_command(
    tmp_path: Path, store: ObjectStore, local: dict[str, str]
) -> None:
    """Its lease runs out first; who comes sooner is told who holds the run."""
    write_recipe(tmp_path)
    process = on_store(tmp_path, store, "killed")
    wait(process, tmp_path, begun(store, "killed", "/units/"))
    process.kill()
    process.wait()
    refused = on_store(tmp_path, store, "killed")
    assert refused.wait(60) == 2
    assert "is in use by process" in (log := (tmp_path / "log").read_text("utf-8")), log[-2000:]
    deadline = time.monotonic() + 150
    while (again := on_store(tmp_path, store, "killed")).wait(400) == 2:
        assert time.monotonic() < deadline
        time.sleep(5)
    assert again.returncode == 0, (tmp_path / "log").read_text("utf-8")[-3000:]
    assert stored(store, "killed") == local
