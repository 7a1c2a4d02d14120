"""Runs a plan: stages in the order their inputs allow, beside each other where they use different resources.

The runner holds no rows. Each stage runs in a thread of the driver that waits on Ray; what a stage leaves behind is its
shard directory, and a directory with a manifest is never touched again. After a crash the same command finds the
finished stages by fingerprint and each unfinished stage goes on from its committed units.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import psutil

from cluster import connect, disk, storage
from cluster.disk import DiskFull
from cluster.lease import Lease, LeaseHeld
from cluster.placement import gpus
from cluster.remote import StoreGone
from operators import shards
from operators.config import SettingsError
from operators.ledger import LedgerError
from operators.stage import Cancelled, StageContext
from pipelines.forget import redo
from pipelines.graph import Node, plan
from pipelines.heartbeat import Heartbeat
from pipelines.journal import masked, redacted, without_secrets
from pipelines.live import Live
from pipelines.progress import Display
from pipelines.recipe import Recipe
from pipelines.report import spending

#: Stages of one kind of resource run one after the other, so that they do not fight for the same cores. Stages that
#: generate share an engine, which serves all in one batch: that costs hardly more than one, and they may follow each other.
_AT_ONCE = {"cpu": 1, "generate": 16, "train": 1}


class RunError(RuntimeError):
    """A stage failed; the message says which, why, and how to go on."""


class RayLost(RunError):
    """Ray itself is gone. What was committed stays; the process should end without waiting for Ray."""


@dataclass
class Options:
    """What the command line sets for a run and what never changes a result."""

    runs: str = "runs"
    limit: int | None = None
    workers: int = 2
    train_workers: int | None = None  # default: one a GPU where there are any, else `workers`
    address: str | None = None
    cpus: int | None = None
    base_directory: str = field(default_factory=os.getcwd)
    command: str = ""


class Run:
    """One run of a recipe. `execute` returns the run's directory; `stop` may be called from a signal handler."""

    def __init__(self, recipe: Recipe, text: str, options: Options, display: Display) -> None:
        self.recipe, self.text, self.options, self.display = recipe, text, options, display
        runs = storage.absolute(options.runs, options.base_directory)
        self.directory = storage.join(runs, recipe.name if options.limit is None else f"{recipe.name}-limit-{options.limit}")
        self.cache_directory = storage.join(runs, ".cache")
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._status: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._reused: set[str] = set()
        self._failures: dict[str, str] = {}
        self._pulse: connect.Pulse | None = None
        self._began = time.time()
        self.nodes: list[Node] = []
        self._services = Services(self)
        self._heart = Heartbeat(self.directory, recipe.name, lambda: dict(self._status), display.line)
        self.live = Live(self.directory, display.line)

    def execute(self) -> str:
        """Run everything that is not done. Raises SettingsError, FileNotFoundError, OSError, RunError or Cancelled."""
        self.nodes = plan(self.recipe, self.directory, self.options.base_directory, self.options.limit)
        with hold(self.directory, self._displaced), self._takedown_finished(), self._heart, self.live:
            for node in self.nodes:
                done = storage.exists(storage.join(node.directory, "manifest.json"))
                refused = node.stage.refusal(node.directory) if done else None
                self._status[node.name] = "failed" if refused else "done" if done else "pending"
                if done:
                    self._reused.add(node.name)
                if refused:
                    self._failures[node.name] = f"stage {node.name} ({node.stage.kind}) failed: {refused}"
            self._record()
            self._heart.log("info", "run started", command=self.options.command, process=os.getpid(), stages=len(self.nodes))
            for node in self.nodes:
                if self._status[node.name] == "pending":
                    preflight(node, self.options.base_directory)
            pending = [node for node in self.nodes if self._status[node.name] == "pending" and not self._blocked(node)]
            for node in self.nodes:
                if node.name in self._failures:
                    self.display.stage(node.name, f"FAILED: {self._failures[node.name].partition(' failed: ')[2]}")
                elif node.name in self._reused:
                    self.display.stage(node.name, "done before")
            if pending:
                was_connected = connect.connected()
                if any(node.stage.needs_ray() for node in pending):
                    joining = f"joining Ray at {self.options.address}"
                    self.display.line("starting Ray" if self.options.address is None else joining)
                    joined = connect.connect(address=self.options.address, cpus=self.options.cpus)
                    self._pulse = connect.Pulse(joined.address) if self.options.address is not None else None
                try:
                    self._services.start_early(pending)
                    self._schedule()
                except RayLost as error:
                    self._lost(str(error))
                    raise
                self._services.stop(graceful=not self.cancelled.is_set())
                if not was_connected:
                    connect.disconnect()
            self._record()
            ended = "failed" if self._failures else "stopped" if self.cancelled.is_set() else "done"
            self._heart.end(ended, "\n".join(self._failures.values()))
        if self.cancelled.is_set() and "lease" not in self._failures:
            raise Cancelled("stopped")
        if self._failures:
            raise RunError("\n".join(self._failures.values()))
        return self.directory

    @contextlib.contextmanager
    def _takedown_finished(self) -> Iterator[None]:
        """Before anything is read or shown: a takedown that was interrupted goes through first."""

        def ours() -> None:
            if "lease" in self._failures:
                raise RunError(self._failures["lease"])

        finished = redo.finish(self.directory, ours)
        if finished is not None:
            self.display.line(f"finished the takedown of {finished['time']} that was interrupted ({finished['rows']:,} rows)")
        yield

    def _lost(self, message: str) -> None:
        """Record that Ray is gone: running stages go back to pending, for they will go on from their units."""
        with self._lock:
            for name, status in self._status.items():
                if status == "running":
                    self._status[name] = "pending"
            self._failures["ray"] = message
        self._record()

    def _displaced(self, holder: str) -> None:
        """Another run has taken the directory, for it did not hear of this one for too long: leave it to that one."""
        self._heart.abandon()
        self.live.abandon()
        with self._lock:
            self._failures["lease"] = f"{self.directory} was taken over by {holder} while this run could not reach it"
        self.stop()

    def stop(self) -> None:
        """Ask every stage to stop at its next commit."""
        self.cancelled.set()

    def _schedule(self) -> None:
        threads: list[threading.Thread] = []
        while True:
            with self._lock:
                if all(status not in ("pending", "running") for status in self._status.values()):
                    break
                if not self.cancelled.is_set():
                    for node in self._startable():
                        self._status[node.name] = "running"
                        self._started[node.name] = time.time()
                        thread = threading.Thread(target=self._run_stage, args=(node,), name=f"stage {node.name}", daemon=True)
                        threads.append(thread)
                        thread.start()
                        if self._feeds_training(node):
                            self._services.train_group()
                if "running" not in self._status.values():
                    break
                self._changed.wait(timeout=0.5)
            if self.cancelled.is_set():
                for thread in threads:
                    thread.join(timeout=10)
                break
            ended = connect.ended_servers() if self.options.address is None else []
            if ended:
                raise RayLost(f"Ray's {' and '.join(ended)} ended while stages were running")
            if self._pulse is not None and (silent := self._pulse.lost()) is not None:
                raise RayLost(
                    f"Ray's control process at {self._pulse.address} has not answered for {silent:.0f} s (without Redis behind it "
                    "the cluster is lost with its head: start another)"
                )
            self._services.stop_unneeded(self._remaining("generate"), self._remaining("train"))
        self._record()

    def _remaining(self, resource: str) -> bool:
        return any(
            self._status[node.name] in ("pending", "running") and node.stage.resource == resource
            for node in self.nodes
            if not self._blocked(node)
        )

    def _blocked(self, node: Node) -> bool:
        """True when an input of the stage failed, directly or further up."""
        by_name = {other.name: other for other in self.nodes}
        return any(self._status[name] == "failed" or self._blocked(by_name[name]) for name in node.inputs)

    def _startable(self) -> list[Node]:
        running = [node.stage.resource for node in self.nodes if self._status[node.name] == "running"]
        found: list[Node] = []
        for node in self.nodes:
            if self._status[node.name] != "pending" or not all(self._ready(node, name) for name in node.inputs):
                continue
            if running.count(node.stage.resource) < _AT_ONCE[node.stage.resource]:
                running.append(node.stage.resource)
                found.append(node)
        return found

    def _ready(self, node: Node, name: str) -> bool:
        """True when an input can be read: it is done, or it is being written and the stage follows it.

        A model is not followed, only rows are."""
        if self._status[name] == "done":
            return True
        models: list[str] = getattr(node.stage, "model_stages", list)()
        return self._status[name] == "running" and node.stage.follows and name not in models

    def _feeds_training(self, node: Node) -> bool:
        """True when a training stage waits for this one: its workers can start (a minute of imports) meanwhile."""
        return any(
            node.name in other.inputs and other.stage.resource == "train" and self._status[other.name] == "pending"
            for other in self.nodes
        )

    def _run_stage(self, node: Node) -> None:
        message = ""
        try:  # everything, or a terminal that went away would leave the schedule waiting for this stage
            self.display.stage(node.name, "started")
            self._heart.started(node.name)
            self.live.changed()
            storage.make_directory(node.directory)
            node.stage.run(self._context(node))
            if not storage.exists(storage.join(node.directory, "manifest.json")):
                raise RunError("the stage ended without writing its manifest")
            if refused := node.stage.refusal(node.directory):
                raise RunError(refused)
            status = "done"
        except Cancelled:
            status = "pending"
        except BaseException as error:  # noqa: BLE001 - a stage's failure is recorded and told, whatever it is
            status = "pending" if self.cancelled.is_set() else "failed"
            message = explain(error, node.directory)
        seconds = time.time() - self._started[node.name]
        with self._lock:
            self._status[node.name] = status
            self._seconds[node.name] = seconds
            if status == "failed":
                self._failures[node.name] = f"stage {node.name} ({node.stage.kind}) failed: {message}"
            self._changed.notify_all()
        if status == "done":
            self._note_seconds(node, seconds)
            self.display.stage(node.name, f"done in {seconds:.0f} s: {account(node.directory)}")
            ledger = shards.load_manifest(node.directory).ledger.to_json()
            self._heart.log("info", "done", stage=node.name, seconds=round(seconds, 3), rows=ledger)
        elif status == "pending":
            self._heart.log("info", "stopped", stage=node.name, seconds=round(seconds, 3))
        elif status == "failed":
            self._heart.failed(node.name, message)
            self.display.stage(node.name, f"FAILED: {message}")
        try:
            self._record()
        except OSError as error:  # the stage's own account stands; a disk that stays full is told at the end of the run
            self.display.line(f"run.json could not be written: {explain(error)}")
        self.live.changed()

    def _context(self, node: Node) -> StageContext:
        by_name = {other.name: other for other in self.nodes}
        return StageContext(
            stage=node.name,
            kind=node.stage.kind,
            directory=node.directory,
            fingerprint=node.fingerprint,
            config=masked(node.config),
            inputs={name: by_name[name].directory for name in node.inputs},
            seed=self.recipe.seed,
            limit=self.options.limit,
            workers=self.options.workers,
            cache_directory=self.cache_directory,
            base_directory=self.options.base_directory,
            progress=lambda done, total, note: self._progress(node.name, done, total, note),
            measured=lambda numbers, step=None: self._measured(node.name, numbers, step),
            log=lambda line: self._log(node.name, line),
            event=lambda message, facts: self._heart.event(node.name, message, facts),
            cancelled=self.cancelled,
            services={"engine": self._services.engine, "train": self._services.train_group},
            status=lambda name: self._status[name],
        )

    def _progress(self, name: str, done: int, total: int, note: str) -> None:
        self.display.progress(name, done, total, note)
        self._heart.progress(name, done, total, note)

    def _measured(self, name: str, numbers: dict[str, Any], step: int | None) -> None:
        self._heart.measured(name, numbers)
        if step is not None:
            self.live.point(name, step, numbers)

    def _log(self, name: str, line: str) -> None:
        self.display.stage(name, line)
        self._heart.log("info", line, stage=name)

    def _note_seconds(self, node: Node, seconds: float) -> None:
        """Wall time of the stage as the driver saw it, beside what the stage measured itself."""
        timings = shards.load_timings(node.directory)
        data = {**timings, "wall_seconds": seconds, "started": self._started[node.name]}
        storage.write_bytes(storage.join(node.directory, "timings.json"), json.dumps(data, indent=1, sort_keys=True).encode())

    def _record(self) -> None:
        """Write run.json: what the report and `danlu trace` start from."""
        with self._lock:
            seconds = {
                node.name: self._seconds.get(node.name, shards.load_timings(node.directory).get("wall_seconds"))
                for node in self.nodes
            }
            record = {
                "recipe": self.recipe.name,
                "recipe_text": without_secrets(self.text),
                "seed": self.recipe.seed,
                "limit": self.options.limit,
                "order": [node.name for node in self.nodes],
                "stages": {
                    node.name: {
                        "kind": node.stage.kind,
                        "directory": f"{node.name}/{node.fingerprint}",
                        "inputs": list(node.inputs),
                        "status": self._status[node.name],
                        "seconds": seconds[node.name],
                        "reused": node.name in self._reused,
                        "started": self._started.get(node.name),
                    }
                    for node in self.nodes
                },
                "started": datetime.datetime.fromtimestamp(self._began, datetime.UTC).isoformat(timespec="seconds"),
                "seconds": time.time() - self._began,
                "machine": {
                    "cpus": os.cpu_count(),
                    "memory_bytes": psutil.virtual_memory().total,
                    "gpus": connect.gpu_count(),
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                },
                "command": redacted(self.options.command),
                "message": redacted("\n".join(self._failures.values()))
                or ("stopped by the user" if self.cancelled.is_set() else None),
            }
            storage.write_bytes(storage.join(self.directory, "run.json"), json.dumps(record, indent=1, ensure_ascii=False).encode())


