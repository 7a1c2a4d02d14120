"""Bands of rows: which documents share a bucket. A signature of b x r values is cut into b bands of r; equal bands collide.

Two documents of Jaccard similarity s share at least one bucket with probability 1 - (1 - s^r)^b (Leskovec, Rajaraman,
Ullman, Mining of Massive Datasets, 3.4).
"""

from __future__ import annotations

import functools

import numba as nb
import numpy as np


@functools.cache
def optimal_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows) with the least sum of false positives and false negatives: datasketch's integral, weights 1/2 each."""
    import datasketch  # brings scipy: seconds that a worker, which is told the shape, need not spend

    index = datasketch.MinHashLSH(threshold=threshold, num_perm=permutations)
    return int(index.b), int(index.r)


def collision_probability(similarity: float | np.ndarray, bands: int, rows: int) -> float | np.ndarray:
    """Probability that two documents of this Jaccard similarity share a bucket."""
    return 1 - (1 - similarity**rows) ** bands


@nb.njit(cache=True, nogil=True)
def band_hashes(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64[documents, bands] from uint32[documents, permutations]; the band's number seeds its hash.

    The seed keeps the buckets of different bands apart in one key space: of 1.4e10 keys (1e9 documents, 14 bands)
    about 5 pairs meet by chance.
    """
    out = np.empty((len(signatures), bands), np.uint64)
    for document in range(len(signatures)):
        for band in range(bands):
            h = np.uint64(band + 1) * np.uint64(0x9E3779B97F4A7C15)
            for i in range(band * rows, band * rows + rows):
                h = (h ^ np.uint64(signatures[document, i])) * np.uint64(0x87C37B91114253D5)
                h ^= h >> np.uint64(31)
            h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
            h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
            out[document, band] = h ^ (h >> np.uint64(33))
    return out


def sketch(signatures: np.ndarray) -> np.ndarray:
    """uint8[documents, permutations]: the lowest byte of each value, enough to estimate similarity later.

    Li, König, b-Bit Minwise Hashing, 2010, with b = 8: a quarter of the signature's bytes for 2% more variance at .8.
    """
    return (signatures & np.uint32(0xFF)).astype(np.uint8)


def estimate_similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64[pairs] Jaccard estimates from two sketches uint8[pairs, permutations], chance agreement (1/256) taken out."""
    equal = (left == right).mean(axis=1)
    return np.clip((equal - 1 / 256) / (1 - 1 / 256), 0.0, 1.0)
