"""Texts as code points, for kernels that look at neighbours: decoding and encoding of whole columns."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def decode(data, offsets):  # type: ignore[no-untyped-def]
    """(points int32, offsets int64[rows + 1]) of a column of UTF-8 texts."""
    rows = len(offsets) - 1
    bounds = np.zeros(rows + 1, np.int64)
    for row in range(rows):
        count = 0
        for i in range(offsets[row], offsets[row + 1]):
            count += (data[i] & 0xC0) != 0x80
        bounds[row + 1] = bounds[row] + count
    points = np.empty(bounds[-1], np.int32)
    at = 0
    i = offsets[0]
    while i < offsets[-1]:
        first = np.int32(data[i])
        if first < 0x80:
            points[at] = first
            i += 1
        elif first < 0xE0:
            points[at] = (first & 0x1F) << 6 | (np.int32(data[i + 1]) & 0x3F)
            i += 2
        elif first < 0xF0:
            points[at] = (first & 0x0F) << 12 | (np.int32(data[i + 1]) & 0x3F) << 6 | (np.int32(data[i + 2]) & 0x3F)
            i += 3
        else:
            high = (first & 0x07) << 18 | (np.int32(data[i + 1]) & 0x3F) << 12
            points[at] = high | (np.int32(data[i + 2]) & 0x3F) << 6 | (np.int32(data[i + 3]) & 0x3F)
            i += 4
        at += 1
    return points, bounds


@numba.njit(cache=True, nogil=True)
def encode(points, bounds):  # type: ignore[no-untyped-def]
    """(data uint8, offsets int64[rows + 1]): the UTF-8 of texts given as code points."""
    rows = len(bounds) - 1
    offsets = np.zeros(rows + 1, np.int64)
    for row in range(rows):
        size = 0
        for i in range(bounds[row], bounds[row + 1]):
            point = points[i]
            size += 1 + (point >= 0x80) + (point >= 0x800) + (point >= 0x10000)
        offsets[row + 1] = offsets[row] + size
    data = np.empty(offsets[-1], np.uint8)
    at = 0
    for i in range(bounds[0], bounds[-1]):
        point = points[i]
        if point < 0x80:
            data[at] = point
            at += 1
        elif point < 0x800:
            data[at], data[at + 1] = 0xC0 | point >> 6, 0x80 | point & 0x3F
            at += 2
        elif point < 0x10000:
            data[at], data[at + 1], data[at + 2] = 0xE0 | point >> 12, 0x80 | point >> 6 & 0x3F, 0x80 | point & 0x3F
            at += 3
        else:
            data[at], data[at + 1] = 0xF0 | point >> 18, 0x80 | point >> 12 & 0x3F
            data[at + 2], data[at + 3] = 0x80 | point >> 6 & 0x3F, 0x80 | point & 0x3F
            at += 4
    return data, offsets
