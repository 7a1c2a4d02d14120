"""The numbers in a text as values, however they are written: 1,234.5, １２３, 三百二十, 3.5万, twenty-five, 12%."""

from __future__ import annotations

import re
import unicodedata

_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_LARGE = {"万": 10**4, "亿": 10**8}
_HAN = "零〇一二两三四五六七八九十百千万亿"
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = dict(zip(_ONES.split(), range(20), strict=True)) | dict(zip(_TENS.split(), range(20, 100, 10), strict=True))
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
_STEP = rf"(?:(?:hundred|thousand|million)\s+and\s+(?:{_WORD})|{_WORD})"
_MOST = 1e15  # beyond, a float tells whole numbers no longer apart
_NUMBER = re.compile(
    rf"(?P<digits>\d+(?:,\d{{3}})*(?:\.\d+)?|\.\d+)(?:\s?(?P<scale>万亿|万|亿|million|billion|trillion|thousand)\b|(?P<han_scale>万亿|万|亿))?"
    rf"|(?P<han>第?[{_HAN}]{{1,20}})"
    rf"|(?<![A-Za-z])(?P<words>{_STEP}(?:[\s-]+{_STEP})*)(?![A-Za-z])",
    re.IGNORECASE,
)
_LARGE_WORDS = {**_SCALES, **_LARGE, "万亿": 10**12}


def values(text: str) -> list[tuple[float, str]]:
    """(value, as written) of each number, in order. Single Han digits inside words (一些, 统一) are numbers too: callers that
    judge leave small ones out."""
    found: list[tuple[float, str]] = []
    for match in _NUMBER.finditer(unicodedata.normalize("NFKC", text)):
        value = _value(match)
        if value is not None and value < _MOST:
            found.append((value, match.group().strip()))
    return found


def _value(match: re.Match[str]) -> float | None:
    if match["digits"]:
        number = float(match["digits"].replace(",", ""))
        scale = (match["scale"] or match["han_scale"] or "").lower()
        return round(number * _LARGE_WORDS.get(scale, 1), 6)
    if not match["han"]:
        return _word_value(match["words"].lower())
    written = match["han"].lstrip("第")
    return _han_value(written) if any(c in _DIGITS for c in written) or written == "十" else None  # 成千上万 is no number


def _han_value(text: str) -> float | None:
    """三百二十一万 by place, 二〇二三 digit by digit."""
    if not any(c in _UNITS or c in _LARGE for c in text):
        return float("".join(str(_DIGITS[c]) for c in text))
    total, section, digit = 0, 0, 0
    for c in text:
        if c in _DIGITS:
            digit = _DIGITS[c]
        elif c in _UNITS:
            section += (digit or 1) * _UNITS[c]
            digit = 0
        else:
            total = (total + section + digit) * _LARGE[c] if total and c == "亿" else total + (section + digit or 1) * _LARGE[c]
            section = digit = 0
    return float(total + section + digit)


def _word_value(text: str) -> float | None:
    total, section = 0, 0
    for word in re.findall(r"[a-z]+", text):
        if word in _WORDS:
            section += _WORDS[word]
        elif word == "hundred":
            section = max(section, 1) * 100
        elif word in _SCALES:
            total += max(section, 1) * _SCALES[word]
            section = 0
    return float(total + section)
