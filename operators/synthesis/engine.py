"""Generation engines: vLLM in Ray actors, shared by all stages of a run.

`start_engine` returns at once; the weights load in the actors while other stages run. A request goes to the replica
with the fewest under way, replies come back one by one as they complete, and nothing waits for the slowest of a batch.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from operators.config import Settings
from operators.synthesis.packaged import check_model, model_revision
from operators.synthesis.requests import Reply, Request

_POLL_S = 1.0  # a caller is back at its cancel check at least this often
_MAX_FRUITLESS_STARTS = 3  # engines started in a row without one reply before the run gives up


class EngineError(RuntimeError):
    """The engine could not be started, or died again and again without a reply."""


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

    def generate(self, requests: Sequence[Request], cancelled: threading.Event | None = None) -> Iterator[tuple[int, Reply]]:
        """(index of the request, reply) as they complete, each exactly once.

        When a replica dies a new one is started and only the requests it had in flight are asked again. Closing the
        iterator, or setting `cancelled`, takes the rest back. Raises EngineError when engines die without a reply.
        """
        if not requests:
            return
        import ray

        self.start()
        client = uuid.uuid4().hex
        waiting = deque(range(len(requests)))
        flying: list[set[int]] = [set() for _ in self._replicas]
        handles = list(self._replicas)
        polls: dict[Any, int] = {}
        window = 4 * self.settings.max_running  # enough for the engine to always have its next batch at hand
        try:
            while waiting or any(flying):
                for slot in sorted(range(len(handles)), key=lambda s: self._load[s]):
                    share = max(1, -(-len(waiting) // max(1, len(handles))))
                    batch = [waiting.popleft() for _ in range(min(len(waiting), window - len(flying[slot]), share))]
                    if batch:
                        handles[slot] = self._replicas[slot]
                        handles[slot].submit.remote(client, [(index, requests[index]) for index in batch])
                        flying[slot].update(batch)
                        self._adjust(slot, len(batch))
                    if flying[slot] and slot not in polls.values():
                        polls[handles[slot].collect.remote(client, _POLL_S)] = slot
                done, _ = ray.wait(list(polls), timeout=_POLL_S)
                if cancelled is not None and cancelled.is_set():
                    return
                for poll in done:
                    slot = polls.pop(poll)
                    try:
                        replies = ray.get(poll)
                    except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as death:
                        self._replace(slot, handles[slot], death)
                        waiting.extendleft(sorted(flying[slot], reverse=True))
                        self._adjust(slot, -len(flying[slot]))
                        flying[slot].clear()
                        continue
                    if replies:
                        self._fruitless = 0
                    self._adjust(slot, -len(replies))
                    for index, reply in replies:
                        flying[slot].discard(index)
                        yield index, reply
        finally:
            for slot, left in enumerate(flying):
                if left:
                    self._adjust(slot, -len(left))
                    handles[slot].abort.remote(client)

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


def start_engine(settings: EngineSettings, cache_directory: str) -> Engine:
    """An engine whose replicas are loading. Ray must be initialised. Raises packaged.ModelError before anything starts."""
    engine = Engine(settings, cache_directory)
    engine.start()
    return engine
