"""Training on one GPU: tokens/s, MFU and peak memory of `train.pretrain` beside transformers.Trainer in the same run.

One document a row of 2,048 tokens, bf16, blocks compiled, and the same with short packed documents. MFU is by the dense
bf16 peak of the device (989 TFLOP/s for an H100 SXM) and PaLM's operations a token; the goal is half of it at 1B. Needs no
Ray; `--ray` measures a third side beside the two, the same job in a Ray Train group. Each measurement is a process of its
own. Use `benchmarks/train/gpu.sh`, which finds or makes an environment, or:

    python -m benchmarks.train.gpu [--quick] [--shapes 0.1b 1b] [--rounds N] [--steps N] [--ray] [--dry-run]

`--dry-run` takes the same way with a tiny shape on any device, one process a side, and with `--ray` two workers over gloo:
it shows that the command works, not how fast.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measure

PUBLISHED = {
    "torchtitan, Llama 3.1 8B at 8k context, FSDP2 on 8 H100": {"tokens_per_second_per_gpu": 5762, "mfu": 0.33},
    "torchtitan, the same with torch.compile": {"tokens_per_second_per_gpu": 6667, "mfu": 0.39},
}
"""What others published, on their machines and shapes: printed beside ours, never part of a ratio.

github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, table 1 (bf16, local batch 2, selective
activation checkpointing) and the text above it; their MFU is by the same 989 TFLOP/s, on H100 of 500 W with HBM2e.
"""

VOCAB, LENGTH = 32_768, 2048
GOAL = 0.5
"""Share of the device's peak at 1B."""
_MICRO = {"0.1b": 16, "1b": 8}
_WARM = 5
_AGREE = 5e-3
"""Largest difference of two loss curves, relative to the loss."""


def side(arguments: argparse.Namespace) -> None:
    """Measurements of one side in this process; prints one JSON line with one entry a task."""
    if not (arguments.dry_run or _has_gpu()):
        raise SystemExit("this benchmark needs a CUDA device; --dry-run runs it on a tiny shape without one")
    tasks = json.loads(Path(arguments.tasks).read_text())
    with _runner(arguments.side, 2 if arguments.dry_run else 1, arguments.directory) as run:
        found = {task["key"]: _measured(task, run, f"{arguments.directory}/{number}") for number, task in enumerate(tasks)}
    print(json.dumps({"measurements": found}))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


Run = Callable[[dict[str, Any], str], tuple[list[float], list[float], float | None]]
"""(task, directory) -> (losses, seconds between the ends of steps, peak memory in GiB or None)."""


@contextmanager
def _runner(name: str, workers: int, directory: str) -> Iterator[Run]:
    """What runs a task on one side, as long as the context lasts."""
    if name == "danlu_ray":
        from benchmarks.train.launcher_side import group

        with group(workers, f"{directory}/group") as started:
            yield partial(_ray, started)
    else:
        yield {"danlu": _danlu, "hf_trainer": _hf_trainer}[name]


def _danlu(task: dict[str, Any], directory: str) -> tuple[list[float], list[float], float | None]:
    from benchmarks.train.step import ours
    from train import samples
    from train.settings import PretrainJob

    losses, seconds = ours(PretrainJob.model_validate(task["job"]), Path(directory))
    result = samples.read_result(directory)
    assert result is not None
    return losses, seconds, result["timings"].get("peak_memory_gib")


def _ray(group: Any, task: dict[str, Any], directory: str) -> tuple[list[float], list[float], float | None]:
    from benchmarks.train.launcher_side import timeline

    result = group.run({"kind": "pretrain", "config": task["job"], "directory": directory})
    losses, seconds = timeline(directory)
    return losses, seconds, result["timings"].get("peak_memory_gib")


def _hf_trainer(task: dict[str, Any], directory: str) -> tuple[list[float], list[float], float | None]:
    import torch

    from benchmarks.train import hf_trainer
    from train import models
    from train.loader import PackedTokens, TokenLoader
    from train.settings import ModelShape, PretrainJob

    job = PretrainJob.model_validate(task["job"])
    assert isinstance(job.model, ModelShape)
    loader = TokenLoader([PackedTokens(job.inputs[0].directory)], [1.0], job.seed, ["tokens"])
    gpu = torch.cuda.is_available()
    if gpu:
        torch.set_float32_matmul_precision("high")
        torch.cuda.reset_peak_memory_stats()
    model = models.create(models.configuration(job.model, loader.corpora[0].vocab_size, loader.length, 0, 3), job.seed)
    losses, seconds = hf_trainer.train(
        model, job, loader, compiled=job.compile, micro=job.micro_batch_sequences, isolated=task["mean_document"] < loader.length
    )
    return losses, seconds, torch.cuda.max_memory_allocated() / 2**30 if gpu else None


