"""One side of the throughput benchmark, in a process of its own: `python -m benchmarks.synthesis.generating SIDE SETTINGS`.

SETTINGS is the JSON form of EngineSettings, with `model` a folder. The process loads its engine, warms it up, prints
`{"ready": ...}`, and then answers each line of standard input, `{"prompts": Parquet, "samples": n, "out": folder, ...}`,
with one line: wall seconds, replies, tokens. `prompts` has the columns id, prompt, max_tokens, seed.

What is timed: `danlu` from reading the prompts to the finished stage directory (reply cache, Parquet, manifest);
`vllm` and `vllm_core` nothing but `LLM.generate` on prompts that are rendered already, with the engine's core in the same
process or, as vLLM does unless told otherwise, in a second one; `ray_data_llm` from the first row to Parquet.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from operators.synthesis import vllm_worker

TEMPERATURE = 0.8
_RAY_BATCH = 32  # ray.data.llm's own default

Row = dict[str, Any]
Answer = dict[str, Any]
Side = Callable[[dict[str, Any]], Answer]


def main() -> None:
    side, settings = sys.argv[1], json.loads(sys.argv[2])
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    answer = _SIDES[side](settings)
    print(json.dumps({"ready": os.getpid()}), file=protocol, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=protocol, flush=True)


def _prompts(task: dict[str, Any]) -> list[Row]:
    return list(pq.read_table(task["prompts"]).to_pylist())


def _counted(seconds: float, replies: list[tuple[int, int]], cached: int | None) -> Answer:
    """`replies` holds (prompt tokens, completion tokens) of each."""
    return {
        "seconds": seconds,
        "replies": len(replies),
        "prompt_tokens": sum(prompt for prompt, _ in replies),
        "completion_tokens": sum(completion for _, completion in replies),
        "cached_tokens": cached,
    }


def _danlu(settings: dict[str, Any]) -> Side:
    import ray

    # not above: vLLM 0.32 on CPU cannot build an engine in a process that has imported llvmlite
    from benchmarks.synthesis.answers import AnswersStage
    from operators import shards
    from operators.stage import StageContext
    from operators.synthesis.engine import EngineSettings, engine_revision, start_engine

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
    engine_settings, cache = EngineSettings(**settings), tempfile.mkdtemp()
    engine = start_engine(engine_settings, cache)
    engine_revision(engine_settings, cache)  # the hash of the weights, once a run

    def answer(task: dict[str, Any]) -> Answer:
        started = time.perf_counter()
        directory = str(Path(task["out"]) / "run" / "answers")
        stage = AnswersStage(
            samples=task["samples"], prompts_file=task["prompts"], temperature=TEMPERATURE, generator=engine_settings
        )
        stage.run(
            StageContext(
                "answers", "answers", directory, "benchmark", {}, {}, seed=0, cache_directory=cache,
                services={"engine": lambda _: engine},
            )
        )  # fmt: skip
        seconds = time.perf_counter() - started
        manifest = shards.load_manifest(directory)
        drawn = manifest.stats["generator"]
        replies = [(0, 0)] * manifest.rows
        return {
            **_counted(seconds, replies, drawn["prefix_tokens"]),
            "prompt_tokens": drawn["drawn_prompt_tokens"],
            "completion_tokens": drawn["drawn_completion_tokens"],
        }

    warm = {"prompts": str(Path(cache) / "warm.parquet"), "samples": 1, "out": str(Path(cache) / "warm")}
    rows = [{"id": str(n), "prompt": f"Count to {n}.", "max_tokens": 8, "seed": n} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), warm["prompts"])
    answer(warm)
    return answer


def _vllm(settings: dict[str, Any], core_process: bool = False) -> Side:
    vllm_worker.set_environment(settings)
    options = vllm_worker.vllm_options(settings, settings["model"])
    if core_process:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(settings['cpu_threads'] or os.cpu_count() or 1) - 1}"
        del options["distributed_executor_backend"]
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    tokenizer = llm.get_tokenizer()
    llm.generate(["Count."] * 8, SamplingParams(max_tokens=8), use_tqdm=False)

    def answer(task: dict[str, Any]) -> Answer:
        rows = _prompts(task)
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True)
            for row in rows
        ]
        params = [
            SamplingParams(temperature=TEMPERATURE, max_tokens=row["max_tokens"], seed=row["seed"], n=task["samples"])
            for row in rows
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        replies = [(len(o.prompt_token_ids or []), len(sample.token_ids)) for o in outputs for sample in o.outputs]
        return _counted(seconds, replies, sum(o.num_cached_tokens or 0 for o in outputs))

    return answer


def _ray_data_llm(settings: dict[str, Any]) -> Side:
    """The pipeline runs once, over all tasks: rows of a task wait in the first step until the task is asked for."""
    import ray

    ray.init(num_cpus=16, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    options = vllm_worker.vllm_options(settings, settings["model"])
    for name in ("model", "disable_log_stats", "distributed_executor_backend", "structured_outputs_config"):
        options.pop(name)
    variables = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if settings["device"] == "cpu":
        threads = settings["cpu_threads"] or os.cpu_count() or 1
        # vLLM's own choice for a worker process is one core less than there are; ours is what the other sides have
        variables |= {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    config = vLLMEngineProcessorConfig(
        model_source=settings["model"],
        engine_kwargs=options,
        batch_size=_RAY_BATCH,
        concurrency=1,
        runtime_env={"env_vars": variables},
        placement_group_config={"bundles": [{"CPU": 1}]} if settings["device"] == "cpu" else None,
        log_engine_metrics=False,
    )
    gates = Path(tempfile.mkdtemp())

    def preprocess(row: Row) -> Row:
        while row["task"] and not (gates / row["task"]).exists():
            time.sleep(0.005)
        return {
            "task": row["task"],
            "messages": [{"role": "user", "content": row["prompt"]}],
            "sampling_params": {"temperature": TEMPERATURE, "max_tokens": row["max_tokens"], "seed": row["seed"]},
        }

    def postprocess(row: Row) -> Row:
        return {name: row[name] for name in ("task", "generated_text", "num_input_tokens", "num_generated_tokens")}

    warm = [{"task": "", "prompt": f"Count to {n}.", "max_tokens": 8, "seed": n} for n in range(_RAY_BATCH)]
    tasks = [
        {"task": Path(path).stem, **{name: row[name] for name in ("prompt", "max_tokens", "seed")}}
        for path in settings["tasks"]
        for row in _prompts({"prompts": path})
    ]
    if len(tasks) % (_RAY_BATCH * len(settings["tasks"])):
        raise ValueError(f"a task's rows must be a multiple of ray.data.llm's batch of {_RAY_BATCH}")
    rows = [*warm, *tasks]
    waiting = {"num_cpus": 0.1, "concurrency": 4}  # enough of them wait at a gate that none is late when it opens
    processor = build_processor(config, preprocess=preprocess, postprocess=postprocess, preprocess_map_kwargs=waiting)
    replies = _rows(processor(ray.data.from_items(rows, override_num_blocks=len(rows) // _RAY_BATCH)))
    for _ in range(_RAY_BATCH):
        next(replies)

    def answer(task: dict[str, Any]) -> Answer:
        name, expected = Path(task["prompts"]).stem, pq.read_metadata(task["prompts"]).num_rows
        started = time.perf_counter()
        (gates / name).touch()
        found = [next(replies) for _ in range(expected)]
        if {row["task"] for row in found} != {name}:
            raise RuntimeError(f"rows of another task than {name} arrived")
        Path(task["out"]).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(found), Path(task["out"]) / "answers.parquet")
        seconds = time.perf_counter() - started
        return _counted(seconds, [(row["num_input_tokens"], row["num_generated_tokens"]) for row in found], None)

    return answer


def _rows(dataset: Any) -> Iterator[Row]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


_SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {
    "danlu": _danlu,
    "vllm": _vllm,
    "vllm_core": lambda settings: _vllm(settings, core_process=True),
    "ray_data_llm": _ray_data_llm,
}

if __name__ == "__main__":
    main()
