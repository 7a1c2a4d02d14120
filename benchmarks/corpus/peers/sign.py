"""MinHash signatures from raw text by one tool, timed inside the tool's own environment; prints one JSON line.

usage: PYTHON sign.py TOOL PARQUET_DIRECTORY PERMUTATIONS UNIT PAIRS.npy [SIGNATURES.npy]

All tools shingle alike: lower case, digit runs to 0, accents off, letters and digits only; runs of five words, or (UNIT
`characters`) of five characters. The peers do it in the shortest Python that the standard library allows; datatrove runs its
own stage 1. Reading and imports are not timed; a first part of the documents is signed beforehand, so that nothing is
compiled or cached within the measurement.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402 - after the number of threads
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

_DIGITS, _WORDS = re.compile(r"\d+"), re.compile(r"[^\W_]+")
_AT_LEAST_S = 1.0
BANDS = {112: (14, 8), 256: (32, 8)}


def tokens(text: str) -> list[str]:
    text = text.lower()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return _WORDS.findall(_DIGITS.sub("0", text))


def shingles(text: str, unit: str) -> list[str]:
    found = tokens(text)
    if unit == "characters":
        run = "".join(found)
        return [run[i : i + 5] for i in range(len(run) - 4)]
    return list(map(" ".join, zip(found, found[1:], found[2:], found[3:], found[4:], strict=False)))


def danlu(permutations: int, unit: str) -> Callable[[list[str] | pa.Array], np.ndarray]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from operators.dedup.bands import band_hashes
    from operators.dedup.normalise import CHARACTERS, WORDS
    from operators.dedup.signatures import sign

    bands, rows = BANDS[permutations]

    def run(texts: pa.Array) -> np.ndarray:
        out = []
        for begin in range(0, len(texts), 2048):  # the batches of a dedup stage
            signatures = sign(texts.slice(begin, 2048), permutations, unit=CHARACTERS if unit == "characters" else WORDS)
            band_hashes(signatures.values, bands, rows)
            out.append(signatures.values)
        return np.concatenate(out)

    return run


def danlu_sha1(permutations: int, unit: str) -> Callable[[pa.Array], np.ndarray]:
    danlu(permutations, unit)  # the path
    from operators.dedup.normalise import CHARACTERS, WORDS
    from operators.dedup.signatures import sign

    resolved = CHARACTERS if unit == "characters" else WORDS
    return lambda texts: sign(texts, permutations, unit=resolved, hashing="datasketch").values


def rensa(permutations: int, unit: str) -> Callable[[list[str]], np.ndarray]:
    from rensa import RMinHash

    def run(texts: list[str]) -> np.ndarray:
        made = RMinHash.from_token_sets([shingles(text, unit) for text in texts], permutations, 1)
        return np.array([each.digest() for each in made], np.uint32)

    return run


def rensa_matrix(permutations: int, unit: str) -> Callable[[list[str]], np.ndarray]:
    """The batch interface that makes no Python object a document; its digests are not read back."""
    from rensa import RMinHash

    def run(texts: list[str]) -> np.ndarray:
        RMinHash.digest_matrix_from_token_sets([shingles(text, unit) for text in texts], permutations, 1)
        return np.empty((0, permutations), np.uint32)

    return run


def datasketch(permutations: int, unit: str) -> Callable[[list[str]], np.ndarray]:
    from datasketch import MinHash

    def run(texts: list[str]) -> np.ndarray:
        made = MinHash.bulk([[each.encode() for each in shingles(text, unit)] for text in texts], num_perm=permutations, seed=1)
        return np.array([each.hashvalues for each in made], np.uint32)

    return run


def datatrove(permutations: int, unit: str) -> Callable[[list[str]], np.ndarray]:
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.logging import logger

    logger.remove()
    if unit != "words":
        raise ValueError("datatrove makes shingles of words only")
    bands, rows = BANDS[permutations]

    def run(texts: list[str]) -> np.ndarray:
        config = MinhashConfig(n_grams=5, num_buckets=bands, hashes_per_bucket=rows)
        with tempfile.TemporaryDirectory() as folder:
            step = MinhashDedupSignature(folder, config)
            step.run(Document(text=text, id=str(i)) for i, text in enumerate(texts))
            out = np.full((len(texts), bands, rows), (1 << 64) - 1, np.uint64)
            record = np.dtype([("values", "<u8", rows), ("row", "<u4")])
            for band in range(bands):
                found = np.frombuffer((Path(folder) / f"bucket_{band:03d}" / "00000.minhash.sig").read_bytes(), record)
                out[found["row"], band] = found["values"]
        return out.reshape(len(texts), permutations)

    return run


def main() -> None:
    tool, directory, permutations, unit, pairs_path, *signatures_path = sys.argv[1:]
    tables = [pq.read_table(path, columns=["text"]) for path in sorted(Path(directory).glob("part-*.parquet"))]
    column = pa.concat_tables(tables)["text"].cast(pa.large_string()).combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    texts = column if tool.startswith("danlu") else column.to_pylist()
    run = globals()[tool](int(permutations), unit)
    run(texts[:50])
    times, begun = 0, time.process_time()
    while times == 0 or time.process_time() - begun < _AT_LEAST_S:
        signatures = run(texts)
        times += 1
    cpu_s = (time.process_time() - begun) / times
    pairs = np.load(pairs_path)
    estimates = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1) if len(signatures) else np.empty(0)
    if signatures_path:
        np.save(signatures_path[0], signatures)
    print(json.dumps({"cpu_s": cpu_s, "documents": len(texts), "estimates": np.round(estimates, 4).tolist()}))


if __name__ == "__main__":
    main()
