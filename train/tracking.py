"""Curves of a training job outside its own result: TensorBoard event files, an MLflow server, and tokens a second.

Everything hangs on the one call that a job makes each step (`Workers.stop_requested`): `Tracked` stands between it and
whoever is told of progress. Nothing here can change a result; what is measured goes into `timings`, never into curves
that are compared.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from cluster import storage
from train.settings import TrackSettings

_UPLOAD_S = 60.0
_FLUSH_S = 30.0
_QUEUE = 10_000
_SPEED_POINTS = 200


class Tracked:
    """A `train.parallel.Report` that also writes curves. One per attempt at a job, on its first worker."""

    def __init__(self, report: Any, settings: TrackSettings, directory: str, kind: str) -> None:
        self._report = report
        self._sinks: list[Any] = []
        if settings.tensorboard:
            self._sinks.append(TensorBoard(storage.join(directory, "tensorboard")))
        if settings.mlflow is not None:
            self._sinks.append(MLflow(settings.mlflow, settings.experiment, directory, kind))
        self._last: tuple[float, int] | None = None
        self._speeds: list[dict[str, float]] = []
        self._every = 1

    def __call__(self, done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        self._pace(done, metrics)
        values = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}
        for sink in self._sinks:
            sink.point(done, values)
        return bool(self._report(done, total, note, metrics))

    def _pace(self, step: int, metrics: dict[str, Any]) -> None:
        """Add `tokens_per_second` of the step to metrics that count tokens."""
        tokens, now = metrics.pop("given_tokens", metrics.get("tokens")), time.perf_counter()
        if not isinstance(tokens, int):
            return
        if self._last is not None and now > self._last[0]:
            speed = (tokens - self._last[1]) / (now - self._last[0])
            metrics.setdefault("tokens_per_second", round(speed, 3))
            if step % self._every == 0:
                point = {"step": step, "tokens_per_second": metrics["tokens_per_second"]}
                self._speeds.append(point | ({"mfu": metrics["mfu"]} if "mfu" in metrics else {}))
            if len(self._speeds) > 2 * _SPEED_POINTS:  # every second one goes: bounded, and even over the run
                self._every *= 2
                self._speeds = [point for point in self._speeds if point["step"] % self._every == 0]
        self._last = (now, tokens)

    def close(self, status: Literal["FINISHED", "FAILED"]) -> dict[str, Any]:
        """Flush everything; returns what belongs into the result's timings. A job that stopped or failed may go on later."""
        found: dict[str, Any] = {"curve": self._speeds} if self._speeds else {}
        for sink in self._sinks:
            found.update(sink.close(status))
        return found


class TensorBoard:
    """Event files below `directory`; for a URI they are written locally and uploaded once a minute and at the end.

    After a resume the points from the first step on that is repeated replace the older ones (`purge_step`).
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._local = tempfile.mkdtemp(prefix="danlu-") if storage.is_remote(directory) else str(storage.local_path(directory))
        self._writer: Any = None
        self._uploaded = time.monotonic()

    def point(self, step: int, values: dict[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(self._local, purge_step=step, flush_secs=10)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._local != self._directory and time.monotonic() - self._uploaded > _UPLOAD_S:
            self._upload()

    def _upload(self) -> None:
        if storage.is_remote(self._directory):
            self._writer.flush()
            for name in sorted(os.listdir(self._local)):
                with open(os.path.join(self._local, name), "rb") as stream:
                    storage.write_bytes(storage.join(self._directory, name), stream.read())
            self._uploaded = time.monotonic()

    def close(self, status: str) -> dict[str, Any]:
        if self._writer is not None:
            self._upload()
            self._writer.close()
        if storage.is_remote(self._directory):
            shutil.rmtree(self._local, ignore_errors=True)
        return {}


def events(directory: Path) -> Iterator[tuple[float, int, str, float]]:
    """(seconds since 1970, step, name, value) of every point in the event files of a local directory."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(directory.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # a TFRecord: length (8 bytes), its checksum (4), the message, its checksum (4)
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                yield event.wall_time, event.step, value.tag, value.simple_value
            at += size + 16


class MLflow:
    """A run on an MLflow server, fed from a thread, so that a slow server does not slow training.

    The run's id is kept in `directory`/mlflow.json: a resumed job goes on with the same run. Raises ValueError when the
    package is not installed or the server cannot be reached at the start; points that a server does not take later are
    counted in the result's timings (`mlflow_points_lost`), and the job goes on: its own result holds the curve.
    """

    def __init__(self, uri: str, experiment: str, directory: str, kind: str) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError:
            raise ValueError("track.mlflow needs the package: pip install 'danlu[mlflow]'") from None
        # The client's own retries would hold a point for minutes; what cannot be delivered is counted.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._client: Any = MlflowClient(tracking_uri=uri)
        self._error: type[Exception] = MlflowException
        note = storage.join(directory, "mlflow.json")
        try:
            if storage.exists(note):
                self._run = str(json.loads(storage.read_bytes(note))["run_id"])
                self._client.update_run(self._run, status="RUNNING")
            else:
                found = self._client.get_experiment_by_name(experiment)
                identity = self._client.create_experiment(experiment) if found is None else found.experiment_id
                name = "/".join(directory.rstrip("/").split("/")[-2:])
                self._run = str(self._client.create_run(identity, run_name=name, tags={"danlu.kind": kind}).info.run_id)
                storage.write_bytes(note, json.dumps({"run_id": self._run}).encode())
        except MlflowException as error:
            raise ValueError(f"track.mlflow: the server at {uri} does not answer: {error}") from None
        self._points: queue.Queue[tuple[int, int, dict[str, float]] | None] = queue.Queue(_QUEUE)
        self._lost = 0
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def point(self, step: int, values: dict[str, float]) -> None:
        try:
            self._points.put_nowait((step, int(time.time() * 1000), values))
        except queue.Full:
            self._lost += 1

    def _deliver(self) -> None:
        from mlflow.entities import Metric

        ended = False
        while not ended:
            batch = [self._points.get()]
            while len(batch) < 50 and not self._points.empty():
                batch.append(self._points.get())
            ended = batch[-1] is None
            points = [point for point in batch if point is not None]
            metrics = [Metric(name, value, at, step) for step, at, values in points for name, value in values.items()]
            for start in range(0, len(metrics), 1000):  # a server takes a thousand metrics a request
                try:
                    self._client.log_batch(self._run, metrics=metrics[start : start + 1000])
                except self._error:
                    self._lost += len({metric.step for metric in metrics[start : start + 1000]})

    def close(self, status: str) -> dict[str, Any]:
        self._points.put(None)
        self._thread.join(_FLUSH_S)
        lost = self._lost + self._points.qsize()
        try:
            self._client.set_terminated(self._run, status)
        except self._error:
            lost = max(lost, 1)
        return {"mlflow_points_lost": lost} if lost else {}
