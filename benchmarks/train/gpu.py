"""Training on one GPU: tokens/s, MFU and peak memory of `train.pretrain` beside transformers.Trainer in the same run.

One document a row of 2,048 tokens, bf16, blocks compiled, and the same with short packed documents. MFU is by the dense
bf16 peak of the device (989 TFLOP/s for an H100 SXM) and PaLM's operations a token. Needs no Ray. Each measurement is a
process of its own. Use `benchmarks/train/gpu.sh`, or:

    python -m benchmarks.train.gpu [--quick] [--shapes 0.1b 1b] [--rounds N] [--steps N] [--dry-run]

`--dry-run` runs all of it on a tiny shape, on CPU if need be: it shows that the command works, not how fast.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure

PUBLISHED = {
    "torchtitan, Llama 3.1 8B, FSDP2 on 8 H100, compiled": {
        "tokens_per_second_per_gpu": 6667, "mfu": 0.33,
        "source": "github.com/pytorch/torchtitan, benchmarks, published by its maintainers",
    },
    "nanotron, 1B at 2k context on H100": {
        "tokens_per_second_per_gpu": 45455, "mfu": 0.418, "source": "github.com/huggingface/nanotron, its own benchmark",
    },
}  # fmt: skip
"""What others published, on their machines and shapes: printed beside ours, never part of a ratio."""

VOCAB, LENGTH = 32_768, 2048
_MICRO = {"0.1b": 16, "1b": 8}
_WARM = 5


def side(arguments: argparse.Namespace) -> None:
    """One measurement in this process; prints one JSON line."""
    from benchmarks.train import hf_trainer
    from benchmarks.train.step import ours
    from train import flops, models
    from train.loader import PackedTokens, TokenLoader
    from train.settings import PretrainJob

    job = PretrainJob.model_validate_json(Path(arguments.job).read_text())
    loader = TokenLoader([PackedTokens(job.inputs[0].directory)], [1.0], job.seed, ["tokens"])
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.cuda.reset_peak_memory_stats()
    assert not isinstance(job.model, str)
    length = loader.length
    config = models.configuration(job.model, loader.corpora[0].vocab_size, length, 0, 3)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        token_flops = flops.flops_per_token(AutoModelForCausalLM.from_config(config), length)
    if arguments.side == "danlu":
        losses, seconds = ours(job, Path(arguments.directory))
    else:
        model = models.create(config, job.seed)
        losses, seconds = hf_trainer.train(
            model, job, loader, compiled=job.compile, micro=job.micro_batch_sequences, isolated=arguments.isolated
        )
    step = statistics.median(seconds[min(_WARM, len(seconds) // 2) :])
    rate = job.batch_sequences * length / step
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        json.dumps(
            {
                "device": name, "losses": losses, "step_seconds": step, "tokens_per_second": rate,
                "flops_per_token": token_flops, "mfu": flops.mfu(rate, token_flops, name),
                "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            }
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.1b", "1b"], help="names in train/shapes")
    parser.add_argument("--steps", type=int, help="steps of one round (default 30, quick 15)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape, three steps, any device; writes no result")
    parser.add_argument("--side", choices=["danlu", "hf_trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    parsed = measure.arguments("", parser)
    if parsed.side:
        side(parsed)
        return
    if not parsed.dry_run and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; --dry-run runs it on a tiny shape without one")
    from benchmarks.train import material
    from train import models
    from train.schedule import Schedule
    from train.settings import ModelShape, PretrainJob, RowsInput

    tiny = parsed.dry_run
    steps = parsed.steps or (3 if tiny else 15 if parsed.quick else 30)
    vocab, length = (512, 64) if tiny else (VOCAB, LENGTH)
    ratio: dict[str, float] = {}
    figures: dict[str, Any] = {"published": PUBLISHED, "steps": steps}
    with tempfile.TemporaryDirectory(prefix="danlu-gpu-") as scratch:
        number = itertools.count()
        for rows, mean in (("whole", 0), ("packed", length // 8)):
            directory = Path(scratch) / "run" / rows / "f0"
            packed = material.packed(directory, sequences=512, length=length, vocab=vocab, seed=1, mean_document_tokens=mean)
            for name in parsed.shapes if rows == "whole" else parsed.shapes[-1:]:
                shape = ModelShape(layers=2, hidden=64, heads=2) if tiny else models.read_shape(name)
                micro = 2 if tiny else _MICRO.get(name, 4)
                job = PretrainJob(
                    inputs=[RowsInput(name="tokens", directory=packed)], model=shape, steps=steps, batch_sequences=2 * micro,
                    micro_batch_sequences=micro, learning_rate=1e-4, precision="bf16", compile=not tiny,
                    schedule=Schedule(shape="constant", warmup=0), checkpoint_every=10**6,
                )  # fmt: skip
                path = Path(scratch) / f"{rows}-{name}.json"
                path.write_text(job.model_dump_json())

                def run(which: str, path: Path = path, isolated: bool = bool(mean)) -> measure.Usage:
                    command = [sys.executable, "-m", "benchmarks.train.gpu", "--side", which, "--job", path]
                    flags = ["--isolated"] if isolated else []
                    return measure.process([*command, "--directory", f"{scratch}/run/base/{next(number)}", *flags])

                sides = {which: (lambda which=which: run(which)) for which in ("danlu", "hf_trainer")}
                found = {
                    which: [usage.output for usage in usages] for which, usages in measure.interleave(sides, parsed.rounds).items()
                }
                key = f"{name}_{rows}"
                curves = zip(found["danlu"][0]["losses"], found["hf_trainer"][0]["losses"], strict=True)
                worst = max(abs(a - b) / b for a, b in curves)
                if worst > 5e-3:
                    raise SystemExit(f"{key}: the loss curves differ by {worst:.2e} of the loss: the figures do not count")
                rate = {which: statistics.median(one["tokens_per_second"] for one in values) for which, values in found.items()}
                ratio[f"vs_hf_trainer_{key}"] = rate["danlu"] / rate["hf_trainer"]
                figures[key] = {
                    which: {
                        "tokens_per_second": rate[which],
                        **{what: values[0][what] for what in ("device", "mfu", "peak_memory_gib", "flops_per_token")},
                    }
                    for which, values in found.items()
                }
                figures[key]["largest_relative_loss_difference"] = worst
                for which, values in figures[key].items():
                    if isinstance(values, dict):
                        share = "MFU unknown" if values["mfu"] is None else f"MFU {values['mfu']:.1%}"
                        speed, peak = f"{values['tokens_per_second']:,.0f} tokens/s", f"peak {values['peak_memory_gib']} GiB"
                        print(f"{key} {which}: {speed}, {share}, {peak}")
    for name, values in PUBLISHED.items():
        what = f"{values['tokens_per_second_per_gpu']:,} tokens/s a GPU, MFU {values['mfu']:.1%}"
        print(f"published: {name}: {what} ({values['source']})")
    measure.publish(
        "train.gpu", ratio, figures, quick=parsed.quick or tiny,
        data=f"rows of {length} made-up tokens, vocabulary {vocab:,}: whole rows, and documents of "
        f"{length // 8} in the mean; bf16, compiled",
    )  # fmt: skip


if __name__ == "__main__":
    main()
