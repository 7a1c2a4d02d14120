"""One vLLM engine inside a Ray actor: requests enter and leave one by one, the batch inside is continuous.

The engine is stepped in this process (no engine-core child), so that nothing outlives the actor: a Ray worker ends with
its driver and with its node's raylet, and tensor-parallel children end when their pipe to it closes.
"""

from __future__ import annotations

import copy
import os
import threading
from dataclasses import dataclass
from typing import Any

import orjson

from operators.synthesis.packaged import resolve_model
from operators.synthesis.prefixes import Sweep, token_key
from operators.synthesis.requests import PROMPT_TOO_LONG, REFUSED, Messages, Reply, Request, SamplingSettings

_CHUNK = 32  # requests that are tokenised before the engine sees them: it starts while the rest is being tokenised


class EngineStartError(RuntimeError):
    """vLLM could not be built with these settings, model or device: it says why, and would say so again."""


@dataclass(frozen=True)
class _Waiting:
    """A request that is ready for the engine."""

    client: str
    index: int
    tokens: list[int]
    params: Any  # vllm.SamplingParams


class VllmWorker:
    """The actor's class. All methods are thread-safe; vLLM's engine is touched by one thread only, which also built it
    (OpenMP keeps a pool of threads for each calling thread). Requests are tokenised by the threads that bring them.

    `settings` is the JSON form of EngineSettings; see there.
    """

    def __init__(self, settings: dict[str, Any], cache_directory: str) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._waiting: Sweep[_Waiting] = Sweep(settings["group_prefixes"])
        self._outbox: dict[str, list[tuple[int, Reply]]] = {}
        self._closed: set[str] = set()  # callers that have gone, for good: what is still on its way from them is dropped
        self._gone: set[str] = set()  # those of them whose requests the engine may still be working on
        self._failure: BaseException | None = None
        self._ready = self._stopped = False
        self._tokenizer: Any = None
        self._tokenizing = threading.Lock()
        self._length = 0
        set_environment(settings)
        self._thread = threading.Thread(target=self._run, args=(cache_directory,), name="vllm", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure is not None)

    def ready(self) -> int:
        """The process id, once the weights are loaded (calls wait for the constructor). Raises EngineStartError."""
        self._raise_failure()
        return os.getpid()

    def submit(self, client: str, requests: list[tuple[int, Request]]) -> None:
        """Queue requests of one caller, each with the caller's own number for it."""
        try:
            for begin in range(0, len(requests), _CHUNK):
                prepared = [self._prepare(client, index, request) for index, request in requests[begin : begin + _CHUNK]]
                with self._changed:
                    if self._failure is not None or client in self._closed:
                        return
                    for item in prepared:
                        if isinstance(item, _Waiting):
                            self._waiting.add(token_key(item.tokens), item)
                        else:
                            self._outbox.setdefault(client, []).append(item)
                    self._changed.notify_all()
        except BaseException as failure:  # noqa: BLE001 - nobody waits for this call: `collect` tells the caller
            self._fail(failure)

    def collect(self, client: str, timeout_s: float) -> list[tuple[int, Reply]]:
        """The finished replies of one caller; waits up to `timeout_s` for the first. May be empty."""
        with self._changed:
            self._changed.wait_for(lambda: client in self._outbox or client in self._closed or self._failure is not None, timeout_s)
            self._raise_failure()
            return self._outbox.pop(client, [])

    def abort(self, client: str) -> None:
        """Forget everything that one caller asked for and has not collected, also what is still on its way."""
        with self._changed:
            self._closed.add(client)
            self._gone.add(client)
            self._waiting.drop(lambda item: item.client == client)
            self._outbox.pop(client, None)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the stepping thread and free the engine."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _fail(self, failure: BaseException) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        why = f"{type(self._failure).__name__}: {self._failure}"
        if not self._ready:
            raise EngineStartError(why) from self._failure
        raise RuntimeError(f"the vLLM engine failed: {why}") from self._failure

    def _prepare(self, client: str, index: int, request: Request) -> _Waiting | tuple[int, Reply]:
        """A request for the engine, or the reply to one that it cannot answer, whatever is wrong with it."""
        try:
            with self._tokenizing:
                tokens = _encode(self._tokenizer, request.messages)
            if len(tokens) >= self._length:
                return index, Reply("", PROMPT_TOO_LONG, len(tokens), 0)
            return _Waiting(client, index, tokens, _sampling_params(request.sampling, request.seed, request.json_schema))
        except (MemoryError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - of this request alone, and part of its reply
            return index, _refused(error, 0)

    def _run(self, cache_directory: str) -> None:
        try:
            engine = _build(self._settings, cache_directory)
            with self._changed:
                # vLLM's detokenizer reads its own at the same time, and tokenizers cannot be shared by threads
                self._tokenizer = copy.deepcopy(engine.get_tokenizer())
                self._length = int(engine.model_config.max_model_len)
                self._ready = True
                self._changed.notify_all()
            self._serve(engine)
        except BaseException as failure:  # noqa: BLE001 - handed to every caller by _raise_failure
            self._fail(failure)

    def _serve(self, engine: Any) -> None:
        running: dict[str, tuple[str, int]] = {}
        admitted = 0
        while True:
            with self._changed:
                if not running:
                    self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                room = min(self._settings["max_running"] - len(running), len(self._waiting))
                arrivals = [self._waiting.take() for _ in range(room)]
                gone, self._gone = self._gone, set()
            if gone:
                names = [name for name, (client, _) in running.items() if client in gone]
                engine.abort_request(names, internal=False)
                for name in names:
                    del running[name]
            done: list[tuple[str, int, Reply]] = []
            for item in arrivals:
                name, admitted = str(admitted), admitted + 1
                try:
                    engine.add_request(name, {"type": "token", "prompt_token_ids": item.tokens}, item.params)
                except (MemoryError, OSError):
                    raise
                except Exception as error:  # noqa: BLE001 - vLLM checks a request here, and it is part of its reply
                    engine.abort_request([name], internal=False)  # whatever of it was entered before it failed
                    done.append((item.client, item.index, _refused(error, len(item.tokens))))
                else:
                    running[name] = (item.client, item.index)
            if running:
                for output in engine.step():
                    if output.finished and output.request_id in running:
                        done.append((*running.pop(output.request_id), _reply(output)))
            if done:
                with self._changed:
                    for client, index, reply in done:
                        if client not in self._closed:
                            self._outbox.setdefault(client, []).append((index, reply))
                    self._changed.notify_all()


ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""What vLLM reads when it is imported. An actor with an environment of its own also gets a fresh process rather than one
that has run other tasks: vLLM 0.32 on CPU cannot be built where llvmlite is imported."""


def set_environment(settings: dict[str, Any]) -> None:
    """vLLM reads these when it is imported, torch reads the thread count when its library loads."""
    os.environ.update(ENVIRONMENT)
    if settings["device"] == "cpu":
        # Waiting threads sleep instead of spinning: on two cores shared with other work 440 tokens/s against 60-96.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Ray gives a one-CPU actor OMP_NUM_THREADS=1; the engine is meant to use the machine.
        os.environ["OMP_NUM_THREADS"] = str(settings["cpu_threads"] or os.cpu_count() or 1)


def vllm_options(settings: dict[str, Any], model: str) -> dict[str, Any]:
    """Arguments of vllm.EngineArgs (or vllm.LLM) for the JSON form of EngineSettings and the folder of its model."""
    parallel = settings["tensor_parallel"]
    options: dict[str, Any] = {
        "model": model,
        "max_model_len": settings["max_model_len"],
        "max_num_seqs": settings["max_running"],
        "dtype": settings["dtype"],
        "seed": settings["seed"],
        "enforce_eager": settings["enforce_eager"],
        "tensor_parallel_size": parallel,
        "distributed_executor_backend": "mp" if parallel > 1 else "uni",
        "enable_prefix_caching": True,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "disable_log_stats": True,
        # Small models write blanks between two fields until their tokens are spent; this backend can forbid it.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if settings["device"] == "cpu":
        # A prompt that is prefilled in two steps while it has a seed of its own ends vLLM 0.32 on CPU ("CPU Generator does
        # not use offset"), so prompts go in whole: the budget of a step holds the longest.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(2048, settings["max_model_len"])
        options["kv_cache_memory_bytes"] = int(settings["kv_cache_gb"] * 2**30)
        options["block_size"] = 32  # prefixes are shared in blocks; the CPU's default of 128 tokens misses short prompts
    else:
        options["gpu_memory_utilization"] = settings["gpu_memory"]
    return options


def _build(settings: dict[str, Any], cache_directory: str) -> Any:
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    options = vllm_options(settings, resolve_model(settings["model"], cache_directory))
    options["structured_outputs_config"] = StructuredOutputsConfig(**options["structured_outputs_config"])
    return LLMEngine.from_engine_args(EngineArgs(**options))


def _encode(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation. Text is data: the tokenizer's control tokens inside a message are taken apart."""
    if not messages:
        raise ValueError("the request has no messages")
    rows = [{"role": role, "content": _defused(tokenizer, content)} for role, content in messages]
    goes_on = rows[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _defused(tokenizer: Any, content: str) -> str:
    for token in tokenizer.all_special_tokens:
        if token in content:
            content = content.replace(token, f"{token[0]} {token[1:]}")
    return content


def _sampling_params(sampling: SamplingSettings, seed: int, json_schema: str | None) -> Any:
    """Raises ValueError when vLLM does not take the settings, or the schema is no JSON object."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structured = None
    if json_schema is not None:
        try:
            schema = orjson.loads(json_schema)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"json_schema is no JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema must be a JSON object, not {type(schema).__name__}")
        structured = StructuredOutputsParams(json=schema)
    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=seed,
        presence_penalty=sampling.presence_penalty, frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty, max_tokens=sampling.max_tokens, stop=list(sampling.stop),
        structured_outputs=structured, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def _reply(output: Any) -> Reply:
    best = output.outputs[0]
    prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
    if best.finish_reason not in ("stop", "length"):
        # vLLM ends a request so when what it found out about it beside the stepping failed: a grammar that does not compile
        why = f"vLLM gave the request up (finish reason {best.finish_reason}); its JSON schema may not compile"
        return Reply(why, REFUSED, prompt, len(best.token_ids), cached)
    return Reply(best.text, best.finish_reason, prompt, len(best.token_ids), cached)


def _refused(error: Exception, prompt_tokens: int) -> Reply:
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return Reply(f"{type(error).__name__}: {error}{cause}", REFUSED, prompt_tokens, 0)
