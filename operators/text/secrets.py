"""Credentials in text: keys of known services by their shape, private key blocks, passwords in URLs, and random values that
a name such as `api_key =` announces.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

# shapes that the services document (or that GitHub's secret scanning lists): what must be in the text, and the pattern, of which
# the group counts
_SHAPES = [
    (
        "AKIA ASIA AROA AIDA AGPA ABIA ACCA",
        rb"(?<![A-Za-z0-9])((?:AKIA|ASIA|AROA|AIDA|AGPA|ABIA|ACCA)[A-Z2-7]{16})(?![A-Za-z0-9])",
    ),  # AWS
    (
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        rb"(?<![A-Za-z0-9_])(gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})(?![A-Za-z0-9_])",
    ),
    ("glpat-", rb"(?<![A-Za-z0-9_])(glpat-[A-Za-z0-9_\-]{20,64})(?![A-Za-z0-9_])"),
    ("xox", rb"(?<![A-Za-z0-9])(xox[abeoprs]-(?:[A-Za-z0-9]{1,64}-)*[A-Za-z0-9]{10,64})(?![A-Za-z0-9])"),  # Slack
    ("hooks.slack.com", rb"(hooks\.slack\.com/services/T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{20,28})"),
    ("AIza", rb"(?<![A-Za-z0-9_])(AIza[A-Za-z0-9_\-]{35})(?![A-Za-z0-9_\-])"),  # Google
    ("_live_ _test_", rb"(?<![A-Za-z0-9_])((?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,247})(?![A-Za-z0-9])"),  # Stripe
    (
        "sk-",
        rb"(?<![A-Za-z0-9_\-])(sk-(?:proj-|ant-|svcacct-|or-v1-)?(?=[A-Za-z_\-]{0,40}\d)[A-Za-z0-9_\-]{20,200})(?![A-Za-z0-9_\-])",
    ),
    (
        "hf_ npm_ pypi-",
        rb"(?<![A-Za-z0-9_])(hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_\-]{50,250})(?![A-Za-z0-9])",
    ),
    ("SG.", rb"(?<![A-Za-z0-9_])(SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43})(?![A-Za-z0-9_\-])"),  # SendGrid
    ("LTAI AKID", rb"(?<![A-Za-z0-9])(LTAI[A-Za-z0-9]{12,20}|AKID[A-Za-z0-9]{32})(?![A-Za-z0-9])"),  # Alibaba Cloud, Tencent Cloud
    (
        "eyJ",
        rb"(?<![A-Za-z0-9_\-.])(eyJ[A-Za-z0-9_\-]{10,2000}\.eyJ[A-Za-z0-9_\-]{10,4000}\.[A-Za-z0-9_\-]{20,2000})(?![A-Za-z0-9_\-])",
    ),
    (
        "PRIVATE",
        rb"(-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----[^-]{16,20000}"
        rb"-----END (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----)",
    ),
    ("://", rb"(?<![A-Za-z0-9])[a-z][a-z0-9+.\-]{1,20}://[^\s:/@?#]{1,64}:([^\s:/@?#<>${}*]{4,128})@[A-Za-z0-9]"),  # user:password@
]
_NAMED = (
    rb"(?i:(?:api[_\- ]?key|secret|token|passw(?:or)?d|passwd|access[_\- ]?key|auth[_\- ]?key|credential)[\"']?"
    rb"|\xe5\xaf\x86\xe9\x92\xa5|\xe5\xaf\x86\xe7\xa0\x81|\xe5\x8f\xa3\xe4\xbb\xa4)"  # 密钥, 密码, 口令
    rb"[ \t]{0,4}(?::=|=>|=|:|\xef\xbc\x9a|\xe6\x98\xaf)[ \t]{0,4}[\"'`]?(?i:bearer )?"
    rb"([A-Za-z0-9+/_\-.~]{16,256}={0,2})(?![A-Za-z0-9(\[{])"
)
_SHAPE = [(tuple(word.encode() for word in words.split()), re.compile(pattern)) for words, pattern in _SHAPES]
_NAME = re.compile(_NAMED)

HINT = (
    r"(?:AKIA|ASIA|AROA|AIDA|AGPA|ABIA|ACCA)[A-Z2-7]{16}|gh[pousr]_|github_pat_|glpat-|xox[abeoprs]-|hooks\.slack\.com|AIza|[sr]k_(?:live|test)_"
    r"|sk-[A-Za-z0-9_\-]{20}|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|pypi-AgEI|SG\.[A-Za-z0-9_\-]{22}\.|LTAI|AKID|eyJ|PRIVATE KEY"
    r"|://[^\s:/@?#]{1,64}:[^\s:/@?#]{4,128}@"
    r"|(?i:key|secret|token|passw(?:or)?d|passwd|credential)[\"']?[ \t]{0,4}(?::=|=>|=|:|：)[ \t]{0,4}"
    r"[\"'`]?[A-Za-z0-9+/_\-.~ ]{16}"
    r"|(?:密钥|密码|口令)[ \t]{0,4}(?:=|:|：|是)"
)
"""RE2 pattern that holds in every text with something that `find` finds."""

_LEAST_BITS = 3.2  # Shannon entropy of a character; identifiers and words of code lie below 3.2 where they have no digits
_PLACEHOLDER = re.compile(rb"(?i)your|www|example|x{4,}|\*{3,}|placeholder|changeme|dummy|sample|<|test_?key|0{6,}|1234567")


def find(text: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) in bytes of each credential in UTF-8 text, in no order; spans may overlap."""
    for words, pattern in _SHAPE:
        if any(word in text for word in words):
            for match in pattern.finditer(text):
                yield match.span(1)
    for match in _NAME.finditer(text):
        if _is_random(match[1]):
            yield match.span(1)


def _is_random(value: bytes) -> bool:
    """Letters and digits mixed, no placeholder, and as many bits a character as a random value has."""
    digits = sum(48 <= byte <= 57 for byte in value)
    letters = sum(65 <= byte <= 90 or 97 <= byte <= 122 for byte in value)
    if digits < 2 or letters < 2 or _PLACEHOLDER.search(value):
        return False
    return bits_per_character(value) >= _LEAST_BITS


def bits_per_character(value: bytes) -> float:
    """Shannon entropy of the bytes, rounded to 6 decimals."""
    size = len(value)
    return round(-sum(count / size * math.log2(count / size) for count in Counter(value).values()), 6) if size else 0.0
