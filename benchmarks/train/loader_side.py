"""One peer of benchmarks.train.loader, run with the peer's own interpreter: NAME FOLDER BATCH SECONDS; prints one JSON line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def grain(folder: Path, batch: int) -> Iterable[Any]:
    """Rows of a memory map as a random-access source, shuffled and batched."""
    import grain.python as pygrain

    rows = np.load(folder / "rows.npy", mmap_mode="r")

    class Rows:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> np.ndarray:
            return np.asarray(rows[index])

    return pygrain.MapDataset.source(Rows()).shuffle(seed=1).batch(batch)


def streaming(folder: Path, batch: int) -> Iterable[Any]:
    """Local MDS shards, shuffled, one array a sample; batches are stacked here as its torch loader would."""
    from streaming import MDSWriter, StreamingDataset

    rows, shards = np.load(folder / "rows.npy", mmap_mode="r"), folder / "shards"
    if not shards.exists():
        with MDSWriter(out=str(shards), columns={"tokens": f"ndarray:uint16:{rows.shape[1]}"}) as writer:
            for row in rows:
                writer.write({"tokens": np.asarray(row)})
    found = StreamingDataset(local=str(shards), shuffle=True, batch_size=batch)

    class Batches:
        def __iter__(self) -> Any:
            held = []
            for sample in found:
                held.append(sample["tokens"])
                if len(held) == batch:
                    yield np.stack(held)
                    held = []

    return Batches()


def main() -> None:
    name, folder, batch, least = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    found = {"grain": grain, "streaming": streaming}[name](folder, batch)
    for _ in found:  # warms caches
        pass
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < least:
        for taken in found:
            tokens += taken.size
    print(json.dumps({"tokens_per_second": tokens / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