def _measured(task: dict[str, Any], run: Run, directory: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from train import flops, models
    from train.settings import ModelShape

    losses, seconds, peak = run(task, directory)
    config = models.configuration(ModelShape.model_validate(task["job"]["model"]), task["vocab"], task["length"], 0, 3)
    with torch.device("meta"):
        # What isolated documents do not compute does not count: attention is as long as a document.
        token_flops = flops.flops_per_token(AutoModelForCausalLM.from_config(config), task["mean_document"])
    step = statistics.median(seconds[min(_WARM, len(seconds) // 2) :])
    rate = task["job"]["batch_sequences"] * task["length"] / step
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": name, "losses": losses, "step_seconds": step, "tokens_per_second": rate, "flops_per_token": token_flops,
        "mfu": flops.mfu(rate, token_flops, name), "peak_memory_gib": peak,
    }  # fmt: skip


def _tasks(parsed: argparse.Namespace, scratch: Path) -> list[list[dict[str, Any]]]:
    """The measurements, those together that one process makes: each its own, all of a dry run in one."""
    from benchmarks.train import material
    from train.model_shapes import read_shape
    from train.schedule import Schedule
    from train.settings import ModelShape, PretrainJob, RowsInput

    dry = parsed.dry_run
    steps = parsed.steps or (3 if dry else 15 if parsed.quick else 30)
    vocab, length = (512, 64) if dry else (VOCAB, LENGTH)
    shapes = {"tiny": ModelShape(layers=2, hidden=64, heads=2)} if dry else {name: read_shape(name) for name in parsed.shapes}
    tasks = []
    for rows, mean in (("whole", 0), ("packed", length // 8)):
        packed = material.packed(
            scratch / "run" / rows / "f0", sequences=512, length=length, vocab=vocab, seed=1, mean_document_tokens=mean
        )
        for name in shapes if rows == "whole" else list(shapes)[-1:]:
            micro = 2 if dry else _MICRO.get(name, 4)
            job = PretrainJob(
                inputs=[RowsInput(name="tokens", directory=packed)], model=shapes[name], steps=steps, batch_sequences=2 * micro,
                micro_batch_sequences=micro, learning_rate=1e-4, precision="bf16", compile=not dry,
                schedule=Schedule(shape="constant", warmup=0), checkpoint_every=10**6,
            )  # fmt: skip
            tasks.append(
                {
                    "key": f"{name}_{rows}", "job": job.model_dump(mode="json"), "vocab": vocab, "length": length,
                    "mean_document": mean or length,
                }
            )  # fmt: skip
    return [tasks] if dry else [[task] for task in tasks]


def _compared(key: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of one task: each side's, from the values of all rounds. Exits when the loss curves differ."""
    reference = found["hf_trainer"][0]["losses"]
    curves = [value["losses"] for values in found.values() for value in values]
    worst = max(abs(a - b) / b for curve in curves for a, b in zip(curve, reference, strict=True))
    if worst > _AGREE:
        raise SystemExit(f"{key}: the loss curves differ by {worst:.2e} of the loss: the figures do not count")
    figures: dict[str, Any] = {}
    for name, values in found.items():
        middle = sorted(values, key=lambda value: value["tokens_per_second"])[len(values) // 2]
        figures[name] = {what: value for what, value in middle.items() if what != "losses"}
        share = "MFU unknown" if middle["mfu"] is None else f"MFU {middle['mfu']:.1%}"
        peak = "" if middle["peak_memory_gib"] is None else f", peak {middle['peak_memory_gib']:.1f} GiB"
        print(f"{key} {name}: {middle['tokens_per_second']:,.0f} tokens/s, {share}{peak}, {middle['device']}")
    return {**figures, "largest_relative_loss_difference": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.1b", "1b"], help="names in train/shapes")
    parser.add_argument("--steps", type=int, help="steps of one round (default 30, quick 15)")
    parser.add_argument("--ray", action="store_true", help="also the same job in a Ray Train group of one worker")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape, three steps, one round, any device; writes no result")
    parser.add_argument("--side", choices=["danlu", "danlu_ray", "hf_trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--tasks", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parsed = measure.arguments("", parser)
    if parsed.side:
        side(parsed)
        return
    if not (parsed.dry_run or _has_gpu()):
        raise SystemExit("this benchmark needs a CUDA device; --dry-run runs it on a tiny shape without one")
    ratio: dict[str, float] = {}
    figures: dict[str, Any] = {"published": PUBLISHED}
    with tempfile.TemporaryDirectory(prefix="danlu-gpu-") as scratch:
        number = itertools.count()
        for together in _tasks(parsed, Path(scratch)):
            path = Path(scratch) / f"tasks-{next(number)}.json"
            path.write_text(json.dumps(together))

            def run(which: str, path: Path = path) -> measure.Usage:
                command = [sys.executable, "-m", "benchmarks.train.gpu", "--side", which, "--tasks", path]
                command += ["--directory", f"{scratch}/run/base/{next(number)}", *(["--dry-run"] if parsed.dry_run else [])]
                return measure.process(command)

            names = ["danlu", *(["danlu_ray"] if parsed.ray else []), "hf_trainer"]
            rounds = 1 if parsed.dry_run else parsed.rounds
            usages = measure.interleave({name: (lambda name=name: run(name)) for name in names}, rounds)
            for task in together:
                key = task["key"]
                found = {name: [usage.output["measurements"][key] for usage in usages[name]] for name in names}
                figures[key] = _compared(key, found)
                for name in names[:-1]:
                    ours, theirs = figures[key][name], figures[key]["hf_trainer"]
                    under = "_under_ray" if name == "danlu_ray" else ""
                    ratio[f"vs_hf_trainer_{key}{under}"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
                    if ours["mfu"] is not None and task["mean_document"] == task["length"]:
                        ratio[f"vs_peak_{key}{under}"] = ours["mfu"]
    for name, values in PUBLISHED.items():
        print(f"published: {name}: {values['tokens_per_second_per_gpu']:,} tokens/s a GPU, MFU {values['mfu']:.0%}")
    if "vs_peak_1b_whole" in ratio:
        reached = "reached" if ratio["vs_peak_1b_whole"] >= GOAL else "MISSED"
        print(f"goal at 1B: MFU {GOAL:.0%}, {reached} with {ratio['vs_peak_1b_whole']:.1%}")
    measure.publish(
        "train.gpu", ratio, figures, quick=parsed.quick or parsed.dry_run,
        data=f"rows of {LENGTH} made-up tokens, vocabulary {VOCAB:,}: whole rows, and documents of {LENGTH // 8} in the mean; "
        "bf16, compiled",
    )  # fmt: skip


if __name__ == "__main__":
    main()
