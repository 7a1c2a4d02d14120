"""Recall and precision on labelled near-duplicates, and the same kept set as datasketch's own LSH."""

from __future__ import annotations

from pathlib import Path

import datasketch
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from benchmarks.corpus import near_dup
from operators.dedup.components import resolve
from operators.dedup.join import join_records
from operators.dedup.keys import document_keys, document_shingles, split
from operators.dedup.options import DedupOptions
from operators.dedup.reference import sign_with_datasketch

NONE = np.empty(0, np.uint64)


@pytest.fixture(scope="module")
def labelled(data_pack: Path) -> near_dup.Labelled:
    return near_dup.load(data_pack / "near_dup")


@pytest.fixture(scope="module")
def sets(labelled: near_dup.Labelled) -> tuple[np.ndarray, np.ndarray]:
    """The shingle sets of all documents by the definition of the labels."""
    options = DedupOptions(normalisation="plain", digits="keep", language_column="lang")
    return document_shingles(labelled.documents, options)


def assert_on_the_curve(curves: near_dup.Curves, errors: float) -> None:
    for shape, languages in curves.items():
        for language, bins in languages.items():
            assert len(bins) == 10
            for each in bins:
                assert abs(each.deviation) <= errors, (shape, language, each)


def test_pairs_meet_as_often_as_bands_and_rows_promise(labelled: near_dup.Labelled) -> None:
    assert_on_the_curve(near_dup.curves(labelled, 3, [(14, 8)]), errors=4)


@pytest.mark.slow
def test_the_mean_of_twenty_seeds_lies_on_the_theoretical_curve(labelled: near_dup.Labelled) -> None:
    assert_on_the_curve(near_dup.curves(labelled, 20), errors=3)


def test_a_wrong_shape_is_off_the_curve(labelled: near_dup.Labelled) -> None:
    (hashes,) = near_dup.bands_of(labelled, 1, [(14, 8)])
    met = (hashes[labelled.a] == hashes[labelled.b]).any(axis=1).astype(float)
    bins = near_dup.s_curve(labelled, met, 1, (20, 5), "zh")  # what would be expected of other bands
    assert max(abs(each.deviation) for each in bins) > 10


def test_plain_shingle_sets_are_those_of_the_labels(labelled: near_dup.Labelled, sets: tuple[np.ndarray, np.ndarray]) -> None:
    hashes, offsets = sets
    assert np.diff(offsets).tolist() == labelled.documents["n_shingles"].to_pylist()
    for pair in np.random.default_rng(1).choice(len(labelled.a), 300, replace=False).tolist():
        a, b = (hashes[offsets[row] : offsets[row + 1]] for row in (labelled.a[pair], labelled.b[pair]))
        shared = len(np.intersect1d(a, b, assume_unique=True))
        assert shared / (len(a) + len(b) - shared) == pytest.approx(labelled.jaccard[pair], abs=1e-12)


def test_folded_shingle_sets_are_close_to_them(labelled: near_dup.Labelled) -> None:
    sample = np.random.default_rng(1).choice(len(labelled.a), 300, replace=False)
    rows, places = np.unique(np.concatenate([labelled.a[sample], labelled.b[sample]]), return_inverse=True)
    hashes, offsets = document_shingles(labelled.documents.take(pa.array(rows)), DedupOptions(digits="keep"))
    ours = []
    for a, b in zip(places[:300].tolist(), places[300:].tolist(), strict=True):
        left, right = hashes[offsets[a] : offsets[a + 1]], hashes[offsets[b] : offsets[b + 1]]
        shared = len(np.intersect1d(left, right, assume_unique=True))
        ours.append(shared / (len(left) + len(right) - shared))
    assert np.abs(np.array(ours) - labelled.jaccard[sample]).mean() < 0.02


@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_verified_edges_are_all_true_and_no_true_pair_that_met_is_lost(
    labelled: near_dup.Labelled, sets: tuple[np.ndarray, np.ndarray], threshold: float
) -> None:
    (hashes,) = near_dup.bands_of(labelled, 5, [DedupOptions(threshold=threshold).shape])
    joined, checks = near_dup.join_verified(labelled, hashes, sets, threshold)
    assert (checks.wrong, checks.lost) == (0, 0)
    assert checks.confirmed > 2000
    assert checks.checked > checks.confirmed / 4
    truth = pc.fill_null(labelled.documents[f"cluster_{round(100 * threshold)}"], -1).to_numpy()
    for language in ("en", "zh"):
        chosen = pc.equal(labelled.documents["lang"], language).to_numpy(zero_copy_only=False)
        verified, loose = (near_dup.score(each, truth, chosen) for each in (joined, near_dup.join(hashes)[0]))
        assert verified["precision"] == 1.0
        assert verified["f1"] > 0.93
        assert loose["f1"] > 0.88


def test_texts_of_two_languages_or_below_every_similarity_do_not_meet(labelled: near_dup.Labelled) -> None:
    (hashes,) = near_dup.bands_of(labelled, 1, [(14, 8)])
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, len(hashes), (2, 200_000))
    listed = set(zip(labelled.a.tolist(), labelled.b.tolist(), strict=True))
    strangers = np.array(
        [x != y and (x, y) not in listed and (y, x) not in listed for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    )
    assert not (hashes[a] == hashes[b]).any(axis=1)[strangers].any()


def test_the_kept_set_is_that_of_datasketchs_own_lsh(labelled: near_dup.Labelled) -> None:
    texts = labelled.documents.slice(0, 500)
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
    assert len(ours.ordinals) > 50


def partitioned(records: np.ndarray, count: int) -> list[np.ndarray]:
    ordered, starts = split(records, count)
    return [ordered[starts[i] : starts[i + 1]] for i in range(count)]
