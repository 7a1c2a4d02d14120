"""Where two texts differ: words of languages that write spaces, single characters of those that do not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rapidfuzz.distance import Indel

# Han, kana and Hangul stand alone; other letters and digits form words; each space run and each sign is a token
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+|\s+|."
)
MAX_TOKENS = 2000  # the alignment is quadratic
_CONTEXT = 90  # characters kept on either side of a change


@dataclass(frozen=True)
class Piece:
    """`kind` is same, kept (only in the first text), removed (only in the second), gap (`text` is not shown), or cut."""

    kind: str
    text: str


def tokens(text: str) -> list[str]:
    """The units that are compared; joined they are the text."""
    return _TOKEN.findall(text)


def difference(kept: str, removed: str, clipped: bool = False) -> list[Piece]:
    """The two texts as one, change by change, by a longest common subsequence of their first `MAX_TOKENS` tokens.

    Long equal stretches become gaps. Where the texts are `clipped` beginnings, a change at their very end only tells
    where they were cut: it is left out and a piece `cut` stands for the rest.
    """
    first, second = tokens(kept), tokens(removed)
    clipped = clipped or len(first) > MAX_TOKENS or len(second) > MAX_TOKENS
    first, second = first[:MAX_TOKENS], second[:MAX_TOKENS]
    pieces: list[Piece] = []
    left, right = "", ""  # the change that is being collected
    operations = list(Indel.opcodes(first, second))
    for index, step in enumerate(operations):
        if step.tag != "equal":
            left += "".join(first[step.src_start : step.src_end])
            right += "".join(second[step.dest_start : step.dest_end])
            continue
        same = "".join(first[step.src_start : step.src_end])
        if (left or right) and index + 1 < len(operations) and not same.strip():
            left, right = left + same, right + same  # a mere space between two changes reads better inside one
            continue
        pieces += _changes(left, right)
        pieces.append(Piece("same", same))
        left, right = "", ""
    if not clipped:
        pieces += _changes(left, right)
    short_pieces = [short for index, piece in enumerate(pieces) for short in _shorten(piece, index == 0, index == len(pieces) - 1)]
    return [*short_pieces, Piece("cut", "")] if clipped else short_pieces


def _changes(left: str, right: str) -> list[Piece]:
    return [piece for piece in (Piece("kept", left), Piece("removed", right)) if piece.text]


def _shorten(piece: Piece, is_first: bool, is_last: bool) -> list[Piece]:
    """An equal stretch with its middle (or its outer end) left out."""
    head, tail = (0 if is_first and not is_last else _CONTEXT), (0 if is_last and not is_first else _CONTEXT)
    if is_first and is_last:
        head, tail = 2 * _CONTEXT, 0  # texts without a difference: a beginning will do
    hidden = len(piece.text) - head - tail
    if piece.kind != "same" or hidden < 40:
        return [piece]
    parts = [Piece("same", piece.text[:head]), Piece("gap", piece.text[head : head + hidden])]
    parts.append(Piece("same", piece.text[head + hidden :]))
    return [part for part in parts if part.text]