class Services:
    """What stages share and what is dear to start: generation engines and the group of training workers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._engines: dict[str, Any] = {}
        self._group: Any = None

    def start_early(self, pending: list[Node]) -> None:
        """Begin loading engines while the corpus stages run: a start takes minutes and needs no input."""
        for node in pending:
            settings = getattr(node.stage, "generator", None)
            if settings is None or settings.model.startswith("@"):
                continue
            if not _has_replies(self._run.directory, node.name):  # else all of them may be there: wait for the first that is not
                self.engine(settings)

    def engine(self, settings: Any) -> Any:
        """The engine of these settings, started on first use."""
        from operators.synthesis.engine import start_engine

        key = settings.model_dump_json()
        with self._lock:
            if key not in self._engines:
                self._engines[key] = start_engine(settings, self._run.cache_directory)
            return self._engines[key]

    def train_group(self) -> Any:
        """The training workers, started on first use."""
        from train.session import TrainGroup

        with self._lock:
            if self._group is None:
                options = self._run.options
                workers = options.train_workers or gpus("train") or options.workers
                self._group = TrainGroup(workers=workers, storage_path=storage.join(self._run.directory, ".train"))
                self._group.start()
            return self._group

    def stop_unneeded(self, generate: bool, train: bool) -> None:
        """Give back what no remaining stage uses, so that the others have the cores and the memory."""
        with self._lock:
            if not generate and self._engines:
                for engine in self._engines.values():
                    engine.stop()
                self._engines = {}
            if not train and self._group is not None:
                self._group.stop()
                self._group = None

    def stop(self, graceful: bool) -> None:
        """Give everything back; without `graceful` Ray's end takes it down."""
        if graceful:
            self.stop_unneeded(False, False)


