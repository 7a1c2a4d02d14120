"""Texts to hashes of their tokens, a window of text at a time.

A window is normalised into a scratch of UTF-8 bytes in which every separator is one space and a character of an unspaced
script stands between two: eight bytes a step where they are plain ASCII, else a character a step. Words are then
hashed sixteen bytes a step. Both steps have no branch that depends on a letter, which is what made a loop over letters slow:
26 against 6 ns a word.

The hash of a token: its UTF-8 bytes, filled up with zeros to the next multiple of 16 (at least one zero), as pairs of
little-endian 64-bit numbers (x, y); h = mix(h, x, y) over the pairs from a seed, then an avalanche. `reference.token_hash` is
the same in plain Python.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from operators.dedup.lanes import (
    leading_bytes_without,
    leading_plain_bytes,
    load64,
    low_bytes,
    other_bytes64,
    store64,
    trailing_zeros,
)
from operators.dedup.normalise import CODE, DIGIT, DROPPED, SEPARATOR, UNSPACED, decode

WINDOW_BYTES = 4096
SCRATCH_BYTES = 5 * WINDOW_BYTES + 256
"""A character of two bytes may become one of three between two spaces; a carried piece of a word and padding come to that."""
WINDOW_TOKENS = SCRATCH_BYTES // 2 + 2
STATE = 4
"""Values of the state between windows: bytes of a cut word in the scratch, hash of what came before them, whether something
did, whether the last character was a digit."""

_LONG_BYTES = 64  # a cut word longer than this is hashed as far as it is known
_SEED = np.uint64(0x9E3779B97F4A7C15)
_STEP_X = np.uint64(0x2127599BF4325C37)
_STEP_Y = np.uint64(0x880355F21E6D1965)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_FOLDED, _LOOKED_UP = np.uint8(1), np.uint8(0)
_DIGIT, _OTHER = np.uint8(0x80), np.uint8(0xFF)
_SPACE = np.uint8(32)
_SPACES = np.uint64(0x2020202020202020)
_MARKS = np.uint64(0x8080808080808080)
_SHIFT = np.uint64(32)
_EIGHT = np.uint64(8)


def ascii_bytes(table: np.ndarray, keep_digits: bool) -> np.ndarray:
    """uint8[257]: first whether the bytes are those that `_classify` can compute, then the class of each byte.

    A class is the normalised byte of a plain ASCII character, or has bit 7 set: a digit of a run that counts as one 0, or
    anything that needs a look at the code table.
    """
    out = np.full(257, _OTHER, np.uint8)
    for byte in range(128):
        entry = int(table[byte])
        code = entry & int(CODE)
        if entry == int(DIGIT) | code and not keep_digits:
            out[byte + 1] = _DIGIT
        elif entry in (code, int(DIGIT) | code) and code != int(DROPPED) and code < 128:
            out[byte + 1] = code
    folded = [ord(c.lower()) if c.isalpha() else int(_DIGIT) if c.isdigit() else 32 for c in map(chr, range(128))]
    out[0] = _FOLDED if out[1:129].tolist() == folded else _LOOKED_UP
    return out


@nb.njit(inline="always")
def _mix(h: np.uint64, x: np.uint64, y: np.uint64) -> np.uint64:
    h = (h ^ x) * _STEP_X
    h = ((h ^ (h >> _SHIFT)) ^ y) * _STEP_Y
    return h ^ (h >> _SHIFT)


@nb.njit(inline="always")
def _finish(h: np.uint64) -> np.uint64:
    h = h * _MIX
    return h ^ (h >> np.uint64(29))


@nb.njit(inline="always")
def _encode(code: np.uint64) -> np.uint64:
    """The UTF-8 bytes of a code point as a little-endian number."""
    six = np.uint64(0x3F)
    last = np.uint64(0x80) | (code & six)
    second = np.uint64(0x80) | ((code >> np.uint64(6)) & six)
    third = np.uint64(0x80) | ((code >> np.uint64(12)) & six)
    two = np.uint64(0xC0) | (code >> np.uint64(6)) | (last << _EIGHT)
    three = np.uint64(0xE0) | (code >> np.uint64(12)) | (second << _EIGHT) | (last << np.uint64(16))
    four = np.uint64(0xF0) | (code >> np.uint64(18)) | (third << _EIGHT) | (second << np.uint64(16)) | (last << np.uint64(24))
    return code if code < 0x80 else (two if code < 0x800 else (three if code < 0x10000 else four))


@nb.njit(inline="always")
def _width(code: np.uint64) -> Any:
    return 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)


@nb.njit(cache=True, nogil=True)
def hash_tokens(
    data: np.ndarray, position: int, end: int, plain: np.ndarray, table: np.ndarray, by_character: bool, keep_digits: bool,
    state: np.ndarray, scratch: np.ndarray, classes: np.ndarray, out: np.ndarray, first: int,
) -> tuple[int, int]:  # fmt: skip
    """Hash the tokens of the next window of a text into out[first:]; (next position, tokens in out).

    `plain` is `ascii_bytes` of `table`; `state` uint64[STATE], zeros before a text; `scratch` uint8[SCRATCH_BYTES], `classes`
    uint8[WINDOW_BYTES + 8];
    `out` uint64 has room for WINDOW_TOKENS more. At the end of the text its last token is complete.
    """
    stop = min(end, position + WINDOW_BYTES)
    if by_character:
        return _hash_characters(data, position, stop, table, keep_digits, state, out, first)
    position, filled = _normalise(data, position, stop, plain, table, keep_digits, state, scratch, classes)
    known = filled
    if position < end:  # the last word may go on
        while known > 0 and scratch[known - 1] != 32:
            known -= 1
    scratch[filled : filled + 96] = 32
    written = _hash_words(scratch, known, position >= end, state, out, first)
    _carry(scratch, known, filled, state)
    return position, written


@nb.njit(cache=True, nogil=True)
def _classify(data: np.ndarray, position: int, stop: int, plain: np.ndarray, out: np.ndarray) -> None:
    """out[i] = the class of data[position + i], computed instead of looked up where it can be: then many bytes a step."""
    if plain[0] == _FOLDED:
        for i in range(stop - position):
            byte = data[position + i]
            low = byte | np.uint8(0x20)
            letter, digit = np.uint8(low - np.uint8(97)) < 26, np.uint8(byte - np.uint8(48)) < 10
            other = np.uint8(0x20) if byte < 0x80 else np.uint8(0xFF)
            out[i] = low if letter else (_DIGIT if digit else other)
    else:
        for i in range(stop - position):
            out[i] = plain[1 + np.int64(data[position + i])]
    out[stop - position : stop - position + 8] = 0xFF


@nb.njit(cache=True, nogil=True)
def _normalise(
    data: np.ndarray, position: int, stop: int, plain: np.ndarray, table: np.ndarray, keep_digits: bool, state: np.ndarray,
    scratch: np.ndarray, classes: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Write the normalised bytes behind those already in the scratch; (position after the last character, bytes in all)."""
    after_digit, begin = state[3] != 0, position
    filled: Any = np.int64(state[0])
    _classify(data, position, stop, plain, classes)
    while position < stop:
        word = load64(classes, position - begin)
        store64(scratch, filled, word)
        if word & _MARKS == 0:
            filled += 8
            position += 8
            after_digit = False
            continue
        ahead = leading_plain_bytes(word)
        filled += ahead
        position += ahead
        after_digit &= ahead == 0
        if position >= stop:
            break
        if classes[position - begin] == _DIGIT:
            scratch[filled] = 48
            filled += not after_digit
            position += 1
            after_digit = True
            continue
        point, width = decode(data, position)
        position += width
        entry = table[point]
        if entry == DROPPED:
            continue
        if entry == SEPARATOR:
            scratch[filled] = 32
            filled += 1
            after_digit = False
            continue
        code = np.uint64(entry & CODE)
        if (entry & DIGIT) != 0 and not keep_digits:
            if after_digit:
                continue
            code, after_digit = np.uint64(48), True
        else:
            after_digit = False
        alone = (entry & UNSPACED) != 0
        scratch[filled] = 32
        filled += alone
        bytes_ = _encode(code)
        for i in range(4):
            scratch[filled + i] = np.uint8((bytes_ >> np.uint64(8 * i)) & np.uint64(0xFF))
        filled += _width(code)
        scratch[filled] = 32
        filled += alone
    state[3] = after_digit
    return position, filled


