"""Worker processes of a training group, as torchrun would start them: they do jobs one after the other and note what they read.

    python -m tests.train.group PLAN.json

PLAN.json is a list of {"job": settings, "directory": path, "reads": path, "stop": step or absent,
"hang_write": step or absent}. Each worker appends a line
{"rank", "step", "rows": [[input, row], ...]} to `reads`.RANK for every batch that it takes for training.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.settings import PretrainJob

ROOT = Path(__file__).resolve().parents[2]


def start(plan: Sequence[dict[str, Any]], scratch: Path, world: int) -> list[subprocess.Popen[str]]:
    """Start a group of `world` workers on a plan; each prints `step N/M` lines for the first worker's progress."""
    path = scratch / f"plan-{len(list(scratch.glob('plan-*')))}.json"
    path.write_text(json.dumps(plan))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.train.group", str(path)]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def entry(job: PretrainJob, directory: Path, **more: Any) -> dict[str, Any]:
    """One job of a plan."""
    return {
        "job": job.model_dump(mode="json"), "directory": str(directory),
        "reads": str(directory.parent / f"{directory.name}.reads"), **more,
    }  # fmt: skip


def run(plan: Sequence[dict[str, Any]], scratch: Path, world: int, timeout: float = 600) -> list[dict[str, Any]]:
    """Do a plan with `world` workers and return what the first said of each job: its result, or {"error": text}."""
    processes = start(plan, scratch, world)
    try:
        output = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(output)
    return [json.loads(line.removeprefix("DONE ")) for line in output[0].splitlines() if line.startswith("DONE ")]


def reads(directory: Path, world: int) -> list[dict[str, Any]]:
    """The batches that workers took, in order of step and rank."""
    found = [
        json.loads(line)
        for rank in range(world)
        for line in (directory.parent / f"{directory.name}.reads.{rank}").read_text().splitlines()
    ]
    return sorted(found, key=lambda batch: (batch["step"], batch["rank"]))


def _hang(step: int) -> None:
    """This worker's write of one checkpoint does not end."""
    from train import checkpoint

    original = checkpoint._write

    def write(directory: str, *rest: Any) -> Any:
        if directory.endswith(f"{step:08d}"):
            time.sleep(3600)
        return original(directory, *rest)

    checkpoint._write = write


def main() -> None:
    import torch

    from train import pretrain
    from train.errors import JobCancelled
    from train.parallel import Workers

    torch.set_num_threads(1)
    for item in json.loads(Path(sys.argv[1]).read_text()):
        job = PretrainJob.model_validate(item["job"])

        def report(done: int, total: int, note: str, metrics: dict[str, Any], stop: int | None = item.get("stop")) -> bool:
            print(f"step {done}/{total}", flush=True)
            return done == stop

        workers = Workers.here(report)
        if item.get("hang_write") is not None and workers.rank:
            _hang(item["hang_write"])
        original = pretrain._Training._step

        def step(training: Any, rate: float, item: Any = item, workers: Workers = workers, original: Any = original) -> Any:
            place, size = training.place, training.job.batch_sequences
            share = size // place.data
            first = training.step * size + place.data_rank * share
            taken = training._taken()
            expected = training.loader.batch(range(first, first + share))
            ids = torch.cat([piece["input_ids"].cpu() for piece in taken]).numpy()
            assert (ids == expected.input_ids).all()
            draw = training.loader.locate(list(range(first, first + share)))
            rows = [[training.loader.names[s], r] for s, r in zip(draw.source.tolist(), draw.row.tolist(), strict=True)]
            with open(f"{item['reads']}.{workers.rank}", "a") as stream:
                stream.write(json.dumps({"rank": workers.rank, "step": training.step, "rows": rows}) + "\n")
            training._taken = lambda: taken
            try:
                return original(training, rate)
            finally:
                del training._taken

        pretrain._Training._step = step  # type: ignore[method-assign]
        try:
            outcome = pretrain.run(job, item["directory"], workers)
        except (JobCancelled, ValueError, RuntimeError) as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        finally:
            pretrain._Training._step = original  # type: ignore[method-assign]
        if workers.first:
            print("DONE " + json.dumps(outcome), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
