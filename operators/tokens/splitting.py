"""Where the usual byte-level tokenizers cut text before they merge: the regular expressions of GPT-2, GPT-4's kin and our own
as one scanner over UTF-8.

A tokenizer is taken only when its pre-tokenizer is, letter for letter, one of those known here. The character classes
are asked of the tokenizers library itself, one question for all code points, so that they are those of its own Unicode
tables whatever its version. The answers (about a CPU second each) are kept below `$DANLU_CACHE`, else `danlu` in the temporary
directory, under that version. `tests/operators/tokens/test_byte_pairs.py` holds the scanner against the library.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import tokenizers
from tokenizers import Regex, pre_tokenizers

WORD, PREFIX, RUN, NUMBER, SPACE, OTHER, NEWLINE = (1 << bit for bit in range(7))
"""Bits of a code point: it makes words; it may stand before a word; it makes runs of its own (Han, kana)."""

REFUSED = -1
"""Returned for a place that the scanner leaves to the library."""

_HAN_KANA = r"\p{Han}\p{Hiragana}\p{Katakana}"
_WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@dataclass(frozen=True)
class Rules:
    """One regular expression as the scanner follows it. `digits`: the longest run of numbers, 0 for any; `gpt2`: a number
    may take a space with it, newlines are plain spaces, contractions are lower-case."""

    word: str
    prefix: str | None
    run: str | None
    digits: int
    gpt2: bool = False


GPT2 = Rules(r"\p{L}", None, None, 0, gpt2=True)


def _patterns() -> dict[str, Rules]:
    from operators.tokens.bpe import PATTERN

    ours = Rules(rf"[[\p{{L}}\p{{M}}]&&[^{_HAN_KANA}]]", r"[^\r\n\p{L}\p{N}\u3000-\u303f\uff00-\uffef]", rf"[{_HAN_KANA}]", 3)
    found = {PATTERN: ours}
    for digits, number in ((1, r"\p{N}"), (3, r"\p{N}{1,3}")):
        found[f"{_CONTRACTIONS}|{_WORD_PATTERN}|{number}|{_TAIL}"] = Rules(r"\p{L}", r"[^\r\n\p{L}\p{N}]", None, digits)
    return found


def rules_of(pre_tokenizer: dict[str, Any] | None) -> Rules | None:
    """The rules of a `pre_tokenizer` entry of tokenizer.json, None where it is not one that is known."""
    if pre_tokenizer is None:
        return None
    if pre_tokenizer.get("type") == "ByteLevel":
        return GPT2 if pre_tokenizer.get("use_regex") and not pre_tokenizer.get("add_prefix_space") else None
    steps = pre_tokenizer.get("pretokenizers", [])
    if pre_tokenizer.get("type") != "Sequence" or [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, bytes_ = steps
    plain = split.get("behavior") == "Isolated" and not split.get("invert")
    if not plain or bytes_.get("use_regex") or bytes_.get("add_prefix_space"):
        return None
    return _patterns().get(split.get("pattern", {}).get("Regex", ""))


@cache
def classes(rules: Rules) -> np.ndarray:
    """uint8[0x110000]: the bits of every code point under these rules, read-only."""
    asked = questions(rules)
    key = hashlib.sha256(f"{tokenizers.__version__} {asked}".encode()).hexdigest()[:16]
    place = Path(os.environ.get("DANLU_CACHE") or os.path.join(tempfile.gettempdir(), "danlu")) / "characters" / f"{key}.z"
    found = _kept(place)
    if found is None:
        found = np.zeros(0x110000, np.uint8)
        for bit, pattern in asked:
            found[_members(pattern)] |= bit
        if rules.prefix is None:
            found[ord(" ")] |= PREFIX
        _keep(place, found)
    found.flags.writeable = False
    return found


def questions(rules: Rules) -> list[tuple[int, str]]:
    """Each bit with the character class of the code points that have it."""
    asked = [(WORD, rules.word), (PREFIX, rules.prefix), (RUN, rules.run), (NUMBER, r"\p{N}"), (SPACE, r"\s")]
    asked += [(OTHER, r"[^\s\p{L}\p{N}]"), (NEWLINE, r"[\r\n]")]
    return [(bit, pattern) for bit, pattern in asked if pattern is not None]


def _kept(place: Path) -> np.ndarray | None:
    """A table on file: its CRC-32 and the deflated bytes. None where there is none, or none that is whole and this user's own."""
    try:
        with place.open("rb") as stream:
            owned = os.fstat(stream.fileno()).st_uid == os.getuid()
            check, packed = stream.read(4), stream.read()
        table = np.frombuffer(zlib.decompress(packed), np.uint8)
    except (OSError, zlib.error):
        return None
    whole = len(table) == 0x110000 and zlib.crc32(table.tobytes()).to_bytes(4, "little") == check
    return table if owned and whole else None


