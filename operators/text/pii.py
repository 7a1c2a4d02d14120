"""Personal data found, then replaced or a reason to drop: e-mail addresses, phone numbers, IP addresses, Chinese resident
identity numbers (GB 11643, check digit verified), payment cards (ISO/IEC 7812: issuer and Luhn check digit verified) and
credentials (operators.text.secrets).

A compiled pass finds the few places where something may be (operators.text.candidates); only these are matched by regular
expressions, as bytes, and judged. Phone numbers are taken in three shapes: international with a plus and an assigned country
code (ITU-T E.164), Chinese mobile and land lines, and North American ones with separators. Numbers of other countries
without their country code look like any other number and stay.

On real text (English technical documentation, Chinese encyclopaedia and documentation, translated help; one core of a busy
machine): 82, 132 and 55 MB/s; 17, 4.5 and 41% of the documents changed, nearly all by e-mail addresses.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text import candidates, secrets
from operators.text.analysis import Analysis, text_buffers
from operators.text.language import set_column

Kind = Literal["email", "resident_id", "card", "ip", "phone", "api_key"]
KINDS: tuple[Kind, ...] = ("api_key", "email", "resident_id", "card", "ip", "phone")  # the first kind that claims a span has it
_BEFORE, _AFTER = 24, 2  # bytes around a candidate that are looked at

# assigned country codes (ITU-T E.164, annexed list), as ranges
_COUNTRY_RANGES = (
    (1, 1), (7, 7), (20, 20), (27, 27), (30, 34), (36, 36), (39, 41), (43, 49), (51, 58), (60, 66), (81, 82), (84, 84), (86,
    86), (90, 95), (98, 98), (211, 213), (216, 216), (218, 218), (220, 258), (260, 269), (290, 291), (297, 299), (350, 359),
    (370, 378), (380, 383), (385, 387), (389, 389), (420, 421), (423, 423), (500, 509), (590, 599), (670, 670), (672, 683),
    (685, 692), (800, 800), (808, 808), (850, 850), (852, 853), (855, 856), (870, 870), (878, 878), (880, 883), (886, 886),
    (888, 888), (960, 968), (970, 977), (979, 979), (992, 996), (998, 998),
)  # fmt: skip
_COUNTRIES = frozenset(str(code) for low, high in _COUNTRY_RANGES for code in range(low, high + 1))
_VERSION = re.compile(
    rb"(?i)(?:\bv|\bver\.?|version|release|build|firmware|section|chapter|rev\.?|\xe7\x89\x88\xe6\x9c\xac\xe5?\x8f?\xb7?)\W{0,3}$"
)
_ADDRESS = re.compile(
    rb"(?i)(?:\bip|addr|host|server|from|ping|dns|\xe5\x9c\xb0\xe5\x9d\x80|\xe6\x9c\x8d\xe5\x8a\xa1\xe5\x99\xa8)"
)  # 地址, 服务器
_SMALL = 40
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_PRODUCT = re.compile(rb"[A-Za-z]/$")  # Chrome/120.0.0.0


def _digits(found: bytes) -> bytes:
    return bytes(byte for byte in found if 48 <= byte <= 57)


def is_resident_id(number: bytes) -> bool:
    """18 characters with a province, a birth date and a valid check digit (ISO 7064, MOD 11-2)."""
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum((digit - 48) * (1 << (17 - place)) for place, digit in enumerate(number[:17])) % 11
    return 11 <= int(number[:2]) <= 83 and b"10X98765432"[total] == number.upper()[17]


def passes_luhn(digits: bytes) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = (digit - 48) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(number: bytes) -> bool:
    """A number of a known issuer in one of its lengths whose check digit is valid."""
    digits = _digits(number)
    size, first = len(digits), int(digits[:6])
    issued = (
        (digits[:1] == b"4" and size in (16, 19))  # Visa
        or ((510000 <= first <= 559999 or 222100 <= first <= 272099) and size == 16)  # Mastercard
        or (digits[:2] in (b"34", b"37") and size == 15)  # American Express
        or (digits[:2] in (b"62", b"60", b"64", b"65", b"81") and 16 <= size <= 19)  # UnionPay, Discover, RuPay
        or (3528 <= first // 100 <= 3589 and 16 <= size <= 19)  # JCB
        or ((300 <= first // 1000 <= 305 or digits[:2] in (b"36", b"38", b"39")) and size == 14)  # Diners Club
        or (digits[:4] in (b"9558", b"9559") and size == 19)  # Chinese debit cards from before UnionPay's prefix
    )
    return issued and len(set(digits)) > 1 and passes_luhn(digits)


def _is_address(number: bytes, before: bytes, public_only: bool) -> bool:
    try:
        address = ipaddress.ip_address(number.decode("ascii"))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        # four small numbers are a version or a section far more often than an address: all below 40 by chance is 1 in 1,700
        small = max(address.packed) < _SMALL and not _ADDRESS.search(before)
        if small or _VERSION.search(before) or _PRODUCT.search(before):
            return False
    elif public_only and address not in _GLOBAL_UNICAST:  # `::2` and `a::b` are code
        return False
    return address.is_global or not public_only


def is_phone(number: bytes) -> bool:
    """By the number of digits, and by the country code where there is a plus."""
    digits = _digits(number)
    if not number.startswith(b"+"):
        return 7 <= len(digits) <= 13
    code = any(digits[:size].decode() in _COUNTRIES for size in (1, 2, 3))
    if digits.startswith(b"86") and len(digits) not in (11, 12, 13):
        return False
    return code and 8 <= len(digits) <= 15


@dataclass(frozen=True)
class _Detector:
    """`pattern` over a candidate of the kind `place`; `accept(match, bytes before it, public_only)` judges a match."""

    place: int
    pattern: re.Pattern[bytes]
    accept: Callable[[bytes, bytes, bool], bool]


_ID = rb"(?<![0-9A-Za-z])[1-8]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])[0-3]\d{4}[\dXx](?![0-9A-Za-z])"
_CARD = (
    rb"(?<![\d.\-+])(?:\d{4} \d{4} \d{4} \d{4}(?: \d{3})?|\d{4}-\d{4}-\d{4}-\d{4}(?:-\d{3})?|\d{4}([ \-])\d{6}\1\d{4,5}|\d{14,19})"
    rb"(?![\d\-])(?!\.\d)(?! \d{4}(?!\d))"
)
_EMAIL = (
    rb"(?<![A-Za-z0-9._%+\-])[A-Za-z0-9](?:[A-Za-z0-9._%+\-]{0,62}[A-Za-z0-9_+\-])?@"
    rb"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9\-])"
)
_V4 = rb"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d]|\.\d)"
_V6 = (
    rb"(?<![0-9A-Za-z:.])(?:(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}"
    rb"|::(?:[0-9A-Fa-f]{1,4}:){0,6}[0-9A-Fa-f]{1,4})(?![0-9A-Za-z]|:[0-9A-Fa-f:])"
)
_PHONE = (
    rb"(?<![\w+])\+\d{1,3}(?:[ .\-]?\(\d{1,4}\))?(?:[ .\-]?\d{2,12}){1,5}(?![\w+])"  # international, with its plus
    # Chinese mobile
    rb"|(?<![\d\-+.A-Za-z_])(?:(?:\+|00)?86[ \-]?)?(?:13\d|14[014-9]|15[0-35-9]|16[2567]|17[0-8]|18\d|19[0-35-9])"
    rb"(?:\d{8}|[ \-]\d{4}[ \-]\d{4})(?![\d\-A-Za-z_]|\.\d)"
    # Chinese land line with its area code
    rb"|(?<![\d\-+.A-Za-z_])(?:\((?:010|02[0-57-9]|0[3-9]\d{2})\) ?|(?:010|02[0-57-9]|0[3-9]\d{2})[\- ])"
    rb"[2-8]\d{2,3}[\- ]?\d{4}(?![\d\-A-Za-z_]|\.\d)"
    # North America
    rb"|(?<![\d\-+.A-Za-z_])(?:1[ .\-])?(?!400)(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.\-])[2-9]\d{2}[.\-]\d{4}(?![\d\-]|\.\d)"
)
_DETECTORS: dict[Kind, tuple[_Detector, ...]] = {
    "email": (_Detector(candidates.AT, re.compile(_EMAIL), lambda found, before, public: b".." not in found),),
    "resident_id": (_Detector(candidates.NUMBER, re.compile(_ID), lambda found, before, public: is_resident_id(found)),),
    "card": (_Detector(candidates.NUMBER, re.compile(_CARD), lambda found, before, public: is_card(found)),),
    "ip": (
        _Detector(candidates.NUMBER, re.compile(_V4), _is_address),
        _Detector(candidates.COLONS, re.compile(_V6), _is_address),
    ),
    "phone": (_Detector(candidates.NUMBER, re.compile(_PHONE), lambda found, before, public: is_phone(found)),),
}


class RedactPiiSettings(Settings):
    """Which kinds to look for, and what to do about them."""

    kinds: list[Kind] = Field(default=list(KINDS), description="kinds of personal data to look for")
    action: Literal["redact", "drop"] = Field(
        default="redact",
        description="replace what is found by placeholders, or leave texts alone and drop documents over `max_count`",
    )
    placeholders: dict[Kind, str] = Field(default={}, description="replacement by kind; `<EMAIL>`, `<PHONE>`, ... by default")
    public_ips_only: bool = Field(default=True, description="leave private, loop-back and documentation addresses as they are")
    max_count: int | None = Field(
        default=None,
        ge=0,
        description="documents with more finds are rejected as `pii`; null: none are, or with `drop` any with a find",
    )


class RedactPii(Operator):
    """Replace personal data by placeholders, or drop the documents. Adds `pii_<kind>`, the number found, for each kind.

    The funnel of the stage counts the finds by kind over the documents that came to the operator (`counts`); a rejected
    document's detail tells what was found in it.
    """

    name: ClassVar[str] = "redact_pii"
    settings = RedactPiiSettings
    adds = tuple(f"pii_{kind}" for kind in KINDS)
    changes_text = True

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        if self.config.action == "drop":
            self.changes_text = False  # type: ignore[misc]

    def may_reject(self) -> bool:
        return self.config.action == "drop" or self.config.max_count is not None

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        kinds = [kind for kind in KINDS if kind in self.config.kinds]
        data, offsets = text_buffers(table["text"])
        found = self._find(data, offsets, kinds)
        counts = {kind: np.zeros(table.num_rows, np.int32) for kind in kinds}
        for row, spans in found.items():
            for _, _, kind in spans:
                counts[kind][row] += 1
        if self.config.action == "redact":
            table = set_column(table, "text", self._redacted(data, offsets, found))
        for kind in kinds:
            table = set_column(table, f"pii_{kind}", pa.array(counts[kind], pa.int32()))
        total = sum(counts.values(), np.zeros(table.num_rows, np.int64))
        limit = 0 if self.config.max_count is None and self.config.action == "drop" else self.config.max_count
        over = total > limit if limit is not None else np.zeros(len(total), bool)
        detail: list[str | None] = [None] * table.num_rows
        for row in np.flatnonzero(over).tolist():
            detail[row] = ", ".join(f"{kind} {counts[kind][row]}" for kind in kinds if counts[kind][row])
        return Verdict(
            table,
            pc.if_else(pa.array(over), "pii", pa.scalar(None, pa.string())),
            pa.array(total.astype(np.float64), mask=~over),
            detail=pa.array(detail, pa.string()),
            counts={kind: int(counts[kind].sum()) for kind in kinds if counts[kind].any()},
        )

    def _find(self, data: np.ndarray, offsets: np.ndarray, kinds: list[Kind]) -> dict[int, list[tuple[int, int, Kind]]]:
        """Row -> spans (start, end in `data`, kind) that do not overlap, in order."""
        claims: dict[int, list[tuple[int, int, int]]] = {}
        if "api_key" in kinds:
            for row, start, end in _credentials(data, offsets):
                claims.setdefault(row, []).append((KINDS.index("api_key"), start, end))
        by_place: dict[int, list[tuple[int, _Detector]]] = {}
        for kind in kinds:
            for detector in _DETECTORS.get(kind, ()):
                by_place.setdefault(detector.place, []).append((KINDS.index(kind), detector))
        if by_place:
            rows, starts, ends, places = (column.tolist() for column in candidates.find(data, offsets))
            for row, start, end, place in zip(rows, starts, ends, places, strict=True):  # sparse: the candidates
                if place not in by_place:
                    continue
                first, last = int(offsets[row]), int(offsets[row + 1])
                begin = max(first, start - _BEFORE)
                window = data[begin : min(last, end + _AFTER)].tobytes()
                for rank, detector in by_place[place]:
                    for match in detector.pattern.finditer(window, start - begin):
                        before = window[: match.start()][-_BEFORE:]
                        if detector.accept(match[0], before, self.config.public_ips_only):
                            claims.setdefault(row, []).append((rank, begin + match.start(), begin + match.end()))
        return {row: spans for row, claimed in sorted(claims.items()) if (spans := _settled(claimed))}

    def _redacted(self, data: np.ndarray, offsets: np.ndarray, found: dict[int, list[tuple[int, int, Kind]]]) -> pa.Array:
        marks = {kind: self.config.placeholders.get(kind, f"<{kind.upper()}>").encode() for kind in KINDS}
        longer = np.zeros(len(offsets), np.int64)  # by how much each text grows, after its place
        pieces: list[Any] = []
        at = int(offsets[0])
        for row, spans in found.items():  # in order of rows: what lies between is copied in one piece
            for start, end, kind in spans:
                pieces += [data[at:start], marks[kind]]
                longer[row + 1] += len(marks[kind]) - (end - start)
                at = end
        pieces.append(data[at : int(offsets[-1])])
        return _texts(np.frombuffer(b"".join(pieces), np.uint8), offsets - offsets[0] + np.cumsum(longer))


def _texts(data: np.ndarray, offsets: np.ndarray) -> pa.Array:
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))


def _credentials(data: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of every credential; whole texts are searched only where RE2 finds a hint."""
    hints = pc.match_substring_regex(_texts(data, offsets), secrets.HINT).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(hints).tolist():
        first = int(offsets[row])
        for start, end in secrets.find(data[first : int(offsets[row + 1])].tobytes()):
            yield row, first + start, first + end


def _settled(claimed: list[tuple[int, int, int]]) -> list[tuple[int, int, Kind]]:
    """Of overlapping claims (rank, start, end) the one of the lower rank, then the earlier one; in order of their starts."""
    taken: list[tuple[int, int, Kind]] = []
    for rank, start, end in sorted(claimed):
        if all(end <= other_start or start >= other_end for other_start, other_end, _ in taken):
            taken.append((start, end, KINDS[rank]))
    return sorted(taken)
