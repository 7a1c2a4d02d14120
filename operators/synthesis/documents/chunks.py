"""Documents cut into chunks along their structure, each a stretch of characters: `text[start:end]`, nothing rewritten.

Lines are read once into blocks: headings (Markdown `#` and underlines, reST underlines and overlines, 第X章), fenced code,
list items, paragraphs. Blocks that are too long are cut at sentence ends (English and Chinese), then at line ends, then at
spaces, then anywhere; code only at line ends first. Then blocks are packed into chunks: a heading opens a new chunk once
the present one is half full, never closes one, and each chunk that continues a section begins with the last sentences of
the one before it (the overlap).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from operators.config import Settings

_LINE = re.compile(r"[^\n]*\n|[^\n]+\Z")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?[ \t]*#*[ \t]*\r?\n?\Z")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_RULE = re.compile(r"([=\-~^\"'`#*+.:_<>])\1{2,}[ \t]*\r?\n?\Z")
_ITEM = re.compile(
    r"[ \t]*(?:[-*+•·]|\(?\d{1,3}[.)、）]|[（(][一二三四五六七八九十\d]{1,3}[)）]|[一二三四五六七八九十]{1,3}、)"
    r"(?:[ \t]|(?<=[、）]))"
)
_CHAPTER = re.compile(r"[ \t\u3000]*(第[一二三四五六七八九十百零〇\d]{1,6}([章节節篇部编卷])[^。！？\n]{0,40})\r?\n?\Z")
_SENTENCE = re.compile(
    "(?<![.!?…\\s])[.!?…]++[\"'”’»)\\]]*+(?=\\s)"  # the look-behind keeps runs of dots linear
    "|(?<![。！？；])[。！？；]++[”’」』）)】》]*+"
)
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|cf|vs|etc|al|Mr|Mrs|Ms|Dr|Prof|St|Fig|Eq|Sec|No|Vol|pp?|[A-Z])\.\Z")
_WIDE = re.compile("[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6]")
_JOINED = re.compile("[\u0300-\u036f\u200d\ufe00-\ufe0f\U0001f3fb-\U0001f3ff\U000e0100-\U000e01ef\n]")
_TITLE = 120  # characters of a heading that a chunk carries along


class ChunkSettings(Settings):
    """How documents are cut. Lengths are tokens of `tokenizer`."""

    max_tokens: int = Field(default=512, ge=16, description="longest chunk, overlap included")
    overlap_tokens: int = Field(default=64, ge=0, description="at most this much of the chunk before is repeated")
    min_tokens: int = Field(default=48, ge=1, description="shorter chunks are left out, if they cannot join the one before")
    tokenizer: str = Field(
        default="auto",
        description="what counts tokens: `auto` (the generator's own tokenizer, the estimate for an endpoint), `estimate`"
        " (.3 a character, 1 a Chinese one), or the path of a tokenizer.json",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.overlap_tokens * 2 > self.max_tokens:
            raise ValueError(f"overlap_tokens {self.overlap_tokens} may be at most half of max_tokens {self.max_tokens}")
        return self


@dataclass(frozen=True)
class Chunk:
    """Characters [start, end) of a document, the titles of the sections they lie in, and how long they are."""

    start: int
    end: int
    headings: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class _Block:
    start: int
    end: int
    kind: str  # heading, code, text
    level: int = 0
    title: str = ""


def chunk(text: str, counts: np.ndarray, settings: ChunkSettings) -> tuple[list[Chunk], int]:
    """(chunks in their order, number of chunks left out because they are shorter than `min_tokens`).

    `counts` is int64[len(text) + 1] (see token_counts). All that is no white space lies in some chunk, or in one that was
    left out. Time is linear in the text.
    """
    cost = _Cost(counts)
    blocks = [piece for block in _blocks(text) for piece in _fitted(text, block, cost, settings)]
    bodies = _packed(text, blocks, cost, settings)
    found: list[Chunk] = []
    short = 0
    previous = 0
    for body in bodies:
        if not text[body.start : body.end].strip():
            continue
        start = body.start
        if body.continues and settings.overlap_tokens:
            room = min(settings.overlap_tokens, settings.max_tokens - cost(body.start, body.end))
            start = _overlap(text, previous, body.start, cost, room)
        stretch = text[start : body.end]
        first = start + len(stretch) - len(stretch.lstrip())
        last = body.end - (len(stretch) - len(stretch.rstrip()))
        previous = first
        tokens = cost(first, last)
        if tokens < settings.min_tokens:
            short += 1
            continue
        found.append(Chunk(first, last, body.headings, tokens))
    return found, short


class _Cost:
    """Tokens of a stretch, and how far a number of tokens reaches."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts

    def __call__(self, start: int, end: int) -> int:
        return int(self.counts[end] - self.counts[start])

    def reach(self, start: int, tokens: int) -> int:
        """The furthest end whose stretch from `start` has at most so many tokens; past `start`, whatever it costs."""
        end = int(np.searchsorted(self.counts, self.counts[start] + tokens, side="right")) - 1
        return max(end, start + 1)

    def back(self, end: int, tokens: int) -> int:
        """The earliest start whose stretch up to `end` has at most so many tokens."""
        return int(np.searchsorted(self.counts, self.counts[end] - tokens, side="left"))


