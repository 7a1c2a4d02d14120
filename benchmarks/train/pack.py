"""Encode and pack against `datasets.map`, one document a call and batched: tokens a CPU second and a wall second, the same ids.

Both sides read the same Parquet of documents (English and Chinese) with SmolLM2's own tokenizer on one process; ours writes packed
rows, `datasets.map` writes its Arrow file of ids. Then what best-fit loses beside TRL's packing and a greedy packer.

    python -m benchmarks.train.pack [--quick] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure
from operators import shards
from operators.ledger import Ledger
from operators.shards import UnitWriter
from operators.synthesis.packaged import resolve_model
from operators.tokens.encode import Encoder
from operators.tokens.layout import place
from operators.tokens.pack import PackSettings, pack_span
from operators.tokens.window import spans
from train import artifacts

DATA = measure.ROOT.parent / "shared" / "data" / "corpus"
LENGTHS = (1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("ours", "datasets_map", "datasets_map_batched"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = measure.arguments(__doc__ or "", parser)
    if options.side:
        print(json.dumps(_side(options.side, Path(options.folder))))
        return
    with tempfile.TemporaryDirectory(prefix="danlu-pack-") as folder:
        root = Path(folder)
        documents = 250 if options.quick else 2500
        tables = [pq.read_table(DATA / f"{name}.parquet", columns=["id", "text", "source", "lang"]) for name in ("en", "zh")]
        table = pa.concat_tables([found.slice(0, documents) for found in tables], promote_options="permissive")
        writer = UnitWriter(str(root / "clean"), 0)
        writer.write(table)
        writer.commit(Ledger(created=table.num_rows, kept=table.num_rows))
        shards.finish(str(root / "clean"), stage="clean", kind="corpus", fingerprint="f", config={}, inputs={})
        (root / "model").symlink_to(resolve_model("packaged:smollm2-135m-instruct", str(artifacts.cache_directory())))
        command = [sys.executable, "-m", "benchmarks.train.pack", "--folder", root, "--side"]
        env = {"TOKENIZERS_PARALLELISM": "false", "NUMBA_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        sides = {
            name: (lambda name=name: measure.process([*command, name], env=env))
            for name in ("ours", "datasets_map", "datasets_map_batched")
        }
        measure.process([*command, "ours"], env=env)  # compiles
        found = measure.interleave(sides, options.rounds)
        outputs = {name: usages[-1].output for name, usages in found.items()}
        if len({output["ids"] for output in outputs.values()}) != 1:
            raise SystemExit(f"the sides do not agree on the ids: {outputs}")
        # The work alone, as each side measures it: not the imports of either.
        cpu, wall = (
            {name: float(np.median([usage.output[key] for usage in usages])) for name, usages in found.items()}
            for key in ("cpu_s", "wall_s")
        )
        lengths = np.load(root / "lengths.npy")
    tokens = int(lengths.sum())
    measure.publish(
        "train.pack",
        {f"vs_{name}": cpu[name] / cpu["ours"] for name in cpu if name != "ours"},
        {
            **{
                f"tokens_per_{unit}_second": {name: tokens / seconds for name, seconds in times.items()}
                for unit, times in (("cpu", cpu), ("wall", wall))
            },
            "losses": losses(lengths),
        },
        data=f"{len(lengths)} documents of shared/data/corpus/en and zh, {tokens} tokens (SmolLM2's tokenizer), one process a side",
        quick=options.quick,
    )


def _side(name: str, root: Path) -> dict[str, Any]:
    """Do one side's work and return {"cpu_s", "wall_s", "ids": a hash of all ids in order}."""
    parts = shards.parts([str(root / "clean")])
    digest = np.zeros(1, np.uint64)
    model = (root / "model" / "tokenizer.json").read_bytes()
    if name == "ours":
        encoder = Encoder(model)
        encoder.encode(pa.array(["warm 热"], pa.large_string()))
        table = pq.read_table(parts[0].path, columns=["text"])
        start, began = sum(os.times()[:4]), time.perf_counter()
        writer = UnitWriter(str(root / f"packed-{os.getpid()}"), 0)
        written = 0
        for span in spans(parts, 4096):
            written += pack_span(span, encoder, PackSettings(2048, 0, 0), writer)[0].kept
        writer.commit(Ledger(created=written, kept=written))
        cpu, wall = sum(os.times()[:4]) - start, time.perf_counter() - began
        ids, offsets = encoder.encode(table["text"])
        np.save(root / "lengths.npy", np.diff(offsets) + 1)
        return {"cpu_s": cpu, "wall_s": wall, "ids": _digest(digest, [ids[a:b] for a, b in pairwise(offsets)])}
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(root / "model" / "tokenizer.json"))
    rows = datasets.Dataset.from_parquet(parts[0].path, cache_dir=str(root / f"cache-{os.getpid()}"), columns=["text"])
    start, began = sum(os.times()[:4]), time.perf_counter()
    mapped = rows.map(
        lambda row: {"input_ids": tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]},
        batched=name == "datasets_map_batched",
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    cpu, wall = sum(os.times()[:4]) - start, time.perf_counter() - began
    return {"cpu_s": cpu, "wall_s": wall, "ids": _digest(digest, [np.array(ids, np.uint32) for ids in mapped["input_ids"]])}


def _digest(state: np.ndarray, documents: list[np.ndarray]) -> str:
    import hashlib

    digest = hashlib.sha256(state.tobytes())
    for ids in documents:
        digest.update(np.asarray(ids, "<u4").tobytes())
        digest.update(b"/")
    return digest.hexdigest()


def losses(lengths: np.ndarray) -> dict[str, dict[str, float]]:
    """Per cent of tokens lost, of padding, and of documents cut by: ours, TRL's `bfd` and `wrapped`, a greedy packer."""
    import datasets
    from trl import pack_dataset

    found: dict[str, dict[str, float]] = {}
    total = int(lengths.sum())
    rows = datasets.Dataset.from_dict({"input_ids": [np.zeros(count, np.int32) for count in lengths]})
    for length in LENGTHS:
        layout = place(lengths, length, "best_fit")
        cut = float((np.bincount(layout.document, minlength=len(lengths)) > 1).mean())
        found[f"ours best_fit {length}"] = _row(total, int(layout.tokens.sum()), layout.sequences * length, cut)
        for strategy in ("bfd", "wrapped"):
            packed = pack_dataset(rows, length, strategy)
            sizes = [len(ids) for ids in packed["input_ids"]]
            over = float((lengths > length).mean())
            kept = sum(sizes)
            if strategy == "wrapped":
                over = _crossing(lengths, length)
            found[f"trl {strategy} {length}"] = _row(total, kept, len(sizes) * length, over)
        bins, room, kept = 0, 0, 0
        for count in np.minimum(lengths, length).tolist():  # next fit in the order of the documents, long ones truncated
            if count > room:
                bins, room = bins + 1, length
            room -= count
            kept += count
        found[f"greedy {length}"] = _row(total, kept, bins * length, float((lengths > length).mean()))
    return found


def _crossing(lengths: np.ndarray, length: int) -> float:
    """The share of documents that lie across an end of a row in the plain stream."""
    ends = np.cumsum(lengths)
    return float(((ends - lengths) // length != (ends - 1) // length).mean())


def _row(total: int, kept: int, room: int, cut: float) -> dict[str, float]:
    return {
        "lost_percent": 100 * (1 - kept / total),
        "padding_percent": 100 * (1 - kept / room),
        "documents_cut_percent": 100 * cut,
    }


if __name__ == "__main__":
    main()
