"""What the launcher costs: the same training under torchrun and as a job of a Ray Train group.

Both sides run `train.pretrain` on the same packed sequences, one thread a worker. A step is the time
between two steps' reports by the first worker's own clock: reporting, progress and the check for a wish to stop are
inside, so what Ray adds to a step shows in full. The losses of both sides must be equal.

Ray's servers and the actors beside the workers take some 15% of one core, whatever the workers do (each idle process wakes
100 times a second to look for signals). A machine that trains has that to spare, so the ratio is taken with a core less
than there are; `all_cores` is the same with a worker (DDP over gloo) on every core, where they must take it from a step.

    python -m benchmarks.train.launcher [--quick] [--rounds N] [--steps N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
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
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="danlu-launcher-") as scratch:
        packed = material.packed(Path(scratch) / "run" / "tokens" / "f0", sequences=512, length=256, vocab=8192, seed=1)

        def compared(workers: int, rounds: int) -> dict[str, Any]:
            job = {
                "inputs": [{"name": "tokens", "directory": packed}],
                "model": {"layers": 4, "hidden": 384, "heads": 6, "kv_heads": 2},
                "steps": steps,
                "batch_sequences": 4 * workers,
                "checkpoint_every": 10 * steps,
            }
            path = Path(scratch) / f"job-{workers}.json"
            path.write_text(json.dumps(job))
            number = itertools.count()

            def side(name: str, launcher: list[str], flags: list[str]) -> measure.Usage:
                command = [sys.executable, *launcher, "-m", "benchmarks.train.launcher_side", str(path)]
                place = f"{scratch}/run/{name}-{workers}/{next(number)}"
                return measure.process([*command, place, *flags], env={"OMP_NUM_THREADS": "1", "DANLU_THREADS": "1"})

            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--standalone"]
            ray = ["--ray", str(workers)]
            sides = {"torchrun": lambda: side("torchrun", torchrun, []), "ray": lambda: side("ray", [], ray)}
            return {"workers": workers, **_figures(measure.interleave(sides, rounds))}

        spare = compared(max(1, cores - 1), parsed.rounds)
        full = compared(cores, 1)
    measure.publish(
        "train.launcher",
        {"vs_torchrun": spare["step_ms"]["torchrun"] / spare["step_ms"]["ray"]},
        {"steps": steps, "cores": cores, "a_core_left": spare, "all_cores": full},
        data="512 packed sequences of 256 made-up tokens, vocabulary 8,192; Llama shape 4 x 384; 4 sequences a worker and step",
        quick=parsed.quick,
    )


def _figures(found: dict[str, list[measure.Usage]]) -> dict[str, Any]:
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
    return {"step_ms": step_ms, "added_ms": added, "start_and_end_s": rest_s, "largest_loss_difference": worst}


if __name__ == "__main__":
    main()
