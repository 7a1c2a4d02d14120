"""One side of benchmarks.cluster.scheduling in a process of its own: `ours` or `ray_data`, units, tasks out at a time.

Units do nothing, or sleep for `--sleep` seconds, so that what is left is the scheduling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from typing import Any

import psutil

from cluster.connect import connect


def _work(sleep: float, number: int) -> int:
    if sleep:
        time.sleep(sleep)
    return number


def ours(units: int, workers: int, sleep: float, samples: list[tuple[int, float, int]]) -> None:
    from operators.stage import StageContext
    from operators.tasks import run_tasks

    context = StageContext("bench", "bench", "", "", {}, {}, 0, workers=workers)
    for done, _ in enumerate(run_tasks(context, _work, ((sleep, number) for number in range(units))), 1):
        _sample(samples, done, units)


def ray_data(units: int, workers: int, sleep: float, samples: list[tuple[int, float, int]]) -> None:
    """As a stage of Ray Data was: one `map_batches` over a pool of tasks, one unit a block."""
    import logging

    import ray

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["unit"]:
            _work(sleep, int(number))
        return batch

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = ray.data.from_items([{"unit": number} for number in range(units)], override_num_blocks=units)
    pool = ray.data.TaskPoolStrategy(size=workers)
    done = blocks.map_batches(run, batch_size=1, compute=pool, num_cpus=1, batch_format="numpy")
    for finished, _ in enumerate(done.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0), 1):
        _sample(samples, finished, units)


def _sample(samples: list[tuple[int, float, int]], done: int, units: int) -> None:
    if done in (units // 10, units) or done % max(1, units // 10) == 0:
        samples.append((done, time.perf_counter(), psutil.Process().memory_info().rss))


def _cpu_s(name: str) -> float:
    """CPU seconds of one of Ray's servers."""
    found = [child for child in psutil.Process().children() if child.name() == name]
    return sum(sum(child.cpu_times()[:2]) for child in found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "ray_data"])
    parser.add_argument("units", type=int)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--sleep", type=float, default=0.0)
    given = parser.parse_args()
    connect(cpus=given.cpus)
    side = {"ours": ours, "ray_data": ray_data}[given.side]
    side(2 * given.cpus, given.workers, 0.0, [])  # workers are started and imports made
    samples: list[tuple[int, float, int]] = []
    before = {"driver": sum(os.times()[:2]), **{name: _cpu_s(name) for name in ("raylet", "gcs_server")}}
    rss, began = psutil.Process().memory_info().rss, time.perf_counter()
    side(given.units, given.workers, given.sleep, samples)
    seconds = time.perf_counter() - began
    after = {"driver": sum(os.times()[:2]), **{name: _cpu_s(name) for name in ("raylet", "gcs_server")}}
    points = [(0, began, rss), *samples]
    rates = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(points) if b[0] > a[0]]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "units_a_second": given.units / seconds,
                "first_and_last_tenth": [rates[0], rates[-1]],
                "cpu_ms_a_unit": {name: 1e3 * (after[name] - before[name]) / given.units for name in before},
                "driver_mb": [rss / 1e6, samples[-1][2] / 1e6],
                "driver_bytes_a_unit": (samples[-1][2] - rss) / given.units,
            }
        )
    )


if __name__ == "__main__":
    main()
