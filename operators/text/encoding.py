"""From bytes as a server sent them to text: which encoding, and how much of it was broken.

The order is the one that survives wrong declarations: byte-order mark; UTF-8 where the bytes are valid UTF-8 (other
encodings almost never are); the HTTP charset; the charset of `<meta>`; detection (uchardet). The first that decodes
without error wins; if none does, the one with the fewest broken bytes.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

_META = re.compile(rb"""<(?:meta|\?xml)[^>]{0,512}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_:.\-]{2,40})""", re.IGNORECASE)
_CHARSET = re.compile(r"""charset\s*=\s*["']?\s*([A-Za-z0-9_:.\-]{2,40})""", re.IGNORECASE)
_META_BYTES = 4096  # browsers look in the first 1024; scripts often come first
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_DETECTION_BYTES = 64 << 10


@dataclass(frozen=True)
class Decoded:
    """Text, the Python name of its encoding, and the number of U+FFFD put in place of broken bytes."""

    text: str
    encoding: str
    broken: int


def declared_charset(content_type: str | None) -> str | None:
    """`gbk` of `text/html; charset=gbk`."""
    found = _CHARSET.search(content_type or "")
    return found[1] if found else None


def decode(data: bytes, charset: str | None = None, html: bool = True) -> Decoded:
    """Decode bytes; `charset` is what HTTP declared. Never fails: see `Decoded.broken`."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _replacing(data[len(mark) :], name)
    declared = [charset] if charset else []
    if html and (meta := _META.search(data[:_META_BYTES])):
        declared.append(meta[1].decode("ascii"))
    candidates = [name for name in (_codec(item) for item in declared) if name]
    stateful = b"\x1b" in data and any(name.startswith(("iso2022", "iso-2022")) for name in candidates)
    if not stateful:
        candidates.insert(0, "utf-8")
    for name in dict.fromkeys(candidates):
        try:
            return Decoded(data.decode(name), name, 0)
        except (UnicodeDecodeError, UnicodeError):
            continue
    detected = _codec(detect_encoding(data, max_len=_DETECTION_BYTES, from_html_meta=False))
    if detected:
        candidates.append(detected)
    return min((_replacing(data, name) for name in dict.fromkeys(candidates)), key=lambda decoded: decoded.broken)


def _codec(label: str | None) -> str | None:
    """The Python codec of a label by the WHATWG table (latin1 is Windows-1252, gb2312 is GBK); None if there is none."""
    if not label:
        return None
    try:
        name = codecs.lookup(map_encoding_to_html5(label, fallback_utf8=False) or label).name
    except LookupError:
        return None
    # GB18030 reads all that GBK and GB2312 do, and what pages declared as these really hold
    name = "gb18030" if name in ("gbk", "gb2312") else name
    return name if name not in ("utf-7", "idna", "punycode", "hex", "base64", "rot13", "zlib", "bz2", "uu", "quopri") else None


def _replacing(data: bytes, name: str) -> Decoded:
    text = data.decode(name, "replace")
    return Decoded(text, name, text.count("\ufffd"))
