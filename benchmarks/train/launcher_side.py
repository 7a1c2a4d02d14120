"""One side of benchmarks.train.launcher: a pretraining job here (alone or under torchrun), or in a Ray Train group.

Prints {"seconds": seconds between steps, "losses": ...} from the event file that the job's first worker wrote.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.session import TrainGroup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("directory")
    parser.add_argument("--ray", type=int, metavar="WORKERS", help="in a group of so many")
    parsed = parser.parse_args()
    if parsed.ray:
        _in_a_group(json.loads(parsed.job.read_text()), parsed.directory, parsed.ray)
        _print_timeline(parsed.directory)
        return
    from train import pretrain

    pretrain.main([str(parsed.job), parsed.directory])
    if os.environ.get("RANK", "0") == "0":
        _print_timeline(parsed.directory)


@contextmanager
def group(workers: int, storage_path: str) -> Iterator[TrainGroup]:
    """A Ray Train group on a Ray of its own; both end with the context."""
    import ray

    from cluster.connect import start_local
    from train.session import TrainGroup

    start_local(4, 256 << 20)
    started = TrainGroup(workers, storage_path=storage_path)
    try:
        yield started
    finally:
        started.stop()
        ray.shutdown()


def _in_a_group(config: dict[str, Any], directory: str, workers: int) -> None:
    with group(workers, f"{directory}-group") as started:
        started.run({"kind": "pretrain", "config": config, "directory": directory})


def timeline(directory: str) -> tuple[list[float], list[float]]:
    """(losses, seconds between the ends of steps) of a job, from the event file that its first worker wrote."""
    from train.tracking import events

    found = [(at, value) for at, _, tag, value in events(Path(directory) / "tensorboard") if tag == "loss"]
    times, losses = [at for at, _ in found], [round(value, 6) for _, value in found]
    return losses, [after - before for before, after in itertools.pairwise(times)]


def _print_timeline(directory: str) -> None:
    losses, seconds = timeline(directory)
    print(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main()
