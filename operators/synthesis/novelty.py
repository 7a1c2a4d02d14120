"""How new a text is: the highest ROUGE-L F against everything accepted so far, exact, in any language.

Tokens: lowercased runs of [a-z0-9], as in the `rouge_score` package, so that for text in Latin script every score and
every decision is the same as there, to the last bit. Beyond that package, each character of a script written without
spaces (Han, Kana, Bopomofo, Thai, Lao, Khmer, Burmese) is a token, and so is each run of letters or digits of any other
script. Mixed text yields its tokens in their order.

ROUGE-L F (Lin 2004, section 3.1) = 2PR / (P + R) with P = LCS / m and R = LCS / n. The longest common subsequence is
counted by Hyyro's bit-vector recurrence (2004), 64 tokens of the candidate a machine word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numba import njit

_ONE_CHARACTER = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff"  # Kana, Bopomofo, ideographic marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_LATIN = (  # letters that rouge_score treats as separators, and symbols that Unicode counts as alphanumeric
    "\u0080-\u036f\u1d00-\u1dbf\u1e00-\u1eff\u2000-\u2bff\u2c60-\u2c7f\u3000-\u3004\u3200-\u33ff\ua720-\ua7ff\uab30-\uab6f"
    "\ufb00-\ufb06\uff00-\uff65\U0001d400-\U0001d7ff\U0001f100-\U0001f1ff"
)
_TOKEN = re.compile(rf"[a-z0-9]+|[{_ONE_CHARACTER}]|[^\W_a-z0-9{_LATIN}{_ONE_CHARACTER}]+")


def tokenize(text: str) -> list[str]:
    """The tokens that ROUGE-L compares (see the module's docstring)."""
    return _TOKEN.findall(text.lower())


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F of two texts, in [0, 1]; symmetric. 0 when either has no token."""
    pool = NoveltyPool()
    pool.add(a)
    return pool.nearest(b)[0]


def recall(reference: str, text: str) -> float:
    """The share of the reference's tokens that the text has in the same order (ROUGE-L recall); 1 for an empty reference."""
    m, n = len(tokenize(reference)), len(tokenize(text))
    if not m:
        return 1.0
    return round(rouge_l(reference, text) * (m + n) / 2 / m, 6)  # F = 2 LCS / (m + n)


def rouge_l_matrix(texts: Sequence[str]) -> np.ndarray:
    """float64[n, n] of ROUGE-L F between all pairs, ones on the diagonal (zeros where a text has no token)."""
    pool = NoveltyPool()
    for text in texts:
        pool.add(text)
    return np.vstack([pool.scores(text) for text in texts]) if texts else np.zeros((0, 0))


class NoveltyPool:
    """Accepted texts, and the similarity of a candidate to the nearest of them.

    Memory: 4 bytes a token plus the vocabulary. A query reads each pooled token once, and skips texts whose length alone
    (F <= 2 min(m, n) / (m + n)) cannot beat the best found.
    """

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._tokens = np.zeros(1 << 12, np.int32)
        self._ends = np.zeros(1 << 8, np.int64)  # ends[i] = end of text i in tokens
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, text: str) -> None:
        """Pool a text; its index is the number of texts before it."""
        codes = np.array([self._codes.setdefault(token, len(self._codes)) for token in tokenize(text)], np.int32)
        start = int(self._ends[self._count - 1]) if self._count else 0
        end = start + len(codes)
        while end > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        if self._count == len(self._ends):
            self._ends = np.concatenate([self._ends, np.zeros_like(self._ends)])
        self._tokens[start:end] = codes
        self._ends[self._count] = end
        self._count += 1

    def nearest(self, text: str) -> tuple[float, int]:
        """(highest F, index of the first text that has it); (0.0, -1) when nothing in the pool shares a token."""
        best, index = _nearest(*self._query(text), self._tokens, self._ends[: self._count])
        return float(best), int(index)

    def scores(self, text: str) -> np.ndarray:
        """float64[len(pool)]: F against each pooled text."""
        return np.asarray(_scores(*self._query(text), self._tokens, self._ends[: self._count]))

    def _query(self, text: str) -> tuple[np.ndarray, np.ndarray, int]:
        """The candidate for the kernels: (row of `masks` by code, match masks, tokens).

        Bit j of `masks[row]` is set where token j of the candidate has the code of that row; row 0 matches nothing.
        """
        tokens = tokenize(text)
        rows = np.zeros(len(self._codes), np.int32)
        masks = np.zeros((len(tokens) + 1, max(1, -(-len(tokens) // 64))), np.uint64)
        used = 0
        for position, token in enumerate(tokens):
            code = self._codes.get(token)
            if code is None:
                continue
            if rows[code] == 0:
                used += 1
                rows[code] = used
            masks[rows[code], position // 64] |= np.uint64(1 << (position % 64))
        return rows, masks, len(tokens)


@njit(cache=True, nogil=True)
def _lcs(rows: np.ndarray, masks: np.ndarray, other: np.ndarray, state: np.ndarray) -> int:
    """Length of the longest common subsequence; `state` is scratch, uint64[words]."""
    words = masks.shape[1]
    for word in range(words):
        state[word] = ~np.uint64(0)
    for code in other:
        row = rows[code]
        if row == 0:
            continue
        carry = np.uint64(0)
        for word in range(words):
            before, match = state[word], masks[row, word]
            common = before & match
            total = before + common
            overflow = np.uint64(total < before)
            total += carry
            overflow |= np.uint64(total < carry)
            carry = overflow
            state[word] = total | (before & ~match)
    found = 0
    for word in range(words):
        rest = ~state[word]  # bits beyond the candidate never match, so they stay set in the state
        while rest:
            rest &= rest - np.uint64(1)
            found += 1
    return found


@njit(cache=True, nogil=True)
def _f(common: int, m: int, n: int) -> float:
    """rouge_score's own arithmetic, operation by operation, so that ties at a threshold fall alike."""
    if common == 0:
        return 0.0
    precision, recall = common / m, common / n
    return 2 * precision * recall / (precision + recall)


@njit(cache=True, nogil=True)
def _nearest(rows: np.ndarray, masks: np.ndarray, m: int, tokens: np.ndarray, ends: np.ndarray) -> tuple[float, int]:
    state = np.empty(masks.shape[1], np.uint64)
    best, index, start = 0.0, -1, 0
    for text in range(len(ends)):
        n = ends[text] - start
        if m and n and _f(min(m, n), m, n) > best:
            score = _f(_lcs(rows, masks, tokens[start : ends[text]], state), m, n)
            if score > best:
                best, index = score, text
        start = ends[text]
    return best, index


@njit(cache=True, nogil=True)
def _scores(rows: np.ndarray, masks: np.ndarray, m: int, tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    state = np.empty(masks.shape[1], np.uint64)
    found = np.zeros(len(ends))
    start = 0
    for text in range(len(ends)):
        if m and ends[text] > start:
            found[text] = _f(_lcs(rows, masks, tokens[start : ends[text]], state), m, ends[text] - start)
        start = ends[text]
    return found
