"""From shared buckets to clusters, and from clusters to the rows that go.

Each partition of the key space turns its buckets into pairs (member, smallest member) and contracts them to a forest;
the forests of all partitions meet in one min-root union-find over dense ranks of the ordinals that have a pair. The
root of a cluster is its smallest ordinal, so the result does not depend on order or partitioning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numba as nb
import numpy as np

EXACT, NEAR = 1, 2
_GATHERED_PAIRS = 1 << 24  # 256 MB


def bucket_pairs(keys: list[np.ndarray], ordinals: np.ndarray, base: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Join each bucket of equal keys to its smallest ordinal: (larger, smaller) uint64 arrays, sorted by bucket.

    `keys` are uint64 arrays, compared together. The number of pairs is members minus buckets. `base` as in `buckets`.
    """
    members, starts = buckets(keys, ordinals, base)
    smallest = np.repeat(members[starts[:-1]], np.diff(starts))
    other = members != smallest
    return members[other], smallest[other]


def buckets(keys: list[np.ndarray], ordinals: np.ndarray, base: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The buckets of at least two members: (ordinals sorted by bucket and number, starts int64[buckets + 1]).

    Ordinals below `base` are those of rows that are only compared with: a bucket of nothing else is left out.
    """
    order = np.lexsort([ordinals, *keys[::-1]])
    members = ordinals[order]
    change = np.ones(len(members), bool)
    change[1:] = np.logical_or.reduce([key[order][1:] != key[order][:-1] for key in keys]) if len(members) else False
    ends = np.append(np.flatnonzero(change), len(members))
    sizes = np.diff(ends)
    shared = (sizes >= 2) & (members[ends[1:] - 1] >= np.uint64(base))
    starts = np.zeros(int(shared.sum()) + 1, np.int64)
    np.cumsum(sizes[shared], out=starts[1:])
    return members[np.repeat(shared, sizes)], starts


def forest(larger: np.ndarray, smaller: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A few of the pairs that connect what all of them connect: at most two for each ordinal.

    Kept first is each ordinal's pair with its smallest partner (or, for one without a smaller partner, its smallest
    larger one), so that the partner named for a removed row does not depend on the partitioning; then any pair
    that joins two trees.
    """
    keep = forest_mask(larger, smaller)
    return larger[keep], smaller[keep]


def forest_mask(larger: np.ndarray, smaller: np.ndarray) -> np.ndarray:
    """bool[pairs]: which pairs `forest` keeps."""
    nodes, ranks = np.unique(np.concatenate([larger, smaller]), return_inverse=True)
    return _forest(ranks[: len(larger)], ranks[len(larger) :], len(nodes))


def gather_forest(pieces: Iterable[np.ndarray], most: int = _GATHERED_PAIRS) -> np.ndarray:
    """Pairs (larger, smaller) uint64[n, 2] from many pieces, contracted to a forest whenever `most` more have come.

    A pair that meets in many bands comes in many pieces; contracting on the way holds about one pair for each ordinal
    instead of six, and leaves the components and the smallest partner of each ordinal as they are.
    """
    kept, waiting, new = np.empty((0, 2), np.uint64), list[np.ndarray](), 0
    for piece in pieces:
        waiting.append(piece)
        new += len(piece)
        if new > max(most, len(kept)):  # as many new ones as kept ones, so that none is looked at too often
            pairs = np.concatenate([kept, *waiting])
            kept, waiting, new = np.column_stack(forest(pairs[:, 0], pairs[:, 1])), [], 0
    return np.concatenate([kept, *waiting])


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
    uint64[n]; `kind` uint8[n] is EXACT or NEAR; `similarity` float64[n] is that of the row and its match where it was
    verified, else NaN.
    """

    ordinals: np.ndarray
    kept: np.ndarray
    match: np.ndarray
    kind: np.ndarray
    similarity: np.ndarray
    cluster_sizes: dict[int, int]


def members_of(exact: tuple[np.ndarray, np.ndarray], near: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The sorted ordinals that occur in any pair: those for which a keep rule needs a score."""
    return np.unique(np.concatenate([*exact, *near]))


def resolve(
    exact: tuple[np.ndarray, np.ndarray],
    near: tuple[np.ndarray, np.ndarray],
    scores: np.ndarray | None = None,
    protected: np.ndarray | None = None,
    similarity: np.ndarray | None = None,
) -> Removals:
    """Decide which members go. Exact duplicates go first; the others of each group compete within their component.

    `exact` and `near` are (larger, smaller) pairs. The following have one row for each of `members_of(exact, near)`:
    `scores` float64[n] or [n, k], compared column by column: the highest stays, ties (and no scores) by the smallest ordinal;
    `protected` bool[n]: rows that never go and before which all others of their component do. `similarity` float64 of
    the near pairs, where they were verified: a pair of 1 has equal shingle sets, and joins the smallest ordinal that has it.
    """
    nodes = members_of(exact, near)
    kept_anyway = np.zeros(len(nodes), bool) if protected is None else protected
    ranking = np.column_stack([kept_anyway.astype(float)] if scores is None else [kept_anyway, scores])
    groups, components = np.arange(len(nodes)), np.arange(len(nodes))
    high, low = (np.searchsorted(nodes, near[side]) for side in (0, 1))
    if len(exact[0]):
        exact_high, exact_low = (np.searchsorted(nodes, exact[side]) for side in (0, 1))
        groups = _roots(exact_high, exact_low, len(nodes))
        components = _roots(np.concatenate([exact_high, high]), np.concatenate([exact_low, low]), len(nodes))
    elif len(nodes):
        components = _roots(high, low, len(nodes))
    best_of_group, survivor = _best(groups, ranking), _best(components, ranking)
    index = np.arange(len(nodes))
    twin = (best_of_group != index) & ~kept_anyway
    gone = twin | ((survivor != index) & ~kept_anyway)
    if similarity is None:
        partner, alike = _partners(high, low, len(nodes)), np.full(len(nodes), np.nan)
        pointless = (partner < 0) | (groups[partner] == groups) | (partner == index)
        partner = np.where(pointless, survivor, partner)
    else:
        partner, alike = _verified_partners(high, low, similarity, groups, survivor)
    match = np.where(twin, best_of_group, partner)
    sizes, counts = np.unique(np.bincount(components[~twin], minlength=len(nodes)), return_counts=True)
    clusters = {int(size): int(count) for size, count in zip(sizes, counts, strict=True) if size >= 2}
    kind = np.where(twin, EXACT, NEAR).astype(np.uint8)
    alike = np.where(twin, 1.0, alike)
    return Removals(nodes[gone], nodes[survivor[gone]], nodes[match[gone]], kind[gone], alike[gone], clusters)


def _best(roots: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """For each node the index of the highest ranking (column by column) in its tree, ties by the smallest index."""
    order = np.lexsort([np.arange(len(roots)), *(-ranking[:, ::-1].T), roots])
    first = np.ones(len(roots), bool)
    first[1:] = roots[order][1:] != roots[order][:-1]
    best = np.empty(len(roots), np.int64)
    best[order] = order[np.flatnonzero(first)][np.cumsum(first) - 1] if len(roots) else 0
    return best


def _verified_partners(
    high: np.ndarray, low: np.ndarray, similarity: np.ndarray, groups: np.ndarray, survivor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(partner, similarity) of each node, a verified pair wherever there is one.

    That is the smallest node with an equal shingle set, or what that one was confirmed with. Exact copies of the node
    itself are no answer; a node without any other pair names the survivor, of which nothing was measured unless they share
    a shingle set.
    """
    index, same = np.arange(len(groups)), similarity == 1.0
    classes = _roots(high[same], low[same], len(groups)) if same.any() else index
    pair = _partner_pairs(high[~same], low[~same], len(groups))
    has_pair = pair >= 0
    partner, alike = survivor.copy(), np.where(classes[survivor] == classes, 1.0, np.nan)
    if has_pair.any():
        chosen = pair[classes]
        found = chosen >= 0
        other = np.where(high[~same][chosen] == classes, low[~same][chosen], high[~same][chosen])
        partner, alike = np.where(found, other, partner), np.where(found, similarity[~same][chosen], alike)
    twinned = (classes != index) & (groups[classes] != groups)
    return np.where(twinned, classes, partner), np.where(twinned, 1.0, alike)


@nb.njit(cache=True, nogil=True)
def _partner_pairs(larger: np.ndarray, smaller: np.ndarray, nodes: int) -> np.ndarray:
    """The pair of each node with its smallest smaller partner, else with its smallest larger one, else -1."""
    below, above = np.full(nodes, -1, np.int64), np.full(nodes, -1, np.int64)
    for pair in range(len(larger)):
        high, low = larger[pair], smaller[pair]
        if below[high] < 0 or low < smaller[below[high]]:
            below[high] = pair
        if above[low] < 0 or high < larger[above[low]]:
            above[low] = pair
    for node in range(nodes):
        if below[node] < 0:
            below[node] = above[node]
    return below


def _partners(larger: np.ndarray, smaller: np.ndarray, nodes: int) -> np.ndarray:
    """The smallest smaller partner of each node, else its smallest larger one, else -1."""
    pair = _partner_pairs(larger, smaller, nodes)
    if not len(larger):
        return pair
    other = np.where(larger[pair] == np.arange(nodes), smaller[pair], larger[pair])
    return np.where(pair < 0, -1, other)
