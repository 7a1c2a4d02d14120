"""A run's status as Prometheus metrics: text for a scrape or for node_exporter's textfile collector.

The numbers are those of `danlu status`, as it saw them last: a scrape reads no file, so what it costs does not depend on how many
units or rows there are. Names end in their unit; counters count within a run, and begin anew where a stage does (Prometheus
takes that for a restart). A number that nobody knows is left out rather than told as 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from operators.config import SettingsError
from pipelines.status import RunStatus, StageStatus

RUN_STATES = ("running", "done", "failed", "stopped", "killed", "unknown")
STAGE_STATES = ("pending", "running", "done", "failed", "stopped", "killed")
_LABELS = ("run", "stage", "kind")

_Number = Callable[[StageStatus], float | None]
_COUNTERS: dict[str, tuple[str, _Number]] = {
    "units": ("Units of work done: work units, items or training steps, as the stage counts them.", lambda s: s.done),
    "rows_in": ("Rows read, of units that are committed.", lambda s: _begun(s, s.rows_in)),
    "rows_created": ("Rows made, of units that are committed.", lambda s: _begun(s, s.created)),
    "rows_kept": ("Rows kept, of units that are committed.", lambda s: _begun(s, s.kept)),
    "rows_rejected": ("Rows rejected by an operator, of units that are committed.", lambda s: _begun(s, s.rejected)),
    "rows_quarantined": ("Rows that could not be read, of units that are committed.", lambda s: _begun(s, s.quarantined)),
    "rows_set_aside": ("Rows set aside in this run because they crashed, hung or outgrew their memory.", lambda s: s.set_aside),
    "failures": ("Failures of the stage in this run.", lambda s: s.failures),
    "retries": ("Further attempts at units in this run.", lambda s: s.retried),
}
_GAUGES: dict[str, tuple[str, _Number]] = {
    "units_planned": ("Units of work in all, done ones included.", lambda s: s.total),
    "units_uncounted": ("Committed units whose rows are not in the counters yet.", lambda s: s.units_unread),
    "rows_per_second": (
        "Rows committed a second in this run.",
        lambda s: _running(s, s.rows_per_second if s.units else None),
    ),
    "tokens_per_second": ("Tokens trained on or generated a second.", lambda s: _running(s, s.tokens_per_second)),
    "elapsed_seconds": ("Wall time of the stage.", lambda s: s.seconds),
    "eta_seconds": ("Time to the stage's end at its pace so far.", lambda s: _running(s, s.eta_seconds)),
}


def _begun(stage: StageStatus, rows: int) -> int | None:
    return rows if stage.status != "pending" or stage.units else None


def _running(stage: StageStatus, value: float | None) -> float | None:
    return value if stage.status == "running" else None


class _Status(Collector):
    def __init__(self, status: Callable[[], RunStatus | None]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        if status is None:
            return
        state = GaugeMetricFamily("danlu_run_state", "1 for the state that the run is in.", labels=["run", "state"])
        for name in RUN_STATES:
            state.add_metric([status.run, name], float(status.state == name))
        yield state
        heard = GaugeMetricFamily(
            "danlu_run_updated_timestamp_seconds", "When the run was last heard of, since 1970.", labels=["run"]
        )
        if status.updated is not None:
            heard.add_metric([status.run], status.updated)
        yield heard
        state = GaugeMetricFamily("danlu_stage_state", "1 for the state that the stage is in.", labels=[*_LABELS, "state"])
        for stage in status.stages:
            for name in STAGE_STATES:
                state.add_metric([status.run, stage.name, stage.kind, name], float(stage.status == name))
        yield state
        for kind, table in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, (meaning, number) in table.items():
                family = kind(f"danlu_stage_{name}", meaning, labels=_LABELS)
                for stage in status.stages:
                    value = number(stage)
                    if value is not None:
                        family.add_metric([status.run, stage.name, stage.kind], float(value))
                yield family


def _registry(status: Callable[[], RunStatus | None]) -> CollectorRegistry:
    registry = CollectorRegistry()  # one of its own: the library's default also tells of the process
    registry.register(_Status(status))
    return registry


def text(status: RunStatus) -> str:
    """The exposition format, version 0.0.4, label values escaped."""
    return generate_latest(_registry(lambda: status)).decode("utf-8")


@contextlib.contextmanager
def served(port: int, host: str, status: Callable[[], RunStatus | None]) -> Iterator[None]:
    """Serve `http://HOST:PORT/metrics` meanwhile. There is no password: give a host other than loopback on purpose alone.

    Raises SettingsError when the port is taken or the host is no address of this machine.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=_registry(status))
    except OSError as error:
        raise SettingsError(f"cannot serve metrics on {host}:{port}: {error.strerror or error}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
