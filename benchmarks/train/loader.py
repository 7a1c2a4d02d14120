"""Batches of packed tokens a second: ours against a bare memory map, Arrow, HF datasets, Ray Data, Grain and MosaicML Streaming.

All read the same rows (full, several documents each) in a shuffled order, warm, on one thread, batches of 64 rows.
`memmap` is the least that a loader can do: rows of the flat file gathered by `memmap[rows]` into an int64 array of inputs, and
those shifted by one into an int64 array of labels. Ours also writes positions that restart at every document, and keeps labels
from crossing documents. The others hand out the row's tokens alone, as they come; nothing is shifted for them. Ray Data
is given the first 4,096 rows, in its own order, for it is slow. Grain and
Streaming run in environments of their own (`make peers`) and are left out, with a note, where they are not installed.

    python -m benchmarks.train.loader [--quick] [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure
from benchmarks.train import material
from cluster import connect
from operators.tokens import twin
from train.loader import PackedTokens, TokenLoader

BATCH, LENGTH, VOCAB = 64, 2048, 32000
RAY_ROWS = 4096  # Ray Data needs some ten seconds for these
SIDE = Path(__file__).with_name("loader_side.py")


def rate(batches: Callable[[], Iterator[tuple[int, int]]], least_s: float) -> tuple[float, int]:
    """(tokens a second after a first pass that warms caches, sum that the batches gave)."""
    for _ in batches():
        pass
    tokens, checksum, start = 0, 0, time.perf_counter()
    while not tokens or time.perf_counter() - start < least_s:
        for count, part in batches():
            tokens += count
            checksum += part
    return tokens / (time.perf_counter() - start), checksum


def main() -> None:
    options = measure.arguments(__doc__ or "", argparse.ArgumentParser(description=__doc__))
    sequences = 4_096 if options.quick else 32_768
    least = 1.0 if options.quick else 3.0
    with tempfile.TemporaryDirectory(prefix="danlu-loader-") as folder:
        root = Path(folder)
        place = material.packed(
            root / "tokens" / "f0", sequences=sequences, length=LENGTH, vocab=VOCAB, seed=1, mean_document_tokens=600
        )
        loader = TokenLoader([PackedTokens(place)], [1.0], 7, ["tokens"])
        flat = np.memmap(Path(place) / twin.TOKENS, "<u2", "r").reshape(sequences, LENGTH)
        order = np.random.default_rng(3).permutation(sequences)
        steps = range(0, sequences - BATCH + 1, BATCH)
        values = pa.array(flat.reshape(-1))
        rows = pa.FixedSizeListArray.from_arrays(values, LENGTH)
        pq.write_table(pa.table({"input_ids": rows}), root / "rows.parquet", row_group_size=512)
        pq.write_table(pa.table({"input_ids": rows.slice(0, RAY_ROWS)}), root / "fewer.parquet", row_group_size=512)

        def ours() -> Iterator[tuple[int, int]]:
            for start in steps:
                batch = loader.batch(np.arange(start, start + BATCH))
                yield batch.input_ids.size, int(batch.labels[0, 0])

        def memmap() -> Iterator[tuple[int, int]]:
            for start in steps:
                taken = flat[order[start : start + BATCH]]
                inputs = taken.astype(np.int64)
                labels = np.empty_like(inputs)
                labels[:, :-1] = taken[:, 1:]
                labels[:, -1] = -100
                yield inputs.size, int(labels[0, 0])

        sides: dict[str, Callable[[], Iterator[tuple[int, int]]]] = {"ours": ours, "memmap": memmap}
        sides |= {"datasets": _datasets(root, order, steps), "ray_data": _ray_data(root)}
        for name in ("grain", "streaming"):
            if measure.has_peer(name):
                sides[name] = _peer(name, root, flat, least)
            else:
                print(f"{name} is not installed: `make peers` makes its environment", file=sys.stderr)
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds):
            for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
                side = sides[name]
                speed = next(side())[0] if name in ("grain", "streaming") else rate(side, 0.0 if name == "ray_data" else least)[0]
                found[name].append(speed)
                print(f"round {number + 1}/{options.rounds} {name}: {speed / 1e6:.1f} M tokens/s", file=sys.stderr)
        _stop_ray()
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    measure.publish(
        "train.loader",
        {f"vs_{name}": medians["ours"] / speed for name, speed in medians.items() if name != "ours"},
        {"tokens_per_second": medians, "batch_rows": BATCH, "row_tokens": LENGTH},
        data=f"{sequences} made-up rows of {LENGTH} tokens, documents of 600 tokens in the mean, warm, shuffled, one thread; "
        f"Ray Data: {RAY_ROWS} of them",
        quick=options.quick,
    )


def _datasets(root: Path, order: np.ndarray, steps: range) -> Callable[[], Iterator[tuple[int, int]]]:
    import datasets

    table = pq.read_table(root / "rows.parquet", memory_map=True)
    found = datasets.Dataset(table).with_format("numpy")

    def batches() -> Iterator[tuple[int, int]]:
        for start in steps:
            taken = found[order[start : start + BATCH].tolist()]["input_ids"]
            yield taken.size, int(taken[0, 0])

    return batches


def _ray_data(root: Path) -> Callable[[], Iterator[tuple[int, int]]]:
    def batches() -> Iterator[tuple[int, int]]:
        import ray

        if not ray.is_initialized():
            connect.start_local(2, 512 << 20)
            ray.data.DataContext.get_current().enable_progress_bars = False
        found: Any = ray.data.read_parquet(str(root / "fewer.parquet"))
        for batch in found.iter_batches(
            batch_size=BATCH, batch_format="numpy", local_shuffle_buffer_size=1024, local_shuffle_seed=1
        ):
            taken = np.stack(batch["input_ids"]) if batch["input_ids"].dtype == object else batch["input_ids"]
            yield taken.size, int(taken[0, 0])

    return batches


def _stop_ray() -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()


def _peer(name: str, root: Path, flat: np.ndarray, least: float) -> Callable[[], Iterator[tuple[int, int]]]:
    folder = root / name
    folder.mkdir()
    np.save(folder / "rows.npy", np.asarray(flat))

    def batches() -> Iterator[tuple[int, int]]:
        used = measure.process([measure.peer_python(name), SIDE, name, folder, str(BATCH), str(least)], timeout_s=600)
        yield int(used.output["tokens_per_second"]), 0

    return batches


if __name__ == "__main__":
    main()
