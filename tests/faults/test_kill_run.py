"""A run that is killed at any moment goes on with the same command, and its Parquet is the same to the byte."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from operators import shards
from tests.conftest import ROOT

STAGES = ["web", "docs", "clean", "bpe", "tokens"]


def write_recipe(directory: Path) -> None:
    """The quickstart's own corpus, dedup, tokenizer and pack stages, on a part of its data."""
    recipe = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    stages = {name: recipe["stages"][name] for name in STAGES}
    for name in ("web", "docs"):
        stages[name]["operators"] = [entry for entry in stages[name]["operators"] if "score_quality" not in entry]
        stages[name]["batch_rows"] = 64
    stages["docs"]["read"]["max_unit_bytes"] = 1 << 20
    stages["clean"]["keep"] = "first"
    stages["bpe"]["vocab_size"] = 2000
    text = yaml.safe_dump({"name": "killed", "seed": 17, "stages": stages}, allow_unicode=True)
    (directory / "recipe.yaml").write_text(text, encoding="utf-8")
    (directory / "examples").symlink_to(ROOT / "examples")


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    with (directory / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "run", "recipe.yaml", "--limit", "200", *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], directory: Path) -> None:
    code = process.wait(timeout=400)
    assert code == 0, (directory / "log").read_text(encoding="utf-8")[-4000:]


def outcome(directory: Path) -> dict[str, str]:
    """SHA-256 of every Parquet, bitmap and binary file of the finished stages, by its path."""
    run = directory / "runs" / "killed-limit-200"
    kinds = ("*.parquet", "*.bits", "tokens.bin", "tokenizer.json")
    files = [path for kind in kinds for path in run.glob(f"*/*/**/{kind}")]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def wait_for(process: subprocess.Popen[str], directory: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list((directory / "runs" / "killed-limit-200").glob(pattern)):
        assert process.poll() is None, (directory / "log").read_text(encoding="utf-8")[-4000:]
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.02)


def descendants(process: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue  # it ended while we looked
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("undisturbed")
    write_recipe(directory)
    finish(start(directory, "--workers", "1"), directory)
    for name in STAGES:
        (stage,) = (directory / "runs" / "killed-limit-200" / name).iterdir()
        manifest = shards.load_manifest(str(stage))
        manifest.ledger.check(name)
        assert json.loads((stage / "manifest.json").read_text(encoding="utf-8"))["kind"] == manifest.kind
    return outcome(directory)


@pytest.mark.slow
def test_the_driver_killed_in_each_stage_then_the_same_command_gives_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    write_recipe(tmp_path)
    for moment in ("docs/*/units/*.json", "clean/*/keys"):
        process = start(tmp_path)
        wait_for(process, tmp_path, moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finish(start(tmp_path), tmp_path)
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_killed_child_and_a_killed_worker_cost_only_their_unit(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    write_recipe(tmp_path)
    process = start(tmp_path)
    wait_for(process, tmp_path, "web/*/.scratch")
    for child in descendants(process, "operators.supervise"):
        child.kill()
    wait_for(process, tmp_path, "docs/*/units/*.json")
    for worker in descendants(process, "MapWorker"):
        worker.kill()
    finish(process, tmp_path)
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_ray_itself_killed_then_the_same_command_gives_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str], victim: str
) -> None:
    write_recipe(tmp_path)
    process = start(tmp_path)
    wait_for(process, tmp_path, "docs/*/units/*.json")
    (server,) = [found for found in descendants(process, victim) if victim in found.name()]
    server.kill()
    try:
        code = process.wait(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the run hangs after {victim} was killed: " + (tmp_path / "log").read_text(encoding="utf-8")[-3000:])
    assert code != 0
    finish(start(tmp_path), tmp_path)
    assert outcome(tmp_path) == undisturbed
