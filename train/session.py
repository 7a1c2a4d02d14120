"""One Ray Train worker group for all training stages of a run.

Starting a group costs a minute or more (placement, process group, imports of torch, transformers and TRL), so the group
is started once and kept warm: its train loop asks a coordinator actor for jobs. A job names a kind, its settings and the
stage's directory; it reads its inputs there, checkpoints there and commits there by itself, and what comes back
through the coordinator is the small result. Therefore a job can be handed out again at any time:

- a lost worker: Ray Train restarts the group, the coordinator hands the unfinished job out again, the job goes on from its
  last checkpoint;
- an error inside a job: every worker reports it, the stage that submitted gets it, the group lives on. If one worker fails
  while others are caught in a collective, the failing one ends itself, which makes Ray Train start the group afresh.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import disk, storage
from cluster.placement import gpus, placement
from train import jobs
from train.coordinator import Coordinator
from train.errors import JobCancelled, JobError, TrainingError
from train.settings import OptimizerSettings
from train.tracking import Tracked

if TYPE_CHECKING:
    from train.parallel import Workers

_POLL_S = 0.1
_GRACE_S = 30.0  # for the other workers to report the same error before the failing one ends itself
_GROUP_RESTARTS = 32


class TrainGroup:
    """A Ray Train worker group that runs one training job after the other.

    `workers` processes with `cpus` logical CPUs each (small, so that data tasks do not starve), one GPU each where
    `use_gpu` (default: where the cluster has as many). `storage_path` is scratch for Ray Train's own state, and must be
    seen by all nodes on a cluster. Ray must be initialised. Not for use from several threads at once.
    """

    def __init__(self, workers: int = 2, *, storage_path: str, cpus: float = 0.5, use_gpu: bool | None = None) -> None:
        self.workers, self.storage_path, self.cpus = workers, storage_path, cpus
        self.use_gpu = use_gpu
        self._coordinator: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._where: dict[str, float] = {}

    def start(self) -> None:
        """Begin to start the workers and return at once; nothing happens if they were started."""
        if self._thread is not None:
            return
        if self.use_gpu is None:
            self.use_gpu = gpus("train") >= self.workers
        # Beside the driver, whose end is its own end too: elsewhere it could be lost with a node that the autoscaler takes away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._coordinator = ray.remote(Coordinator).options(num_cpus=0, scheduling_strategy=here).remote(self.workers)
        self._where = placement("train")
        # Workers import torch and TRL from disk: a minute is not always enough on a busy machine.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
        self._thread = threading.Thread(target=self._fit, name="train-group", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            # Imports torch, which takes seconds: here, so that `start` returns at once.
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchConfig, TorchTrainer

            # Ray Train's own requests wait for a store as well, and the store is the one that the environment names.
            filesystem, path = storage.resolve(self.storage_path)
            TorchTrainer(
                serve,
                train_loop_config={"coordinator": self._coordinator},
                torch_config=TorchConfig(backend="nccl" if self.use_gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=self.workers,
                    use_gpu=bool(self.use_gpu),
                    resources_per_worker={"CPU": self.cpus, **({"GPU": 1.0} if self.use_gpu else {}), **self._where},
                ),
                # A name that was used before would silently resume that run.
                run_config=RunConfig(
                    name=f"training-{uuid.uuid4().hex[:12]}",
                    storage_path=path,
                    storage_filesystem=filesystem,
                    failure_config=FailureConfig(max_failures=_GROUP_RESTARTS),
                ),
            ).fit()
        except BaseException as error:  # noqa: BLE001  raised again by whoever waits for the group
            self._failure = error

    def run(
        self,
        job: dict[str, Any],
        on_progress: Callable[[int, int, str, dict[str, Any]], None] = lambda done, total, note, metrics: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Do one job, {"kind", "config", "directory"}, and return its result. Starts the group if need be.

        Raises TrainingError when the job failed or the group could not be kept alive, JobCancelled when `cancelled` said so
        (its last checkpoint stays, and the same job goes on from there), ValueError for a job that names no known kind.
        """
        if job.get("kind") not in jobs.KINDS:
            raise ValueError(f"unknown kind of training job {job.get('kind')!r}; valid: {', '.join(jobs.KINDS)}")
        if not (os.path.isabs(job["directory"]) or "://" in job["directory"]):
            raise ValueError(f"the job's directory must be absolute, workers run elsewhere: {job['directory']}")
        self.start()
        number = ray.get(self._coordinator.submit.remote(job))
        asked, seen = False, None
        while True:
            status = ray.get(self._coordinator.status.remote(number))
            if status["progress"] is not None and status["progress"] != seen:
                seen = status["progress"]
                on_progress(*seen)
            outcome = status["outcome"]
            if outcome is not None:
                if outcome.get("cancelled"):
                    raise JobCancelled(outcome["error"])
                if outcome.get("error"):
                    raise TrainingError(outcome["error"], outcome.get("details", ""))
                return dict(outcome["result"])
            if self._failure is not None:
                raise TrainingError(f"the training group could not be kept alive: {self._failure}") from self._failure
            if self._thread is None or not self._thread.is_alive():
                raise TrainingError("the training group has ended")
            if not asked and cancelled():
                asked = True
                ray.get(self._coordinator.cancel.remote(number))
                if not status["attempts"]:
                    ray.get(self._coordinator.give_up.remote(number, {"error": "stopped before it began", "cancelled": True}))
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the workers; nothing happens if they were not started."""
        if self._thread is None:
            return
        ray.get(self._coordinator.stop.remote())
        self._thread.join(timeout=60)
        ray.kill(self._coordinator)
        self._thread = None


def _threads() -> int:
    """Threads of a worker: `DANLU_THREADS`, else its share of the cores that this process may use. (Ray sets `OMP_NUM_THREADS` to
    1 by itself, which would not be told from a wish.)"""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(os.environ.get("DANLU_THREADS") or max(1, share))


def serve(config: dict[str, Any]) -> None:
    """The train loop of one worker: do jobs until told to stop."""
    _prepare_process()
    import torch

    from train.parallel import Workers

    coordinator = config["coordinator"]
    torch.set_num_threads(_threads())
    workers = Workers.here()
    incarnation = workers.share(uuid.uuid4().hex)
    jobs.warm_up()
    last, pause = 0, _POLL_S
    while True:
        # Every worker asks for itself: one that waited for the first in a collective would time out in a long idle spell.
        given = ray.get(coordinator.next.remote(incarnation, last))
        if given is None:
            time.sleep(pause)
            pause = min(1.0, pause * 1.2)
            continue
        if given.get("stop"):
            return
        last, pause = given["number"], _POLL_S
        report = _attempt(given["job"], workers, _Reporter(coordinator, last))
        ray.get(coordinator.report.remote(last, incarnation, workers.rank, report))
        if report.get("error") and not _settled(coordinator, last):
            ray.get(coordinator.give_up.remote(last, report))
            raise RuntimeError(f"the training group must start afresh: {report['error']}")


def _attempt(job: dict[str, Any], workers: Workers, reporter: _Reporter) -> dict[str, Any]:
    """Run a job; what became of it, as plain data."""
    from operators.config import parse

    workers.report = reporter
    tracked: Tracked | None = None
    try:
        model, function = jobs.load(job["kind"])
        config = parse(model, job["config"], job["kind"])
        if isinstance(config, OptimizerSettings):
            tracked = workers.on_first(lambda: Tracked(reporter, config.track, job["directory"], job["kind"]))
            workers.report = tracked or reporter
        result = function(config, job["directory"], workers)
        if tracked is not None:
            result = {**result, "timings": {**result["timings"], **tracked.close("FINISHED")}}
            tracked = None
        return {"result": result if workers.first else None}
    except JobCancelled as error:
        return {"error": str(error), "details": "", "cancelled": True, "secondary": False}
    except Exception as error:  # noqa: BLE001  told to the stage that submitted the job
        message = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
        if disk.is_full(error):
            message = str(disk.full(error, job["directory"]))
        return {"error": message, "details": traceback.format_exc(), "secondary": isinstance(error, JobError)}
    finally:
        if tracked is not None:
            tracked.close("FAILED")


def _settled(coordinator: Any, number: int) -> bool:
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        if ray.get(coordinator.settled.remote(number)):
            return True
        time.sleep(_POLL_S)
    return False


class _Reporter:
    """Tells the coordinator of each step without waiting for it; learns of a wish to stop one step later."""

    def __init__(self, coordinator: Any, number: int) -> None:
        self._coordinator, self._number = coordinator, number
        self._pending: Any = None
        self._stop = False

    def __call__(self, done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        if self._pending is None or ray.wait([self._pending], timeout=0)[0]:
            if self._pending is not None:
                self._stop = self._stop or bool(ray.get(self._pending))
            self._pending = self._coordinator.step.remote(self._number, done, total, note, metrics)
        return self._stop


def _prepare_process() -> None:
    """No hub, no telemetry, no progress bars: set before transformers is imported."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ[name] = value
