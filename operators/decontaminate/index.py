"""The n-grams of benchmarks as sorted arrays, and the kernel that finds them in a batch of texts.

Texts are compared as tokens of `dedup.normalise` with digits kept: lower-cased words without accents and punctuation, and
single characters of scripts written without spaces, whatever surrounds them, so that a Chinese item is found inside an
English page. An n-gram is found by the hash of its first `anchor` tokens (a bit table rejects most positions, a sorted
array the rest) and then compared character by character with the text: a hash decides nothing by itself.
Memory: the index, and a ring of `anchor` tokens; a text of any size is scanned where it lies.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numba as nb
import numpy as np
import pyarrow as pa

from operators.dedup.normalise import CODE, DROPPED, SEPARATOR, UNSPACED, WORDS, code_table, compose, decode, normalise_row

_STEP = np.uint64(0x9E3779B97F4A7C15)
_SEED = np.uint64(0xCBF29CE484222325)
_END = np.uint32(0)  # closes each token in the stored codes of an n-gram


@dataclass(frozen=True)
class Lengths:
    """Tokens of an n-gram (`words`, `characters` for mostly unspaced items), and of the shortest whole item."""

    words: int
    characters: int
    short_words: int
    short_characters: int

    @property
    def anchor(self) -> int:
        return min(self.words, self.characters, self.short_words, self.short_characters)


@dataclass(frozen=True)
class Hits:
    """Found n-grams in order of row and position; bytes are counted from the start of the text."""

    rows: np.ndarray  # int64
    entries: np.ndarray  # int64, index of the n-gram
    starts: np.ndarray  # int64, bytes
    ends: np.ndarray  # int64, bytes


@dataclass(frozen=True)
class NgramIndex:
    """`ids[text] = (benchmark, item, field)`; n-gram e belongs to `texts[e]`, text t has `totals[t]` of them."""

    anchor: int
    bits: np.ndarray  # uint64, power of two words
    hashes: np.ndarray  # uint64[anchors], sorted
    first: np.ndarray  # int64[anchors + 1]: the n-grams of each anchor
    starts: np.ndarray  # int64[ngrams] into codes
    ends: np.ndarray  # int64[ngrams]
    codes: np.ndarray  # uint32, the tokens of all texts, each closed by a zero
    texts: np.ndarray  # int32[ngrams]
    totals: np.ndarray  # int64[texts]
    ids: list[tuple[str, str, str]]
    skipped: dict[str, int]  # benchmark -> texts too short to be told from chance

    def ngram(self, entry: int) -> str:
        """The n-gram as normalised text."""
        codes = self.codes[self.starts[entry] : self.ends[entry] - 1].tolist()
        return "".join(" " if code == _END else chr(code) for code in codes)

    def find(self, texts: pa.Array | pa.ChunkedArray) -> tuple[Hits, np.ndarray, np.ndarray]:
        """All n-grams in each text, and the (bytes, offsets) that the positions refer to (NFC where a row needs it)."""
        data, offsets = compose(texts)
        capacity = 1 << 12
        while True:
            out = np.empty((capacity, 4), np.int64)
            found = _scan(
                data,
                offsets,
                code_table(),
                self.anchor,
                self.bits,
                self.hashes,
                self.first,
                self.starts,
                self.ends,
                self.codes,
                out,
            )
            if found <= capacity:
                columns = np.ascontiguousarray(out[:found].T)
                return Hits(*columns), data, offsets
            capacity = found


def build_index(items: Iterable[tuple[str, str, str, str]], lengths: Lengths, template_items: int | None) -> NgramIndex:
    """Index (benchmark, item id, field, text) tuples.

    A text of at least `words` (or `characters`) tokens gives its n-grams, a shorter one of at least `short_*` tokens is one
    n-gram by itself, still shorter ones are counted in `skipped`. N-grams that more than `template_items` items of a
    benchmark share are its template ("which of the following statements ...") and left out.
    """
    ids: list[tuple[str, str, str]] = []
    pieces, starts, ends = [np.empty(0, np.uint32)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    skipped: Counter[str] = Counter()
    used = 0
    for benchmark, item, field, text in items:
        codes, bounds = _closed_tokens(text)
        count = len(bounds) - 1
        unspaced = int(((code_table()[codes[bounds[:-1]]] & UNSPACED) != 0).sum()) * 2 > count
        n, short = (lengths.characters, lengths.short_characters) if unspaced else (lengths.words, lengths.short_words)
        if count < min(n, short):
            skipped[benchmark] += bool(text.strip())
            continue
        n = min(n, count)
        ids.append((benchmark, item, field))
        pieces.append(codes)
        starts.append(bounds[: count - n + 1] + used)
        ends.append(bounds[n:] + used)
        used += len(codes)
    sizes = [len(own) for own in starts[1:]]
    texts = np.repeat(np.arange(len(ids), dtype=np.int32), sizes)
    codes, first, last = np.concatenate(pieces), np.concatenate(starts), np.concatenate(ends)
    hashes = _hash_grams(codes, first, last, lengths.anchor)
    keep = _distinct(texts, hashes, ids, template_items)
    keep = keep[np.argsort(hashes[keep, 0], kind="stable")]
    keys, begins = np.unique(hashes[keep, 0], return_index=True)
    bits = np.zeros(1 << max(6, (len(keys) * 32 // 64).bit_length()), np.uint64)
    _set_bits(keys, bits)
    return NgramIndex(
        lengths.anchor, bits, keys, np.append(begins, len(keep)).astype(np.int64), first[keep], last[keep], codes, texts[keep],
        np.bincount(texts[keep], minlength=len(ids)), ids, dict(skipped),
    )  # fmt: skip


def _distinct(texts: np.ndarray, hashes: np.ndarray, ids: list[tuple[str, str, str]], template_items: int | None) -> np.ndarray:
    """The n-grams to keep, int64: each once in a text, and none that is in more than `template_items` items."""
    items = np.unique([f"{benchmark}\0{item}" for benchmark, item, _ in ids] or [""], return_inverse=True)[1]
    benchmarks = np.unique([benchmark for benchmark, _, _ in ids] or [""], return_inverse=True)[1]
    rows = np.column_stack([texts.astype(np.uint64), hashes[:, 1:]])
    keep: np.ndarray = np.sort(np.unique(rows, axis=0, return_index=True)[1])
    if template_items is None or not len(keep):
        return keep
    owner = texts[keep]
    holders = np.column_stack([benchmarks[owner].astype(np.uint64), hashes[keep, 1:], items[owner].astype(np.uint64)])
    held = np.unique(holders, axis=0)
    grams, counts = np.unique(held[:, :3], axis=0, return_counts=True)
    _, codes = np.unique(np.concatenate([grams, holders[:, :3]]), axis=0, return_inverse=True)
    return keep[counts[codes.reshape(-1)[len(grams) :]] <= template_items]


def _closed_tokens(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint32 of the tokens, a zero after each; where each token starts, and the end, int64[tokens + 1])."""
    data, offsets = compose(pa.array([text], pa.large_string()))
    size = int(offsets[1] - offsets[0])
    codes, starts = np.zeros(size, np.uint32), np.zeros(size, np.int64)
    n_codes, n_tokens = normalise_row(data, offsets[0], offsets[1], code_table(), WORDS, True, codes, starts)
    bounds = np.append(starts[:n_tokens], n_codes) + np.arange(n_tokens + 1)
    closed = np.zeros(n_codes + n_tokens, np.uint32)
    inside = np.ones(len(closed), bool)
    inside[bounds[1:] - 1] = False
    closed[inside] = codes[:n_codes]
    return closed, bounds


