"""Generation engines: vLLM in Ray actors, shared by all stages of a run.

`start_engine` returns at once; the weights load in the actors while other stages run. A request goes to the replica
with the fewest under way, replies come back one by one as they complete, and nothing waits for the slowest of a batch.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from operators.config import Settings
from operators.synthesis.endpoint import EndpointEngine, EndpointSettings
from operators.synthesis.packaged import check_model, model_revision
from operators.synthesis.requests import EngineError, Reply, Request, TextEngine

_POLL_S = 1.0  # a caller is back at its cancel check at least this often
_MAX_FRUITLESS_STARTS = 3  # engines started in a row without one reply before the run gives up


class EngineSettings(Settings):
    """Which model generates, and on what. Stages with equal settings share one engine."""

    model: str = Field(
        default="packaged:smollm2-135m-instruct", description="`packaged:NAME`, or a folder with safetensors and a tokenizer"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="auto: gpu when the Ray cluster has one")
    max_model_len: int = Field(
        default=2048, ge=16, description="longest prompt + reply, tokens; a longer prompt is rejected and counted"
    )
    max_running: int = Field(default=64, ge=1, description="requests in one batch of the engine; the rest wait inside it")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="type of weights and activations"
    )
    kv_cache_gb: int = Field(default=1, ge=1, description="memory for the key-value cache on CPU, GiB")
    gpu_memory: float = Field(default=0.9, gt=0, le=1, description="share of a GPU's memory that vLLM may take")
    cpu_threads: int = Field(default=0, ge=0, description="threads of an engine on CPU; 0 = all of the machine")
    cpus: float = Field(default=1, ge=0, description="logical Ray CPUs that a replica reserves")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs (or CPU processes) that hold one copy of the model")
    replicas: int = Field(default=1, ge=1, description="copies of the model")
    enforce_eager: bool = Field(
        default=True, description="no compilation and no CUDA graphs: starts faster, generates slower on GPU"
    )
    seed: int = Field(default=0, ge=0, description="seed of the engine itself; every request carries its own")
    endpoint: EndpointSettings | None = Field(
        default=None, description="a server with OpenAI's interface that generates instead; `model` is the model's name there"
    )


class Engine:
    """A handle on the replicas, made on the driver; `generate` may be called by several threads at once."""

    def __init__(self, settings: EngineSettings, cache_directory: str) -> None:
        """Checks the model reference (raises packaged.ModelError) and starts nothing."""
        check_model(settings.model)
        self.settings = settings
        self.cache_directory = cache_directory
        self._lock = threading.Lock()
        self._replicas: list[Any] = []
        self._load: list[int] = []  # requests under way at each replica, of all callers
        self._fruitless = 0

    @property
    def revision(self) -> str:
        """Content hash of weights, tokenizer and chat template."""
        return model_revision(self.settings.model, self.cache_directory)

    @property
    def started(self) -> bool:
        return bool(self._replicas)

    def start(self) -> None:
        """Create the actors unless they are there; returns at once, loading goes on beside."""
        with self._lock:
            if not self._replicas:
                self._replicas = [self._create() for _ in range(self.settings.replicas)]
                self._load = [0] * len(self._replicas)

    def wait_ready(self, timeout_s: float | None = None) -> list[int]:
        """Process ids of the replicas once all have loaded. Raises ray.exceptions.GetTimeoutError, RayActorError."""
        import ray

        self.start()
        return list(ray.get([replica.ready.remote() for replica in self._replicas], timeout=timeout_s))

    @property
    def in_flight(self) -> int:
        """Requests that keep all replicas busy: each has its next batch at hand."""
        return 4 * self.settings.max_running * self.settings.replicas

    def open(self) -> VllmSession:
        """A stream of requests and replies of one caller."""
        self.start()
        return VllmSession(self)

    def generate(self, requests: Sequence[Request], cancelled: threading.Event | None = None) -> Iterator[tuple[int, Reply]]:
        """(index of the request, reply) as they complete, each exactly once.

        Closing the iterator, or setting `cancelled`, takes the rest back. Raises EngineError.
        """
        if not requests:
            return
        session = self.open()
        try:
            session.submit(list(enumerate(requests)))
            left = len(requests)
            while left:
                if cancelled is not None and cancelled.is_set():
                    return
                for index, reply in session.collect(_POLL_S):
                    left -= 1
                    yield index, reply
        finally:
            session.close()

    def stop(self) -> None:
        """End the actors and their processes; the engine can be started again."""
        import ray

        with self._lock:
            replicas, self._replicas = self._replicas, []
        for replica in replicas:
            ray.kill(replica)

    def _adjust(self, slot: int, change: int) -> None:
        with self._lock:
            if slot < len(self._load):
                self._load[slot] += change

    def _replace(self, slot: int, dead: Any, death: Exception) -> None:
        """Start a new replica in a slot, unless another caller has done so already."""
        import ray

        with self._lock:
            if not self._replicas:
                raise EngineError("the generation engine was stopped while replies were under way") from death
            if self._replicas[slot] is not dead:
                return
            self._fruitless += 1
            if self._fruitless >= _MAX_FRUITLESS_STARTS:
                raise EngineError(
                    f"the generation engine ({self.settings.model}) died {self._fruitless} times without a reply: {death}"
                ) from death
            ray.kill(dead)
            self._replicas[slot] = self._create()

    def _create(self) -> Any:
        import ray

        from operators.synthesis.vllm_worker import VllmWorker

        settings = self.settings.model_dump()
        if settings["device"] == "auto":
            settings["device"] = "gpu" if ray.cluster_resources().get("GPU", 0) >= self.settings.tensor_parallel else "cpu"
        gpus = self.settings.tensor_parallel if settings["device"] == "gpu" else 0
        actor = ray.remote(VllmWorker).options(num_cpus=self.settings.cpus, num_gpus=gpus, max_concurrency=64, max_restarts=0)
        return actor.remote(settings, self.cache_directory)


class VllmSession:
    """Requests of one caller at the replicas of an engine (see requests.EngineSession).

    A request goes to the replica with the fewest under way. When a replica dies a new one is started and only the
    requests it had in flight are asked again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._client = uuid.uuid4().hex
        self._handles = list(engine._replicas)
        self._flying: list[dict[int, Request]] = [{} for _ in self._handles]
        self._polls: dict[Any, int] = {}

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        engine = self._engine
        order = sorted(range(len(self._handles)), key=lambda slot: engine._load[slot])
        for place, slot in enumerate(order):
            share = list(requests[place :: len(order)])
            if share:
                self._handles[slot] = engine._replicas[slot]
                self._handles[slot].submit.remote(self._client, share)
                self._flying[slot].update(share)
                engine._adjust(slot, len(share))

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        import ray

        for slot, flying in enumerate(self._flying):
            if flying and slot not in self._polls.values():
                self._polls[self._handles[slot].collect.remote(self._client, _POLL_S)] = slot
        if not self._polls:
            return []
        done, _ = ray.wait(list(self._polls), timeout=timeout_s)
        found: list[tuple[int, Reply]] = []
        for poll in done:
            slot = self._polls.pop(poll)
            try:
                replies = ray.get(poll)
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as death:
                self._engine._replace(slot, self._handles[slot], death)
                lost = sorted(self._flying[slot].items())
                self._engine._adjust(slot, -len(lost))
                self._flying[slot].clear()
                self.submit(lost)
                continue
            if replies:
                self._engine._fruitless = 0
            self._engine._adjust(slot, -len(replies))
            for index, reply in replies:
                del self._flying[slot][index]
                found.append((index, reply))
        return found

    def close(self) -> None:
        for slot, left in enumerate(self._flying):
            if left:
                self._engine._adjust(slot, -len(left))
                self._handles[slot].abort.remote(self._client)
                left.clear()


def check_engine(settings: EngineSettings) -> None:
    """Raises packaged.ModelError unless the model can be found; a stage's model and a server are not looked for here."""
    if settings.endpoint is None and not settings.model.startswith("@"):
        check_model(settings.model)


def engine_revision(settings: EngineSettings, cache_directory: str) -> str:
    """What names the model behind the settings in keys of the reply cache. Starts nothing."""
    if settings.endpoint is not None:
        return settings.endpoint.revision_of(settings.model)
    return model_revision(settings.model, cache_directory)


def start_engine(settings: EngineSettings, cache_directory: str) -> TextEngine:
    """An engine that is loading; a vLLM engine needs Ray initialised. Raises packaged.ModelError before anything starts."""
    engine: TextEngine = (
        EndpointEngine(settings.model, settings.endpoint) if settings.endpoint is not None else Engine(settings, cache_directory)
    )
    engine.start()
    return engine
