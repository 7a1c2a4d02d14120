"""Curves beside the result: TensorBoard files, MLflow, tokens a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.config import SettingsError, parse
from train.samples import Given
from train.settings import TrackSettings
from train.tracking import Tracked, events


def _report(told: list[int]) -> Any:
    def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        told.append(done)
        return done == 3

    return report


def test_every_number_of_a_step_becomes_a_point_and_the_wish_to_stop_comes_through(tmp_path: Path) -> None:
    told: list[int] = []
    tracked = Tracked(_report(told), TrackSettings(), str(tmp_path), "pretrain")
    stops = [
        tracked(step, 3, "steps", {"loss": 4.0 / step, "tokens": 100 * step, "note": "text", "bad": float("nan")})
        for step in (1, 2, 3)
    ]
    timings = tracked.close("FINISHED")
    assert told == [1, 2, 3] and stops == [False, False, True]
    points = [point[1:] for point in events(tmp_path / "tensorboard")]
    assert [(step, value) for step, tag, value in points if tag == "loss"] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]
    assert {tag for _, tag, _ in points} == {"loss", "tokens", "tokens_per_second"}
    assert [point["step"] for point in timings["curve"]] == [2, 3] and all(p["tokens_per_second"] > 0 for p in timings["curve"])


def test_the_speed_curve_stays_short_however_long_the_run(tmp_path: Path) -> None:
    tracked = Tracked(_report([]), TrackSettings(tensorboard=False), str(tmp_path), "sft")
    for step in range(1, 3001):
        tracked(step, 3000, "steps", {"tokens": step})
    curve = tracked.close("FINISHED")["curve"]
    assert 150 <= len(curve) <= 401 and curve[-1]["step"] > 2900
    assert not (tmp_path / "tensorboard").exists()


def test_mlflow_gets_the_curve_and_a_resumed_job_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = TrackSettings(tensorboard=False, mlflow=(tmp_path / "mlruns").as_uri(), experiment="丹炉")
    first = Tracked(_report([]), settings, str(tmp_path / "chat" / "f0"), "sft")
    first(1, 2, "steps", {"loss": 2.0})
    assert first.close("FAILED") == {}
    run = json.loads((tmp_path / "chat" / "f0" / "mlflow.json").read_text())["run_id"]
    again = Tracked(_report([]), settings, str(tmp_path / "chat" / "f0"), "sft")
    again(2, 2, "steps", {"loss": 1.0})
    assert again.close("FINISHED") == {}
    client = mlflow.MlflowClient(tracking_uri=settings.mlflow)
    assert [(point.step, point.value) for point in client.get_metric_history(run, "loss")] == [(1, 2.0), (2, 1.0)]
    assert client.get_run(run).info.status == "FINISHED" and client.get_run(run).info.run_name == "chat/f0"


def test_an_mlflow_server_that_is_not_there_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9"):
        Tracked(_report([]), TrackSettings(tensorboard=False, mlflow="http://127.0.0.1:9"), str(tmp_path), "sft")


def test_a_password_in_a_recipe_is_refused() -> None:
    with pytest.raises(SettingsError, match="MLFLOW_TRACKING_PASSWORD"):
        parse(TrackSettings, {"mlflow": "https://me:secret@tracking.example/"}, "track")


def test_what_inputs_gave_becomes_their_shares_and_the_speed_of_tokens(tmp_path: Path) -> None:
    given = Given(["新闻", "books"])
    given.add(np.array([0, 1, 1]), np.array([30, 5, 5]))
    metrics = given.add(np.array([0]), np.array([40]))
    assert metrics == {"given_tokens": 80, "mixture/新闻": 0.875, "mixture/books": 0.125}
    assert Given(["one"]).add(np.array([0]), np.array([7])) == {"given_tokens": 7}
    tracked = Tracked(_report([]), TrackSettings(), str(tmp_path), "sft")
    for step in (1, 2):
        tracked(step, 2, "steps", {"loss": 1.0, **metrics, "given_tokens": 80 * step})
    assert tracked.close("FINISHED")["curve"][0]["step"] == 2
    tags = {tag for _, _, tag, _ in events(tmp_path / "tensorboard")}
    assert tags == {"loss", "mixture/新闻", "mixture/books", "tokens_per_second"}
