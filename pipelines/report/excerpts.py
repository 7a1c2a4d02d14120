"""Corpus text made safe and legible: control and direction characters visible, long text clipped, everything escaped."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

from pipelines.report.messages import MESSAGES

EXCERPT_CHARACTERS = 600

# C0 and C1 controls but tab and newline; zero-width and direction characters, which could reorder or hide what a reader
# sees; surrogates, which cannot be encoded; noncharacters
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0e\ufeff\ufff9-\uffff\ud800-\udfff]"
)
_CONTROLS = [
    "NUL",
    "SOH",
    "STX",
    "ETX",
    "EOT",
    "ENQ",
    "ACK",
    "BEL",
    "BS",
    "TAB",
    "LF",
    "VT",
    "FF",
    "CR",
    "SO",
    "SI",
    "DLE",
    "DC1",
    "DC2",
    "DC3",
    "DC4",
    "NAK",
    "SYN",
    "ETB",
    "CAN",
    "EM",
    "SUB",
    "ESC",
    "FS",
    "GS",
    "RS",
    "US",
]
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*\Z")


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code == 0xFFFC or code == 0xFFFD:
        return match.group()
    return f"⟨{_CONTROLS[code]}⟩" if code < len(_CONTROLS) else f"⟨U+{code:04X}⟩"


def visible(text: str) -> str:
    """`text` with invisible characters spelled out: NUL as ⟨NUL⟩, a right-to-left override as ⟨U+202E⟩."""
    return _INVISIBLE.sub(_picture, text)


def _marked(match: re.Match[str]) -> str:
    shown = _picture(match)
    return shown if shown == match.group() else f'<b class="ctl">{shown[1:-1]}</b>'


def marked(text: str) -> Markup:
    """Escaped text whose invisible characters stand out as small labels."""
    return Markup(_INVISIBLE.sub(_marked, str(escape(text))))


def language_attribute(lang: Any) -> Markup:
    """` lang="zh"`, or nothing where the language is unknown or no language tag."""
    if not isinstance(lang, str) or not _LANGUAGE.match(lang):
        return Markup("")
    return Markup(' lang="{}"').format(lang)


def excerpt(text: Any, lang: Any = None, limit: int = EXCERPT_CHARACTERS, total: int | None = None) -> Markup:
    """A block of corpus text of at most `limit` characters. `total` is the whole length where `text` is a beginning."""
    if text is None or text == "":
        return Markup('<p class="note">{}</p>').format(translated("corpus.no_text"))
    text = str(text)
    rest = max(total or 0, len(text)) - min(limit, len(text))
    tail = Markup('<span class="rest">… {}</span>').format(translated("page.clipped", n=rest)) if rest > 0 else ""
    return Markup('<div class="excerpt" dir="auto"{}>{}{}</div>').format(language_attribute(lang), marked(text[:limit]), tail)


def sentence(key: str, language: int, **values: Any) -> Markup:
    """One message in one language (0 English, 1 Chinese), values escaped. Raises KeyError for an unknown key."""
    form = MESSAGES[key][language]
    if "|" in form:
        one, many = form.split("|", 1)
        form = one if str(values.get("n")) == "1" else many
    shown = {name: value if isinstance(value, Markup) else visible(str(value)) for name, value in values.items()}
    return Markup(form).format(**shown)


def translated(key: str, **values: Any) -> Markup:
    """A message in both languages; the page shows the one that its reader has chosen."""
    return both(sentence(key, 0, **values), sentence(key, 1, **values))


def both(english: str, chinese: str) -> Markup:
    """A text in both languages, of which the page shows one; plain strings are escaped."""
    sides = [text if isinstance(text, Markup) else visible(text) for text in (english, chinese)]
    return Markup('<span class="en" lang="en">{}</span><span class="zh" lang="zh-CN">{}</span>').format(*sides)


def term(prefix: str, value: Any) -> Markup:
    """The message `prefix.value` where there is one, else the value itself: kinds and languages may be unknown to us."""
    key = f"{prefix}.{value}"
    return translated(key) if key in MESSAGES else escape(visible(str(value)))
