"""Personal data replaced by typed placeholders: e-mail addresses, phone numbers, IP addresses, Chinese resident identity
numbers (GB 11643, check digit verified) and payment cards (Luhn check digit verified).

A linear-time regular expression over the whole column picks the rows; only these are searched in detail.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis
from operators.text.language import set_column
from operators.text.repair import put

Kind = Literal["email", "resident_id", "card", "ip", "phone"]


@dataclass(frozen=True)
class _Detector:
    """`hint` (RE2) holds wherever `pattern` (re) matches; `accept` judges a match."""

    hint: str
    pattern: re.Pattern[str]
    accept: Callable[[str, bool], bool]


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isascii() and character.isdigit())


def _is_resident_id(text: str, public_only: bool) -> bool:
    """18 characters with a valid birth date and check digit (ISO 7064, MOD 11-2)."""
    try:
        datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (1 << (17 - place)) for place, digit in enumerate(text[:17])) % 11
    return "10X98765432"[total] == text[17].upper()


def _is_card(text: str, public_only: bool) -> bool:
    """13 to 19 digits with a valid check digit (Luhn, ISO/IEC 7812-1) and an issuer's first digit."""
    digits = _digits(text)
    if not 13 <= len(digits) <= 19 or digits[0] not in "23456" or len(set(digits)) < 2:
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_ip(text: str, public_only: bool) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global or not public_only


def _is_phone(text: str, public_only: bool) -> bool:
    return 7 <= len(_digits(text)) <= 15


def _any(text: str, public_only: bool) -> bool:
    return True


_DETECTORS: dict[str, _Detector] = {
    "email": _Detector(
        "@",
        re.compile(
            r"(?<![A-Za-z0-9._%+\-])[A-Za-z0-9](?:[A-Za-z0-9._%+\-]{0,62}[A-Za-z0-9_+\-])?@"
            r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9\-])"
        ),
        _any,
    ),
    "resident_id": _Detector(
        r"[1-9]\d{16}[\dXx]",
        re.compile(r"(?<![0-9A-Za-z])[1-9]\d{5}(?:18|19|20)\d{2}(?:0\d|1[0-2])[0-3]\d{4}[\dXx](?![0-9A-Za-z])", re.ASCII),
        _is_resident_id,
    ),
    "card": _Detector(
        r"\d(?:[ \-]?\d){12}",
        re.compile(
            r"(?<![\d.\-])(?:\d{4}[ \-]\d{4}[ \-]\d{4}[ \-]\d{1,7}|\d{4}[ \-]\d{6}[ \-]\d{5}|\d{13,19})(?![\d\-])(?!\.\d)",
            re.ASCII,
        ),
        _is_card,
    ),
    "ip": _Detector(
        r"\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f]:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]",
        re.compile(
            r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d]|\.\d)"
            r"|(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}(?![0-9A-Za-z:])",
            re.ASCII,
        ),
        _is_ip,
    ),
    "phone": _Detector(
        r"\+\d|1[3-9]\d[ \-]?\d{4}[ \-]?\d{4}|\(?\d{3}\)?[ .\-]\d{3}[.\-]\d{4}|0\d{2,3}-\d{7,8}",
        re.compile(
            r"(?<![\w+])\+\d{1,3}(?:[ .\-]?\(\d{1,4}\))?(?:[ .\-]?\d{2,5}){2,5}(?!\w)"  # international, with its plus
            r"|(?<![\d\-+.A-Za-z_])(?:(?:\+|00)?86[ \-]?)?1[3-9]\d(?:\d{8}|[ \-]\d{4}[ \-]\d{4})(?![\d\-]|\.\d)"  # Chinese mobile
            r"|(?<![\d\-+.A-Za-z_])0\d{2,3}-\d{7,8}(?![\d\-]|\.\d)"  # Chinese land line with its area code
            # North America
            r"|(?<![\d\-+.A-Za-z_])(?:1[ .\-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.\-])[2-9]\d{2}[.\-]\d{4}(?![\d\-]|\.\d)",
            re.ASCII,
        ),
        _is_phone,
    ),
}  # fmt: skip
_ORDER: tuple[Kind, ...] = ("email", "resident_id", "card", "ip", "phone")


class RedactPiiSettings(Settings):
    """Which kinds to replace, and by what."""

    kinds: list[Kind] = Field(default=list(_ORDER), description="kinds of personal data to replace")
    placeholders: dict[Kind, str] = Field(default={}, description="replacement by kind; `<EMAIL>`, `<PHONE>`, ... by default")
    public_ips_only: bool = Field(default=True, description="leave private, loop-back and documentation addresses as they are")
    max_count: int | None = Field(default=None, ge=0, description="documents with more replacements are rejected as `pii`")


class RedactPii(Operator):
    """Replace personal data by placeholders. Adds `pii_<kind>`, the number of replacements, for each kind asked for."""

    name: ClassVar[str] = "redact_pii"
    settings = RedactPiiSettings
    adds = tuple(f"pii_{kind}" for kind in _ORDER)
    changes_text = True

    def may_reject(self) -> bool:
        return self.config.max_count is not None

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        column = table["text"].cast(pa.large_string())
        text = pc.fill_null(column.combine_chunks(), "") if table.num_rows else pa.array([], pa.large_string())
        text = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
        total = np.zeros(table.num_rows, np.int64)
        for kind in (kind for kind in _ORDER if kind in self.config.kinds):
            text, counts = self._replace(text, kind)
            total += counts
            table = set_column(table, f"pii_{kind}", pa.array(counts, pa.int32()))
        table = set_column(table, "text", text)
        over = total > self.config.max_count if self.config.max_count is not None else np.zeros(len(total), bool)
        reason = pc.if_else(pa.array(over), "pii", pa.scalar(None, pa.string()))
        return Verdict(table, reason, pa.array(total.astype(np.float64), mask=~over))

    def _replace(self, text: pa.Array, kind: Kind) -> tuple[pa.Array, np.ndarray]:
        detector = _DETECTORS[kind]
        placeholder = self.config.placeholders.get(kind, f"<{kind.upper()}>")
        counts = np.zeros(len(text), np.int64)
        hits = pc.match_substring_regex(text, detector.hint)
        rows = np.flatnonzero(hits.to_numpy(zero_copy_only=False)) if len(text) else np.zeros(0, np.int64)
        if not len(rows):
            return text, counts
        public_only = self.config.public_ips_only

        def substitute(match: re.Match[str]) -> str:
            if not detector.accept(match[0], public_only):
                return match[0]
            counts[row] += 1
            return placeholder

        replaced = []
        for row, item in zip(rows, text.filter(hits).to_pylist(), strict=True):  # noqa: B007 (`substitute` counts by row)
            replaced.append(detector.pattern.sub(substitute, item))  # sparse: only the rows that match
        return put(text, hits, pa.array(replaced, pa.large_string())), counts
