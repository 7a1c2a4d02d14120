"""`danlu status`, the run's log, and moved runs: told from files, while a run goes, after a kill, and elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from operators import shards
from operators.config import SettingsError
from pipelines import heartbeat, holder, journal
from pipelines.cli import main
from pipelines.heartbeat import Heartbeat
from pipelines.progress import clock
from pipelines.runner import hold
from pipelines.status import Watch
from tests.cluster.object_store import BUCKET, Line
from tests.conftest import ROOT
from tests.pipelines.test_clean import make_run, make_stage
from tests.pipelines.test_runner import wait_for, write_recipe

A, B = "a" * 16, "b" * 16


def test_a_run_at_work_tells_units_rows_pace_and_holder_then_that_it_was_killed_then_that_it_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path, wait_s=3.0, ray="false")
    run = str(tmp_path / "runs" / "toy")
    hurried = "from pipelines import cli, heartbeat; heartbeat.LOCAL_S = 0.1; cli.main(['run', 'recipe.yaml'])"
    process = subprocess.Popen(
        [sys.executable, "-c", hurried], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    wait_for(tmp_path, "toy/a/*/units/*1.json")
    watch, deadline = Watch(run), time.monotonic() + 60
    while True:
        found = watch.look()
        if found.stages[0].done == 2 or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    a, b, _ = found.stages
    assert found.state == "running" and found.holder is not None and found.holder.alive
    assert found.holder.process == process.pid and found.holder.since is not None
    assert (a.status, a.done, a.total, a.units, a.kept, b.status) == ("running", 2, 3, 2, 2, "pending"), found
    assert a.rows_per_second is not None and 0.05 < a.rows_per_second < 2 and a.eta_seconds is not None and a.eta_seconds > 0
    assert main(["status", run]) == 0 and f"toy: running, held by process {process.pid}" in capsys.readouterr().out
    process.kill()
    process.wait()
    found = Watch(run).look()
    assert found.state == "killed" and found.stages[0].status == "killed" and found.stages[0].kept == 2
    assert found.holder is not None and not found.holder.alive and found.holder.process == process.pid
    capsys.readouterr()
    assert main(["status", run, "--json"]) == 1 and json.loads(capsys.readouterr().out)["state"] == "killed"
    write_recipe(tmp_path, ray="false")
    assert main(["run", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]) == 0
    found = Watch(run).look()
    assert found.state == "done" and [stage.kept for stage in found.stages] == [3, 6, 3]
    told = [(line["message"], line.get("stage")) for line in journal.read(run)]
    assert told[:2] == [("run started", None), ("started", "a")] and told[-1] == ("run done", None)
    assert ("done", "c") in told and told.count(("run started", None)) == 2


def test_a_failure_is_told_with_its_reason_by_status_and_log(tmp_path: Path) -> None:
    write_recipe(tmp_path, b=", fail: 'the disk ate it'", ray="false")
    assert main(["run", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]) == 1
    run = str(tmp_path / "runs" / "toy")
    found = Watch(run).look()
    assert found.state == "failed" and "the disk ate it" in found.message
    assert [(stage.status, stage.failures) for stage in found.stages] == [("done", 0), ("failed", 1), ("pending", 0)]
    (line,) = [line for line in journal.read(run) if line["message"] == "failed"]
    assert (line["level"], line["stage"]) == ("error", "b") and "the disk ate it" in line["why"]


def beating(run: str, statuses: dict[str, str]) -> Heartbeat:
    return Heartbeat(run, "r", lambda: statuses, pytest.fail)


def test_retries_and_rows_set_aside_are_counted_and_logged_by_unit(tmp_path: Path) -> None:
    run = str(tmp_path)
    make_stage(run, "one", A, finished=False)
    make_run(run, {"one": A})
    with hold(run, lambda _: None), beating(run, {"one": "running"}) as heart:
        heart.started("one")
        heart.progress("one", 4, 10, "units")
        heart.event(
            "one", "unit retried", {"unit": 7, "attempts": 3, "failed": ["ended by SIGSEGV"] * 2, "set_aside": 1, "rows": {5: "x"}}
        )
        for attempt in (2, 3):
            heart.event("one", "unit started again", {"unit": 8, "attempt": attempt, "failed": ["the node is dead"]})
        heart.event("one", "unit copied", {"unit": 9, "seconds": 700, "from": "a", "to": "b"})
        heart.end("stopped")
        (stage,) = Watch(run).look().stages
    assert (stage.retried, stage.set_aside, stage.done, stage.total) == (4, 1, 4, 10)
    line = next(line for line in journal.read(run) if line["message"] == "unit retried")
    assert (line["unit"], line["stage"], line["attempts"], line["level"]) == (7, "one", 3, "warning")


def test_a_run_on_an_object_store_tells_its_status_holder_and_log_in_pieces(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"s3://{BUCKET}/status/run"
    make_stage(run, "one", A)
    make_run(run, {"one": A})
    monkeypatch.setattr(journal, "KEPT_PIECES", 3)
    with hold(run, lambda _: None):
        with beating(run, {"one": "done"}) as heart:
            found = Watch(run).look()
            assert found.state == "running" and found.holder is not None and found.holder.process == os.getpid()
            for number in range(5):
                heart.log("info", f"line {number}")
                heart._journal.flush()
            heart.end("done")
        assert [entry["message"] for entry in journal.read(run)] == ["line 3", "line 4", "run done"]
    found = Watch(run).look()
    assert found.state == "done" and found.stages[0].kept == 6


def test_the_holder_of_a_directory_is_seen_without_taking_it_away_from_a_run_that_starts(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert holder.look(run) is None
    with hold(run, lambda _: None):
        found = holder.look(run)
        assert found is not None and found.alive and found.process == os.getpid()
    found = holder.look(run)
    assert found is not None and not found.alive


def test_a_killed_run_stays_killed_while_another_command_holds_its_directory(tmp_path: Path) -> None:
    run = str(tmp_path)
    make_stage(run, "one", A, finished=False)
    make_run(run, {"one": A})
    heart = beating(run, {"one": "running"})
    heart._write()  # as a run that a kill ended leaves it
    record = json.loads((tmp_path / "status.json").read_text())
    record["holder"]["process"] += 1
    (tmp_path / "status.json").write_text(json.dumps(record))
    with hold(run, lambda _: None):
        found = Watch(run).look()
    assert found.state == "killed" and found.holder is not None and found.holder.alive


def test_the_log_is_bounded_and_oldest_lines_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 1000)
    log = journal.Journal(str(tmp_path), "r")
    for number in range(200):
        log.write("info", "x" * 50, number=number)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000 * (journal.KEPT_FILES + 1)
    numbers = [line["number"] for line in journal.read(str(tmp_path))]
    assert numbers == list(range(numbers[0], 200)) and len(numbers) > 20


def test_secrets_never_reach_the_log_or_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plain words")
    aws = "AKIA" + "IOSFODNN7EXAMPLE"
    run = str(tmp_path)
    with beating(run, {"one": "running"}) as heart:
        heart.log("info", "asked with hunter2hunter2", detail={"key": ["plain words", aws]})
        heart.failed("one", f"no access: {aws}")
        heart.end("failed", "with hunter2hunter2")
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert all(secret not in written for secret in ("hunter2hunter2", "plain words", aws))
    assert "[MY_SERVICE_TOKEN]" in written


def test_a_disk_that_takes_no_status_is_told_once_and_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def full(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat.storage, "write_bytes", full)
    with Heartbeat(str(tmp_path), "r", dict, told.append) as heart:
        heart.end("done")
    assert len(told) == 1 and "No space left" in told[0]


def test_a_time_is_told_in_minutes_or_hours() -> None:
    assert [clock(seconds) for seconds in (None, 5, 200, 174960)] == ["", "0:05", "3:20", "48:36 h"]


def test_a_finished_run_that_was_moved_is_told_traced_and_found_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, ray="false")
    recipe, before = str(tmp_path / "recipe.yaml"), tmp_path / "runs"
    assert main(["run", recipe, "--runs", str(before)]) == 0
    (before / ".cache").mkdir(exist_ok=True)
    for with_cache in (True, False):
        elsewhere = before.with_name(f"elsewhere-{with_cache}")
        elsewhere.mkdir()
        shutil.move(before / "toy", elsewhere / "toy")
        if with_cache:
            shutil.move(before / ".cache", elsewhere / ".cache")
        shutil.rmtree(before)
        moved = str(elsewhere / "toy")
        for arguments, told in [
            (["report", moved], "report.html"),
            (["trace", moved, "b-2"], "parts/00000002"),
            (["status", moved], "toy: done"),
            (["diff", moved, moved], "b: the same"),
            (["clean", moved], "nothing to remove"),
            (["run", recipe, "--runs", str(elsewhere)], "report.html"),
        ]:
            capsys.readouterr()
            code, (out, err) = main(arguments), capsys.readouterr()
            assert code == 0 and told in out, err
        assert err.count("done before") == 3
        assert not any(str(before) in path.read_text() for path in elsewhere.rglob("manifest.json"))
        before = elsewhere


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"versions": {"tables": "2"}}, "newer than this Danlu"),
        ({"versions": {"tables": "new"}}, "unknown version"),
        ({"versions": {"tables": "0"}}, "unknown version"),
        ({"colours": []}, "has colours, which only a newer Danlu knows"),
        ({"ledger": None}, "lacks ledger"),
    ],
)
def test_a_manifest_of_another_version_is_refused_with_what_to_do(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    directory = make_stage(str(tmp_path), "one", A)
    path = Path(directory, "manifest.json")
    data = {key: value for key, value in {**json.loads(path.read_text()), **change}.items() if value is not None or key != "ledger"}
    storage.write_bytes(str(path), json.dumps(data).encode())
    with pytest.raises(SettingsError, match=told):
        shards.load_manifest(directory)
