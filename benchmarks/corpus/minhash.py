"""MinHash from raw text (normalise, shingle, sign, bands): documents per CPU-second at 112 and 256 permutations.

All sides get the same documents and the same definition of a shingle, each in its own environment and process
(`peers/sign.py`). That they do the same work is checked by their estimates of the Jaccard similarity of known pairs, beside
the exact value, and in datasketch's mode by the signatures themselves.

The distance to the machine: one core's attainable rate of multiply-add-minimum and of reading memory are measured in the
same run; a signature can cost no less than its multiply-adds and one pass over its bytes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.corpus import material
from benchmarks.measure import ROOT, Usage, arguments, interleave, peer_python, process, publish
from operators.dedup.normalise import CHARACTERS, WORDS
from operators.dedup.signatures import _permute, shingle_sets

_SCRIPT = ROOT / "benchmarks" / "corpus" / "peers" / "sign.py"
_OWN = ROOT / ".venv" / "bin" / "python"
_PAIRS = 400
_ERRORS = 3.0  # standard errors of a mean over the pairs that an estimate may be off


def main() -> None:
    options = arguments(__doc__ or "")
    megabytes = {"words": 2 if options.quick else 4, "characters": 1 if options.quick else 2}
    figures: dict[str, Any] = {}
    ratio: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, described = Path(scratch), []
        for unit, language in (("words", "en"), ("characters", "zh")):
            described.append(material.build(folder / unit, megabytes[unit], languages=(language,)))
            exact = _known_pairs(folder, unit)
            for permutations in (112, 256) if unit == "words" else (112,):
                suffix = ("" if permutations == 112 else f"_{permutations}") + ("" if unit == "words" else "_zh")
                measured, agreed = _compare(folder, unit, permutations, exact, options.rounds)
                figures[f"signing{suffix}"] = agreed
                own = measured.pop("danlu")
                ratio.update({f"vs_{peer}{suffix}": cpu_s / own for peer, cpu_s in measured.items()})
        figures["datasketch_mode"] = _bit_equal(folder)
        figures["machine"] = machine = _machine()
        figures["limit"] = _distance(folder / "words", figures, machine)
    publish("corpus.minhash", ratio, figures, data="; ".join(described), quick=options.quick)


def _texts(directory: Path) -> pa.Array:
    tables = [pq.read_table(path, columns=["text"]) for path in sorted(directory.glob("part-*.parquet"))]
    return pa.concat_tables(tables)["text"].combine_chunks()


def _known_pairs(folder: Path, unit: str) -> np.ndarray:
    """Write pairs of documents of every degree of likeness; their exact Jaccard similarities float64[pairs].

    The likeness is made: each pair is a document and its own text with a share of its pieces replaced, appended to the
    material as one more part.
    """
    directory = folder / unit
    texts = _texts(directory)
    lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False)
    generator = np.random.default_rng(5)
    fit = np.flatnonzero((lengths > 500) & (lengths < 20000))
    chosen = generator.choice(fit, min(_PAIRS, len(fit)), replace=False)
    edited = []
    for row in chosen.tolist():
        lines = texts[row].as_py().split("\n")
        shuffled = texts[int(generator.choice(fit))].as_py().split("\n")
        share = generator.random() * 0.6
        edited.append(
            "\n".join(shuffled[i % len(shuffled)] if generator.random() < share else line for i, line in enumerate(lines))
        )
    table = pa.table({"id": pa.array([f"e{i}" for i in range(len(edited))]), "text": pa.array(edited, pa.large_string())})
    pq.write_table(table, directory / "part-9999.parquet")
    pairs = np.column_stack([chosen, np.arange(len(edited)) + len(texts)])
    np.save(folder / f"{unit}.npy", pairs)
    hashes, offsets = shingle_sets(_texts(directory), unit=WORDS if unit == "words" else CHARACTERS)
    sets = [set(hashes[offsets[i] : offsets[i + 1]].tolist()) for i in pairs.ravel().tolist()]
    return np.array([len(a & b) / max(1, len(a | b)) for a, b in zip(sets[::2], sets[1::2], strict=True)])


def _side(tool: str, python: Path, folder: Path, unit: str, permutations: int, *more: str) -> Callable[[], Usage]:
    """One timed run in an own process; its CPU seconds are those of the measured part alone."""

    def run() -> Usage:
        command = [python, _SCRIPT, tool, folder / unit, permutations, unit, folder / f"{unit}.npy", *more]
        usage = process([str(part) for part in command])
        return Usage(usage.output["cpu_s"], usage.wall_s, usage.peak_bytes, usage.output)

    return run


def _compare(folder: Path, unit: str, permutations: int, exact: np.ndarray, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(median CPU seconds of each tool, its rates and the error of its estimates)."""
    tools = {"danlu": _OWN, "rensa": peer_python("rensa"), "datasketch": peer_python("rensa")}
    if unit == "words":
        tools |= {"rensa_matrix": peer_python("rensa"), "datatrove": peer_python("datatrove")}
    found = interleave({tool: _side(tool, python, folder, unit, permutations) for tool, python in tools.items()}, rounds)
    texts = _texts(folder / unit)
    size = int(pc.sum(pc.binary_length(texts)).as_py())
    seconds = {tool: statistics.median(usage.cpu_s for usage in usages) for tool, usages in found.items()}
    agreed: dict[str, Any] = {}
    for tool, cpu_s in seconds.items():
        agreed[tool] = {"documents_per_cpu_s": len(texts) / cpu_s, "mb_per_cpu_s": size / cpu_s / 1e6}
        estimates = np.array(found[tool][0].output["estimates"])
        if not len(estimates):
            continue
        difference = estimates - exact
        agreed[tool] |= {"jaccard_bias": float(difference.mean()), "jaccard_rmse": float(np.sqrt((difference**2).mean()))}
        expected = float(np.sqrt((exact * (1 - exact) / permutations).mean()))
        if (
            abs(difference.mean()) > _ERRORS * expected / np.sqrt(len(exact)) + 0.005
            or agreed[tool]["jaccard_rmse"] > 1.5 * expected
        ):
            raise RuntimeError(
                f"{tool} with {permutations} permutations signs something else: {agreed[tool]}, expected {expected:.4f}"
            )
    agreed["pairs"] = {
        "count": len(exact),
        "mean_jaccard": float(exact.mean()),
        "expected_rmse": float(np.sqrt((exact * (1 - exact) / permutations).mean())),
    }
    return seconds, agreed


