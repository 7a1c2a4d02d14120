"""Main text of web pages: bytes as served -> encoding -> parse -> text.

Four extractors, by pages a second and F1 on pages with a known article (`python -m benchmarks.corpus.html`, results in
benchmarks/results/html.json): `danlu` (operators.text.main_content; the default), `resiliparse` (Bevendorff et al. 2018: fastest,
least precise), `trafilatura` (Barbaresi 2021: slowest, most precise on articles) and `justext` (Pomikalek 2011).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numba
import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text import encoding, main_content
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

    extractor: Literal["danlu", "resiliparse", "trafilatura", "justext"] = Field(
        default="danlu", description="what finds the main content; benchmarks/results/html.json has the speed and F1 of each"
    )
    tables: Literal["keep", "drop"] = Field(default="keep", description="tables of data: one line a row, cells apart, or left out")
    code: Literal["keep", "drop"] = Field(default="keep", description="preformatted text: lines and indentation kept, or left out")
    main_content: bool = Field(default=True, description="only the main content; false: all visible text, by resiliparse")
    fall_back: bool = Field(default=True, description="take all visible text of a page where no main content is found")
    title: bool = Field(default=False, description="add the page's title as column `title`")
    max_bytes: int = Field(default=8 << 20, ge=1, description="larger pages are rejected as `too_large`")
    max_depth: int = Field(
        default=1000, ge=16, description="pages nested deeper are rejected as `too_deep`: their cost is quadratic"
    )
    max_broken: float = Field(default=0.05, ge=0, le=1, description="highest share of broken characters; above it `undecodable`")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.extractor == "justext" and ("drop" in (self.tables, self.code) or not self.main_content):
            raise ValueError("justext takes main content with all its tables and code; choose another extractor")
        return self


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

    def _extract(self, markup: str) -> tuple[str, str | None]:
        """(text, title); the text of a page without main content is all that is visible, if `fall_back` is on."""
        config = self.config
        tree = HTMLTree.parse(markup)
        title = _title(tree) if config.title else None
        text = ""
        if config.main_content:
            if config.extractor == "danlu":
                text = main_content.extract(tree, markup, config.tables, config.code)
            elif config.extractor == "resiliparse":
                text = _resiliparse(tree, markup, True, config.tables, config.code)
            elif config.extractor == "trafilatura":
                text = _trafilatura(markup, config.tables == "keep", config.code == "keep")
            else:
                text = _justext(tree, markup)
            if text or not config.fall_back:
                return text, title
        return _resiliparse(tree, markup, False, config.tables, config.code), title

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
                extracted, title = self._extract(markup)
            except (ValueError, RuntimeError) as error:  # what the parsers raise for a page they cannot take
                return _Page(title=str(error)[:80], codec=decoded.encoding, broken=decoded.broken, reason="unparsable")
        # lone surrogates, which a character reference such as &#xD800; may leave, cannot be stored as UTF-8
        extracted = extracted.encode("utf-8", "replace").decode("utf-8")
        return _Page(extracted, title, decoded.encoding, decoded.broken, None if extracted else "empty")


def _values(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def _title(tree: HTMLTree) -> str | None:
    return _SPACES.sub(" ", tree.title or "").strip().encode("utf-8", "replace").decode("utf-8")[:500] or None


def _resiliparse(tree: HTMLTree, markup: str, only_main: bool, tables: main_content.Keep, code: main_content.Keep) -> str:
    main_content.prepare(tree, markup, tables)
    return extract_plain_text(
        tree, preserve_formatting=True, main_content=only_main, list_bullets=True, alt_texts=False, links=False,
        form_fields=False, noscript=False, comments=False, skip_elements=["pre"] if code == "drop" else [],
    ).strip()  # fmt: skip


def _trafilatura(markup: str, tables: bool, code: bool) -> str:
    import trafilatura

    prune = None if code else ["//pre"]
    found = trafilatura.extract(markup, include_comments=False, include_tables=tables, deduplicate=False, prune_xpath=prune)
    return (found or "").strip()


def _justext(tree: HTMLTree, markup: str) -> str:
    """With the stop words of the language that most of the page's words are stop words of; without, where none fits (Chinese)."""
    import justext

    visible = tree.body.text if tree.body is not None else ""
    words = set((visible or "").lower().split())
    _, known = max(_stop_words().items(), key=lambda item: (len(words & item[1]), item[0]))
    options = {} if len(words & known) >= 5 else {"stopwords_low": 0, "stopwords_high": 0}
    paragraphs = justext.justext(
        markup.encode("utf-8", "replace"), known if not options else frozenset(), encoding="utf-8", **options
    )
    return "\n\n".join(paragraph.text for paragraph in paragraphs if not paragraph.is_boilerplate)


@functools.cache
def _stop_words() -> dict[str, frozenset[str]]:
    import justext

    return {language: justext.get_stoplist(language) for language in sorted(justext.get_stoplists())}


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