def tokenise(text: str) -> list[str]:
    """The normalised tokens of one text: a word of a spaced script, or one character of another."""
    codes, bounds = _closed_tokens(text)
    return ["".join(map(chr, codes[a : b - 1].tolist())) for a, b in itertools.pairwise(bounds.tolist())]


@nb.njit(inline="always")
def _finish(h: np.uint64) -> np.uint64:
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


@nb.njit(cache=True, nogil=True)
def _hash_grams(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, anchor: int) -> np.ndarray:
    """uint64[ngrams, 3]: the hash of the first `anchor` tokens, and two of the whole n-gram."""
    out = np.empty((len(starts), 3), np.uint64)
    for gram in range(len(starts)):
        total, h, tokens = np.uint64(0), _SEED, 0
        first, second = _SEED, _STEP
        for i in range(starts[gram], ends[gram]):
            code = np.uint64(codes[i])
            first = (first ^ code) * _STEP
            second = _finish(second + code)
            if code != 0:
                h = (h ^ code) * _STEP
                continue
            if tokens < anchor:
                total = total * _STEP + _finish(h)
            h = _SEED
            tokens += 1
        out[gram, 0], out[gram, 1], out[gram, 2] = _finish(total), _finish(first), second
    return out


@nb.njit(cache=True, nogil=True)
def _set_bits(hashes: np.ndarray, bits: np.ndarray) -> None:
    mask = np.uint64(len(bits) - 1)
    for h in hashes:
        bits[(h >> np.uint64(6)) & mask] |= np.uint64(1) << (h & np.uint64(63))