def _bit_equal(folder: Path) -> dict[str, float]:
    """The SHA-1 mode against datasketch itself, fed by plain Python: share of documents with the very same signature."""
    ours, theirs = folder / "ours.npy", folder / "theirs.npy"
    own = _side("danlu_sha1", _OWN, folder, "words", 112, str(ours))()
    peer = _side("datasketch", peer_python("rensa"), folder, "words", 112, str(theirs))()
    equal = (np.load(ours) == np.load(theirs)).all(axis=1)
    return {"documents_with_equal_signature": float(equal.mean()), "times_datasketch": peer.cpu_s / own.cpu_s}


@nb.njit(nogil=True)
def _multiply_adds(rounds: int, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """rounds x 64 x len(a) multiply-add-minimum steps with everything in the first cache and few loads: the attainable rate."""
    for round_ in range(rounds):
        h = np.uint32(round_)
        for j in range(len(a)):
            x, y, least = a[j], b[j], out[j]
            for i in range(64):
                least = min(least, np.uint32(x * np.uint32(h + np.uint32(i)) + y))
            out[j] = least


@nb.njit(nogil=True)
def _read(values: np.ndarray) -> np.uint64:
    total = np.uint64(0)
    for value in values:
        total ^= value
    return total


def _best(work: Callable[[], Any], times: int = 5) -> float:
    work()
    found = []
    for _ in range(times):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def _machine() -> dict[str, float]:
    """Of one core: multiply-add-minimum steps a second on 32-bit lanes, bytes a second read from memory."""
    a, b = np.arange(1, 513, 2, dtype=np.uint32), np.arange(256, dtype=np.uint32)
    out = np.full(256, 0xFFFFFFFF, np.uint32)
    adds = 20_000 * 64 * 256 / _best(lambda: _multiply_adds(20_000, a, b, out))
    block = np.arange(520, dtype=np.uint32)
    adds = max(adds, 512 * 256 * 1000 / _best(lambda: [_permute(block, 512, a, b, out) for _ in range(1000)]))
    values = np.arange(1 << 26, dtype=np.uint64)
    return {"multiply_adds_per_s": adds, "read_bytes_per_s": values.nbytes / _best(lambda: _read(values))}


def _distance(directory: Path, figures: dict[str, Any], machine: dict[str, float]) -> dict[str, Any]:
    """How many times the least possible time a signature takes, and where the rest goes."""
    texts = _texts(directory)
    size, shingled = int(pc.sum(pc.binary_length(texts)).as_py()), 0
    for begin in range(0, len(texts), 2048):
        shingled += len(shingle_sets(texts.slice(begin, 2048), unit=WORDS)[0])
    out: dict[str, Any] = {"bytes_hashed": size, "shingles": shingled}
    for permutations, name in ((112, "signing"), (256, "signing_256")):
        seconds = size / 1e6 / figures[name]["danlu"]["mb_per_cpu_s"]
        least = shingled * permutations / machine["multiply_adds_per_s"] + size / machine["read_bytes_per_s"]
        out[str(permutations)] = {
            "multiply_adds_per_s": shingled * permutations / seconds,
            "share_of_attainable_multiply_adds": shingled * permutations / seconds / machine["multiply_adds_per_s"],
            "share_of_read_rate": size / seconds / machine["read_bytes_per_s"],
            "times_the_least": seconds / least,
            "ns_per_shingle": seconds / shingled * 1e9,
        }
    return out


if __name__ == "__main__":
    main()
