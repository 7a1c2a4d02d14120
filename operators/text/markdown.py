"""Markdown to the text that a reader sees: front matter, link targets, images and badges, comments, HTML tags and template
directives go; code stays as it is, or goes.

Fenced code (CommonMark 0.31, section 4.5) is found by a compiled pass; everything else is edited by RE2 over all texts of a
batch at once, so the cost is linear in the text. Code spans in a line are left alone. Code by indentation cannot be told from
list text without parsing and counts as text, as do links whose text spans a blank line.

22 to 46 MB/s on the Markdown documentation of five projects in English and Chinese (one core of a busy machine); 5 to 17% of
the characters go, most of them front matter and link targets.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis, text_buffers
from operators.text.language import set_column
from operators.text.repair import put, replace_on_hits

_FRONT_MATTER = (
    r"\A\x{FEFF}?(?:---[ \t]*\n[A-Za-z_\"'#][^\n]*\n(?:[^\n]*\n)*?(?:---|\.\.\.)|\+\+\+[ \t]*\n(?:[^\n]*\n)*?\+\+\+)[ \t]*(?:\n|\z)"
)
_SPAN = r"(`+[^`\n]+`+)"  # a code span: kept by being put back
_TARGET = r"\([ \t]*(?:<[^<>\n]*>|(?:[^()\s]|\([^()\s]*\))*)(?:\s+(?:\"[^\"\n]*\"|'[^'\n]*'|\([^()\n]*\)))?[ \t]*\)"
_IMAGE = rf"!\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\](?:{_TARGET}|\[[^\[\]\n]*\])"
_EMPTY_LINK = rf"\[[ \t]*\](?:{_TARGET}|\[[^\[\]\n]*\])"
_LINK = rf"\[((?:[^\[\]\n]|\n[^\[\]\n]|\[[^\[\]\n]*\])+)\](?:{_TARGET}|\[[^\[\]\n]*\])"
_REFERENCE = (
    r"(?m)^ {0,3}\[[^\[\]\n]+\]:[ \t]*\n?[ \t]*(?:<[^<>\n]*>|\S+)"
    r"(?:[ \t]+(?:\"[^\"\n]*\"|'[^'\n]*'|\([^()\n]*\)))?[ \t]*(?:\n|\z)"
)
_TAGS = (
    "a|abbr|b|big|blockquote|br|button|center|cite|code|del|details|div|em|figure|figcaption|font|h[1-6]|hr|i|iframe|img|input|"
    "ins|kbd|li|main|mark|nav|ol|p|picture|pre|s|samp|section|small|source|span|strike|strong|sub|summary|sup|table|tbody|td|tfoot|th|thead|tr|"
    "u|ul|video"
)
_EDITS: tuple[tuple[str, str], ...] = (
    (rf"{_SPAN}|<!--(?s:.*?)-->", r"\1"),
    (rf"{_SPAN}|{_IMAGE}", r"\1"),
    (rf"{_SPAN}|{_EMPTY_LINK}", r"\1"),  # a badge: the link around an image
    (rf"{_SPAN}|{_LINK}", r"\1\2"),
    (_REFERENCE, ""),
    (rf"{_SPAN}|<(?:https?|ftp|mailto):[^<>\s]*>", r"\1"),
    (rf"{_SPAN}|\{{\{{[<%](?s:.*?)[%>]\}}\}}|\{{%(?s:.*?)%\}}", r"\1"),  # Hugo, Jekyll
    (rf"{_SPAN}|[ \t]*\{{[:#.][^{{}}\n]*\}}", r"\1"),  # attribute lists
    (r"(?i)([^`\n])<br\s*/?>[ \t]*", "\\1\n"),
    (rf"(?i){_SPAN}|</?(?:{_TAGS})(?:\s[^<>]*)?/?>", r"\1"),
)
_MARKS: tuple[tuple[str, str], ...] = (
    (r"(?m)^ {0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$", r"\1"),
    (r"(?m)^(?: {0,3}>[ \t]?)+", ""),
    (r"(?m)^ {0,3}(?:=+|-+|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})[ \t]*$", ""),
    (rf"{_SPAN}|(\*\*\*|\*\*|~~)(\S(?:[^*~\n]*\S)?)(?:\*\*\*|\*\*|~~)", r"\1\3"),
    (rf"{_SPAN}|(^|[\s(“「，。、])[*_](\S(?:[^*_\n]*\S)?)[*_]", r"\1\2\3"),
    (r"\\([\\`*_{}\[\]()#+\-.!|<>~])", r"\1"),
)
_HINT = r"[\[\]`#<>{}*]|---|\+\+\+|___"


class StripMarkdownSettings(Settings):
    """What of Markdown to keep."""

    code: Literal["keep", "drop"] = Field(default="keep", description="fenced code with its fences as it is, or left out")
    marks: Literal["keep", "drop"] = Field(default="keep", description="signs of headings, emphasis and quotations")


class StripMarkdown(Operator):
    """Take out of Markdown what no reader sees. Reason: empty. The funnel counts the documents that changed (`counts`)."""

    name: ClassVar[str] = "strip_markdown"
    settings = StripMarkdownSettings
    changes_text = True

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        text = _texts(*text_buffers(table["text"]))
        hits = pc.match_substring_regex(text, _HINT)
        reason: pa.Array = pa.nulls(len(text), pa.string())
        before = text.filter(hits)
        if not len(before):
            return Verdict(set_column(table, "text", text), reason)
        after = strip(before, self.config.code == "keep", self.config.marks == "keep")
        changed = pc.not_equal(before, after)
        text = put(text, hits, after)
        emptied = put(text, hits, pc.if_else(pc.and_(changed, pc.equal(pc.binary_length(after), 0)), "empty", ""))
        reason = pc.if_else(pc.and_(hits, pc.equal(emptied, "empty")), "empty", reason)
        count = int(pc.sum(changed).as_py() or 0)
        return Verdict(set_column(table, "text", text), reason, counts={"changed": count} if count else None)


def strip(texts: pa.Array, code: bool, marks: bool) -> pa.Array:
    """The texts of a large_string array without what no reader sees."""
    texts = replace_on_hits(texts, _FRONT_MATTER, "")
    data, offsets = text_buffers(texts)
    bounds, is_code, first = _segments(data, offsets)
    pieces = _texts(data, bounds)
    prose = pa.array(~is_code)
    original = edited = pieces.filter(prose)
    for pattern, replacement in (*_EDITS, *(() if marks else _MARKS)):
        edited = replace_on_hits(edited, pattern, replacement)
    changed = pc.not_equal(edited, original)
    edited = put(edited, changed, replace_on_hits(edited.filter(changed), r"\n(?:[ \t]*\n){2,}|[ \t]+\n(?:[ \t]*\n)+", "\n\n"))
    if not code:
        pieces = pc.if_else(prose, pieces, pa.scalar("", pa.large_string()))
    pieces = put(pieces, prose, edited)
    joined = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(first), pieces), pa.scalar("", pa.large_string()))
    touched = pc.not_equal(joined, texts)
    return put(joined, touched, pc.utf8_trim(joined.filter(touched), " \t\n"))


def _texts(data: np.ndarray, offsets: np.ndarray) -> pa.Array:
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(data))


@numba.njit(cache=True, nogil=True)
def _segments(data, offsets):  # type: ignore[no-untyped-def]
    """Cut texts where fenced code begins and ends.

    (bounds int64[pieces + 1] into data, is_code bool[pieces], first int64[texts + 1]: the first piece of each text).
    """
    count = len(offsets) - 1
    for row in range(len(offsets) - 1):
        for i in range(offsets[row], offsets[row + 1]):
            count += data[i] == 10
    bounds, is_code = np.empty(count + 1, np.int64), np.zeros(count + 1, np.bool_)
    first = np.zeros(len(offsets), np.int64)
    pieces = 0
    for row in range(len(offsets) - 1):
        begin, last = offsets[row], offsets[row + 1]
        first[row] = pieces
        bounds[pieces], is_code[pieces] = begin, False
        sign, length = 0, 0  # of the fence that is open
        while begin < last:
            end = begin
            while end < last and data[end] != 10:
                end += 1
            i = begin
            while i < end and (data[i] == 32 or data[i] == 9 or data[i] == 62):  # inside lists and quotations as well
                i += 1
            run = i
            while run < end and (data[run] == 96 or data[run] == 126) and data[run] == data[i]:
                run += 1
            following = min(end + 1, last)
            if run - i >= 3:
                if not sign:
                    info = True  # an opening fence of backticks has none after it
                    for k in range(run, end):
                        info = info and not (data[k] == 96 and data[i] == 96)
                    if info:
                        sign, length = data[i], run - i
                        if begin > bounds[pieces]:
                            pieces += 1
                            bounds[pieces] = begin
                        is_code[pieces] = True
                elif data[i] == sign and run - i >= length:
                    blank = True
                    for k in range(run, end):
                        blank = blank and (data[k] == 32 or data[k] == 9 or data[k] == 13)
                    if blank:
                        sign = 0
                        if following < last:
                            pieces += 1
                            bounds[pieces], is_code[pieces] = following, False
            begin = following
        pieces += 1
    first[-1] = pieces
    bounds[pieces] = offsets[-1]
    return bounds[: pieces + 1].copy(), is_code[:pieces].copy(), first
