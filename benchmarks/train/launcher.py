"""What the launcher costs: the same training as two processes under torchrun and as a job of a Ray Train group of two.

Both sides run `train.pretrain` on the same packed sequences, DDP over gloo, one thread a worker. A step is the time
between two steps' reports by the first worker's own clock: reporting, progress and the check for a wish to stop are
inside, so what Ray adds to a step shows in full. The losses of both sides must be equal.

    python -m benchmarks.train.launcher [--quick] [--rounds N] [--steps N]
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

from benchmarks import measure
from benchmarks.train import material

_WARM = 3  # steps that do not count: allocations, first touch of pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="steps of one round (default 40, quick 15)")
    parsed = measure.arguments("", parser)
    steps = parsed.steps or (15 if parsed.quick else 40)
    with tempfile.TemporaryDirectory(prefix="danlu-launcher-") as scratch:
        packed = material.packed(Path(scratch) / "run" / "tokens" / "f0", sequences=512, length=256, vocab=8192, seed=1)
        job = {
            "inputs": [{"name": "tokens", "directory": packed}],
            "model": {"layers": 4, "hidden": 384, "heads": 6, "kv_heads": 2},
            "steps": steps,
            "batch_sequences": 8,
            "checkpoint_every": 10 * steps,
        }
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job))
        number = itertools.count()

        def side(name: str, launcher: list[str], flags: list[str]) -> measure.Usage:
            command = [sys.executable, *launcher, "-m", "benchmarks.train.launcher_side", str(path)]
            return measure.process([*command, f"{scratch}/run/{name}/{next(number)}", *flags], env={"OMP_NUM_THREADS": "1"})

        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        sides = {"torchrun": lambda: side("torchrun", torchrun, []), "ray": lambda: side("ray", [], ["--ray"])}
        found = measure.interleave(sides, parsed.rounds)
    outputs: dict[str, list[Any]] = {name: [usage.output for usage in usages] for name, usages in found.items()}
    losses = [output["losses"] for name in outputs for output in outputs[name]]
    worst = max(abs(a - b) for other in losses[1:] for a, b in zip(losses[0], other, strict=True))
    if worst > 1e-5:
        raise SystemExit(f"the losses of the two sides differ by {worst:.2e}: the figures do not count")
    step_ms = {
        name: statistics.median(1000 * statistics.median(output["seconds"][_WARM:]) for output in results)
        for name, results in outputs.items()
    }
    rest_s = {name: statistics.median(u.wall_s - sum(u.output["seconds"]) for u in usages) for name, usages in found.items()}
    added = step_ms["ray"] - step_ms["torchrun"]
    print(
        f"a step takes {step_ms['torchrun']:.1f} ms under torchrun and {step_ms['ray']:.1f} ms under Ray Train: "
        f"{added:+.1f} ms, {added / step_ms['torchrun']:+.1%}"
    )
    figures = {"step_ms": step_ms, "added_ms": added, "start_and_end_s": rest_s, "steps": steps, "largest_loss_difference": worst}
    measure.publish(
        "train.launcher",
        {"vs_torchrun": step_ms["torchrun"] / step_ms["ray"]},
        figures,
        data="512 packed sequences of 256 made-up tokens, vocabulary 8,192; Llama shape 4 x 384; batch of 8 sequences, 2 workers",
        quick=parsed.quick,
    )


if __name__ == "__main__":
    main()
