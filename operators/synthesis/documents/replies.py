"""JSON or labelled lines in a reply: whatever the model was allowed to write, read with the same tolerance.

With structured output the reply is JSON by construction; otherwise it may be JSON inside other words, or lines such as
`Question: ...`. Lone surrogates, deep nesting and replies of any length are read or refused, never raised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

_TRIES = 32  # places at which a reply is tried as JSON
_DECODER = json.JSONDecoder(strict=False)
_SURROGATE = re.compile("[\ud800-\udfff]")


def objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a reply, outermost first; those of a list one by one. What was cut off at the end is left out."""
    try:
        return _listed(orjson.loads(text))
    except orjson.JSONDecodeError:
        pass
    found: list[dict[str, Any]] = []
    place = 0
    for _ in range(_TRIES):
        place = _next(text, place)
        if place < 0:
            break
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        found += _listed(value)
    return found


def _next(text: str, place: int) -> int:
    places = [found for found in (text.find("{", place), text.find("[", place)) if found >= 0]
    return min(places, default=-1)


def _listed(value: Any) -> list[dict[str, Any]]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def unpacked(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The objects of a list under `name`, or the objects themselves."""
    return [
        inner for item in found for inner in (item[name] if isinstance(item.get(name), list) else [item]) if isinstance(inner, dict)
    ]


def text_of(value: Any) -> str:
    """A field as text: strings as they are, numbers as written, anything else is empty."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return _SURROGATE.sub("\ufffd", str(value)).strip()


def field(found: Mapping[str, Any], *names: str) -> str:
    """The first of several names that an object has, as text."""
    lowered = {str(key).strip().casefold(): value for key, value in found.items()}
    for name in names:
        if name in lowered:
            return text_of(lowered[name])
    return ""


def labelled(text: str, labels: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(label, what follows it up to the next label) of lines such as `Question 2: ...`, `**答案**：...`, in their order."""
    known = {word.casefold(): label for label, words in labels.items() for word in words}
    joined = "|".join(re.escape(word) for word in sorted(known, key=len, reverse=True))
    number, marks = r"(?:\d{1,2}[.)、][ \t]*)?", r"[*_]*"
    pattern = re.compile(
        rf"^[ \t]*(?:[-*#>]+[ \t]*)?{number}{marks}({joined})[ \t]*\d{{0,2}}{marks}[ \t]*[:：]{marks}", re.IGNORECASE | re.MULTILINE
    )
    found = list(pattern.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)][: len(found)]
    return [(known[match.group(1).casefold()], text_of(text[match.end() : end])) for match, end in zip(found, ends, strict=True)]


def numbered(text: str) -> list[str]:
    """The items of a list that is numbered or bulleted line by line."""
    items = re.findall(r"^[ \t]*(?:[-*•·]|[(（]?\d{1,2}[.)、）])[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE)
    return [text_of(item) for item in items]
