"""Where personal data may stand: one compiled pass over the bytes of a column, so that regular expressions see little text.

A candidate is a span of bytes of one row. Kinds: NUMBER, a run of digits and the signs that stand inside numbers, with at
least seven digits or three full stops; AT, the allowed characters around an `@`; COLONS, a run of hexadecimal digits with
two colons and one decimal digit at least.
"""

from __future__ import annotations

import numba
import numpy as np

NUMBER, AT, COLONS = 0, 1, 2
_LEAST_DIGITS = 7
_LONGEST_LOCAL = 64  # characters before the @ (RFC 5321, section 4.5.3.1)
_LONGEST_DOMAIN = 255

# classes of bytes as bits
_DIGIT, _INSIDE, _LOCAL, _DOMAIN, _HEX = 1, 2, 4, 8, 16


def _classes() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    table[48:58] |= _DIGIT | _INSIDE | _LOCAL | _DOMAIN | _HEX
    for byte in b" ().+-":
        table[byte] |= _INSIDE
    letters = [*range(65, 91), *range(97, 123)]
    table[letters] |= _LOCAL | _DOMAIN
    for byte in b"._%+-":
        table[byte] |= _LOCAL
    for byte in b".-":
        table[byte] |= _DOMAIN
    table[[*range(65, 71), *range(97, 103), ord(":"), ord(".")]] |= _HEX
    return table


_CLASSES = _classes()


def find(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row int64, start int64, end int64, kind uint8) of every candidate, in order of rows and starts within a kind.

    `data` uint8[bytes] and `offsets` int64[rows + 1] are the buffers of a large_string column.
    """
    count = _scan(data, offsets, _CLASSES, np.zeros((0, 3), np.int64), np.zeros(0, np.uint8))
    spans, kinds = np.empty((count, 3), np.int64), np.empty(count, np.uint8)
    _scan(data, offsets, _CLASSES, spans, kinds)
    return spans[:, 0], spans[:, 1], spans[:, 2], kinds


@numba.njit(cache=True, nogil=True)
def _scan(data, offsets, classes, spans, kinds):  # type: ignore[no-untyped-def]
    """Fill `spans` and `kinds` as far as they reach; the number of candidates."""
    count = 0
    for row in range(len(offsets) - 1):
        first, last = offsets[row], offsets[row + 1]
        i = first
        number = first  # up to where numbers were looked for
        colons = first
        while i < last:
            byte = data[i]
            if byte == 64:  # @
                start, end = i, i + 1
                while start > first and i - start < _LONGEST_LOCAL and classes[data[start - 1]] & _LOCAL:
                    start -= 1
                while end < last and end - i <= _LONGEST_DOMAIN and classes[data[end]] & _DOMAIN:
                    end += 1
                if start < i and end > i + 3:
                    if count < len(spans):
                        spans[count, 0], spans[count, 1], spans[count, 2], kinds[count] = row, start, end, AT
                    count += 1
            elif byte == 58 and i >= colons:  # :
                start, end, seen, digits = i, i, 0, 0
                while start > first and classes[data[start - 1]] & _HEX:
                    start -= 1
                    digits += classes[data[start]] & _DIGIT
                while end < last and classes[data[end]] & _HEX:
                    seen += data[end] == 58
                    digits += classes[data[end]] & _DIGIT
                    end += 1
                colons = end
                if seen >= 2 and digits:
                    if count < len(spans):
                        spans[count, 0], spans[count, 1], spans[count, 2], kinds[count] = row, start, end, COLONS
                    count += 1
            elif classes[byte] & _DIGIT and i >= number:
                start, end, digits, dots, stop = i, i, 0, 0, i
                while start > first and classes[data[start - 1]] & _INSIDE and data[start - 1] != 32 and i - start < 4:
                    start -= 1
                while end < last and classes[data[end]] & _INSIDE and not (data[end] == 32 and data[end - 1] == 32):
                    if classes[data[end]] & _DIGIT:
                        digits += 1
                        stop = end + 1
                    dots += data[end] == 46
                    end += 1
                number = end
                if digits >= _LEAST_DIGITS or (dots >= 3 and digits >= 4):
                    if count < len(spans):
                        spans[count, 0], spans[count, 1], spans[count, 2], kinds[count] = row, start, stop, NUMBER
                    count += 1
            i += 1
    return count
