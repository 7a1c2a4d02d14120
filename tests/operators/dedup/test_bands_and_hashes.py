"""Bands, content hashes, sketches and verified pairs."""

from __future__ import annotations

import hashlib
import itertools

import datasketch
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.config import SettingsError, parse
from operators.dedup.bands import band_hashes, collision_probability, estimate_similarity, optimal_bands, sketch
from operators.dedup.components import buckets
from operators.dedup.exact import content_hashes
from operators.dedup.join import join_records
from operators.dedup.options import DedupOptions
from operators.dedup.sha1 import sha1_prefix32
from operators.dedup.verify import candidate_pairs, confirm, fingerprints, unique_pairs


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_bands_and_rows_are_datasketchs_choice(threshold: float) -> None:
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=112)
    assert optimal_bands(threshold, 112) == (index.b, index.r)


def test_the_collision_probabilities_of_the_known_shapes() -> None:
    assert [round(float(collision_probability(s, 14, 8)), 2) for s in (0.7, 0.8, 0.9)] == [0.56, 0.92, 1.0]
    assert [round(float(collision_probability(s, 20, 13)), 2) for s in (0.7, 0.8)] == [0.18, 0.68]


def test_equal_bands_collide_and_nothing_else() -> None:
    signatures = np.random.default_rng(0).integers(0, 2**32, (200, 112), dtype=np.uint32)
    signatures[7, 8:16] = signatures[3, 8:16]
    signatures[9, 0:8] = signatures[3, 8:16]  # the same values in another band
    hashes = band_hashes(signatures, 14, 8)
    assert hashes[7, 1] == hashes[3, 1]
    assert len(np.unique(hashes)) == hashes.size - 1


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=200))
def test_sha1_is_sha1(data: bytes) -> None:
    padded = np.frombuffer(b"ab" + data + b"c", np.uint8)
    assert int(sha1_prefix32(padded, 2, 2 + len(data))) == int.from_bytes(hashlib.sha1(data).digest()[:4], "little")


def test_murmur_has_its_published_values() -> None:
    hashes = content_hashes(pa.array(["foo", "", "The quick brown fox jumps over the lazy dog"]))
    assert hashes.astype(np.int64)[:2].tolist() == [[-2129773440516405919, 9128664383759220103], [0, 0]]
    assert [f"{value:016x}" for value in hashes[2].tolist()] == ["e34bbc7bbc071b6c", "7a433ca9c49a9347"]


def test_normalised_hashes_see_through_case_and_punctuation_but_not_through_words() -> None:
    texts = ["Foo, Bar 12", "foo bár! 345", "foobar 1", "foo bar baz", "你好，世界", "你好世界！", "", "?!", "!?", "?!"]
    hashes = [tuple(row) for row in content_hashes(pa.array(texts), normalised=True).tolist()]
    assert hashes[0] == hashes[1]
    assert hashes[4] == hashes[5]
    assert hashes[7] == hashes[9]
    assert len(set(hashes)) == len(texts) - 3


def test_a_sketch_of_bytes_estimates_like_the_signature() -> None:
    generator = np.random.default_rng(1)
    left = generator.integers(0, 2**32, (1, 4096), dtype=np.uint32)
    right = np.where(generator.random((1, 4096)) < 0.7, left, generator.integers(0, 2**32, (1, 4096), dtype=np.uint32))
    exact = float((left == right).mean())
    assert abs(float(estimate_similarity(sketch(left), sketch(right))[0]) - exact) < 0.01
    assert estimate_similarity(sketch(left), sketch(left)).tolist() == [1.0]


SETS = {1: [1, 2, 3, 4], 2: [1, 2, 3, 4], 5: [1, 2, 3, 9], 8: [7], 9: []}


