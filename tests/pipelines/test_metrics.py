"""What Prometheus is told of a run, and a dashboard that asks for nothing else."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cluster import storage
from pipelines import metrics
from pipelines.cli import main
from pipelines.status import RunStatus, StageStatus
from tests.conftest import ROOT
from tests.pipelines.test_runner import write_recipe

HOSTILE = 'a"b\\c\nd} 1\nplanted_metric 1'
RUNNING = StageStatus(
    "web", "corpus", "running",
    done=3, total=10, note="units", units=3, units_unread=1, rows_in=50, created=5, kept=40,
    rejected=14, quarantined=1, rows_per_second=12.5, tokens_per_second=99.0, seconds=4.0, eta_seconds=8.0, failures=1,
    retried=2, set_aside=6,
)  # fmt: skip
STATUS = RunStatus("runs/r", "r", "running", "", None, 1.7e9, [RUNNING, StageStatus("base", "pretrain", "pending")])


def samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def values(text: str, **labels: str) -> dict[str, float]:
    return {sample.name: sample.value for sample in samples(text) if labels.items() <= sample.labels.items()}


def test_every_number_of_a_stage_is_told_and_what_nobody_knows_is_left_out() -> None:
    text = metrics.text(STATUS)
    web, base = values(text, stage="web"), values(text, stage="base")
    del web["danlu_stage_state"], base["danlu_stage_state"]
    assert {name.removeprefix("danlu_stage_"): value for name, value in web.items()} == {
        "units_total": 3, "units_planned": 10, "units_uncounted": 1, "rows_in_total": 50, "rows_created_total": 5,
        "rows_kept_total": 40, "rows_rejected_total": 14, "rows_quarantined_total": 1, "rows_set_aside_total": 6,
        "rows_per_second": 12.5, "tokens_per_second": 99, "elapsed_seconds": 4, "eta_seconds": 8,
        "failures_total": 1, "retries_total": 2,
    }  # fmt: skip
    assert set(base) == {
        f"danlu_stage_{name}" for name in ("units_uncounted", "failures_total", "retries_total", "rows_set_aside_total")
    }
    states = {(s.labels["stage"], s.labels["state"]) for s in samples(text) if s.name == "danlu_stage_state" and s.value == 1}
    assert states == {("web", "running"), ("base", "pending")}
    assert [s.labels["state"] for s in samples(text) if s.name == "danlu_run_state" and s.value == 1] == ["running"]
    assert values(text)["danlu_run_updated_timestamp_seconds"] == 1.7e9


def test_names_and_types_follow_the_conventions() -> None:
    for family in text_string_to_metric_families(metrics.text(STATUS)):
        assert re.fullmatch(r"danlu_(run|stage)_[a-z_]+", family.name) and family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert sample.labels["run"] == "r" and (set(sample.labels) - {"state"} <= {"run", "stage", "kind"})


def test_label_values_are_escaped() -> None:
    text = metrics.text(RunStatus("d", HOSTILE, "running", "", None, None, [StageStatus(HOSTILE, HOSTILE, "running", done=1)]))
    assert {sample.labels["run"] for sample in samples(text)} == {HOSTILE}
    assert {sample.name for sample in samples(text)} <= {sample.name for sample in samples(metrics.text(STATUS))}


def test_a_scrape_reads_no_file_and_serves_what_was_seen_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a scrape has read a file")

    for name in ("read_bytes", "list_beside", "list_all", "exists"):
        monkeypatch.setattr(storage, name, never)
    port = free_port()
    with metrics.served(port, "127.0.0.1", lambda: STATUS):
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert answer.read().decode() == metrics.text(STATUS)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_status_prints_the_same_metrics_and_run_refuses_a_taken_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, ray="false")
    words = ["run", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main([*words, "--metrics-port", port]) == 2
        assert f"cannot serve metrics on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert main([*words, "--metrics-host", "0.0.0.0"]) == 2
    assert not (tmp_path / "runs").exists()
    assert main(words) == 0
    capsys.readouterr()
    run = str(tmp_path / "runs" / "toy")
    assert main(["status", run, "--prometheus"]) == 0
    found = values(capsys.readouterr().out, run="toy", stage="b", kind="tests.pipelines.toy:NumberStage")
    assert (found["danlu_stage_rows_kept_total"], found["danlu_stage_units_total"], found["danlu_stage_units_planned"]) == (6, 6, 6)
    assert main(["status", run, "--prometheus", "--json"]) == 2


def _targets(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    return [(target["expr"], target["legendFormat"]) for panel in dashboard["panels"] for target in panel["targets"]]


def _unknown(dashboard: dict[str, Any]) -> list[str]:
    """Metrics and labels in the dashboard's queries and legends that the exporter does not emit."""
    emitted = {sample.name: set(sample.labels) for sample in samples(metrics.text(STATUS))}
    found = []
    for expression, legend in _targets(dashboard):
        names = re.findall(r"\bdanlu_\w+", expression)
        labels = re.findall(r"(\w+)\s*=~?\s*\"", expression) + re.findall(r"\{\{\s*(\w+)\s*\}\}", legend)
        labels += [label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")]
        found += [name for name in names if name not in emitted]
        found += [label for label in labels if not all(label in emitted.get(name, ()) for name in names)]
        assert names, f"no metric in {expression}"
    return found


def test_the_dashboard_asks_for_what_the_exporter_tells_and_has_what_grafana_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "grafana"]) == 0
    text = capsys.readouterr().out
    assert text == (ROOT / "pipelines" / "grafana.json").read_text("utf-8")
    dashboard = json.loads(text)
    assert _unknown(dashboard) == []
    assert isinstance(dashboard["schemaVersion"], int) and dashboard["title"] and dashboard["uid"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["definition"] == "label_values(danlu_run_state, run)"
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["type"] and panel["title"] and panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        covered = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not covered & cells and max(x for x, _ in covered) < 24, panel["title"]
        cells |= covered
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_dashboard_with_another_name_or_label_would_be_found_out() -> None:
    target = {
        "expr": 'sum by (stage, host) (danlu_stage_rows{run=~"$run"}) / danlu_stage_failures_total',
        "legendFormat": "{{node}}",
    }
    assert {"danlu_stage_rows", "host", "node"} <= set(_unknown({"panels": [{"targets": [target]}]}))
