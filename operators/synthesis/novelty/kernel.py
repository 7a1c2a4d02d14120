"""ROUGE-L in machine words: the longest common subsequence of two texts, of one with many, of 64 with many.

ROUGE-L F (Lin 2004, "ROUGE", section 3.1) = 2PR / (P + R) with P = LCS / m and R = LCS / n for texts of m and n tokens.
The longest common subsequence is counted by Hyyro's bit-vector recurrence (2004, "Bit-parallel LCS-length computation
revisited"): bit j of the state stands for token j of the one text, each token of the other costs an addition and three
logical operations a word. Many texts are done beside each other, one a lane of the machine's vectors, in 8, 16, 32 or 64
bits as their length needs (the arrangement of RapidFuzz's `MultiLCSseq`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numba.core import types
from numba.extending import intrinsic

LANES = 64
_STRIPE = 64  # words of a text whose match masks are held at once: 2 MB
_LANE_WORDS = 4  # longer texts are held against the others one by one: a block of 64 would need too many masks
_SLACK = 1e-9  # relative; far above what doubles lose, far below one token in any text that fits in memory


@intrinsic
def ones(_context: Any, value: Any) -> Any:
    """`ones(value)`: the number of bits set in a uint64."""
    if not isinstance(value, types.Integer):
        return None

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@njit(cache=True, nogil=True, inline="always")
def f_measure(common: int, m: int, n: int) -> float:
    """rouge_score's own arithmetic, operation by operation, so that ties at a threshold fall alike."""
    if common == 0:
        return 0.0
    precision, recall = common / m, common / n
    return 2 * precision * recall / (precision + recall)


@njit(cache=True, nogil=True, inline="always")
def needed(total: int, threshold: float) -> int:
    """The fewest common tokens with which two texts of `total` tokens together can have F >= threshold, or one fewer; >= 1.

    F = 2 LCS / total up to rounding, so LCS >= threshold * total / 2 up to rounding; the slack covers the rounding.
    """
    return max(1, math.ceil(threshold * total * (0.5 * (1 - _SLACK))))