def load(ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = [SETS[int(ordinal)] for ordinal in ordinals]
    return np.array(list(itertools.chain(*chosen)), np.uint64), np.cumsum([0, *map(len, chosen)])


def prints(members: np.ndarray) -> np.ndarray:
    return np.array([hash(tuple(SETS[int(member)])) & (1 << 63) - 1 for member in members], np.uint64)


def test_equal_sets_are_joined_and_the_other_pairs_listed_once_and_confirmed() -> None:
    members, starts = np.array([1, 2, 5, 8, 9, 1, 5], np.uint64), np.array([0, 5, 7])
    listed = candidate_pairs(members, starts, prints(members), 100)
    assert listed.same.tolist() == [[2, 1]]
    assert listed.pairs.tolist() == [[5, 1], [8, 1], [8, 5], [9, 1], [9, 5], [9, 8]]
    pairs, similarity = confirm(listed.pairs, 0.6, load)
    assert pairs.tolist() == [[5, 1]]
    assert similarity.tolist() == [0.6]
    assert len(confirm(listed.pairs, 0.61, load)[0]) == 0


def test_the_cap_leaves_no_member_unchecked_with_the_first_and_counts_the_rest() -> None:
    members, starts = np.array([1, 2, 5, 8, 9, 1, 5], np.uint64), np.array([0, 5, 7])
    listed = candidate_pairs(members, starts, prints(members), 1)
    assert listed.pairs.tolist() == [[5, 1], [8, 1], [9, 1]]
    assert listed.unchecked == 3
    known = candidate_pairs(members, starts, prints(members), 100, base=8)
    assert known.pairs.tolist() == [[8, 1], [8, 5], [9, 1], [9, 5], [9, 8]]
    assert known.same.tolist() == []


def test_buckets_of_a_hundred_thousand_copies_stay_linear() -> None:
    count = 300_000
    records = np.column_stack([np.full(count, 7, np.uint64), np.arange(count, dtype=np.uint64)[::-1]])
    joined = join_records(records)
    assert joined.edges == len(joined.larger) == count - 1
    members, starts = buckets([records[:, 0]], records[:, 1])
    listed = candidate_pairs(members, starts, np.full(count, 5, np.uint64), 10)
    assert (len(listed.pairs), len(listed.same), listed.unchecked) == (0, count - 1, 0)
    different = candidate_pairs(members, starts, np.arange(count, dtype=np.uint64), 10)
    assert len(different.pairs) == count - 1
    assert different.unchecked == count * (count - 1) // 2 - (count - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=6, unique=True), max_size=8), st.integers(0, 8))
def test_listed_pairs_are_those_of_the_naive_search(rows: list[list[int]], base: int) -> None:
    rows = [sorted(row) for row in rows if max(row) >= base]
    members = np.array(list(itertools.chain(*rows)), np.uint64)
    starts = np.cumsum([0, *map(len, rows)])
    kinds = members // np.uint64(3)  # three neighbours have one shingle set
    listed = candidate_pairs(members, starts, kinds, 1000, base)
    expected, same = set(), set()
    for row in rows:
        leaders = {value // 3: value for value in reversed(row)}
        same |= {(value, leaders[value // 3]) for value in row if value != leaders[value // 3] and value >= base}
        pairs = itertools.combinations(sorted(leaders.values()), 2)
        expected |= {(high, low) for low, high in pairs if high >= base}
    assert listed.pairs.tolist() == sorted(map(list, expected))
    assert listed.same.tolist() == sorted(map(list, same))


def test_fingerprints_tell_sets_apart() -> None:
    hashes, offsets = load(np.array([1, 2, 5, 8, 9], np.uint64))
    found = fingerprints(hashes, offsets).tolist()
    assert found[0] == found[1]
    assert len(set(found)) == 4
    assert unique_pairs(np.array([[3, 1], [2, 1], [3, 1]], np.uint64)).tolist() == [[2, 1], [3, 1]]


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SettingsError, match="together"):
        parse(DedupOptions, {"bands": 14}, "clean")
    with pytest.raises(SettingsError, match="exceeds permutations"):
        parse(DedupOptions, {"bands": 20, "rows": 13}, "clean")
    with pytest.raises(SettingsError, match="no method"):
        parse(DedupOptions, {"method": []}, "clean")
    with pytest.raises(SettingsError, match="did you mean 'threshold'"):
        parse(DedupOptions, {"treshold": 0.7}, "clean")