@nb.njit(cache=True, nogil=True)
def _ends_at(data: np.ndarray, position: int, end: int, table: np.ndarray, codes: np.ndarray, first: int, last: int) -> int:
    """Where the n-gram codes[first:last] ends if it stands at `position` (a token's start), else -1."""
    at, inside, stop = first, False, position
    while position < end:
        point, width = decode(data, position)
        entry = table[point]
        position += width
        if entry == DROPPED:
            continue
        if entry == SEPARATOR or (entry & UNSPACED) != 0:
            if inside:
                if codes[at] != _END:
                    return -1
                at += 1
                inside = False
                if at == last:
                    return stop
            if entry == SEPARATOR:
                continue
            if codes[at] != entry & CODE:
                return -1
            at += 2  # a character by itself: its code and the end of the token
            stop = position
            if at == last:
                return stop
            continue
        if codes[at] != entry & CODE:  # also where the n-gram's token ends before the text's
            return -1
        at += 1
        inside = True
        stop = position
    if inside and codes[at] == _END and at + 1 == last:
        return stop
    return -1


@nb.njit(cache=True, nogil=True)
def _probe(
    data: np.ndarray, start: int, end: int, table: np.ndarray, key: np.uint64, hashes: np.ndarray, first: np.ndarray,
    starts: np.ndarray, ends: np.ndarray, codes: np.ndarray, row: int, begin: int, out: np.ndarray, found: int,
) -> int:  # fmt: skip
    """Write the n-grams with this anchor that do stand at `start`; the new number of hits."""
    at = np.searchsorted(hashes, key)
    if at == len(hashes) or hashes[at] != key:
        return found
    for entry in range(first[at], first[at + 1]):
        stop = _ends_at(data, start, end, table, codes, starts[entry], ends[entry])
        if stop >= 0:
            if found < len(out):
                out[found, 0], out[found, 1], out[found, 2], out[found, 3] = row, entry, start - begin, stop - begin
            found += 1
    return found


@nb.njit(cache=True, nogil=True)
def _scan(
    data: np.ndarray, text_offsets: np.ndarray, table: np.ndarray, anchor: int, bits: np.ndarray, hashes: np.ndarray,
    first: np.ndarray, gram_starts: np.ndarray, gram_ends: np.ndarray, codes: np.ndarray, out: np.ndarray,
) -> int:  # fmt: skip
    """Fill `out` int64[capacity, 4] with (row, n-gram, start, end); returns how many there are, even beyond its capacity."""
    leaving, mask = np.uint64(1), np.uint64(len(bits) - 1)
    for _ in range(anchor):
        leaving *= _STEP
    values, starts = np.zeros(anchor, np.uint64), np.zeros(anchor, np.int64)
    found = 0
    for row in range(len(text_offsets) - 1):
        begin, end = text_offsets[row], text_offsets[row + 1]
        position, total, count, slot, inside, h, token_start = begin, np.uint64(0), 0, 0, False, _SEED, begin
        while position <= end:
            alone, width, entry = False, 1, SEPARATOR
            if position < end:
                if data[position] < 0x80:
                    entry = table[data[position]]
                else:
                    point, width = decode(data, position)
                    entry = table[point]
                if entry == DROPPED:
                    position += width
                    continue
                alone = (entry & UNSPACED) != 0
                if entry != SEPARATOR and not alone:
                    if not inside:
                        h, inside, token_start = _SEED, True, position
                    h = (h ^ np.uint64(entry & CODE)) * _STEP
                    position += width
                    while position < end and data[position] < 0x80 and table[data[position]] > SEPARATOR:  # the word's ASCII
                        h = (h ^ np.uint64(table[data[position]] & CODE)) * _STEP
                        position += 1
                    continue
                if entry == SEPARATOR and not inside:
                    position += width
                    continue
            for which in range(2):  # the word that ends here, then the character that stands alone
                if which == 0 and not inside:
                    continue
                if which == 1:
                    if not alone:
                        break
                    h, token_start = (_SEED ^ np.uint64(entry & CODE)) * _STEP, position
                value = _finish(h)
                total = total * _STEP + value
                if count >= anchor:
                    total -= values[slot] * leaving
                values[slot], starts[slot] = value, token_start
                slot = slot + 1 if slot + 1 < anchor else 0
                count += 1
                inside = False
                if count < anchor:
                    continue
                key = _finish(total)
                if (bits[(key >> np.uint64(6)) & mask] >> (key & np.uint64(63))) & np.uint64(1):
                    found = _probe(
                        data, starts[slot], end, table, key, hashes, first, gram_starts, gram_ends, codes, row, begin, out, found
                    )
            position += width
    return found
