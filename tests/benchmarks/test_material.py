"""Text made for benchmarks: of the size asked for, the same each time, with the duplicates it says it has."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.corpus import material
from operators.dedup.signatures import shingle_sets


def _read(directory: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(directory.glob("part-*.parquet"))])


def test_the_same_request_makes_the_same_documents(tmp_path: Path) -> None:
    described = material.build(tmp_path / "one", 3, part_megabytes=1, languages=("zh",))
    assert material.build(tmp_path / "two", 3, part_megabytes=1, languages=("zh",)) == described
    one, two = _read(tmp_path / "one"), _read(tmp_path / "two")
    assert one.equals(two)
    one.validate(full=True)
    documents, size = material.documents_and_bytes(tmp_path / "one")
    assert documents == one.num_rows == len(set(one["id"].to_pylist()))
    assert 0.9 * 3e6 < size <= 3e6


def test_enlarged_text_has_copies_near_duplicates_and_new_documents(tmp_path: Path) -> None:
    texts = pa.array(
        [" ".join(f"{word}{i % 7}x{i // 7}" for word in "abcdefgh") + f". line {i}\n" * 9 for i in range(400)], pa.large_string()
    )
    parts = list(material._parts([texts], 3 * texts.nbytes, 1 << 20, seed=3))
    made = pa.concat_tables(parts)["text"].to_pylist()[400:]
    real = set(texts.to_pylist())
    copies = sum(text in real for text in made)
    assert 0.02 < copies / len(made) < 0.2
    assert len(set(made)) > 0.7 * len(made)
    assert len(shingle_sets(pa.array(made))[0]) > 0
