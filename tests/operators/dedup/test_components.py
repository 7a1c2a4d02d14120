"""Buckets, forests, components and who stays."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.dedup.components import (
    EXACT,
    NEAR,
    bucket_pairs,
    buckets,
    connected_components,
    forest,
    forest_mask,
    gather_forest,
    members_of,
    resolve,
)

Pairs = list[tuple[int, int]]


def arrays(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    table = np.array([(max(pair), min(pair)) for pair in pairs], np.uint64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def naive_roots(pairs: Pairs) -> dict[int, int]:
    root = {node: node for pair in pairs for node in pair}
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            least = min(root[a], root[b])
            changed |= root[a] != least or root[b] != least
            root[a] = root[b] = least
    return root


pair_lists = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda pair: pair[0] != pair[1]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(pair_lists)
def test_components_are_those_of_the_naive_search(pairs: Pairs) -> None:
    nodes, roots = connected_components(*arrays(pairs))
    assert dict(zip(nodes.tolist(), roots.tolist(), strict=True)) == naive_roots(pairs)


@settings(max_examples=200, deadline=None)
@given(pair_lists, st.integers(1, 8), st.integers(0, 12))
def test_pairs_contracted_as_they_come_decide_as_all_of_them_at_once(pairs: Pairs, pieces: int, most: int) -> None:
    table, none = np.column_stack(arrays(pairs)), (np.empty(0, np.uint64), np.empty(0, np.uint64))
    gathered = gather_forest(np.array_split(table, pieces), most)
    assert len(gathered) <= len(table)
    whole, contracted = resolve(none, (table[:, 0], table[:, 1])), resolve(none, (gathered[:, 0], gathered[:, 1]))
    for name in ("ordinals", "kept", "match", "kind"):
        assert (getattr(whole, name) == getattr(contracted, name)).all()
    assert whole.cluster_sizes == contracted.cluster_sizes


@settings(max_examples=200, deadline=None)
@given(pair_lists)
def test_a_forest_connects_the_same_with_few_pairs(pairs: Pairs) -> None:
    larger, smaller = forest(*arrays(pairs))
    kept = list(zip(larger.tolist(), smaller.tolist(), strict=True))
    assert naive_roots(kept) == naive_roots(pairs)
    assert set(kept) <= {(max(pair), min(pair)) for pair in pairs}
    assert len(kept) <= 2 * len(naive_roots(pairs))


@settings(max_examples=100, deadline=None)
@given(pair_lists, pair_lists, st.integers(1, 5), st.lists(st.integers(0, 3), min_size=41, max_size=41))
def test_the_outcome_does_not_depend_on_the_partitioning(exact: Pairs, near: Pairs, pieces: int, scores: list[int]) -> None:
    def outcome(count: int) -> list[object]:
        parts = [[forest(*arrays(pairs[i::count])) for i in range(count)] for pairs in (exact, near)]
        both = [tuple(np.concatenate([piece[side] for piece in part]) for side in (0, 1)) for part in parts]
        members = members_of(both[0], both[1])
        found = resolve(both[0], both[1], np.array(scores, float)[members.astype(int)])
        return [found.ordinals.tolist(), found.kept.tolist(), found.match.tolist(), found.kind.tolist(), found.cluster_sizes]

    assert outcome(1) == outcome(pieces)


@settings(max_examples=100, deadline=None)
@given(pair_lists, pair_lists)
def test_one_row_of_each_component_stays_and_it_is_the_smallest(exact: Pairs, near: Pairs) -> None:
    found, roots = resolve(arrays(exact), arrays(near)), naive_roots(exact + near)
    assert found.ordinals.tolist() == sorted(node for node, root in roots.items() if node != root)
    assert found.kept.tolist() == [roots[node] for node in found.ordinals.tolist()]
    groups = naive_roots(exact)
    twins = [node for node in found.ordinals.tolist() if groups.get(node, node) != node]
    assert found.ordinals[found.kind == EXACT].tolist() == twins
    assert sum((size - 1) * count for size, count in found.cluster_sizes.items()) == int((found.kind == NEAR).sum())


@settings(max_examples=100, deadline=None)
@given(pair_lists, pair_lists, st.sets(st.integers(0, 40)))
def test_protected_rows_never_go_and_take_all_others_of_their_component_with_them(
    exact: Pairs, near: Pairs, protected: set[int]
) -> None:
    members = members_of(arrays(exact), arrays(near))
    mask = np.array([int(member) in protected for member in members], bool)
    found, roots = resolve(arrays(exact), arrays(near), protected=mask), naive_roots(exact + near)
    strong = {root for node, root in roots.items() if node in protected}
    expected = {n for n, root in roots.items() if n not in protected and (root in strong or n != root)}
    assert set(found.ordinals.tolist()) == expected
    for row, kept in zip(found.ordinals.tolist(), found.kept.tolist(), strict=True):
        assert roots[kept] == roots[row]
        assert (kept in protected) == (roots[row] in strong)


@settings(max_examples=150, deadline=None)
@given(pair_lists, pair_lists, st.integers(1, 5), st.lists(st.integers(0, 3), min_size=42, max_size=42))
def test_a_verified_match_is_a_pair_that_was_confirmed_whatever_the_partitioning(
    exact: Pairs, near: Pairs, pieces: int, scores: list[int]
) -> None:
    shape = {node: node // 2 for node in range(42)}  # neighbours have equal shingle sets, and so do exact copies
    twins = [pair for pair in exact if shape[pair[0]] == shape[pair[1]]]
    confirmed = {(2 * max(shape[a], shape[b]), 2 * min(shape[a], shape[b])) for a, b in near if shape[a] != shape[b]}
    same = sorted({(2 * shape[node] + 1, 2 * shape[node]) for pair in near + twins for node in pair})

    def alike(a: int, b: int) -> float:
        return 1.0 if shape[a] == shape[b] else 0.5 + (31 * min(shape[a], shape[b]) + max(shape[a], shape[b])) / 10_000

    def outcome(count: int) -> list[list[Any]]:
        kept: list[Pairs] = []
        for piece in range(count):
            high, low = arrays(sorted(confirmed)[piece::count])
            mask = forest_mask(high, low)
            kept.append([*zip(high[mask].tolist(), low[mask].tolist(), strict=True), *same])
        pairs = [pair for piece in kept for pair in piece]
        members = members_of(arrays(twins), arrays(pairs))
        similarity = np.array([alike(*pair) for pair in pairs])
        found = resolve(arrays(twins), arrays(pairs), np.array(scores, float)[members.astype(int)], similarity=similarity)
        return [each.tolist() for each in (found.ordinals, found.kept, found.match, found.kind, found.similarity)]

    whole = outcome(1)
    assert whole == outcome(pieces)
    for row, _, match, kind, similarity in zip(*whole, strict=True):
        assert similarity == alike(row, match)
        high, low = 2 * max(shape[row], shape[match]), 2 * min(shape[row], shape[match])
        assert kind == EXACT or high == low or (high, low) in confirmed


def test_the_best_of_a_cluster_stays_and_ties_go_to_the_first() -> None:
    exact, near = arrays([(1, 2), (5, 6)]), arrays([(2, 3), (3, 4)])
    found = resolve(exact, near, np.array([1.0, 1.0, 3.0, 3.0, 2.0, 2.0]))
    assert found.ordinals.tolist() == [1, 2, 4, 6]
    assert found.kept.tolist() == [3, 3, 3, 5]
    assert found.kind.tolist() == [NEAR, EXACT, NEAR, EXACT]
    assert found.match.tolist() == [3, 1, 3, 5]
    assert found.cluster_sizes == {3: 1}


def test_buckets_of_one_are_left_out() -> None:
    keys = np.array([7, 1, 7, 3, 1, 7], np.uint64)
    members, starts = buckets([keys], np.array([5, 2, 0, 9, 8, 3], np.uint64))
    assert members.tolist() == [2, 8, 0, 3, 5]
    assert starts.tolist() == [0, 2, 5]
    larger, smaller = bucket_pairs([keys], np.array([5, 2, 0, 9, 8, 3], np.uint64))
    assert list(zip(larger.tolist(), smaller.tolist(), strict=True)) == [(8, 2), (3, 0), (5, 0)]


def test_nothing_in_nothing_out() -> None:
    none = np.empty(0, np.uint64)
    assert buckets([none], none)[1].tolist() == [0]
    assert resolve((none, none), (none, none)).ordinals.tolist() == []
