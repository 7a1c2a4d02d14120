"""SHA-1 (FIPS 180-4) of short byte ranges as a kernel: what datasketch hashes a shingle with by default."""

from __future__ import annotations

import numba as nb
import numpy as np


@nb.njit(inline="always")
def _rotate(x: np.uint32, bits: int) -> np.uint32:
    return np.uint32((x << np.uint32(bits)) | (x >> np.uint32(32 - bits)))


@nb.njit(cache=True, nogil=True)
def _compress(w: np.ndarray, h: np.ndarray) -> None:
    """One block: `w` uint32[80] with the message in its first 16 words, `h` uint32[5] the state."""
    for t in range(16, 80):
        w[t] = _rotate(np.uint32(w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16]), 1)
    a, b, c, d, e = h[0], h[1], h[2], h[3], h[4]
    for t in range(80):
        if t < 20:
            f, k = np.uint32((b & c) | (~b & d)), np.uint32(0x5A827999)
        elif t < 40:
            f, k = np.uint32(b ^ c ^ d), np.uint32(0x6ED9EBA1)
        elif t < 60:
            f, k = np.uint32((b & c) | (b & d) | (c & d)), np.uint32(0x8F1BBCDC)
        else:
            f, k = np.uint32(b ^ c ^ d), np.uint32(0xCA62C1D6)
        turned = np.uint32(_rotate(a, 5) + f + e + k + w[t])
        e, d, c, b, a = d, c, _rotate(b, 30), a, turned
    h[0] = np.uint32(h[0] + a)
    h[1] = np.uint32(h[1] + b)
    h[2] = np.uint32(h[2] + c)
    h[3] = np.uint32(h[3] + d)
    h[4] = np.uint32(h[4] + e)


@nb.njit(cache=True, nogil=True)
def sha1_prefix32(data: np.ndarray, start: int, end: int) -> np.uint32:
    """The first four bytes of SHA-1 of data[start:end] as a little-endian number (datasketch.hashfunc.sha1_hash32)."""
    w, h = np.empty(80, np.uint32), np.empty(5, np.uint32)
    h[0], h[1], h[2], h[3], h[4] = 0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0
    size = end - start
    for block in range((size + 9 + 63) // 64):
        for t in range(16):
            word = np.uint32(0)
            for i in range(4):
                at = block * 64 + t * 4 + i
                byte = data[start + at] if at < size else np.uint8(0x80 if at == size else 0)
                word = np.uint32((word << np.uint32(8)) | np.uint32(byte))
            w[t] = word
        if (block + 1) * 64 >= size + 9:
            w[14], w[15] = np.uint32((size * 8) >> 32), np.uint32((size * 8) & 0xFFFFFFFF)
        _compress(w, h)
    first = h[0]
    return np.uint32(
        (first >> np.uint32(24))
        | ((first >> np.uint32(8)) & np.uint32(0xFF00))
        | ((first << np.uint32(8)) & np.uint32(0xFF0000))
        | np.uint32(first << np.uint32(24))
    )
