"""Generation engines: vLLM in Ray actors, shared by all stages of a run.

`start_engine` returns at once; the weights load in the actors while other stages run. A request goes to the replica
that has seen its beginning, unless another has much less to do; replies come back one by one as they complete, and
nothing waits for the slowest of a batch.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from cluster.placement import gpus as reachable_gpus
from cluster.placement import placement
from operators.config import Settings
from operators.synthesis.endpoint import EndpointEngine, EndpointSettings
from operators.synthesis.packaged import check_model, model_revision
from operators.synthesis.prefixes import PrefixRouter
from operators.synthesis.requests import EngineError, Reply, Request, TextEngine

_POLL_S = 1.0  # a caller is back at its cancel check at least this often
_MAX_FRUITLESS_STARTS = 3  # engines started in a row without one reply before the run gives up
_MAX_DEATHS = 3  # engines that may die while one request is under way: it may be what ends them


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
    kv_cache_gb: float = Field(default=1, gt=0, description="memory for the key-value cache on CPU, GiB")
    gpu_memory: float = Field(default=0.9, gt=0, le=1, description="share of a GPU's memory that vLLM may take")
    cpu_threads: int = Field(default=0, ge=0, description="threads of an engine on CPU; 0 = all of the machine")
    cpus: float = Field(default=1, ge=0, description="logical Ray CPUs that a replica reserves")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs (or CPU processes) that hold one copy of the model")
    replicas: int = Field(default=1, ge=1, description="copies of the model")
    group_prefixes: bool = Field(
        default=True, description="waiting prompts that begin alike run one after the other, so that the prefix cache holds them"
    )
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
        self._router = PrefixRouter(settings.max_running)
        self._fruitless = 0
        self._proved = False  # a reply has come: the settings are such that an engine starts

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

    def _place(self, requests: Sequence[tuple[int, Request]]) -> list[tuple[int, Any, dict[int, Request]]]:
        """(slot, replica, its share of the requests); they count as under way from here on. Raises EngineError."""
        with self._lock:
            if not self._replicas:
                raise EngineError("the generation engine was stopped")
            shares: dict[int, dict[int, Request]] = {}
            for number, request in requests:
                slot = self._router.choose(request.messages, self._load) if len(self._load) > 1 else 0
                self._load[slot] += 1
                shares.setdefault(slot, {})[number] = request
            return [(slot, self._replicas[slot], share) for slot, share in shares.items()]

    def _done(self, slot: int, replica: Any, count: int) -> None:
        """Requests that are no longer under way at a replica: answered, lost with it, or taken back."""
        with self._lock:
            if slot < len(self._replicas) and self._replicas[slot] is replica:
                self._load[slot] -= count

    def _answered(self) -> None:
        self._fruitless, self._proved = 0, True

    def _replace(self, slot: int, dead: Any, death: Any) -> None:
        """Start a new replica in a slot, unless another caller has done so already. Raises EngineError."""
        import ray

        from operators.synthesis.vllm_worker import EngineStartError

        with self._lock:
            if not self._replicas:
                raise EngineError("the generation engine was stopped while replies were under way") from death
            if self._replicas[slot] is not dead:
                return
            if not self._proved and isinstance(getattr(death, "cause", None), EngineStartError):
                raise EngineError(f"the generation engine ({self.settings.model}) cannot be started: {death.cause}") from death
            self._fruitless += 1
            if self._fruitless >= _MAX_FRUITLESS_STARTS:
                raise EngineError(
                    f"the generation engine ({self.settings.model}) died {self._fruitless} times without a reply: {death}"
                ) from death
            ray.kill(dead)
            self._replicas[slot], self._load[slot] = self._create(), 0

    def _create(self) -> Any:
        import ray

        from operators.synthesis.vllm_worker import ENVIRONMENT, VllmWorker

        settings = self.settings.model_dump()
        if settings["device"] == "auto":
            settings["device"] = "gpu" if reachable_gpus("generate") >= self.settings.tensor_parallel else "cpu"
        gpus = self.settings.tensor_parallel if settings["device"] == "gpu" else 0
        actor = ray.remote(VllmWorker).options(
            num_cpus=self.settings.cpus, num_gpus=gpus, resources=placement("generate" if gpus else "cpu"),
            max_concurrency=64, max_restarts=0, runtime_env={"env_vars": ENVIRONMENT},
        )  # fmt: skip
        return actor.remote(settings, self.cache_directory)


@dataclass
class _Share:
    """What one session has under way at one replica."""

    slot: int
    replica: Any
    flying: dict[int, Request]
    poll: Any = None  # the call of `collect` that is under way


class VllmSession:
    """Requests of one caller at the replicas of an engine (see requests.EngineSession).

    When a replica dies a new one is started and only the requests it had in flight are asked again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._client = uuid.uuid4().hex
        self._shares: list[_Share] = []
        self._deaths: Counter[int] = Counter()  # engines that died while a request was under way
        self._closed = False

    def submit(self, requests: Sequence[tuple[int, Request]]) -> None:
        if self._closed:
            raise EngineError("the session is closed")
        for slot, replica, flying in self._engine._place(requests):
            share = next((share for share in self._shares if share.replica is replica), None)
            if share is None:
                self._shares.append(_Share(slot, replica, flying))
            else:
                share.flying.update(flying)
            replica.submit.remote(self._client, list(flying.items()))

    def collect(self, timeout_s: float) -> list[tuple[int, Reply]]:
        import ray

        for share in self._shares:
            if share.flying and share.poll is None:
                share.poll = share.replica.collect.remote(self._client, _POLL_S)
        polls = {share.poll: share for share in self._shares if share.poll is not None}
        if not polls:
            return []
        done, rest = ray.wait(list(polls), timeout=timeout_s)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        found: list[tuple[int, Reply]] = []
        dead: list[tuple[_Share, Exception]] = []
        for poll in done:
            share = polls[poll]
            share.poll = None
            try:
                replies = ray.get(poll)
            except ray.exceptions.RayError as death:
                dead.append((share, death))
                continue
            if replies:
                self._engine._answered()
                self._engine._done(share.slot, share.replica, len(replies))
            for index, reply in replies:
                del share.flying[index]
                found.append((index, reply))
        if not found:  # otherwise the next call learns of it again: what came is delivered before an error can be raised
            for share, why in dead:
                self._ask_again(share, why)
        return found

    def _ask_again(self, share: _Share, death: Exception) -> None:
        """Give what a dead replica had in flight to the others, or to its successor. Raises EngineError."""
        self._shares.remove(share)
        self._engine._replace(share.slot, share.replica, death)
        self._deaths.update(share.flying.keys())
        for index in share.flying:
            if self._deaths[index] >= _MAX_DEATHS:
                raise EngineError(
                    f"{_MAX_DEATHS} generation engines died while one request was under way, which may be what ends them: "
                    f"{str(share.flying[index].messages)[:200]}"
                ) from death
        self.submit(sorted(share.flying.items()))

    def close(self) -> None:
        self._closed = True
        for share in self._shares:
            if share.flying or share.poll is not None:
                self._engine._done(share.slot, share.replica, len(share.flying))
                share.replica.abort.remote(self._client)  # ends the poll as well
        self._shares = []


def check_engine(settings: EngineSettings) -> None:
    """Raises packaged.ModelError unless the model can be found; a stage's model and a server are not looked for here."""
    if settings.endpoint is not None:
        settings.endpoint.key()  # that it may be sent
    elif not settings.model.startswith("@"):
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