@njit(cache=True, nogil=True)
def prepare(text: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Make `rows` (int32 by token, zeros before and, by `release`, after) ready to hold texts against this one.

    Bit j of word j // 64 of masks[rows[token]] is set where that token is token j of the text; row 0 is that of tokens it
    has not. Tokens without a number (-1) match nothing. For a long text, `rows` counts its tokens and there are no masks.
    """
    words = (len(text) + 63) >> 6
    if words > _STRIPE:
        for code in text:
            if code >= 0:
                rows[code] += 1
        return np.zeros((0, 0), np.uint64)
    masks = np.zeros((len(text) + 1, words), np.uint64)
    used = 1
    for j in range(len(text)):
        code = text[j]
        if code < 0:
            continue
        row = rows[code]
        if row == 0:
            row = used
            rows[code] = row
            used += 1
        masks[row, j >> 6] |= np.uint64(1) << np.uint64(j & 63)
    return masks


@njit(cache=True, nogil=True)
def release(text: np.ndarray, rows: np.ndarray) -> None:
    for code in text:
        if code >= 0:
            rows[code] = 0


@njit(cache=True, nogil=True)
def common_tokens(text: np.ndarray, rows: np.ndarray, masks: np.ndarray, other: np.ndarray, least: int) -> int:
    """Length of the longest common subsequence of a prepared text and another, or 0 once it is known to be below `least`."""
    if len(masks) == 0:
        return _common_of_long(text, rows, other, least)
    words = masks.shape[1]
    spare = len(other) - least  # tokens of the other text that may go unmatched
    if words == 1:
        one = ~np.uint64(0)
        for code in other:
            row = rows[code] if code >= 0 else 0
            if row == 0:
                spare -= 1
                if spare < 0:
                    return 0
                continue
            match = one & masks[row, 0]
            one = (one + match) | (one - match)
        return 64 - ones(one)
    state = np.full(words, ~np.uint64(0))
    for code in other:
        row = rows[code] if code >= 0 else 0
        if row == 0:
            spare -= 1
            if spare < 0:
                return 0
            continue
        carry = np.uint64(0)
        for word in range(words):
            carry = _step(state, word, masks[row, word], carry)
    found = 0
    for word in range(words):
        found += 64 - ones(state[word])  # bits beyond the text never match, so they stay set
    return found


@njit(cache=True, nogil=True, inline="always")
def _step(state: np.ndarray, word: int, mask: np.uint64, carry: np.uint64) -> np.uint64:
    """One word of the recurrence S' = (S + (S & M)) | (S & ~M); the carry out."""
    before = state[word]
    match = before & mask
    total = before + match
    sum_ = total + carry
    state[word] = sum_ | (before - match)
    return np.uint64(total < before) | np.uint64(sum_ < total)


@njit(cache=True, nogil=True)
def _common_of_long(text: np.ndarray, counts: np.ndarray, other: np.ndarray, least: int) -> int:
    """The same by stripes of the text, so that memory is bounded: the carries out of a stripe go into the next one."""
    shared = 0
    for code in other:
        if code >= 0:
            shared += counts[code] > 0
            counts[code] -= 1
    for code in other:
        if code >= 0:
            counts[code] += 1
    if shared < least:
        return 0
    rows, carries = np.zeros(len(counts), np.int32), np.zeros(len(other), np.uint64)
    state = np.empty(_STRIPE, np.uint64)
    found = 0
    for begin in range(0, len(text), 64 * _STRIPE):
        stripe = text[begin : begin + 64 * _STRIPE]
        masks = prepare(stripe, rows)
        words = masks.shape[1]
        state[:words] = ~np.uint64(0)
        for j in range(len(other)):
            code, carry = other[j], carries[j]
            row = rows[code] if code >= 0 else 0
            if row == 0 and carry == 0:
                continue
            for word in range(words):
                carry = _step(state, word, masks[row, word], carry)
            carries[j] = carry
        for word in range(words):
            found += 64 - ones(state[word])
        release(stripe, rows)
    return found


@njit(cache=True, nogil=True)
def common_of_two(a: np.ndarray, b: np.ndarray, vocabulary: int) -> int:
    """Length of the longest common subsequence of two texts of tokens below `vocabulary`."""
    if len(a) > len(b):
        a, b = b, a
    rows = np.zeros(vocabulary, np.int32)
    return common_tokens(a, rows, prepare(a, rows), b, 0)


@njit(cache=True, nogil=True)
def one_with_all(text: np.ndarray, others: np.ndarray, offsets: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
    """F of a text with each of the others, into found float64[others]."""
    m, masks = len(text), prepare(text, rows)
    for other in range(len(found)):
        n = offsets[other + 1] - offsets[other]
        if m and n:
            found[other] = f_measure(common_tokens(text, rows, masks, others[offsets[other] : offsets[other + 1]], 0), m, n)
    release(text, rows)


@njit(cache=True, nogil=True, error_model="numpy")
def _narrow(
    block: np.ndarray,
    lengths: np.ndarray,
    width: int,
    tokens: np.ndarray,
    offsets: np.ndarray,
    first: int,
    rows: np.ndarray,
    state: np.ndarray,
    out: np.ndarray,
) -> None:
    """F of a block's texts, at most `width` tokens each, with texts first, first + 1, ... into out[text, lane]."""
    full = ~state.dtype.type(0)
    for text in range(len(out)):
        for lane in range(LANES):
            state[lane] = full
        begin, end = offsets[first + text], offsets[first + text + 1]
        for at in range(begin, end):
            row = rows[tokens[at]]
            if row == 0:
                continue
            masks = block[row]
            for lane in range(LANES):
                before = state[lane]
                match = before & masks[lane]
                state[lane] = (before + match) | (before - match)
        for lane in range(LANES):
            common = np.float64(width - ones(np.uint64(state[lane])))
            precision, recall = common / lengths[lane], common / (end - begin)
            score = 2 * precision * recall / (precision + recall)
            out[text, lane] = score if common > 0 else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def _wide(
    block: np.ndarray,
    lengths: np.ndarray,
    words: int,
    tokens: np.ndarray,
    offsets: np.ndarray,
    first: int,
    rows: np.ndarray,
    state: np.ndarray,
    out: np.ndarray,
) -> None:
    """As _narrow for texts of any length; block[row] and state are uint64[words * LANES], word by word."""
    carry = np.empty(LANES, np.uint64)
    for text in range(len(out)):
        state[:] = ~np.uint64(0)
        begin, end = offsets[first + text], offsets[first + text + 1]
        for at in range(begin, end):
            row = rows[tokens[at]]
            if row == 0:
                continue
            masks = block[row]
            carry[:] = 0
            for word in range(words):
                base = word * LANES
                for lane in range(LANES):
                    carry[lane] = _step(state, base + lane, masks[base + lane], carry[lane])
        for lane in range(LANES):
            found = 0
            for word in range(words):
                found += 64 - ones(state[word * LANES + lane])
            common = np.float64(found)
            precision, recall = common / lengths[lane], common / (end - begin)
            score = 2 * precision * recall / (precision + recall)
            out[text, lane] = score if common > 0 else 0.0


@njit(cache=True, nogil=True)
def _fill_block(block: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, lanes: np.ndarray, width: int, rows: np.ndarray) -> int:
    """Match masks of the texts in `lanes`, bit by bit of a word of `width` bits; rows used, the empty one included."""
    used = 1
    for lane in range(len(lanes)):
        begin, end = offsets[lanes[lane]], offsets[lanes[lane] + 1]
        for j in range(end - begin):
            code = tokens[begin + j]
            if code < 0:
                continue
            row = rows[code]
            if row == 0:
                row = used
                rows[code] = row
                used += 1
            word, bit = j // width, j % width
            block[row, word * LANES + lane] |= block.dtype.type(1) << block.dtype.type(bit)
    return used


@njit(cache=True, nogil=True)
def _store(tile: np.ndarray, lanes: np.ndarray, first: int, out: np.ndarray) -> None:
    for lane in range(len(lanes)):
        row = out[lanes[lane]]
        for text in range(len(tile)):
            row[first + text] = tile[text, lane]


def all_scores(
    tokens: np.ndarray, offsets: np.ndarray, others: np.ndarray, other_offsets: np.ndarray, vocabulary: int
) -> np.ndarray:
    """float64[texts, other texts]: ROUGE-L F of every pair, exact to the last bit. No pair is left out.

    `tokens` int32 with `offsets` int64[texts + 1] are numbers below `vocabulary` (-1 matches nothing).
    """
    texts, count = len(offsets) - 1, len(other_offsets) - 1
    out = np.zeros((texts, count))
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]
    rows = np.zeros(vocabulary + 1, np.int32)  # the last one is that of tokens without a number, -1
    block = np.zeros((0, 0), np.uint8)
    tile = np.empty((LANES, LANES))
    for begin in range(0, len(order), LANES):
        lanes = order[begin : begin + LANES]
        longest = int(lengths[lanes[-1]])
        width = next((bits for bits in (8, 16, 32) if longest <= bits), 64)
        words = -(-longest // width)
        if words > _LANE_WORDS:
            for lane in order[begin:]:
                one_with_all(tokens[offsets[lane] : offsets[lane + 1]], others, other_offsets, rows, out[lane])
            break
        most = 1 + int(lengths[lanes].sum())
        dtype = np.dtype(f"uint{width}")
        if block.dtype != dtype or len(block) < most or block.shape[1] != words * LANES:
            block = np.zeros((most, words * LANES), dtype)
        used = _fill_block(block, tokens, offsets, lanes, width, rows)
        sizes = np.ones(LANES)
        sizes[: len(lanes)] = lengths[lanes]
        state = np.empty(words * LANES, dtype)
        for first in range(0, count, LANES):
            part = tile[: min(LANES, count - first)]
            if words == 1:
                _narrow(block, sizes, width, others, other_offsets, first, rows, state, part)
            else:
                _wide(block, sizes, words, others, other_offsets, first, rows, state, part)
            _store(part, lanes, first, out)
        block[:used] = 0
        for lane in lanes:
            release(tokens[offsets[lane] : offsets[lane + 1]], rows)
    return out
