"""Runs are resumed, stopped, refused and explained: real recipes in real processes with a real Ray."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

TOY = "tests.pipelines.toy:NumberStage"


def danlu(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    """The `danlu` command in a process group of its own, so that a kill takes nothing of the test with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def write_recipe(directory: Path, wait_s: float = 0.0, b: str = "", ray: str = "true") -> None:
    (directory / "recipe.yaml").write_text(
        f"name: toy\nstages:\n"
        f"  a: {{kind: '{TOY}', units: 3, wait_s: {wait_s}, ray: {ray}}}\n"
        f"  b: {{kind: '{TOY}', input: [a], units: 6, wait_s: {wait_s}, ray: {ray}{b}}}\n"
        f"  c: {{kind: '{TOY}', input: [b], ray: {ray}}}\n",
        encoding="utf-8",
    )


def parquet(directory: Path) -> dict[str, str]:
    run = directory / "runs" / "toy"
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.rglob("*.parquet"))}


def status(directory: Path) -> dict[str, str]:
    record = json.loads((directory / "runs" / "toy" / "run.json").read_text())
    return {name: stage["status"] for name, stage in record["stages"].items()}


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(directory: Path, pattern: str) -> None:
    deadline = time.monotonic() + 90
    while not list((directory / "runs").glob(pattern)):
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("undisturbed")
    write_recipe(directory)
    code, out, err = finish(danlu(directory, "run", "recipe.yaml"))
    assert code == 0, err
    assert (directory / out.strip().splitlines()[-1]).name == "report.html"
    return parquet(directory)


@pytest.mark.slow
def test_kill_of_the_driver_then_the_same_command_gives_the_same_bytes(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    write_recipe(tmp_path, wait_s=0.4)
    for moment in ("toy/a/*/units/*1.json", "toy/b/*/units/*2.json", "toy/b/*/manifest.json"):
        process = danlu(tmp_path, "run", "recipe.yaml")
        wait_for(tmp_path, moment)
        os.kill(process.pid, signal.SIGKILL)
        finish(process)
    records = list((tmp_path / "runs").glob("toy/b/*/units/*.json"))
    before = {path: path.stat().st_mtime_ns for path in records}
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code == 0, err
    assert parquet(tmp_path) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in records} == before, "a committed unit was done again"


def test_ctrl_c_stops_cleanly_says_how_to_go_on_and_a_second_run_is_refused_meanwhile(tmp_path: Path) -> None:
    write_recipe(tmp_path, wait_s=6.0)
    process = danlu(tmp_path, "run", "recipe.yaml")
    wait_for(tmp_path, "toy/a/*/units/*0.json")
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code == 2
    assert f"in use by process {process.pid}" in err
    os.kill(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "Go on with: danlu run recipe.yaml" in err
    assert status(tmp_path) == {"a": "pending", "b": "pending", "c": "pending"}
    assert (tmp_path / "runs" / "toy" / "report.html").exists()


def test_a_failing_stage_fails_the_run_by_name_and_an_edit_redoes_that_stage_and_those_after_it(tmp_path: Path) -> None:
    write_recipe(tmp_path, b=", fail: 'the disk ate it'", ray="false")
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code == 1
    assert "stage b" in err
    assert "the disk ate it" in err
    assert status(tmp_path) == {"a": "done", "b": "failed", "c": "pending"}
    (manifest,) = (tmp_path / "runs" / "toy" / "a").glob("*/manifest.json")
    before = manifest.stat().st_mtime_ns
    write_recipe(tmp_path, ray="false")
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code == 0, err
    assert "a: done before" in err
    assert manifest.stat().st_mtime_ns == before
    assert set(status(tmp_path).values()) == {"done"}


def test_what_a_finished_stage_made_can_be_refused_and_a_raised_bound_does_not_make_it_again(tmp_path: Path) -> None:
    write_recipe(tmp_path, b=", most: 5", ray="false")
    for told in ("b: FAILED: 6 rows are more than 5", "a: done before"):
        code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
        assert code == 1 and told in err and "b: FAILED: 6 rows are more than 5" in err
        assert status(tmp_path) == {"a": "done", "b": "failed", "c": "pending"}
    (manifest,) = (tmp_path / "runs" / "toy" / "b").glob("*/manifest.json")
    before = manifest.stat().st_mtime_ns
    write_recipe(tmp_path, b=", most: 6", ray="false")
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code == 0 and "b: done before" in err and manifest.stat().st_mtime_ns == before
    write_recipe(tmp_path, b=", most: 2", ray="false")
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code == 1 and "6 rows are more than 2" in err and "c: done before" in err


def test_an_output_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml", "--runs", str(tmp_path / "file" / "runs")))
    assert code == 2
    assert "error:" in err
    assert "Traceback" not in err


def test_usage_errors_have_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    for arguments, told in [
        (["run", "nothing.yaml"], "no recipe at nothing.yaml"),
        (["ops", "show", "gopher_qualty"], "did you mean 'gopher_quality'"),
        (["report", "."], "is no run"),
        (["trace", ".", "x"], "is no run"),
    ]:
        code, _, err = finish(danlu(tmp_path, *arguments))
        assert code == 2
        assert told in err
        assert "Traceback" not in err


def test_a_stage_that_follows_reads_rows_of_a_stage_that_is_still_running_and_no_ray_is_started(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: toy\nstages:\n  gate: {kind: 'tests.pipelines.toy:GateStage', awaited: 'echo/*/units/00000000.json'}\n"
        "  echo: {kind: 'tests.pipelines.toy:EchoStage', input: [gate]}\n",
        encoding="utf-8",
    )
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code == 0, err
    assert "Ray" not in err
    manifests = {path.parts[-3]: json.loads(path.read_text()) for path in (tmp_path / "runs" / "toy").glob("*/*/manifest.json")}
    assert manifests["echo"]["ledger"]["kept"] == manifests["gate"]["ledger"]["kept"] == 2


def test_a_stage_that_follows_one_that_fails_stops_and_is_not_called_done(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: toy\nstages:\n"
        "  gate: {kind: 'tests.pipelines.toy:GateStage', awaited: 'echo/*/units/00000000.json', then_fail: true}\n"
        "  echo: {kind: 'tests.pipelines.toy:EchoStage', input: [gate]}\n",
        encoding="utf-8",
    )
    code, _, err = finish(danlu(tmp_path, "run", "recipe.yaml"))
    assert code != 0
    assert "the gate is broken" in err
    assert status(tmp_path) == {"gate": "failed", "echo": "pending"}
