"""The nearest of a pool of texts by ROUGE-L F, found without looking at most of the pool, and exact.

What is asked: the highest F >= t of a candidate x with any text y of the pool, and the first y that has it. Let x and y
have m and n tokens, L common ones in order (their LCS) and O common ones in any order (of each token the smaller count).

**Nothing is lost**, because every text that is passed over fails one of these, each implied by F(x, y) >= t:

1. F = 2L / (m + n), and L <= O <= min(m, n). So F >= t implies O >= L >= o with o = ceil(t (m + n) / 2) (`kernel.needed`,
   which allows for the rounding of F), and n must lie in [m t / (2 - t), m (2 - t) / t].
2. *Prefixes* (Chaudhuri et al. 2006; Bayardo et al. 2007, AllPairs). Fix one order of all tokens, rare ones first, and
   sort the tokens of both texts by it, equal ones numbered. Of their O common elements let e be the first in that order,
   at place i of x and j of y. All O lie at places >= i of x and >= j of y, so o <= O <= m - i and o <= O <= n - j. With
   the smallest o that any admissible length of the other text allows, e lies among the first m - o + 1 elements of x and
   the first n - o + 1 of y: y is in the posting list of e's token, if just those prefixes are indexed. e is the first
   occurrence of its token in both texts (were a later occurrence common, so would be the first), so one posting for each
   distinct token is enough, and the two inequalities are tested with its places and the actual n (PPJoin's positional
   filter, Xiao et al. 2008).
3. *Sketches* (Sandes et al. 2020, bitmap filter). Bit h(token) of 256 is flipped for each token. Two sketches differ
   in at most as many bits as elements are not common: popcount(x ^ y) <= m + n - 2 O, so popcount(x ^ y) > m + n - 2 o
   proves O < o. The same holds for the four words of a sketch joined by exclusive or, which a posting carries.
4. Whatever is left is counted: LCS in machine words, given up when more tokens of y are strange to x than n - o.

t is the floor of the index at first and the best F found from then on; a text with F >= t passes all tests for that t,
so the maximum is found, and of equal ones the one added first. The order of the tokens serves speed alone.

Postings lie in one array by token and length; what was added since that was built is in linked lists beside it, and the
array is built anew, with the frequencies as they are then, when the lists hold a sixteenth of the pool.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from operators.synthesis.novelty.kernel import common_tokens, f_measure, needed, ones, prepare, release
from operators.text.words import mix

TEXTS, TOKENS, NODES = range(3)  # what Store.counts counts
_UNKNOWN = -(1 << 31)  # the rank of tokens without a number: rarest of all


class Store(NamedTuple):
    """The texts of a pool; arrays are longer than what is in use."""

    tokens: np.ndarray  # int32, token numbers, text after text
    offsets: np.ndarray  # int64[texts + 1]
    sketches: np.ndarray  # uint64[texts, 4]
    counts: np.ndarray  # int64[3]: texts, tokens, nodes of the tail


class Postings(NamedTuple):
    """Which texts have a token in their prefix, sorted by token, length, text."""

    ranks: np.ndarray  # int32[tokens at the time]: place in the order of tokens, rare first
    starts: np.ndarray  # int64[tokens + 1]
    texts: np.ndarray  # int32
    lengths: np.ndarray  # int32, tokens of the text
    places: np.ndarray  # int32, place of the token in the sorted text
    folds: np.ndarray  # uint64, the sketch of the text folded to one word


class Tail(NamedTuple):
    """The same for texts added since, as linked lists, newest first."""

    heads: np.ndarray  # int32[tokens], -1 where empty
    nexts: np.ndarray  # int32[nodes]
    texts: np.ndarray
    lengths: np.ndarray
    places: np.ndarray


class Scratch(NamedTuple):
    """What a query writes to; one for each thread."""

    rows: np.ndarray  # int32[tokens], zeros between queries
    seen: np.ndarray  # int32[texts]: the last query that counted the text
    clock: np.ndarray  # int64[2]: queries so far, texts counted so far


@njit(cache=True, nogil=True, inline="always")
def _key(code: int, ranks: np.ndarray) -> int:
    """Sorts tokens rare first; tokens newer than the ranks are rarer than all others, the newest most."""
    if code < 0:
        return _UNKNOWN << 32
    number = int(code)
    rank = int(ranks[code]) if code < len(ranks) else -number
    return (rank << 32) | number


@njit(cache=True, nogil=True)
def _sorted_keys(text: np.ndarray, ranks: np.ndarray, keys: np.ndarray) -> None:
    m = len(text)
    if m > 48:
        for i in range(m):
            keys[i] = _key(text[i], ranks)
        keys[:m].sort()
        return
    for i in range(m):
        key, j = _key(text[i], ranks), i
        while j > 0 and keys[j - 1] > key:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key


@njit(cache=True, nogil=True)
def sketch_into(text: np.ndarray, out: np.ndarray) -> None:
    """The sketch of a text, into uint64[4]. Tokens without a number leave no mark (nor has any other text a mark of theirs)."""
    out[:] = 0
    for code in text:
        if code >= 0:
            spot = mix(np.uint64(code))
            out[(spot >> np.uint64(6)) & np.uint64(3)] ^= np.uint64(1) << (spot & np.uint64(63))


@njit(cache=True, nogil=True, inline="always")
def _fold(sketch: np.ndarray) -> int:
    return sketch[0] ^ sketch[1] ^ sketch[2] ^ sketch[3]


@njit(cache=True, nogil=True, inline="always")
def _differing(sketch: np.ndarray, sketches: np.ndarray, other: int) -> int:
    """Bits in which a sketch differs from that of a pooled text."""
    theirs = sketches[other]
    return ones(sketch[0] ^ theirs[0]) + ones(sketch[1] ^ theirs[1]) + ones(sketch[2] ^ theirs[2]) + ones(sketch[3] ^ theirs[3])


@njit(cache=True, nogil=True, inline="always")
def _shortest(m: int, threshold: float) -> int:
    """No text of fewer tokens reaches the threshold with one of m tokens."""
    return max(1, int(m * threshold / (2 - threshold) * (1 - 1e-9)))


@njit(cache=True, nogil=True, inline="always")
def _longest(m: int, threshold: float) -> int:
    return int(m * (2 - threshold) / threshold * (1 + 1e-9)) + 1


@njit(cache=True, nogil=True, inline="always")
def _least(m: int, threshold: float) -> int:
    """Common tokens that a text of m tokens needs with any other, at least."""
    return needed(m + _shortest(m, threshold), threshold)


@njit(cache=True, nogil=True)
def _first_of_length(lengths: np.ndarray, low: int, high: int, length: int) -> int:
    while low < high:
        middle = (low + high) >> 1
        if lengths[middle] < length:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def search(
    text: np.ndarray,
    keys: np.ndarray,
    store: Store,
    postings: Postings,
    tail: Tail,
    scratch: Scratch,
    floor: float,
    best: float,
    index: int,
    since: int,
) -> tuple[float, int]:
    """The highest F >= floor with texts since, since + 1, ... of the pool and the first text that has it.

    Starts from a match (best, index) that is known already; gives it back where nothing is better. `keys` is scratch.
    """
    m = len(text)
    if m == 0 or store.counts[TEXTS] <= since:
        return best, index
    _sorted_keys(text, postings.ranks, keys)
    sketch = np.empty(4, np.uint64)
    sketch_into(text, sketch)
    fold = _fold(sketch)
    scratch.clock[0] += 1
    stamp = scratch.clock[0]
    masks, prepared = np.empty((0, 0), np.uint64), False
    threshold = max(floor, best)
    i = 0
    while i < m:
        if m - i < _least(m, threshold):
            break
        key = keys[i]
        if key == _UNKNOWN << 32:  # in no other text
            i += 1
            continue
        code = key & 0x7FFFFFFF
        low, high, node = 0, 0, -1
        if since == 0 and code < len(postings.ranks):
            low = _first_of_length(postings.lengths, postings.starts[code], postings.starts[code + 1], _shortest(m, threshold))
            high = _first_of_length(postings.lengths, low, postings.starts[code + 1], _longest(m, threshold) + 1)
        if code < len(tail.heads):
            node = int(tail.heads[code])
        while True:
            if low < high:
                at = low
                low += 1
                n, place = postings.lengths[at], postings.places[at]
                least = needed(m + n, threshold)
                if m - i < least or n - place < least or ones(fold ^ postings.folds[at]) > m + n - 2 * least:
                    continue
                other = int(postings.texts[at])
            elif node >= 0:
                other = int(tail.texts[node])
                if other < since:
                    node = -1
                    continue
                n, place = tail.lengths[node], tail.places[node]
                node = int(tail.nexts[node])
                least = needed(m + n, threshold)
                if m - i < least or n - place < least:
                    continue
            else:
                break
            if _differing(sketch, store.sketches, other) > m + n - 2 * least or scratch.seen[other] == stamp:
                continue
            scratch.seen[other] = stamp
            scratch.clock[1] += 1
            if not prepared:
                masks, prepared = prepare(text, scratch.rows), True
            given = store.tokens[store.offsets[other] : store.offsets[other + 1]]
            common = common_tokens(text, scratch.rows, masks, given, least)
            score = f_measure(common, m, n)
            if score >= threshold and (score > best or index < 0 or other < index):
                best, index = score, other
                threshold = score
        while i < m and keys[i] == key:
            i += 1
    if prepared:
        release(text, scratch.rows)
    return best, index


@njit(cache=True, nogil=True)
def search_all(
    tokens: np.ndarray,
    offsets: np.ndarray,
    first: int,
    last: int,
    store: Store,
    postings: Postings,
    tail: Tail,
    scratch: Scratch,
    floor: float,
    best: np.ndarray,
    index: np.ndarray,
) -> None:
    """`search` for texts first to last - 1 of a batch, the whole pool for each; into best[text], index[text]."""
    longest = 0
    for text in range(first, last):
        longest = max(longest, offsets[text + 1] - offsets[text])
    keys = np.empty(longest, np.int64)
    for text in range(first, last):
        given = tokens[offsets[text] : offsets[text + 1]]
        best[text], index[text] = search(given, keys, store, postings, tail, scratch, floor, 0.0, -1, 0)


@njit(cache=True, nogil=True)
def append(text: np.ndarray, keys: np.ndarray, store: Store, ranks: np.ndarray, tail: Tail, floor: float) -> None:
    """Pool a text; the arrays must have room for it."""
    m, number, begin = len(text), store.counts[TEXTS], store.counts[TOKENS]
    store.tokens[begin : begin + m] = text
    store.offsets[number + 1] = begin + m
    sketch_into(text, store.sketches[number])
    store.counts[TEXTS] += 1
    store.counts[TOKENS] += m
    if m == 0:
        return
    _sorted_keys(text, ranks, keys)
    least = _least(m, floor)
    for i in range(m - least + 1):
        if i and keys[i] == keys[i - 1]:
            continue
        code, node = keys[i] & 0x7FFFFFFF, store.counts[NODES]
        tail.texts[node], tail.lengths[node], tail.places[node] = number, m, i
        tail.nexts[node] = tail.heads[code]
        tail.heads[code] = node
        store.counts[NODES] += 1


@njit(cache=True, nogil=True)
def append_all(tokens: np.ndarray, offsets: np.ndarray, store: Store, ranks: np.ndarray, tail: Tail, floor: float) -> None:
    keys = np.empty(len(tokens), np.int64)
    for text in range(len(offsets) - 1):
        append(tokens[offsets[text] : offsets[text + 1]], keys, store, ranks, tail, floor)


@njit(cache=True, nogil=True)
def admit_all(
    tokens: np.ndarray,
    offsets: np.ndarray,
    store: Store,
    postings: Postings,
    tail: Tail,
    scratch: Scratch,
    floor: float,
    threshold: float,
    best: np.ndarray,
    index: np.ndarray,
) -> None:
    """In order: a text with F >= threshold is passed over, another one joins the pool and meets those after it.

    `best` and `index` hold the matches in the pool as it was, and get those among the texts that joined.
    """
    since, keys = store.counts[TEXTS], np.empty(len(tokens), np.int64)
    for text in range(len(offsets) - 1):
        given = tokens[offsets[text] : offsets[text + 1]]
        best[text], index[text] = search(given, keys, store, postings, tail, scratch, floor, best[text], index[text], since)
        if best[text] < threshold:
            append(given, keys, store, postings.ranks, tail, floor)


@njit(cache=True, nogil=True)
def frequencies(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    found = np.zeros(vocabulary, np.int64)
    for code in tokens:
        found[code] += 1
    return found


@njit(cache=True, nogil=True)
def build(store: Store, order: np.ndarray, ranks: np.ndarray, floor: float) -> Postings:
    """Postings of all texts in the store. `order` int64[texts] are the texts by length, earlier ones first."""
    longest = 0
    for text in order:
        longest = max(longest, store.offsets[text + 1] - store.offsets[text])
    keys = np.empty(longest, np.int64)
    starts = np.zeros(len(ranks) + 1, np.int64)
    bound = 0
    for text in order:
        m = store.offsets[text + 1] - store.offsets[text]
        if m:
            bound += m - _least(m, floor) + 1
    codes, places = np.empty(bound, np.int32), np.empty(bound, np.int32)
    ends = np.zeros(len(order), np.int64)  # of the text in codes and places
    at = 0
    for k in range(len(order)):
        begin, end = store.offsets[order[k]], store.offsets[order[k] + 1]
        m = end - begin
        if m:
            _sorted_keys(store.tokens[begin:end], ranks, keys)
            for i in range(m - _least(m, floor) + 1):
                if i == 0 or keys[i] != keys[i - 1]:
                    codes[at], places[at] = keys[i] & 0x7FFFFFFF, i
                    starts[codes[at] + 1] += 1
                    at += 1
        ends[k] = at
    for code in range(len(ranks)):
        starts[code + 1] += starts[code]
    following = starts[:-1].copy()
    out = Postings(ranks, starts, np.empty(at, np.int32), np.empty(at, np.int32), np.empty(at, np.int32), np.empty(at, np.uint64))
    at = 0
    for k in range(len(order)):
        text = order[k]
        m = store.offsets[text + 1] - store.offsets[text]
        while at < ends[k]:
            place = following[codes[at]]
            following[codes[at]] += 1
            out.texts[place], out.lengths[place], out.places[place] = text, m, places[at]
            out.folds[place] = _fold(store.sketches[text])
            at += 1
    return out


@njit(cache=True, nogil=True)
def scan(text: np.ndarray, store: Store, rows: np.ndarray) -> tuple[float, int]:
    """The highest F with any text of the pool, however low, and the first that has it; (0.0, -1) where no token is shared.

    Reads the pool from end to end; length and sketch (points 1 and 3 of the module's docstring) spare the counting.
    """
    m, best, index = len(text), 0.0, -1
    if m == 0:
        return best, index
    masks, sketch = prepare(text, rows), np.empty(4, np.uint64)
    sketch_into(text, sketch)
    for other in range(store.counts[TEXTS]):
        n = store.offsets[other + 1] - store.offsets[other]
        most = min(m, n, (m + n - _differing(sketch, store.sketches, other)) >> 1)
        if most <= 0 or f_measure(most, m, n) <= best:
            continue
        given = store.tokens[store.offsets[other] : store.offsets[other + 1]]
        score = f_measure(common_tokens(text, rows, masks, given, needed(m + n, best)), m, n)
        if score > best:
            best, index = score, other
    release(text, rows)
    return best, index
