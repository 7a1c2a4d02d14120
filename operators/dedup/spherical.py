"""Spherical k-means (Dhillon, Modha 2001) on a sample, and the duplicates inside one cluster (SemDeDup)."""

from __future__ import annotations

import numpy as np

_BLOCK = 2048


def train_centroids(vectors: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    """float32[clusters, d] unit vectors for unit vectors float[n, d]; fewer where n is smaller.

    Starts from rows drawn by `seed`; an empty cluster restarts at the row that fits its own worst. Ends when no row moves.
    """
    points = vectors.astype(np.float32)
    clusters = min(clusters, len(points))
    if clusters == 0:
        return np.zeros((0, vectors.shape[1]), np.float32)
    centroids = points[np.sort(np.random.default_rng(seed).choice(len(points), clusters, replace=False))]
    labels = np.full(len(points), -1)
    for _ in range(iterations):
        found, similarity = assign(points, centroids)
        if (found == labels).all():
            break
        labels = found
        order = np.argsort(labels, kind="stable")
        filled, first = np.unique(labels[order], return_index=True)
        sums = np.add.reduceat(points[order], first, axis=0, dtype=np.float64)
        centroids = centroids.copy()
        centroids[filled] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        empty = np.setdiff1d(np.arange(clusters), filled)
        centroids[empty] = points[np.argsort(similarity, kind="stable")[: len(empty)]]
    return centroids


def assign(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cluster int64[n], cosine to its centroid float64[n], rounded to 4 decimals): the nearest, of equal ones the first."""
    labels, similarity = np.zeros(len(vectors), np.int64), np.zeros(len(vectors))
    for begin in range(0, len(vectors), _BLOCK):
        cosine = vectors[begin : begin + _BLOCK].astype(np.float32) @ centroids.T
        labels[begin : begin + _BLOCK] = best = cosine.argmax(axis=1)
        similarity[begin : begin + _BLOCK] = cosine[np.arange(len(best)), best]
    return labels, np.round(similarity, 4)


def duplicates(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, its match, the row that stays, cosine) of the rows of one cluster that go. Rows are in order of precedence.

    SemDeDup's rule (Abbas et al. 2023, arXiv:2303.09540, section 3): a row goes if its greatest cosine to a row before
    it, whether that one stays or not, reaches the threshold. Cosines are rounded to 4 decimals; of equal ones the first
    row is the match. The row that stays is found by following the matches. Memory: two blocks of 2,048 rows.
    """
    greatest, match = np.full(len(vectors), -2.0), np.full(len(vectors), -1, np.int64)
    for begin in range(0, len(vectors), _BLOCK):
        rows = vectors[begin : begin + _BLOCK].astype(np.float32)
        for other in range(0, begin + 1, _BLOCK):
            cosine = np.round((rows @ vectors[other : other + _BLOCK].astype(np.float32).T).astype(np.float64), 4)
            if other == begin:
                cosine[np.triu_indices(len(rows))] = -2.0
            best = cosine.argmax(axis=1)
            value = cosine[np.arange(len(rows)), best]
            better = value > greatest[begin : begin + _BLOCK]
            greatest[begin : begin + _BLOCK][better] = value[better]
            match[begin : begin + _BLOCK][better] = best[better] + other
    gone = np.flatnonzero(greatest >= threshold)
    stays = np.arange(len(vectors))
    for row in gone.tolist():  # matches lie before their rows, so theirs are known
        stays[row] = stays[match[row]]
    return gone, match[gone], stays[gone], greatest[gone]
