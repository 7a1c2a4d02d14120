"""Where each document goes: plans that cut and place documents of known token counts into sequences of one length.

A plan is four arrays over pieces, a piece being a run of tokens of one document: its document, its first token in that
document, its tokens, and for each sequence the index of its first piece. Both plans place every token once.

`best_fit` is best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830):
only a document longer than a sequence is cut. `concatenate` is the usual stream, cut at every `length` tokens. On 1,000
English and 1,000 Chinese web documents (4.75 M tokens, median 862 a document, one window of 2,000):

    length   documents cut, %             padding, %
             best_fit   concatenate       best_fit   concatenate
       512       66.0          85.6          0.141         0.001
     1,024       45.4          69.3          0.044         0.001
     2,048       29.1          52.7          0.066         0.023
     8,192        6.3          23.2          0.152         0.152

Windows of 1,024 documents pad 0.11 to 0.32 % under best_fit and cut the same documents, so the window may stay small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np

Method = Literal["best_fit", "concatenate"]


@dataclass(frozen=True)
class Layout:
    """`document`, `offset`, `tokens`: int64[pieces]. `start`: int64[sequences + 1], indices into the pieces.

    Pieces of a sequence are in order of their documents, sequences in order of their first piece.
    """

    document: np.ndarray
    offset: np.ndarray
    tokens: np.ndarray
    start: np.ndarray

    @property
    def sequences(self) -> int:
        return len(self.start) - 1


def place(lengths: np.ndarray, length: int, method: Method) -> Layout:
    """Plan documents of `lengths` tokens (int64[documents]) into sequences of `length` tokens."""
    counts = np.ascontiguousarray(lengths, np.int64)
    return Layout(*(_best_fit(counts, length) if method == "best_fit" else _concatenate(counts, length)))


@numba.njit(cache=True, nogil=True)
def _bins(remainders: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """(bin of each document, -1 where the remainder is 0; number of bins), best fit in order of decreasing remainder."""
    documents = len(remainders)
    by_size = np.zeros(length + 2, np.int64)
    for size in remainders:
        by_size[length - size + 1] += 1
    for slot in range(1, length + 2):
        by_size[slot] += by_size[slot - 1]
    order = np.empty(documents, np.int64)
    for document in range(documents):
        slot = length - remainders[document]
        order[by_size[slot]] = document
        by_size[slot] += 1

    bin_of = np.full(documents, -1, np.int64)
    head = np.full(length + 1, -1, np.int64)  # bins by the room they have left, the last changed first
    following = np.empty(documents, np.int64)
    occupied = np.zeros(length // 64 + 2, np.uint64)  # one bit for each room that some bin has
    bins = 0
    for largest in order:
        size = int(remainders[largest])
        if size == 0:
            break
        word = size >> 6
        bits = occupied[word] >> np.uint64(size & 63) << np.uint64(size & 63)
        while bits == 0 and word + 1 < len(occupied):
            word += 1
            bits = occupied[word]
        if bits == 0:
            chosen, room = bins, length
            bins += 1
        else:
            room = 64 * word
            while not bits & np.uint64(1):
                bits >>= np.uint64(1)
                room += 1
            chosen = head[room]
            head[room] = following[chosen]
            if head[room] < 0:
                occupied[room >> 6] &= ~(np.uint64(1) << np.uint64(room & 63))
        bin_of[largest] = chosen
        room -= size
        if room > 0:
            following[chosen] = head[room]
            head[room] = chosen
            occupied[room >> 6] |= np.uint64(1) << np.uint64(room & 63)
    return bin_of, bins


@numba.njit(cache=True, nogil=True)
def _best_fit(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    remainders = lengths % length
    bin_of, bins = _bins(remainders, length)
    member_start = np.zeros(bins + 1, np.int64)
    for chosen in bin_of:
        if chosen >= 0:
            member_start[chosen + 1] += 1
    member_start = np.cumsum(member_start)
    filled = member_start.copy()
    members = np.empty(member_start[-1], np.int64)
    for document in range(len(lengths)):
        if bin_of[document] >= 0:
            members[filled[bin_of[document]]] = document
            filled[bin_of[document]] += 1

    whole = 0
    for tokens in lengths:
        whole += tokens // length
    pieces = whole + len(members)
    piece_document, piece_offset, piece_tokens = np.empty(pieces, np.int64), np.empty(pieces, np.int64), np.empty(pieces, np.int64)
    start = np.zeros(whole + bins + 1, np.int64)
    piece, sequence = 0, 0
    for document in range(len(lengths)):
        for index in range(lengths[document] // length):
            piece_document[piece], piece_offset[piece], piece_tokens[piece] = document, index * length, length
            piece += 1
            sequence += 1
            start[sequence] = piece
        chosen = bin_of[document]
        if chosen >= 0 and members[member_start[chosen]] == document:
            for member in members[member_start[chosen] : member_start[chosen + 1]]:
                piece_document[piece], piece_tokens[piece] = member, remainders[member]
                piece_offset[piece] = lengths[member] - remainders[member]
                piece += 1
            sequence += 1
            start[sequence] = piece
    return piece_document, piece_offset, piece_tokens, start


@numba.njit(cache=True, nogil=True)
def _concatenate(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    total = lengths.sum()
    sequences = (total + length - 1) // length
    most = len(lengths) + sequences
    piece_document, piece_offset, piece_tokens = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    start = np.zeros(sequences + 1, np.int64)
    piece, sequence, room = 0, 0, length
    for document in range(len(lengths)):
        done = 0
        while done < lengths[document]:
            tokens = min(room, lengths[document] - done)
            piece_document[piece], piece_offset[piece], piece_tokens[piece] = document, done, tokens
            piece += 1
            done += tokens
            room -= tokens
            if room == 0:
                sequence += 1
                start[sequence] = piece
                room = length
    if sequence < sequences:
        start[sequences] = piece
    return piece_document[:piece], piece_offset[:piece], piece_tokens[:piece], start
