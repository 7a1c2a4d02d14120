"""Whether an answer stands in its document: where the evidence lies, and whether the numbers and words are supported.

Evidence is looked for as it is, then by local alignment of tokens (Smith and Waterman 1981, with +2 for an equal token and
-1 for one that is skipped or replaced): small changes of a quotation are found again, and its place is known to the
character. Tokens are runs of letters and digits, without regard to case; each character of scripts without spaces is one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
from numba import njit

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_MAX_EVIDENCE = 512  # tokens of evidence that are aligned
_CLOSING = '.。！？!?…”"』」）)'

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?\Z")
_MARKER = re.compile(
    r"^[ \t]*[(（]?\d{1,2}[.)、）．](?!\d)|\b(?:steps?|items?|points?) \d{1,2}\b|(?:步骤|第)[ \t]*\d{1,2}[ \t]*(?:步|点|项|条)?",
    re.IGNORECASE | re.MULTILINE,
)
_WRITTEN = """zero none/one first once/two second twice both double/three third triple/four fourth/five fifth/six sixth/
seven seventh/eight eighth/nine ninth/ten tenth/eleven/twelve/thirteen/fourteen/fifteen/sixteen/seventeen/eighteen/
nineteen/twenty"""
_WORDS = {word: str(value) for value, words in enumerate(_WRITTEN.split("/")) for word in words.split()}
_WORDS |= {"thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "hundred": "100", "thousand": "1000", "half": "2"}
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
_HAN_NUMBER = re.compile("[零〇一二两三四五六七八九十百千万]{1,16}")
_HAN_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_HAN_UNITS = {"十": 10, "百": 100, "千": 1000}

_STOP = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be been but by can do does for from had has have how i if in into is it its may more most no not of on
        one or other so such than that the their them then there these they this to use used using was we were what when where which
        who why will with you your 
        的 了 和 是 在 有 就 不 人 都 一 个 上 也 很 到 说 要 会 着 以 及 与 或 为 可 其 于 中 并 等 这 那 对""",
    )
)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) and how well they match: 2 x matched tokens / (tokens of the evidence + tokens of the span)."""

    start: int
    end: int
    score: float


def locate(evidence: str, text: str) -> Span:
    """The stretch of the text that is most like the evidence; score 1 for a literal quotation, 0 where nothing is alike."""
    wanted = evidence.strip().strip('"“”「」『』').strip()
    if not wanted:
        return Span(0, 0, 0.0)
    place = text.find(wanted)
    if place >= 0:
        return Span(place, place + len(wanted), 1.0)
    needle = [match.group().casefold() for match in _TOKEN.finditer(wanted)][:_MAX_EVIDENCE]
    found = list(_TOKEN.finditer(text))
    if not needle or not found:
        return Span(0, 0, 0.0)
    codes: dict[str, int] = {}
    first = np.array([codes.setdefault(token, len(codes)) for token in needle], np.int32)
    second = np.array([codes.get(match.group().casefold(), -1) for match in found], np.int32)
    low, high, matched = _align(first, second)
    if not matched:
        return Span(0, 0, 0.0)
    end = found[high - 1].end()
    while end < len(text) and text[end] in _CLOSING:
        end += 1
    return Span(found[low].start(), end, round(2 * matched / (len(needle) + high - low), 4))


@njit(cache=True, nogil=True)
def _align(needle: np.ndarray, text: np.ndarray) -> tuple[int, int, int]:
    """(first token, token after the last, tokens matched) of the best local alignment; the earliest of equals."""
    n = len(text)
    score, begin, equal = np.zeros(n + 1, np.int32), np.zeros(n + 1, np.int32), np.zeros(n + 1, np.int32)
    best, low, high, matched = 0, 0, 0, 0
    for code in needle:
        diagonal, diagonal_begin, diagonal_equal = 0, 0, 0
        for j in range(1, n + 1):
            above, above_begin, above_equal = int(score[j]), int(begin[j]), int(equal[j])
            same = text[j - 1] == code
            now = diagonal + (2 if same else -1)
            now_begin = diagonal_begin if diagonal > 0 else j - 1
            now_equal = (diagonal_equal if diagonal > 0 else 0) + same
            if above - 1 > now:
                now, now_begin, now_equal = above - 1, above_begin, above_equal
            if score[j - 1] - 1 > now:
                now, now_begin, now_equal = int(score[j - 1]) - 1, int(begin[j - 1]), int(equal[j - 1])
            if now <= 0:
                now, now_begin, now_equal = 0, j, 0
            diagonal, diagonal_begin, diagonal_equal = above, above_begin, above_equal
            score[j], begin[j], equal[j] = now, now_begin, now_equal
            if now > best:
                best, low, high, matched = now, now_begin, j, now_equal
    return low, high, matched


def unsupported_number(answer: str, *support: str) -> str | None:
    """The first number of an answer that none of the supporting texts holds, if there is one.

    Written-out numbers (three, third, 三十五) and thousands separators of the support count; the numbering of lists and
    steps in the answer does not. 3.11 is supported by 3.11.2.
    """
    wanted = _NUMBER.findall(_MARKER.sub(" ", _plain(answer)))
    if not wanted:
        return None
    held: set[str] = set()
    for text in map(_plain, support):
        held.update(_canonical(number) for number in _NUMBER.findall(text))
        held.update(_WORDS[word.lower()] for word in _WORD.findall(text))
        held.update(str(_han_number(number)) for number in _HAN_NUMBER.findall(text))
    for number in wanted:
        canonical = _canonical(number)
        if canonical not in held and not any(known.startswith(canonical + ".") for known in held):
            return str(number)
    return None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _canonical(number: str) -> str:
    if _THOUSANDS.match(number):
        number = number.replace(",", "")
    whole, dot, rest = number.partition(".")
    whole = whole.lstrip("0") or "0"
    if dot and "." not in rest and "," not in number:
        rest = rest.rstrip("0")
        return f"{whole}.{rest}" if rest else whole
    return whole + dot + rest


def _han_number(written: str) -> int:
    """三百五十二 -> 352, 二〇二四 -> 2024, 十 -> 10, 两万 -> 20000."""
    if not any(sign in written for sign in "十百千万"):
        return int("".join(str(_HAN_DIGITS[sign]) for sign in written))
    total = part = digit = 0
    for sign in written:
        if sign in _HAN_DIGITS:
            digit = _HAN_DIGITS[sign]
        elif sign == "万":
            total, part, digit = (total + part + digit or 1) * 10000, 0, 0
        else:
            part, digit = part + (digit or 1) * _HAN_UNITS[sign], 0
    return total + part + digit


def support(answer: str, *texts: str) -> float:
    """The share of the answer's words, stop words aside, that stand somewhere in the texts; pairs of neighbours in scripts
    without spaces. 1 for an answer without any."""
    wanted = _content(answer)
    if not wanted:
        return 1.0
    held = set().union(*(_content(text) for text in texts))
    return round(len(wanted & held) / len(wanted), 4)


def _content(text: str) -> set[str]:
    """Words in lower case (the first five letters of longer ones, so that inflections agree) and pairs of characters."""
    found: set[str] = set()
    before, end = "", -1
    for match in _TOKEN.finditer(text):
        token = match.group().casefold()
        if token in _STOP:
            before = ""
        elif len(token) == 1 and ord(token) > 0xE00:
            if before and match.start() == end:
                found.add(before + token)
            before, end = token, match.end()
        else:
            found.add(token[:5] if token.isascii() else token)
            before = ""
    return found
