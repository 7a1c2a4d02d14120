"""Recall and precision on labelled near-duplicates, and the same kept set as datasketch's own LSH."""

from __future__ import annotations

from pathlib import Path

import datasketch
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from operators.dedup.bands import collision_probability
from operators.dedup.components import resolve
from operators.dedup.join import join_records
from operators.dedup.keys import document_keys, document_shingles, split
from operators.dedup.options import DedupOptions
from operators.dedup.reference import sign_with_datasketch

NONE = np.empty(0, np.uint64)


@pytest.fixture(scope="module")
def documents(data_pack: Path) -> pa.Table:
    return pq.read_table(data_pack / "near_dup" / "docs.parquet", columns=["id", "text", "lang"])


@pytest.fixture(scope="module")
def pairs(data_pack: Path, documents: pa.Table) -> dict[str, np.ndarray]:
    """Row numbers a, b and exact Jaccard of every pair of one language at 0.2 or more, found by brute force."""
    table = pq.read_table(data_pack / "near_dup" / "pairs.parquet")
    a, b = (pc.index_in(table[side], value_set=documents["id"]).to_numpy() for side in ("a", "b"))
    return {"a": a, "b": b, "jaccard": table["jaccard"].to_numpy()}


def sharing_a_bucket(documents: pa.Table, options: DedupOptions, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    records = document_keys(documents, np.arange(len(documents), dtype=np.uint64), options, with_ids=False).records["bands"]
    hashes = np.zeros((len(documents), options.shape[0]), np.uint64)
    order = np.argsort(records[:, 1], kind="stable")
    rows = records[order, 1].reshape(-1, options.shape[0])[:, 0].astype(int)
    hashes[rows] = records[order, 0].reshape(-1, options.shape[0])
    return ((hashes[a] == hashes[b]) & (hashes[a] != 0)).any(axis=1)


@pytest.mark.parametrize("shape", [(14, 8), (9, 12)])
def test_pairs_are_found_with_the_probability_that_bands_and_rows_promise(
    documents: pa.Table, pairs: dict[str, np.ndarray], shape: tuple[int, int]
) -> None:
    options = [DedupOptions(bands=shape[0], rows=shape[1], digits="keep", seed=seed) for seed in (1, 2, 3, 4)]
    found = np.mean([sharing_a_bucket(documents, each, pairs["a"], pairs["b"]) for each in options], axis=0)
    for low, high in ((0.2, 0.4), (0.5, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        inside = (pairs["jaccard"] >= low) & (pairs["jaccard"] < high)
        expected = collision_probability(pairs["jaccard"][inside], *shape).mean()
        # pairs of one family are not independent, and our characters drop the punctuation that the truth keeps
        assert abs(found[inside].mean() - expected) < 0.05, (low, high)
    nearly_equal = pairs["jaccard"] >= 0.9
    assert found[nearly_equal].mean() > (0.99 if shape == (14, 8) else 0.9)


def test_texts_of_two_languages_or_below_every_similarity_do_not_meet(documents: pa.Table, pairs: dict[str, np.ndarray]) -> None:
    options = DedupOptions(bands=14, rows=8)
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, len(documents), (2, 200_000))
    listed = set(zip(pairs["a"].tolist(), pairs["b"].tolist(), strict=True))
    strangers = np.array(
        [x != y and (x, y) not in listed and (y, x) not in listed for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    )
    assert not sharing_a_bucket(documents, options, a[strangers], b[strangers]).any()


def test_shingle_sets_have_the_true_jaccard(documents: pa.Table, pairs: dict[str, np.ndarray]) -> None:
    hashes, offsets = document_shingles(documents, DedupOptions(digits="keep"))
    sample = np.random.default_rng(1).choice(len(pairs["a"]), 300, replace=False)
    ours = []
    for a, b in zip(pairs["a"][sample].tolist(), pairs["b"][sample].tolist(), strict=True):
        left, right = hashes[offsets[a] : offsets[a + 1]], hashes[offsets[b] : offsets[b + 1]]
        shared = len(np.intersect1d(left, right, assume_unique=True))
        ours.append(shared / (len(left) + len(right) - shared))
    assert np.abs(np.array(ours) - pairs["jaccard"][sample]).mean() < 0.02


def test_the_kept_set_is_that_of_datasketchs_own_lsh(documents: pa.Table) -> None:
    texts = documents.slice(0, 900)
    options = DedupOptions(threshold=0.7, exact=False, signature="datasketch", similarity=False)
    keys = document_keys(texts, np.arange(len(texts), dtype=np.uint64), options, with_ids=False)
    joined = [join_records(piece) for piece in partitioned(keys.records["bands"], 3)]
    near = tuple(np.concatenate([getattr(each, side) for each in joined]) for side in ("larger", "smaller"))
    ours = resolve((NONE, NONE), (near[0], near[1]))

    index = datasketch.MinHashLSH(threshold=0.7, num_perm=112)
    roots = list(range(len(texts)))
    signatures = sign_with_datasketch(texts["text"], hashing="datasketch")
    for row in np.flatnonzero(signatures.signed).tolist():
        minhash = datasketch.MinHash(hashvalues=signatures.values[row], seed=1, scheme="affine32")
        for other in index.query(minhash):
            low, high = sorted((roots[row], roots[other]))
            roots = [low if root == high else root for root in roots]
        index.insert(row, minhash)
    assert ours.ordinals.tolist() == [row for row, root in enumerate(roots) if row != root]
    assert ours.kept.tolist() == [root for row, root in enumerate(roots) if row != root]
    assert len(ours.ordinals) > 100


def partitioned(records: np.ndarray, count: int) -> list[np.ndarray]:
    ordered, starts = split(records, count)
    return [ordered[starts[i] : starts[i + 1]] for i in range(count)]
