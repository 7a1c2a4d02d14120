"""The report of a run at work: progress, curves, loaded again by the browser, never half written, and at last a plain report."""

from __future__ import annotations

import http.server
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import live
from pipelines.live import Curve, Live
from pipelines.report import build, samples
from pipelines.report.build import Report
from pipelines.report.view import Now
from pipelines.status import RunStatus, StageStatus
from tests.conftest import ROOT
from tests.pipelines.report.browser import dom, needs_browser
from tests.pipelines.report.fixture_run import build_run, read_record, write_record
from tests.pipelines.report.page import parse
from tests.pipelines.test_metrics import free_port, values
from tests.pipelines.test_runner import wait_for, write_recipe

HURRIED = (
    "from pipelines import cli, heartbeat, live; heartbeat.LOCAL_S = 0.1; "
    "live.LOCAL_S, live.FIRST_S, live._LEAST_S, live._SHARE = 0.2, 0.1, 0.1, 1; "
)


@pytest.mark.slow
@needs_browser
def test_a_run_at_work_shows_its_progress_in_a_browser_and_to_prometheus_and_ends_without_a_reload(tmp_path: Path) -> None:
    write_recipe(tmp_path, wait_s=1.5, ray="false")
    (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text().replace("units: 6, wait_s: 1.5", "units: 6"))
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HURRIED} cli.main(['run', 'recipe.yaml', '--metrics-port', '{port}'])"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    report, seen, torn, ended = tmp_path / "runs" / "toy" / "report.html", dict[str, str](), list[str](), threading.Event()

    def read_again_and_again() -> None:
        while not ended.wait(0.002):
            if report.exists():
                html = report.read_text("utf-8")
                for progress in re.findall(r"(\d / \d) <span", html):
                    seen.setdefault(progress, html)
                if not html.rstrip().endswith("</html>"):
                    torn.append(html[-100:])

    reader = threading.Thread(target=read_again_and_again, daemon=True)
    reader.start()
    wait_for(tmp_path, "toy/a/*/units/*0.json")
    deadline = time.monotonic() + 60
    while "1 / 3" not in seen and time.monotonic() < deadline:
        time.sleep(0.05)
    html = seen["1 / 3"].encode()
    told = values(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode(), stage="a")
    assert told["danlu_stage_units_planned"] == 3 and 1 <= told["danlu_stage_units_total"] <= told["danlu_stage_rows_created_total"]
    page, asked = visited(html, tmp_path / "profile")
    assert asked == 2 and "<!-- again -->" in page, "the browser has loaded it again"
    shown = parse_table(page)
    assert shown[:2] == ["a tests.pipelines.toy:NumberStage", "1 / 3 units"] and shown[3:5] == ["1", "1"], shown
    assert "Running: 0 of 3 stages are done." in page and "as of" in page
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert process.wait(60) == 0
    ended.set()
    reader.join(10)
    assert torn == [] and {"1 / 3", "2 / 3"} <= set(seen)
    page = dom(report, tmp_path / "profile")
    assert 'http-equiv="refresh"' not in page and "Complete. Every row is accounted for." in page and "as of" not in page


def visited(page: bytes, profile: Path) -> tuple[str, int]:
    """The document in a browser, and how often the browser has asked for it; from the second time on it tells of no reload."""
    asked = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal asked
            asked += self.path == "/report.html"
            self.send_response(200 if self.path == "/report.html" else 404)
            self.end_headers()
            if self.path == "/report.html":
                self.wfile.write(page if asked == 1 else re.sub(rb'<meta http-equiv="refresh"[^>]*>', b"<!-- again -->", page))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shown = dom(f"http://127.0.0.1:{server.server_port}/report.html", profile)
        server.shutdown()
    return shown, asked


def parse_table(page: str) -> list[str]:
    """The cells of the first stage at work."""
    (table,) = parse(re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)).all("table", "now")
    row = table.all("tbody")[0].all("tr")[0]
    return [" ".join(cell.text().split()) for cell in row.children]