def _keep(place: Path, table: np.ndarray) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as stream:
            stream.write(zlib.crc32(table.tobytes()).to_bytes(4, "little") + zlib.compress(table.tobytes()))
        os.replace(stream.name, place)
    except OSError:  # a directory that cannot be written to: the table is asked for again next time
        return


@cache
def _members(pattern: str) -> np.ndarray:
    """The code points that a character class of the tokenizers library holds."""
    every = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000)]).astype("<u4")
    text = every.tobytes().decode("utf-32-le")
    split = pre_tokenizers.Split(Regex(f"(?:{pattern})+"), "removed")
    inside = np.ones(len(every), bool)
    for _, (start, stop) in split.pre_tokenize_str(text):
        inside[start:stop] = False
    return every[inside]


@numba.njit(inline="always")
def _code(data, at):  # type: ignore[no-untyped-def]
    """(code point, bytes) of the UTF-8 that begins at `at`."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 31) << 6 | (np.int64(data[at + 1]) & 63), 2
    if first < 0xF0:
        return (first & 15) << 12 | (np.int64(data[at + 1]) & 63) << 6 | (np.int64(data[at + 2]) & 63), 3
    tail = (np.int64(data[at + 1]) & 63) << 12 | (np.int64(data[at + 2]) & 63) << 6 | (np.int64(data[at + 3]) & 63)
    return (first & 7) << 18 | tail, 4


@numba.njit(cache=True, nogil=True)
def _run(data: np.ndarray, at: int, stop: int, table: np.ndarray, bit: int, most: int) -> int:
    """Where the run of code points with this bit that begins at `at` ends; `most` code points of it, 0 for all."""
    taken = 0
    while at < stop and (most == 0 or taken < most):
        code, size = _code(data, at)
        if not table[code] & bit:
            break
        at += size
        taken += 1
    return at


@numba.njit(cache=True, nogil=True)
def first_of(data: np.ndarray, at: int, stop: int, table: np.ndarray, bit: int) -> int:
    """Where the first code point with this bit begins, `stop` where there is none."""
    while at < stop:
        code, size = _code(data, at)
        if table[code] & bit:
            return at
        at += size
    return stop


@numba.njit(cache=True, nogil=True)
def _contraction(data: np.ndarray, at: int, stop: int, gpt2: bool) -> int:
    """Bytes of the contraction at an apostrophe, 0 for none, REFUSED where letters of another script fold to these."""
    if at + 1 >= stop:
        return 0
    first = data[at + 1]
    if not gpt2 and first >= 0x80:
        code, _ = _code(data, at + 1)
        return REFUSED if code == 0x17F else 0
    second = data[at + 2] if at + 2 < stop else np.uint8(0)
    if not gpt2:
        if 65 <= first <= 90:
            first += 32
        if 65 <= second <= 90:
            second += 32
    if first == 115 or first == 116 or first == 109 or first == 100:  # s t m d
        return 2
    if (first == 114 or first == 118) and second == 101:  # re ve
        return 3
    return 3 if first == 108 and second == 108 else 0  # ll


@numba.njit(cache=True, nogil=True)
def next_word(data: np.ndarray, at: int, stop: int, table: np.ndarray, digits: int, gpt2: bool) -> int:
    """Where the word that begins at byte `at` ends, at most `stop`; REFUSED where the library has to say."""
    code, size = _code(data, at)
    bits = table[code]
    if code == 39:
        taken = _contraction(data, at, stop, gpt2)
        if taken:
            return at + taken if taken > 0 else REFUSED
    if bits & RUN:
        return _run(data, at, stop, table, RUN, 0)
    if bits & WORD:
        return _run(data, at, stop, table, WORD, 0)
    following = np.uint8(0)
    if at + size < stop:
        following = table[_code(data, at + size)[0]]
    if bits & PREFIX and following & WORD:
        return _run(data, at + size, stop, table, WORD, 0)
    if bits & NUMBER:
        return _run(data, at, stop, table, NUMBER, digits)
    if gpt2 and code == 32 and following & NUMBER:
        return _run(data, at + size, stop, table, NUMBER, digits)
    if bits & OTHER or (code == 32 and following & OTHER):
        end = _run(data, at + (0 if bits & OTHER else size), stop, table, OTHER, 0)
        return end if gpt2 else _run(data, end, stop, table, NEWLINE, 0)
    # White space: up to its last newline; else all of it at the end of the text, all but its last before a word.
    end, last, newline = at, at, 0
    while end < stop:
        code, size = _code(data, end)
        if not table[code] & SPACE:
            break
        last = end
        end += size
        if table[code] & NEWLINE:
            newline = end
    if newline and not gpt2:
        return newline
    return end if end == stop or last == at else last