def _blocks(text: str) -> list[_Block]:
    """The blocks of a text, end to end; empty lines belong to the block before them."""
    found: list[_Block] = []
    styles: list[str] = []  # reST: underline characters in the order of their first use are the levels
    start, first_line = 0, ""  # of the open paragraph
    lines = 0  # of the open paragraph
    fence = ""
    blank = False
    position = 0
    overline: tuple[int, str] | None = None

    def close(end: int) -> None:
        nonlocal start, lines
        if end > start:
            found.append(_Block(start, end, "text"))
        start, lines = end, 0

    for match in _LINE.finditer(text):
        line, position = match.group(), match.end()
        if fence:
            if line.lstrip(" ").startswith(fence) and not line.strip().strip(fence[0]):
                found.append(_Block(start, position, "code"))
                start, lines, fence = position, 0, ""
            continue
        if not line.strip():
            blank = True
            continue
        opened = _FENCE.match(line)
        if opened:
            close(match.start())
            fence, blank, overline = opened.group(1), False, None
            continue
        head = _ATX.match(line) or _CHAPTER.match(line)
        if head is not None:
            close(match.start())
            hashes = head.group(1) if head.re is _ATX else ""
            level = len(hashes) if hashes else 1 + (head.group(2) in "节節")
            title = (head.group(2) or "") if hashes else head.group(1)
            found.append(_Block(start, position, "heading", level, title.strip()[:_TITLE]))
            start, lines, blank, overline = position, 0, False, None
            continue
        rule = _RULE.match(line)
        if rule is not None and lines == 1 and not blank and len(line.rstrip()) >= min(3 + _width(first_line) // 2, 40):
            mark = rule.group(1)
            if overline is not None and overline[1] == mark:
                start, mark = overline[0], mark * 2
            if mark not in styles:
                styles.append(mark)
            found.append(_Block(start, position, "heading", styles.index(mark) + 1, first_line.strip()[:_TITLE]))
            start, lines, overline = position, 0, None
            continue
        if rule is not None and (blank or lines == 0):
            close(match.start())
            overline, blank = (match.start(), rule.group(1)), False
            continue
        if blank or _ITEM.match(line):
            if not (overline is not None and lines == 0 and not blank):
                close(match.start())
                overline = None
            blank = False
        if lines == 0:
            first_line = line
        lines += 1
        if lines > 1:
            overline = None
    if fence:  # never closed: code to the end
        found.append(_Block(start, position, "code"))
    else:
        close(len(text))
    return _whole(found, len(text))


def _whole(blocks: list[_Block], length: int) -> list[_Block]:
    """Blocks that leave no gap: each reaches to the next one's start, the first begins at 0."""
    edges = [0, *(block.start for block in blocks[1:]), length]
    return [
        _Block(edges[place], edges[place + 1], block.kind, block.level, block.title)
        for place, block in enumerate(blocks)
        if edges[place + 1] > edges[place]
    ]


def _width(line: str) -> int:
    """Columns of a line; wide characters take two."""
    return len(line.rstrip()) + len(_WIDE.findall(line))


def _fitted(text: str, block: _Block, cost: _Cost, settings: ChunkSettings) -> Iterator[_Block]:
    """The block, or pieces of it that fit. Code may fill a whole chunk, other pieces leave room for the overlap."""
    room = settings.max_tokens - (0 if block.kind == "code" else settings.overlap_tokens)
    if cost(block.start, block.end) <= room:
        yield block
        return
    kind = "code" if block.kind == "code" else "text"
    cuts = [_line_ends] if kind == "code" else [_sentence_ends, _line_ends]
    for place, (start, end) in enumerate(_cut(text, block.start, block.end, cost, room, cuts)):
        if block.kind == "heading" and place == 0:
            yield _Block(start, end, "heading", block.level, block.title)
        else:
            yield _Block(start, end, kind)


def _cut(text: str, start: int, end: int, cost: _Cost, room: int, cuts: list) -> Iterator[tuple[int, int]]:  # type: ignore[type-arg]
    """Stretches of at most `room` tokens: joined pieces of the first way to cut, pieces too long cut the next way."""
    if cost(start, end) <= room:
        yield start, end
        return
    if not cuts:
        while start < end:
            stop = min(end, cost.reach(start, room))
            if stop < end:
                stop = _hard_cut(text, start, stop)
            yield start, stop
            start = stop
        return
    first = start
    for edge in [*cuts[0](text, start, end), end]:
        if cost(first, edge) <= room:
            start = edge
            continue
        if start > first:
            yield first, start
            first = start
        if cost(first, edge) > room:
            yield from _cut(text, first, edge, cost, room, cuts[1:])
            first = edge
        start = edge
    if start > first:
        yield first, start


def _sentence_ends(text: str, start: int, end: int) -> list[int]:
    """Where sentences end inside (start, end), a little after the mark: at the next sentence's first character."""
    found = []
    for match in _SENTENCE.finditer(text, start, end):
        stop = match.end()
        if text[stop - 1] == "." and _ABBREVIATION.search(text, max(start, stop - 8), stop):
            continue
        while stop < end and text[stop].isspace():
            stop += 1
        if start < stop < end:
            found.append(stop)
    return found


def _line_ends(text: str, start: int, end: int) -> list[int]:
    found = []
    place = text.find("\n", start, end)
    while place >= 0:
        if place + 1 < end:
            found.append(place + 1)
        place = text.find("\n", place + 1, end)
    return found


def _hard_cut(text: str, start: int, stop: int) -> int:
    """A place at or before `stop` to cut where nothing better is: after a space in the last half, else between characters
    that do not belong together (combining marks, joiners, the halves of a line end)."""
    space = max(text.rfind(" ", start + (stop - start) // 2, stop), text.rfind("\t", start + (stop - start) // 2, stop))
    if space > start:
        return space + 1
    for place in range(stop, max(start + 1, stop - 16), -1):
        if not _JOINED.match(text[place]) and text[place - 1] != "\u200d":
            return place
    return stop


@dataclass
class _Body:
    """A chunk before its overlap is added. `continues`: it goes on in the middle of a section."""

    start: int
    end: int
    headings: tuple[str, ...]
    continues: bool


def _packed(text: str, blocks: list[_Block], cost: _Cost, settings: ChunkSettings) -> list[_Body]:
    room = settings.max_tokens - settings.overlap_tokens
    bodies: list[_Body] = []
    path: list[tuple[int, str]] = []
    held: list[tuple[_Block, tuple[str, ...]]] = []  # blocks of the open chunk, with the titles over each

    def close() -> None:
        if held:
            opening, titles = held[0]
            continues = bool(bodies) and opening.kind != "heading"
            bodies.append(_Body(opening.start, held[-1][0].end, titles, continues))
            held.clear()

    for block in blocks:
        if block.kind == "heading":
            while path and path[-1][0] >= block.level:
                path.pop()
        titles = tuple(title for _, title in path if title)
        if block.kind == "heading":
            path.append((block.level, block.title))
        if held:
            size = cost(held[0][0].start, held[-1][0].end)
            full = cost(held[0][0].start, block.end) > room
            opens = block.kind == "heading" and held[-1][0].kind != "heading" and size >= room // 2
            if full or opens:
                moved = []
                while full and len(held) > 1 and _leads(text, last := held[-1][0]):
                    if cost(last.start, block.end) > room or cost(last.start, block.start) > room // 4:
                        break
                    moved.append(held.pop())
                close()
                held += reversed(moved)
        held.append((block, titles))
    close()
    if len(bodies) > 1:
        tail, before = bodies[-1], bodies[-2]
        if cost(tail.start, tail.end) < settings.min_tokens and cost(before.start, tail.end) <= room:
            bodies[-2:] = [_Body(before.start, tail.end, before.headings, before.continues)]
    return bodies


def _leads(text: str, block: _Block) -> bool:
    """A heading, or a paragraph that ends with a colon: belongs to what follows."""
    return block.kind == "heading" or (block.kind == "text" and text[block.start : block.end].rstrip().endswith((":", "：")))


def _overlap(text: str, earliest: int, start: int, cost: _Cost, room: int) -> int:
    """Where a chunk begins when up to `room` tokens of what stands before `start`, and after `earliest`, are repeated in it."""
    low = max(earliest + 1, cost.back(start, room))
    if low >= start:
        return start
    from_line = max(earliest, text.rfind("\n", earliest, low) + 1, low - 400)
    for cut in (_sentence_ends, _line_ends):
        ends = [place for place in cut(text, from_line, start) if place >= low]
        if ends:
            return ends[0]
    space = text.find(" ", low, start)
    if space >= 0:
        return space + 1
    return low if low > earliest + 1 else start
