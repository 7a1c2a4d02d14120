"""Main text of web pages: bytes as served -> encoding -> parse -> text.

Extraction is by resiliparse (Bevendorff et al. 2018; a C++ parser with rules for main content, some 10x faster) or by
trafilatura (Barbaresi 2021; more precise on articles).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numba
import numpy as np
import pyarrow as pa
from pydantic import Field

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text import encoding
from operators.text.analysis import Analysis
from operators.text.language import set_column

_HTML_TYPES = {"text/html", "application/xhtml+xml", "application/xml", "text/xml", "application/vnd.wap.xhtml+xml"}
_UNKNOWN_TYPES = {"", "application/octet-stream", "application/x-unknown", "unknown/unknown", "httpd/unix-directory", "*/*"}
_MAGIC = (
    b"%PDF", b"\x89PNG", b"GIF8", b"\xff\xd8\xff", b"PK\x03\x04", b"\x1f\x8b", b"RIFF", b"\x00\x00\x01\x00", b"OggS", b"ID3",
    b"\x7fELF", b"MZ", b"BM", b"wOFF", b"wOF2", b"{\\rtf",
)  # fmt: skip
_SPACES = re.compile(r"\s+")


class ExtractHtmlSettings(Settings):
    """Reads `content` (bytes as served; with `content_type` and `charset` if there) or `html`, writes `text`."""

    library: Literal["resiliparse", "trafilatura"] = Field(default="resiliparse", description="which library extracts")
    main_content: bool = Field(default=True, description="only the main content; false takes all visible text")
    fall_back: bool = Field(default=True, description="take all visible text of a page where no main content is found")
    title: bool = Field(default=False, description="add the page's title as column `title`")
    max_bytes: int = Field(default=8 << 20, ge=1, description="larger pages are rejected as `too_large`")
    max_depth: int = Field(
        default=1000, ge=16, description="pages nested deeper are rejected as `too_deep`: their cost is quadratic"
    )
    max_broken: float = Field(default=0.05, ge=0, le=1, description="highest share of broken characters; above it `undecodable`")


@dataclass(frozen=True)
class _Page:
    text: str = ""
    title: str | None = None
    codec: str | None = None
    broken: int = 0
    reason: str | None = None
    value: float | None = None


class ExtractHtml(Operator):
    """Extract the main text of HTML pages; plain text passes, other media types are rejected.

    Reasons: content_type, too_large, too_deep, undecodable, unparsable, empty. Rows without page but with `text` stay as
    they are. Adds `encoding` and `broken_characters` (U+FFFD put in place of broken bytes).
    """

    name: ClassVar[str] = "extract_html"
    settings = ExtractHtmlSettings
    needs = ()
    adds = ("text", "encoding", "broken_characters")
    changes_text = True

    def check_columns(self, columns: list[str]) -> None:
        if "content" not in columns and "html" not in columns:
            raise KeyError(f"operator {self.name} needs column 'content' or 'html'; the table has {columns}")

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        self.check_columns(table.column_names)
        rows = table.num_rows
        content, html, kind, charset, text = (
            _values(table, name) for name in ("content", "html", "content_type", "charset", "text")
        )
        pages = [self._page(content[i], html[i], kind[i], charset[i], text[i]) for i in range(rows)]
        table = table.drop_columns([name for name in ("content", "html") if name in table.column_names])
        table = set_column(table, "text", pa.array([page.text for page in pages], pa.large_string()))
        table = set_column(table, "encoding", pa.array([page.codec for page in pages], pa.string()))
        table = set_column(table, "broken_characters", pa.array([page.broken for page in pages], pa.int32()))
        if self.config.title:
            table = set_column(table, "title", pa.array([page.title for page in pages], pa.string()))
        return Verdict(
            table,
            pa.array([page.reason for page in pages], pa.string()),
            pa.array([page.value for page in pages], pa.float64()),
        )

    def _page(self, content: bytes | None, html: str | None, kind: str | None, charset: str | None, text: str | None) -> _Page:
        if content is None and html is None:
            return _Page(text or "", reason=None if text else "empty")
        media = (kind or "").split(";")[0].strip().lower()
        if content is not None:
            if len(content) > self.config.max_bytes:
                return _Page(reason="too_large", value=len(content))
            if media.startswith("text/") and media not in _HTML_TYPES and media != "text/plain":
                return _Page(reason="content_type")
            if media not in _HTML_TYPES and media not in _UNKNOWN_TYPES and media != "text/plain":
                return _Page(reason="content_type")
            if content.startswith(_MAGIC):
                return _Page(reason="content_type")
            decoded = encoding.decode(content, charset or encoding.declared_charset(kind), html=media != "text/plain")
        else:
            assert html is not None
            if len(html) > self.config.max_bytes:
                return _Page(reason="too_large", value=len(html))
            decoded = encoding.Decoded(html, "utf-8", 0)
        share = decoded.broken / max(len(decoded.text), 1)
        if share > self.config.max_broken:
            return _Page(codec=decoded.encoding, broken=decoded.broken, reason="undecodable", value=share)
        markup = decoded.text.replace("\x00", "")
        if media == "text/plain":
            extracted, title = markup.strip(), None
        else:
            depth = nesting_depth(markup)
            if depth > self.config.max_depth:
                return _Page(codec=decoded.encoding, broken=decoded.broken, reason="too_deep", value=depth)
            try:
                extracted, title = _extract(markup, self.config.library, self.config.main_content, self.config.title)
                if not extracted and self.config.main_content and self.config.fall_back:
                    extracted, _ = _extract(markup, self.config.library, False, False)
            except (ValueError, RuntimeError) as error:  # what the parsers raise for a page they cannot take
                return _Page(title=str(error)[:80], codec=decoded.encoding, broken=decoded.broken, reason="unparsable")
        # lone surrogates, which a character reference such as &#xD800; may leave, cannot be stored as UTF-8
        extracted = extracted.encode("utf-8", "replace").decode("utf-8")
        return _Page(extracted, title, decoded.encoding, decoded.broken, None if extracted else "empty")


def _values(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def _extract(markup: str, library: str, main_content: bool, with_title: bool) -> tuple[str, str | None]:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    title: str | None = None
    if library == "resiliparse" or with_title:
        tree = HTMLTree.parse(markup)
        if with_title:
            title = _SPACES.sub(" ", tree.title or "").strip().encode("utf-8", "replace").decode("utf-8")[:500] or None
    if library == "resiliparse":
        text = extract_plain_text(
            tree, preserve_formatting=True, main_content=main_content, list_bullets=True, alt_texts=False, links=False,
            form_fields=False, noscript=False, comments=False,
        )  # fmt: skip
        return text.strip(), title
    return _trafilatura(markup, main_content), title


def _trafilatura(markup: str, main_content: bool) -> str:
    import trafilatura

    if main_content:
        return (trafilatura.extract(markup, include_comments=False, include_tables=True, deduplicate=False) or "").strip()
    return trafilatura.html2txt(markup).strip()


def nesting_depth(markup: str) -> int:
    """An upper estimate of how deep elements nest; elements whose end tag may be left out do not count."""
    if markup.count("<") < 64:
        return 0
    data = np.frombuffer(markup.encode("utf-8", "replace"), np.uint8)
    return int(_depth(data, _UNCOUNTED))


def _tag_number(name: bytes) -> int:
    """The first eight bytes of a lower-case tag name as a number."""
    return int.from_bytes(name[:8], "big")


_UNCOUNTED = np.array(
    sorted(
        _tag_number(name)
        for name in (
            b"area", b"base", b"br", b"col", b"embed", b"hr", b"img", b"input", b"link", b"meta", b"source", b"track", b"wbr",
            b"param", b"p", b"li", b"dt", b"dd", b"option", b"tr", b"td", b"th", b"thead", b"tbody", b"tfoot", b"colgroup",
            b"html", b"body", b"head", b"rp", b"rt",
        )
    ),
    np.uint64,
)  # fmt: skip
_SCRIPT, _STYLE = np.uint64(_tag_number(b"script")), np.uint64(_tag_number(b"style"))


@numba.njit(cache=True, nogil=True)
def _depth(data, uncounted):  # type: ignore[no-untyped-def]
    depth = deepest = i = 0
    raw = np.uint64(0)  # inside <script> or <style>: their name
    size = len(data)
    while i < size - 1:
        if data[i] != 60:
            i += 1
            continue
        if not raw and i + 3 < size and data[i + 1] == 33 and data[i + 2] == 45 and data[i + 3] == 45:  # <!--
            i += 4
            while i + 2 < size and not (data[i] == 45 and data[i + 1] == 45 and data[i + 2] == 62):
                i += 1
            continue
        closing = data[i + 1] == 47
        i += 2 if closing else 1
        name, length = np.uint64(0), 0
        while i < size:
            c = data[i] | 32 if 65 <= data[i] <= 90 else data[i]
            if not (97 <= c <= 122 or (48 <= c <= 57 and length)):
                break
            if length < 8:
                name = (name << np.uint64(8)) | np.uint64(c)
            length += 1
            i += 1
        if not length:
            continue
        if raw:
            if closing and name == raw:
                raw = np.uint64(0)
            continue
        if name == _SCRIPT or name == _STYLE:  # noqa: SIM109 (compiled)
            raw = np.uint64(0) if closing else name
            continue
        counted = True
        for number in uncounted:
            if number == name:
                counted = False
        if not counted:
            continue
        depth = max(0, depth - 1) if closing else depth + 1
        deepest = max(deepest, depth)
    return deepest
