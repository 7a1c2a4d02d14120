"""`danlu status`: how far a run is, told from what lies in its directory, from any machine that sees it.

run.json names the stages and their directories, status.json (pipelines.heartbeat) says what the driver knows, unit records
count the rows committed so far, manifests those of finished stages, and the lock or lease says whether anybody is at work.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster import storage
from operators import shards, tombstones
from operators.ledger import Ledger
from pipelines import heartbeat
from pipelines.holder import Holder, look
from pipelines.progress import clock

_UNIT = re.compile(r"^\d+\.json$")
_READERS = 16  # unit records that are fetched beside each other
UNITS_A_LOOK = 10_000
"""New unit records that one look reads of one stage; a watch reads the others in its next looks."""


@dataclass
class StageStatus:
    """One stage. Rows are those committed; `units_unread` tells that the rows of so many units are not in yet."""

    name: str
    kind: str
    status: str
    done: int | None = None
    total: int | None = None
    note: str = ""
    units: int = 0
    units_unread: int = 0
    rows_in: int = 0
    created: int = 0
    kept: int = 0
    rejected: int = 0
    quarantined: int = 0
    forgotten: int = 0
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    eta_seconds: float | None = None
    failures: int = 0
    retried: int = 0
    set_aside: int = 0


@dataclass
class RunStatus:
    """`state`: running, killed, done, failed, stopped or unknown (a run of an older version)."""

    directory: str
    run: str
    state: str
    message: str
    holder: Holder | None
    updated: float | None
    stages: list[StageStatus]
    takedowns: list[dict[str, Any]] = field(default_factory=list)  # time, reason, ids and rows of each

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Seen:
    """Unit records of one stage that were read already, summed."""

    names: set[str] = field(default_factory=set)
    ledger: Ledger = field(default_factory=Ledger)
    fresh_rows: int = 0  # of units committed since the stage started in this run


class Watch:
    """Looks at one run again and again; what was read of committed units is not read again."""

    def __init__(self, run_directory: str) -> None:
        self._directory = run_directory
        self._seen: dict[tuple[str, float], _Seen] = {}
        self._finished: dict[str, Ledger] = {}  # of stages with a manifest, by directory

    def look(self) -> RunStatus:
        """Raises FileNotFoundError when the directory is no run."""
        path = storage.join(self._directory, "run.json")
        if not storage.exists(path):
            raise FileNotFoundError(f"{self._directory} is no run: it has no run.json (a run is e.g. runs/quickstart)")
        record = json.loads(storage.read_bytes(path))
        beat_path = storage.join(self._directory, heartbeat.NAME)
        beat: dict[str, Any] = json.loads(storage.read_bytes(beat_path)) if storage.exists(beat_path) else {}
        holder = look(self._directory)
        state = _state(record, beat, holder)
        stages = [self._stage(name, record["stages"][name], beat, state) for name in record["order"]]
        message = beat.get("message") or record.get("message") or ""
        last = holder if holder is not None and holder.alive else _last_holder(beat) or holder
        takedowns = [
            {"time": item["time"], "reason": item["reason"], "ids": len(item["ids"]), "rows": item["rows"]}
            for item in tombstones.records(self._directory)
        ]
        return RunStatus(self._directory, record["recipe"], state, message, last, beat.get("updated"), stages, takedowns)

    def _stage(self, name: str, entry: dict[str, Any], beat: dict[str, Any], state: str) -> StageStatus:
        told: dict[str, Any] = beat.get("stages", {}).get(name, {})
        status = told.get("status", entry["status"])
        if status == "running" and state != "running":
            status = state
        found = StageStatus(name, entry["kind"], status, seconds=entry.get("seconds"))
        found.failures, found.retried, found.set_aside = (told.get(key, 0) for key in ("failures", "retried", "set_aside"))
        found.done, found.total, found.note = told.get("done"), told.get("total"), told.get("note", "")
        directory = storage.join(self._directory, entry["directory"])
        if directory not in self._finished and storage.exists(storage.join(directory, "manifest.json")):
            self._finished[directory] = shards.load_manifest(directory).ledger
        if directory in self._finished:
            _count(found, self._finished[directory])
            if found.seconds:
                found.rows_per_second = (found.rows_in + found.created) / found.seconds
            self._seen = {key: seen for key, seen in self._seen.items() if key[0] != directory}
            return found
        started = told.get("started")
        seen = self._units(directory, started or 0.0, found)
        _count(found, seen.ledger)
        if status == "running" and started:
            found.seconds = max(0.0, time.time() - started)
            if found.seconds > 0:
                found.rows_per_second = seen.fresh_rows / found.seconds
            found.eta_seconds = _left(told)
            found.tokens_per_second = told.get("tokens_per_second")
        return found

    def _units(self, directory: str, started: float, found: StageStatus) -> _Seen:
        seen = self._seen.setdefault((directory, started), _Seen())
        folder = storage.join(directory, "units")
        entries = [entry for entry in storage.list_beside(folder) if _UNIT.match(entry.relative)]
        found.units = len(entries)
        new = [entry for entry in entries if entry.relative not in seen.names]
        for entry, ledger in _ledgers(new[:UNITS_A_LOOK]):
            seen.names.add(entry.relative)
            seen.ledger.add(ledger)
            if entry.mtime_ns >= started * 1e9:
                seen.fresh_rows += ledger.rows_in + ledger.created
        found.units_unread = max(0, len(new) - UNITS_A_LOOK)
        return seen


def _ledgers(entries: list[storage.FileEntry]) -> Iterator[tuple[storage.FileEntry, Ledger]]:
    def one(entry: storage.FileEntry) -> Ledger:
        return Ledger.from_json(json.loads(storage.read_bytes(entry.path))["ledger"])

    if not entries:
        return
    with ThreadPoolExecutor(_READERS) as pool:
        yield from zip(entries, pool.map(one, entries), strict=True)


def _count(found: StageStatus, ledger: Ledger) -> None:
    found.rows_in, found.created, found.kept = ledger.rows_in, ledger.created, ledger.kept
    found.rejected, found.quarantined, found.forgotten = ledger.rejected.total(), ledger.quarantined, ledger.forgotten


def _state(record: dict[str, Any], beat: dict[str, Any], holder: Holder | None) -> str:
    state = str(beat.get("state", "unknown"))
    if state == "unknown":
        statuses = {entry["status"] for entry in record["stages"].values()}
        return "done" if statuses == {"done"} else "failed" if "failed" in statuses else "unknown"
    if state != "running":
        return state
    told = beat["holder"]  # another command may hold the directory of a killed run, to clean it, say
    ours = holder is not None and (holder.host, holder.process) == (told["host"], int(told["process"]))
    return "running" if ours and holder is not None and holder.alive else "killed"


def _last_holder(beat: dict[str, Any]) -> Holder | None:
    told = beat.get("holder")
    return Holder(told["host"], int(told["process"]), told["since"], False) if told else None


def _left(told: dict[str, Any]) -> float | None:
    """Seconds to the end at the pace since the stage began in this run; None while nobody can tell."""
    first, done, total = told.get("first"), told.get("done"), told.get("total")
    if not first or done is None or not total or done <= first[1] or done >= total:
        return None
    elapsed = float(told["seen"]) - float(first[0])
    return elapsed * (total - done) / (done - first[1]) if elapsed > 0 else None


def headline(status: RunStatus) -> str:
    """One line: the state of the run, who holds or held it, and how old the news is."""
    line = f"{status.run}: {status.state}"
    if status.holder is not None:
        line += f", held by {status.holder}" if status.holder.alive else f", last by {status.holder}"
    if status.state == "killed":
        line += "; its process is gone without a word: the same `danlu run` goes on where it stopped"
    if status.state == "running" and status.updated is not None:
        line += f", heard {max(0.0, time.time() - status.updated):.0f} s ago"
    return line


def table(status: RunStatus) -> Group:
    """What `danlu status` prints."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("stage")
    grid.add_column("status")
    for name in ("units", "in", "created", "kept", "rejected", "quarantined", "rows/s", "time", "left", "failed", "retried"):
        grid.add_column(name, justify="right")
    for stage in status.stages:
        units = f"{stage.done:,} of {stage.total:,}" if stage.done is not None and stage.total else f"{stage.units or ''}"
        if stage.note and stage.note != "units":
            units += f" {stage.note}"
        rows = [stage.rows_in, stage.created, stage.kept, stage.rejected, stage.quarantined]
        began = stage.status != "pending" or stage.units
        grid.add_row(
            Text(stage.name), Text(stage.status), Text(units), *(f"{count:,}" if began else "" for count in rows),
            "" if stage.rows_per_second is None else f"{stage.rows_per_second:,.1f}",
            clock(stage.seconds), clock(stage.eta_seconds), str(stage.failures or ""), str(stage.retried or ""),
        )  # fmt: skip
    lines: list[Text | Table] = [Text(headline(status)), grid]
    unread = sum(stage.units_unread for stage in status.stages)
    if unread:
        lines.append(Text(f"the rows of {unread:,} more units are not counted yet (--watch goes on reading)"))
    for item in status.takedowns:
        why = f" ({item['reason']})" if item["reason"] else ""
        lines.append(Text(f"forgotten on {item['time']}{why}: {item['ids']:,} ids, {item['rows']:,} rows"))
    lines += [Text(line) for line in status.message.splitlines()]
    return Group(*lines)
