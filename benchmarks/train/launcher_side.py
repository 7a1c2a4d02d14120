"""One side of benchmarks.train.launcher: a pretraining job here (alone or under torchrun), or in a Ray Train group of two.

Prints {"seconds": seconds between steps, "losses": ...} from the event file that the job's first worker wrote.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("directory")
    parser.add_argument("--ray", action="store_true")
    parsed = parser.parse_args()
    if parsed.ray:
        _in_a_group(json.loads(parsed.job.read_text()), parsed.directory)
        _print_timeline(parsed.directory)
        return
    from train import pretrain

    pretrain.main([str(parsed.job), parsed.directory])
    if os.environ.get("RANK", "0") == "0":
        _print_timeline(parsed.directory)


def _in_a_group(config: dict[str, Any], directory: str) -> None:
    import ray

    from cluster.connect import start_local
    from train.session import TrainGroup

    start_local(4, 256 << 20)
    group = TrainGroup(2, storage_path=f"{directory}-group")
    try:
        group.run({"kind": "pretrain", "config": config, "directory": directory})
    finally:
        group.stop()
        ray.shutdown()


def _print_timeline(directory: str) -> None:
    from train.tracking import events

    found = [(at, value) for at, _, tag, value in events(Path(directory) / "tensorboard") if tag == "loss"]
    times, losses = [at for at, _ in found], [round(value, 6) for _, value in found]
    print(json.dumps({"seconds": [after - before for before, after in itertools.pairwise(times)], "losses": losses}))


if __name__ == "__main__":
    main()