@nb.njit(cache=True, nogil=True)
def _hash_words(scratch: np.ndarray, known: int, complete: bool, state: np.ndarray, out: np.ndarray, written: int) -> int:
    """Hash the words of scratch[:known], which ends with a space unless the text is `complete`; tokens in `out`.

    At least 96 bytes behind `known` can be read; those of a complete text are spaces. The starts of words come from a mask of
    64 bytes, so that no word waits for the length of the one before it.
    """
    at = 0
    if state[2] != 0 and (known or complete):  # go on with a word that was hashed in part
        while at < known and scratch[at] != 32:
            at += 1
        out[written] = _finish(_hash_blocks(scratch, 0, at, state[1]))
        written += 1
        state[2] = 0
    before = np.uint64(0)  # whether the byte before the chunk belongs to a word
    while at < known:
        inside = other_bytes64(scratch, at, _SPACE)
        if known - at < 64:
            inside &= (np.uint64(1) << np.uint64(known - at)) - np.uint64(1)
        starts = inside & ~((inside << np.uint64(1)) | before)
        before = inside >> np.uint64(63)
        while starts:
            start = at + trailing_zeros(starts)
            starts &= starts - np.uint64(1)
            x, y = load64(scratch, start), load64(scratch, start + 8)
            in_x, in_y = leading_bytes_without(x, _SPACES), leading_bytes_without(y, _SPACES)
            h = _mix(_SEED, x & low_bytes(in_x), y & low_bytes(in_y if in_x == 8 else 0))
            if in_x + in_y == 16:
                end = start + 16
                while scratch[end] != 32:
                    end += 1
                h = _hash_blocks(scratch, start + 16, end, h)
            out[written] = _finish(h)
            written += 1
        at += 64
    return written


