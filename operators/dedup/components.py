"""From shared buckets to clusters, and from clusters to the rows that go.

Each partition of the key space turns its buckets into pairs (member, smallest member) and contracts them to a forest;
the forests of all partitions meet in one min-root union-find over dense ranks of the ordinals that have a pair. The
root of a cluster is its smallest ordinal, so the result does not depend on order or partitioning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba as nb
import numpy as np

EXACT, NEAR = 1, 2
_NONE = np.iinfo(np.int64).max


def bucket_pairs(keys: list[np.ndarray], ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join each bucket of equal keys to its smallest ordinal: (larger, smaller) uint64 arrays, sorted by bucket.

    `keys` are uint64 arrays, compared together. The number of pairs is members minus buckets.
    """
    members, starts = buckets(keys, ordinals)
    smallest = np.repeat(members[starts[:-1]], np.diff(starts))
    other = members != smallest
    return members[other], smallest[other]


def buckets(keys: list[np.ndarray], ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of at least two members: (ordinals sorted by bucket and number, starts int64[buckets + 1])."""
    order = np.lexsort([ordinals, *keys[::-1]])
    members = ordinals[order]
    change = np.ones(len(members), bool)
    change[1:] = np.logical_or.reduce([key[order][1:] != key[order][:-1] for key in keys]) if len(members) else False
    sizes = np.diff(np.append(np.flatnonzero(change), len(members)))
    shared = sizes >= 2
    starts = np.zeros(int(shared.sum()) + 1, np.int64)
    np.cumsum(sizes[shared], out=starts[1:])
    return members[np.repeat(shared, sizes)], starts


def forest(larger: np.ndarray, smaller: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A few of the pairs that connect what all of them connect: at most two for each ordinal.

    Kept first is each ordinal's pair with its smallest partner (or, for one without a smaller partner, its smallest
    larger one), so that the partner named for a removed row does not depend on the partitioning; then any pair
    that joins two trees.
    """
    nodes, ranks = np.unique(np.concatenate([larger, smaller]), return_inverse=True)
    keep = _forest(ranks[: len(larger)], ranks[len(larger) :], len(nodes))
    return larger[keep], smaller[keep]


@nb.njit(cache=True, nogil=True)
def _find(parents: np.ndarray, node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@nb.njit(cache=True, nogil=True)
def _unite(parents: np.ndarray, left: int, right: int) -> bool:
    """Join two trees under the smaller root; False if they were one already."""
    left, right = _find(parents, left), _find(parents, right)
    if left == right:
        return False
    parents[max(left, right)] = min(left, right)
    return True


@nb.njit(cache=True, nogil=True)
def _forest(larger: np.ndarray, smaller: np.ndarray, nodes: int) -> np.ndarray:
    below = np.full(nodes, -1, np.int64)  # the pair with the smallest partner that is smaller
    above = np.full(nodes, -1, np.int64)
    for pair in range(len(larger)):
        high, low = larger[pair], smaller[pair]
        if below[high] < 0 or low < smaller[below[high]]:
            below[high] = pair
        if above[low] < 0 or high < larger[above[low]]:
            above[low] = pair
    keep = np.zeros(len(larger), np.bool_)
    parents = np.arange(nodes)
    for node in range(nodes):
        pair = below[node] if below[node] >= 0 else above[node]
        keep[pair] = True
        _unite(parents, larger[pair], smaller[pair])
    for pair in range(len(larger)):
        if not keep[pair] and _unite(parents, larger[pair], smaller[pair]):
            keep[pair] = True
    return keep


def connected_components(larger: np.ndarray, smaller: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nodes sorted, root of each): every ordinal that has a pair, and the smallest ordinal of its component."""
    nodes, ranks = np.unique(np.concatenate([larger, smaller]), return_inverse=True)
    return nodes, nodes[_roots(ranks[: len(larger)], ranks[len(larger) :], len(nodes))]


@nb.njit(cache=True, nogil=True)
def _roots(larger: np.ndarray, smaller: np.ndarray, nodes: int) -> np.ndarray:
    parents = np.arange(nodes)
    for pair in range(len(larger)):
        _unite(parents, larger[pair], smaller[pair])
    for node in range(nodes):
        parents[node] = _find(parents, node)
    return parents


@dataclass(frozen=True)
class Removals:
    """The rows to remove, sorted by ordinal, and the sizes of the near-duplicate clusters (after exact removal).

    `ordinals`, `kept` (the survivor of the cluster), `match` (the partner it shares its text or a bucket with) are
    uint64[n]; `kind` uint8[n] is EXACT or NEAR.
    """

    ordinals: np.ndarray
    kept: np.ndarray
    match: np.ndarray
    kind: np.ndarray
    cluster_sizes: dict[int, int]


def members_of(exact: tuple[np.ndarray, np.ndarray], near: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The sorted ordinals that occur in any pair: those for which a keep rule needs a score."""
    return np.unique(np.concatenate([*exact, *near]))


def resolve(
    exact: tuple[np.ndarray, np.ndarray], near: tuple[np.ndarray, np.ndarray], scores: np.ndarray | None = None
) -> Removals:
    """Decide which members go. Exact duplicates go first; the others of each group compete within their component.

    `exact` and `near` are (larger, smaller) pairs. `scores` float64, one for each of `members_of(exact, near)`: the highest
    stays, ties by the smallest ordinal; without scores the smallest ordinal stays.
    """
    nodes = members_of(exact, near)
    if scores is None:
        scores = np.zeros(len(nodes))
    groups, components = np.arange(len(nodes)), np.arange(len(nodes))
    if len(exact[0]):
        groups = _roots(np.searchsorted(nodes, exact[0]), np.searchsorted(nodes, exact[1]), len(nodes))
    if len(nodes):
        high, low = (np.searchsorted(nodes, np.concatenate([exact[side], near[side]])) for side in (0, 1))
        components = _roots(high, low, len(nodes))
    best_of_group, survivor = _best(groups, scores), _best(components, scores)
    index = np.arange(len(nodes))
    twin = best_of_group != index
    gone = twin | (survivor != index)
    partner = _partners(np.searchsorted(nodes, near[0]), np.searchsorted(nodes, near[1]), len(nodes))
    pointless = (partner < 0) | (groups[partner] == groups) | (partner == index)
    match = np.where(twin, best_of_group, np.where(pointless, survivor, partner))
    sizes, counts = np.unique(np.bincount(components[~twin], minlength=len(nodes)), return_counts=True)
    clusters = {int(size): int(count) for size, count in zip(sizes, counts, strict=True) if size >= 2}
    kind = np.where(twin, EXACT, NEAR).astype(np.uint8)
    return Removals(nodes[gone], nodes[survivor[gone]], nodes[match[gone]], kind[gone], clusters)


def _best(roots: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """For each node the index of the highest score in its tree, ties by the smallest index."""
    order = np.lexsort([np.arange(len(roots)), -scores, roots])
    first = np.ones(len(roots), bool)
    first[1:] = roots[order][1:] != roots[order][:-1]
    best = np.empty(len(roots), np.int64)
    best[order] = order[np.flatnonzero(first)][np.cumsum(first) - 1] if len(roots) else 0
    return best


@nb.njit(cache=True, nogil=True)
def _partners(larger: np.ndarray, smaller: np.ndarray, nodes: int) -> np.ndarray:
    """The smallest smaller partner of each node, else its smallest larger one, else -1."""
    below, above = np.full(nodes, _NONE), np.full(nodes, _NONE)
    for pair in range(len(larger)):
        below[larger[pair]] = min(below[larger[pair]], smaller[pair])
        above[smaller[pair]] = min(above[smaller[pair]], larger[pair])
    for node in range(nodes):
        if below[node] == _NONE:
            below[node] = above[node] if above[node] != _NONE else -1
    return below