def _now(run: Path, as_of: float | None = None, **stage: Any) -> Now:
    points = [{"step": float(step), "loss": 4.0 - step / 50, "tokens_per_second": 1000.0} for step in range(1, 101)]
    seen = StageStatus("aligned", "dpo", "running", done=100, total=400, note="steps, loss 2.000", **stage)
    status = RunStatus(str(run), "quickstart", "running", "", None, None, [seen])
    return Now(time.time() if as_of is None else as_of, 10.0, status, {"aligned": points})


@pytest.fixture
def at_work(tmp_path: Path) -> Path:
    """The run of the report's tests while its stage `aligned` trains."""
    run = build_run(tmp_path)
    record = read_record(run)
    record["stages"]["aligned"].update(status="pending", seconds=None)
    record["stages"]["scores"].update(status="pending", seconds=None)
    write_record(run, record)
    return run


def test_the_curves_of_a_stage_that_trains_are_drawn_so_far(at_work: Path) -> None:
    page = parse(Path(Report(str(at_work)).write(_now(at_work, eta_seconds=200.0, tokens_per_second=1234.0))).read_text("utf-8"))
    assert [
        text for text in (" ".join(cell.text().split()) for cell in page.all("table", "now")[0].all("td")) if len(text) > 3
    ] == ["100 / 400 steps, loss 2.000", "1,234", "3:20"]
    text = page.by_id("training").text()
    assert "aligned: running. There are no numbers" not in text
    assert "aligned" in text and "3.98" in text, "the first point of the curve is shown"
    assert page.by_id("training").all("svg") != []


@needs_browser
def test_a_page_written_long_ago_says_that_nothing_new_has_come(at_work: Path, tmp_path: Path) -> None:
    for as_of, silent in ((time.time(), 'class="silent" hidden'), (time.time() - 3600, 'class="silent">')):
        assert silent in dom(Path(Report(str(at_work)).write(_now(at_work, as_of))), tmp_path / "profile")


def test_finished_stages_are_read_once(at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, now = Report(str(at_work)), _now(at_work)
    first = Path(report.write(now)).read_text("utf-8")
    read: list[str] = []
    kept = build.storage.read_bytes
    monkeypatch.setattr(build.storage, "read_bytes", lambda path: read.append(path) or kept(path))
    monkeypatch.setattr(samples, "_first_rows", lambda path: pytest.fail(f"{path} is read again"))
    assert Path(report.write(now)).read_text("utf-8") == first
    assert [Path(path).name for path in read] == ["run.json"]


def test_a_curve_is_bounded_and_even_and_steps_done_again_replace_the_old_ones() -> None:
    curve = Curve()
    for step in range(1, 10_001):
        curve.add(step, {"loss": 1 / step, "wrong": float("nan"), "name": "x"})
    steps = [point["step"] for point in curve.points()]
    assert len(steps) <= 400 and steps[-1] > 9900 and len({b - a for a, b in itertools.pairwise(steps)}) == 1
    assert set(curve.points()[0]) == {"loss", "step"}
    curve.add(5024, {"loss": 7.0})
    assert curve.points()[-1] == {"loss": 7.0, "step": 5024}


def test_a_page_that_cannot_be_written_is_told_once_and_a_directory_that_was_taken_over_is_left_alone(
    at_work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOCAL_S", 0.01)
    monkeypatch.setattr(live, "FIRST_S", 0.0)
    monkeypatch.setattr(live, "_LEAST_S", 0.01)
    monkeypatch.setattr(live, "_SHARE", 0)
    tries: list[object] = []

    def full(self: Report, now: Now | None = None) -> str:
        tries.append(now)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Report, "write", full)
    told: list[str] = []

    def try_thrice() -> None:
        with Live(str(at_work), told.append):
            while len(tries) < 3:
                time.sleep(0.01)

    with pytest.raises(OSError, match="No space"):
        try_thrice()
    assert len(told) == 1 and "the run goes on" in told[0] and "No space left" in told[0]
    count = len(tries)
    with Live(str(at_work), told.append) as abandoned:
        abandoned.first_s = 60
        abandoned.abandon()
    assert len(tries) - count <= 1 and not any(now is None for now in tries[count:])
