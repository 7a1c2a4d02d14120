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
    offsets: np.ndarray  # int64[ngrams + 1] into codes
    codes: np.ndarray  # uint32
    texts: np.ndarray  # int32[ngrams]
    totals: np.ndarray  # int64[texts]
    ids: list[tuple[str, str, str]]
    skipped: dict[str, int]  # benchmark -> texts too short to be told from chance

    def ngram(self, entry: int) -> str:
        """The n-gram as normalised text."""
        codes = self.codes[self.offsets[entry] : self.offsets[entry + 1] - 1].tolist()
        return "".join(" " if code == _END else chr(code) for code in codes)

    def find(self, texts: pa.Array | pa.ChunkedArray) -> tuple[Hits, np.ndarray, np.ndarray]:
        """All n-grams in each text, and the (bytes, offsets) that the positions refer to (NFC where a row needs it)."""
        data, offsets = compose(texts)
        capacity = 1 << 12
        while True:
            out = np.empty((capacity, 4), np.int64)
            found = _scan(
                data, offsets, code_table(), self.anchor, self.bits, self.hashes, self.first, self.offsets, self.codes, out
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
    grams: list[list[bytes]] = []
    skipped: Counter[str] = Counter()
    for benchmark, item, field, text in items:
        tokens = tokenise(text)
        unspaced = sum(_is_unspaced(token) for token in tokens) * 2 > len(tokens)
        n, short = (lengths.characters, lengths.short_characters) if unspaced else (lengths.words, lengths.short_words)
        if len(tokens) < min(n, short):
            skipped[benchmark] += bool(text.strip())
            continue
        n = min(n, len(tokens))
        pieces = [_encode(token) for token in tokens]
        ids.append((benchmark, item, field))
        grams.append(list(dict.fromkeys(b"".join(pieces[i : i + n]) for i in range(len(pieces) - n + 1))))
    if template_items is not None:
        grams = _without_templates(ids, grams, template_items)
    return _pack(lengths.anchor, ids, grams, dict(skipped))


def _without_templates(ids: list[tuple[str, str, str]], grams: list[list[bytes]], limit: int) -> list[list[bytes]]:
    holders: dict[tuple[str, bytes], set[str]] = {}
    for (benchmark, item, _), own in zip(ids, grams, strict=True):
        for gram in own:
            holders.setdefault((benchmark, gram), set()).add(item)
    return [
        [gram for gram in own if len(holders[benchmark, gram]) <= limit] for (benchmark, _, _), own in zip(ids, grams, strict=True)
    ]


def _pack(anchor: int, ids: list[tuple[str, str, str]], grams: list[list[bytes]], skipped: dict[str, int]) -> NgramIndex:
    flat = [np.frombuffer(gram, np.uint32) for own in grams for gram in own]
    texts = np.repeat(np.arange(len(grams), dtype=np.int32), [len(own) for own in grams])
    keys = np.array([_anchor_hash(codes, anchor) for codes in flat], np.uint64)
    order = np.argsort(keys, kind="stable")
    flat = [flat[i] for i in order]
    offsets = np.zeros(len(flat) + 1, np.int64)
    np.cumsum([len(codes) for codes in flat], out=offsets[1:])
    hashes, first = np.unique(keys[order], return_index=True)
    words = 1 << max(6, (len(hashes) * 32 // 64).bit_length())
    bits = np.zeros(words, np.uint64)
    _set_bits(hashes, bits)
    return NgramIndex(
        anchor, bits, hashes, np.append(first, len(flat)).astype(np.int64), offsets,
        np.concatenate([np.empty(0, np.uint32), *flat]), texts[order], np.array([len(own) for own in grams], np.int64),
        ids, skipped,
    )  # fmt: skip


def tokenise(text: str) -> list[str]:
    """The normalised tokens of one text: a word of a spaced script, or one character of another."""
    data, offsets = compose(pa.array([text], pa.large_string()))
    size = int(offsets[1] - offsets[0])
    codes, starts = np.zeros(size, np.uint32), np.zeros(size, np.int64)
    n_codes, n_tokens = normalise_row(data, offsets[0], offsets[1], code_table(), WORDS, True, codes, starts)
    edges = [*starts[:n_tokens].tolist(), n_codes]
    characters = [chr(code) for code in codes[:n_codes].tolist()]
    return ["".join(characters[a:b]) for a, b in itertools.pairwise(edges)]


def _is_unspaced(token: str) -> bool:
    return bool(code_table()[ord(token[0])] & UNSPACED)


def _encode(token: str) -> bytes:
    return np.array([*map(ord, token), _END], np.uint32).tobytes()


@nb.njit(inline="always")
def _finish(h: np.uint64) -> np.uint64:
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


@nb.njit(cache=True, nogil=True)
def _anchor_hash(codes: np.ndarray, anchor: int) -> np.uint64:
    total, h, tokens = np.uint64(0), _SEED, 0
    for code in codes:
        if code != _END:
            h = (h ^ np.uint64(code)) * _STEP
            continue
        total = total * _STEP + _finish(h)
        h, tokens = _SEED, tokens + 1
        if tokens == anchor:
            break
    return _finish(total)


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
    offsets: np.ndarray, codes: np.ndarray, row: int, begin: int, out: np.ndarray, found: int,
) -> int:  # fmt: skip
    """Write the n-grams with this anchor that do stand at `start`; the new number of hits."""
    at = np.searchsorted(hashes, key)
    if at == len(hashes) or hashes[at] != key:
        return found
    for entry in range(first[at], first[at + 1]):
        stop = _ends_at(data, start, end, table, codes, offsets[entry], offsets[entry + 1])
        if stop >= 0:
            if found < len(out):
                out[found, 0], out[found, 1], out[found, 2], out[found, 3] = row, entry, start - begin, stop - begin
            found += 1
    return found


@nb.njit(cache=True, nogil=True)
def _scan(
    data: np.ndarray, text_offsets: np.ndarray, table: np.ndarray, anchor: int, bits: np.ndarray, hashes: np.ndarray,
    first: np.ndarray, offsets: np.ndarray, codes: np.ndarray, out: np.ndarray,
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
                    found = _probe(data, starts[slot], end, table, key, hashes, first, offsets, codes, row, begin, out, found)
            position += width
    return found