def _has_replies(run_directory: str, stage: str) -> bool:
    """True when the reply cache holds something that this stage has drawn before."""
    try:
        return bool(storage.list_files(storage.join(run_directory, ".replies", f"{stage}*.jsonl")))
    except FileNotFoundError:
        return False


class hold:
    """One run at a time on a run's directory: the second is told who holds it. `lost` is told of a holder that came in between."""

    def __init__(self, directory: str, lost: Callable[[str], None]) -> None:
        self._directory, self._lost = directory, lost
        self._file: IO[str] | None = None
        self._lease: Lease | None = None

    def __enter__(self) -> None:
        storage.make_directory(self._directory)
        if storage.is_remote(self._directory):
            self._lease = Lease(self._directory, self._lost)
            try:
                self._lease.claim()
            except LeaseHeld as held:
                self._lease = None
                raise self._in_use(str(held)) from None
            return
        self._file = open(storage.join(self._directory, ".lock"), "a+", encoding="utf-8")
        try:
            _lock_soon(self._file)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise self._in_use(holder) from None
        self._file.truncate(0)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._lease is not None:
            self._lease.release()

    def _in_use(self, holder: str) -> SettingsError:
        return SettingsError(f"{self._directory} is in use by {holder}; wait for it, or choose another --runs")


