"""One vLLM engine inside a Ray actor: requests enter and leave one by one, the batch inside is continuous.

The engine is stepped in this process (no engine-core child), so that nothing outlives the actor: a Ray worker ends with
its driver and with its node's raylet, and tensor-parallel children end when their pipe to it closes.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from typing import Any

from operators.synthesis.packaged import resolve_model
from operators.synthesis.requests import PROMPT_TOO_LONG, Messages, Reply, Request, SamplingSettings


class VllmWorker:
    """The actor's class. All methods are thread-safe; vLLM itself is touched by one thread only, which also built it
    (OpenMP keeps a pool of threads for each calling thread).

    `settings` is the JSON form of EngineSettings; see there.
    """

    def __init__(self, settings: dict[str, Any], cache_directory: str) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._inbox: deque[tuple[str, int, Request]] = deque()
        self._outbox: dict[str, list[tuple[int, Reply]]] = defaultdict(list)
        self._aborted: set[str] = set()
        self._failure: BaseException | None = None
        self._ready = self._stopped = False
        _environment(settings)
        self._thread = threading.Thread(target=self._run, args=(cache_directory,), name="vllm", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure is not None)
        self._raise_failure()

    def ready(self) -> int:
        """The process id, once the weights are loaded (calls wait for the constructor)."""
        return os.getpid()

    def submit(self, client: str, requests: list[tuple[int, Request]]) -> None:
        """Queue requests of one caller, each with the caller's own number for it."""
        with self._changed:
            self._raise_failure()
            self._inbox.extend((client, index, request) for index, request in requests)
            self._changed.notify_all()

    def collect(self, client: str, timeout_s: float) -> list[tuple[int, Reply]]:
        """The finished replies of one caller; waits up to `timeout_s` for the first. May be empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox[client] or self._failure is not None, timeout_s)
            self._raise_failure()
            return self._outbox.pop(client, [])

    def abort(self, client: str) -> None:
        """Forget everything that one caller asked for and has not collected."""
        with self._changed:
            self._aborted.add(client)
            self._inbox = deque(item for item in self._inbox if item[0] != client)
            self._outbox.pop(client, None)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the stepping thread and free the engine."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the vLLM engine failed: {type(self._failure).__name__}: {self._failure}") from self._failure

    def _run(self, cache_directory: str) -> None:
        try:
            engine = _build(self._settings, cache_directory)
            with self._changed:
                self._ready = True
                self._changed.notify_all()
            self._serve(engine)
        except BaseException as failure:  # noqa: BLE001 - handed to every caller by _raise_failure
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _serve(self, engine: Any) -> None:
        tokenizer = engine.get_tokenizer()
        length = int(engine.model_config.max_model_len)
        running: dict[str, tuple[str, int]] = {}
        admitted = 0
        while True:
            with self._changed:
                if not running:
                    self._changed.wait_for(lambda: self._inbox or self._stopped)
                if self._stopped:
                    return
                arrivals = list(self._inbox)
                self._inbox.clear()
                aborted, self._aborted = self._aborted, set()
            if aborted:
                gone = [name for name, (client, _) in running.items() if client in aborted]
                engine.abort_request(gone, internal=False)
                for name in gone:
                    del running[name]
            done: list[tuple[str, int, Reply]] = []
            for client, index, request in arrivals:
                tokens = _encode(tokenizer, request.messages)
                if len(tokens) >= length:
                    done.append((client, index, Reply("", PROMPT_TOO_LONG, len(tokens), 0)))
                    continue
                name = f"{admitted}"
                admitted += 1
                engine.add_request(name, {"prompt_token_ids": tokens}, _sampling_params(request.sampling, request.seed))
                running[name] = (client, index)
            if running:
                for output in engine.step():
                    if output.finished and output.request_id in running:
                        client, index = running.pop(output.request_id)
                        best = output.outputs[0]
                        reply = Reply(best.text, best.finish_reason or "stop", len(output.prompt_token_ids), len(best.token_ids))
                        done.append((client, index, reply))
            if done:
                with self._changed:
                    for client, index, reply in done:
                        if client not in self._aborted:
                            self._outbox[client].append((index, reply))
                    self._changed.notify_all()


def _environment(settings: dict[str, Any]) -> None:
    """vLLM reads these when it is imported, torch reads the thread count when its library loads."""
    os.environ.update(
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    if settings["device"] == "cpu":
        # Waiting threads sleep instead of spinning: on two cores shared with other work 440 tokens/s against 60-96.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Ray gives a one-CPU actor OMP_NUM_THREADS=1; the engine is meant to use the machine.
        os.environ["OMP_NUM_THREADS"] = str(settings["cpu_threads"] or os.cpu_count() or 1)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings["kv_cache_gb"])


def _build(settings: dict[str, Any], cache_directory: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    parallel = settings["tensor_parallel"]
    options: dict[str, Any] = {
        "model": resolve_model(settings["model"], cache_directory),
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
    }
    if settings["device"] == "cpu":
        # A prompt that is prefilled in two steps while it has a seed of its own ends vLLM 0.32 on CPU ("CPU Generator does
        # not use offset"), so prompts go in whole: the budget of a step holds the longest.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(2048, settings["max_model_len"])
        options["block_size"] = 32  # prefixes are shared in blocks; the CPU's default of 128 tokens misses short prompts
    else:
        options["gpu_memory_utilization"] = settings["gpu_memory"]
    return LLMEngine.from_engine_args(EngineArgs(**options))


def _encode(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation. Text is data: the tokenizer's control tokens inside a message are taken apart."""
    rows = [{"role": role, "content": _defused(tokenizer, content)} for role, content in messages]
    goes_on = rows[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _defused(tokenizer: Any, content: str) -> str:
    for token in tokenizer.all_special_tokens:
        if token in content:
            content = content.replace(token, f"{token[0]} {token[1:]}")
    return content


def _sampling_params(sampling: SamplingSettings, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=seed,
        presence_penalty=sampling.presence_penalty, frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty, max_tokens=sampling.max_tokens, stop=list(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
