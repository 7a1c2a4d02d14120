"""Training speed: tokens/s of `train.pretrain` beside transformers.Trainer, same model, rows, optimizer, type and cores.

Packed rows of short documents, a realistic vocabulary. Both sides isolate documents (ours computes each document alone,
Trainer gets transformers' block-diagonal mask from the same position ids), start from the same weights and see the same
rows; the two loss curves must agree or the figures do not count. A step is the time between the ends of two steps, so
data, logging and everything else a loop does between is inside. Figures of float32 and of bf16 autocast.

    python -m benchmarks.train.step [--quick] [--rounds N] [--steps N] [--threads N] [--compile]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.train import hf_trainer, material
from train import models, pretrain
from train.loader import PackedTokens, TokenLoader
from train.parallel import Workers
from train.schedule import Schedule
from train.settings import ModelShape, PretrainJob, RowsInput

SHAPE = ModelShape(layers=8, hidden=512, heads=8, kv_heads=4, intermediate=1408)  # 40M parameters with the vocabulary
VOCAB, LENGTH, BATCH, DOCUMENT = 32_768, 1024, 4, 200
_WARM = 1  # steps that do not count, after the one that begins the clock
_AGREE = {"fp32": 1e-4, "bf16": 1e-3}
"""Largest difference of the two curves, relative to the loss."""


def ours(job: PretrainJob, directory: Path) -> tuple[list[float], list[float]]:
    """(losses, seconds between the ends of steps) of the loop in this process."""
    losses: list[float] = []
    ends: list[float] = []

    def report(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
        ends.append(time.perf_counter())
        losses.append(metrics["loss"])
        return False

    pretrain.run(job, str(directory), Workers(report=report))
    return losses, [b - a for a, b in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="steps of one round (default 8, quick 4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both sides (default: all cores)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], action="append", help="default: both")
    parser.add_argument("--compile", action="store_true", help="both sides under torch.compile")
    parsed = measure.arguments("", parser)
    torch.set_num_threads(parsed.threads)
    steps = parsed.steps or (4 if parsed.quick else 8)
    ratio: dict[str, float] = {}
    figures: dict[str, Any] = {"steps": steps, "threads": parsed.threads, "compiled": parsed.compile}
    with tempfile.TemporaryDirectory(prefix="danlu-step-") as scratch:
        packed = material.packed(
            Path(scratch) / "run" / "tokens" / "f0",
            sequences=256,
            length=LENGTH,
            vocab=VOCAB,
            seed=1,
            mean_document_tokens=DOCUMENT,
        )  # fmt: skip
        number = itertools.count()
        for precision in parsed.precision or ("bf16", "fp32"):
            job = PretrainJob(
                inputs=[RowsInput(name="tokens", directory=packed)], model=SHAPE, steps=steps, batch_sequences=BATCH,
                learning_rate=3e-4, precision=precision, schedule=Schedule(shape="constant", warmup=0),
                checkpoint_every=10**6, compile=parsed.compile,
            )  # fmt: skip
            loader = TokenLoader([PackedTokens(packed)], [1.0], job.seed, ["tokens"])

            def danlu(job: PretrainJob = job) -> measure.Usage:
                return measure.in_process(lambda: ours(job, Path(scratch) / "run" / "base" / str(next(number))))

            def hf(job: PretrainJob = job, loader: TokenLoader = loader) -> measure.Usage:
                model = models.create(models.configuration(SHAPE, VOCAB, LENGTH, 0, 3), job.seed)
                return measure.in_process(lambda: hf_trainer.train(model, job, loader, compiled=parsed.compile))

            found = measure.interleave({"danlu": danlu, "hf_trainer": hf}, parsed.rounds)
            curves = {name: [usage.output[0] for usage in usages] for name, usages in found.items()}
            pairs = itertools.product(curves["danlu"], curves["hf_trainer"])
            worst = max(abs(a - b) / b for one, other in pairs for a, b in zip(one, other, strict=True))
            if worst > _AGREE[precision]:
                raise SystemExit(f"{precision}: the loss curves differ by {worst:.2e} of the loss: the figures do not count")
            # the fastest step of a round is the one that others on the machine disturbed least; then the median of rounds
            seconds = {name: [min(usage.output[1][_WARM:]) for usage in usages] for name, usages in found.items()}
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rate = {name: BATCH * LENGTH / value for name, value in medians.items()}
            each = [b / a for a, b in zip(seconds["danlu"], seconds["hf_trainer"], strict=True)]
            ratio["vs_hf_trainer" if precision == "bf16" else f"vs_hf_trainer_{precision}"] = statistics.median(each)
            figures[precision] = {
                "tokens_per_second": rate, "seconds_a_step": medians, "largest_relative_loss_difference": worst,
                "first_loss": curves["danlu"][0][0], "last_loss": curves["danlu"][0][-1], "ratio_of_rounds": each,
                "peak_mb": {name: max(u.peak_bytes for u in usages) / 1e6 for name, usages in found.items()},
            }  # fmt: skip
            print(f"{precision}: " + ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in rate.items()))
    measure.publish(
        "train.step", ratio, figures, quick=parsed.quick,
        data=f"rows of {LENGTH} made-up tokens, documents of {DOCUMENT} in the mean, vocabulary {VOCAB:,}; Llama shape 8 x 512, "
        f"40M parameters; {BATCH} rows a step; {parsed.threads} threads",
    )  # fmt: skip


if __name__ == "__main__":
    main()