def _lock_soon(file: IO[str]) -> None:
    """Lock a file at once or within half a second: `danlu status` holds the lock for a moment to see whether it is free."""
    for attempt in range(6):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == 5:
                raise
            time.sleep(0.1)


def preflight(node: Node, base_directory: str) -> None:
    """The stage's quick look at its input, with the stage's name before what it finds wrong."""
    try:
        node.stage.preflight(base_directory)
    except (SettingsError, FileNotFoundError) as error:
        raise type(error)(f"stages.{node.name}: {error}") from error


def explain(error: BaseException, directory: str | None = None) -> str:
    """An error as one message a user can act on: the cause rather than Ray's wrapping of it. `directory` is the stage's."""
    cause: BaseException = error
    while True:
        inner = getattr(cause, "cause", None) or cause.__cause__
        if not isinstance(inner, BaseException) or inner is cause or type(cause) in (ConnectionError, DiskFull, StoreGone):
            break  # ours say more
        cause = inner
    if disk.is_full(cause):
        return str(disk.full(cause, directory))
    if isinstance(cause, StoreGone):
        return f"{cause}. What was committed stays: once the store answers, the same command goes on where it stopped"
    if isinstance(cause, SettingsError | LedgerError | FileNotFoundError | PermissionError | RunError):
        return str(cause)
    if os.environ.get("DANLU_TRACEBACK"):
        traceback.print_exception(error, file=sys.stderr)
    return f"{type(cause).__name__}: {cause}"