@nb.njit(cache=True, nogil=True)
def _hash_blocks(scratch: np.ndarray, start: int, end: int, h: np.uint64) -> np.uint64:
    """`h` mixed with scratch[start:end] and the zeros behind it."""
    while end - start >= 16:
        h = _mix(h, load64(scratch, start), load64(scratch, start + 8))
        start += 16
    left = end - start
    x, y = load64(scratch, start) & low_bytes(min(left, 8)), load64(scratch, start + 8)
    return _mix(h, x, y & low_bytes(max(left - 8, 0)))


@nb.njit(cache=True, nogil=True)
def _carry(scratch: np.ndarray, known: int, filled: int, state: np.ndarray) -> None:
    """Move the piece of a word in scratch[known:filled] to the front; of a very long one only what is not hashed yet."""
    if filled - known > _LONG_BYTES:
        h = state[1] if state[2] != 0 else _SEED
        while filled - known >= 16:
            h = _mix(h, load64(scratch, known), load64(scratch, known + 8))
            known += 16
        state[1], state[2] = h, 1
    for i in range(filled - known):
        scratch[i] = scratch[known + i]
    state[0] = filled - known


@nb.njit(cache=True, nogil=True)
def _hash_characters(
    data: np.ndarray, position: int, stop: int, table: np.ndarray, keep_digits: bool, state: np.ndarray, out: np.ndarray, first: int
) -> tuple[int, int]:
    """Every character a token: their codes first, hashed together afterwards."""
    filled, after_digit = first, state[3] != 0
    while position < stop:
        point, width = decode(data, position)
        position += width
        entry = table[point]
        if entry == SEPARATOR:
            after_digit = False
            continue
        if entry == DROPPED:
            continue
        code = np.uint64(entry & CODE)
        if (entry & DIGIT) != 0 and not keep_digits:
            if after_digit:
                continue
            code, after_digit = np.uint64(48), True
        else:
            after_digit = False
        out[filled] = code
        filled += 1
    state[3] = after_digit
    for i in range(first, filled):
        out[i] = _finish(_mix(_SEED, _encode(out[i]), np.uint64(0)))
    return position, filled