def account(directory: str) -> str:
    """`in 10, kept 8, rejected 2` of a finished stage, and what its model calls cost."""
    manifest = shards.load_manifest(directory)
    ledger, stats = manifest.ledger, manifest.stats
    words = [("in", ledger.rows_in), ("created", ledger.created), ("kept", ledger.kept)]
    words += [("rejected", ledger.rejected.total()), ("quarantined", ledger.quarantined)]
    words += [("forgotten", ledger.forgotten)]
    told = ", ".join(f"{word} {count:,}" for word, count in words if count or word == "kept")
    if "completion_tokens" in stats:
        told += f"; {stats['calls']:,} calls, {stats['prompt_tokens']:,} tokens in, {stats['completion_tokens']:,} out"
        price = spending.cost(shards.load_timings(directory))
        told += f", {price}" if price else ""
    return told


def resume_command(options: Options, recipe_path: str) -> str:
    """The command that goes on."""
    program = "danlu" if shutil.which("danlu") or os.path.basename(sys.argv[0]) != "danlu" else os.path.relpath(sys.argv[0])
    pieces = [program, "run", recipe_path]
    if options.runs != "runs":
        pieces += ["--runs", options.runs]
    if options.limit is not None:
        pieces += ["--limit", str(options.limit)]
    if options.workers != 2:
        pieces += ["--workers", str(options.workers)]
    if options.train_workers is not None:
        pieces += ["--train-workers", str(options.train_workers)]
    if options.address is not None:
        pieces += ["--address", options.address]
    return shlex.join(pieces)
