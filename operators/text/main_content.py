"""Main content of a web page: resiliparse's rules (Bevendorff et al. 2018), corrected by the page's own marks and by lines.

Four corrections, each cheap beside parsing: (1) where the page marks its article by one of the class names, ids or
attributes that publishing systems use, only that element counts, if it holds most of what the rules found; (2) image
captions and line numbers go; (3) lines of links go, and so does what follows the last sentence (tags, teasers, author
boxes); (4) of pages where the rules find nothing, sentences that are no links are taken. Tables of data become lines of
cells before the text is taken, code keeps its line breaks and its indentation.

Measured by `python -m benchmarks.corpus.html`.
"""

from __future__ import annotations

import html
import re
from typing import Any, Literal, NamedTuple

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

Keep = Literal["keep", "drop"]

_CLASS_NAMES = (
    "entry-content post-content post-body post__content post__body post_content post_body blog-post-content td-post-content "
    "article-body article__body articleBody article-content article__content articleContent article_content content-article "
    "article-text article_text articletext article-main story-body story-content single-content body-text body-copy "
    "content-body content-text rich-text richtext node-content field--name-body field-name-body entry newsContent news-content "
    "TRS_Editor rich_media_content RichText Post-RichText rm_txt_con art_content article-con text_con news_txt show-content"
)
_CLASSES = frozenset(_CLASS_NAMES.split())
_ID_NAMES = (
    "article-body articleBody article-content article_content articleContent content-body story-body post-body js_content zoom "
    "artibody endText cnblogs_post_body content_views Cnt-Main-Article-QQ p-detail main_content ContentBody"
)
_IDS = frozenset(_ID_NAMES.split())
_ATTRIBUTES = re.compile(r"""(?:class|id)\s*=\s*["']?([^"'>]{4,200})""")
_CAPTIONS = ['[class*="caption"]', '[id*="caption"]', "figcaption"]
_LINE_NUMBERS = ["td.linenos", "td.gutter", ".linenodiv", ".line-numbers-rows", ".lineno", "td.blob-num"]
_CANDIDATES = 8  # elements of one class name that are looked at
_LEAST_CHARACTERS = 200  # of a marked article
_LEAST_SHARE = 0.7  # ... of the characters that the rules find in the whole page
_LINK_SHARE = 0.8  # a line with more of its characters in links is no content
_LINK_LINE = 200  # ... if it has fewer characters
_SENTENCE = 60  # characters, a wide one counting three, that with a mark at their end are a sentence
_WIDE = 3

_PRE = re.compile(r"(<pre>.*?</pre>)", re.DOTALL)
_LINK = re.compile(r"<a [^>]*>(.*?)</a>")
_TAG = re.compile(r"</?(?:a|br|p|h[1-6]|ul|ol|li|pre)\b[^>]*>")
_ANY_TAG = re.compile(r"<[^>]*>")
_WIDE_CHARACTER = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]")
_END = re.compile(r"""[.!?…。！？；;:：”"’'」』)）]\s*$""")
_SPACES = re.compile(r"\s+")


class _Block(NamedTuple):
    kind: Literal["heading", "item", "preformatted", "paragraph", "line"]
    text: str
    linked: float  # share of its characters in links


def extract(tree: HTMLTree, markup: str, tables: Keep = "keep", code: Keep = "keep") -> str:
    """The main content of a parsed page; `markup` is what it was parsed from. Changes the tree.

    Data tables become one line a row, cells between ` | `. `tables` or `code` set to `drop` leaves these out.
    """
    prepare(tree, markup, tables)
    skip = [*_CAPTIONS, *_LINE_NUMBERS, *(["pre"] if code == "drop" else [])]
    found = _rules(tree, skip)
    marked = _marked(tree, markup)
    if marked is not None:
        inside = _rules(HTMLTree.parse(f"<main>{marked.html}</main>"), skip)
        if len(inside) >= max(_LEAST_CHARACTERS, _LEAST_SHARE * len(found)):
            found = inside
    if found.strip():
        return _joined(_until_last_sentence([block for block in _blocks(found) if not _is_link_line(block)]))
    found = _rules(tree, [*skip, "nav", "footer", "aside"], main_content=False)
    return _joined([block for block in _blocks(found) if block.linked <= 0.5 and _is_sentence(block)])


def prepare(tree: HTMLTree, markup: str, tables: Keep) -> None:
    """Put each data table's rows into a <pre> in its place, or take the table out. Tables that lay out a page stay."""
    if "<table" not in markup and "<TABLE" not in markup:
        return
    for table in _elements(tree.body, "table"):
        rows = _data_rows(table)
        if rows is None or table.parent is None:
            continue
        if tables == "drop":
            table.parent.remove_child(table)
            continue
        lines: Any = tree.create_element("pre")
        lines.append_child(tree.create_text_node("\n".join(" | ".join(row) for row in rows)))
        table.parent.replace_child(lines, table)


def _elements(root: Any, tag: str) -> list[Any]:
    return list(root.query_selector_all(tag)) if root is not None else []


def _data_rows(table: Any) -> list[list[str]] | None:
    """The cells of a table of data; None for one that holds a layout, code or other tables."""
    if table.getattr("role") in ("presentation", "none") or table.query_selector("table, pre, form, iframe, h1, h2") is not None:
        return None
    rows = []
    for row in _elements(table, "tr"):
        cells = [cell for cell in row.child_nodes if cell.tag in ("td", "th")]
        texts = [_SPACES.sub(" ", html.unescape(_ANY_TAG.sub(" ", cell.html))).strip() for cell in cells]
        if any(texts):
            rows.append(texts)
    if len(rows) < 2 or max(map(len, rows)) < 2:
        return None
    sizes = [len(text) for row in rows for text in row]
    return rows if max(sizes) <= 1000 and sum(sizes) <= 100 * len(sizes) else None


def _rules(tree: HTMLTree, skip: list[str], main_content: bool = True) -> str:
    return extract_plain_text(
        tree, preserve_formatting="minimal_html", main_content=main_content, list_bullets=True, alt_texts=False, links=True,
        form_fields=False, noscript=False, comments=False, post_meta=False, skip_elements=skip,
    )  # fmt: skip


def _marked(tree: HTMLTree, markup: str) -> Any:
    """The longest element that the page marks as its article, or None."""
    body = tree.body
    if body is None:
        return None
    names = {name for value in _ATTRIBUTES.findall(markup) for name in value.split()}
    candidates: list[Any] = []
    for name in sorted(_CLASSES & names):
        found = body.get_elements_by_class_name(name)
        candidates += [found[i] for i in range(min(len(found), _CANDIDATES))]
    candidates += [body.get_element_by_id(name) for name in sorted(_IDS & names)]
    if "articleBody" in markup:
        candidates += list(body.query_selector_all('[itemprop="articleBody"]'))[:_CANDIDATES]
    best = _longest(candidates)
    if best is None and "<article" in markup:
        found = body.get_elements_by_tag_name("article")
        best = _longest([found[i] for i in range(len(found))]) if len(found) <= 3 else None
    return best


def _longest(elements: list[Any]) -> Any:
    best, length = None, _LEAST_CHARACTERS - 1
    for element in elements:
        if element is not None and (size := len(element.text)) > length:
            best, length = element, size
    return best


def _blocks(found: str) -> list[_Block]:
    blocks: list[_Block] = []
    for part in _PRE.split(found):
        if part.startswith("<pre>"):
            text = html.unescape(_TAG.sub("", part)).strip("\n")
            if text.strip():
                blocks.append(_Block("preformatted", text, 0.0))
            continue
        blocks.extend(_block(line) for line in part.split("\n") if line.strip())
    return [block for block in blocks if block.text.strip()]


def _block(line: str) -> _Block:
    start = line.lstrip()
    text = html.unescape(_TAG.sub("", line)).rstrip()
    linked = sum(len(html.unescape(_TAG.sub("", inside))) for inside in _LINK.findall(line)) / max(len(text.strip()), 1)
    if start.startswith("<li"):
        return _Block("item", f"{line[: len(line) - len(start)]}- {text.strip()}" if text.strip() else "", linked)
    text = text.lstrip()
    if start.startswith("<h"):
        return _Block("heading", text, linked)
    return _Block("paragraph" if start.startswith("<p") else "line", text, linked)


def _is_link_line(block: _Block) -> bool:
    return block.kind != "preformatted" and block.linked > _LINK_SHARE and len(block.text) < _LINK_LINE


def _is_sentence(block: _Block) -> bool:
    if block.kind == "preformatted":
        return True
    width = len(block.text) + (_WIDE - 1) * len(_WIDE_CHARACTER.findall(block.text))
    ends = _END.search(block.text) is not None
    return (width >= _SENTENCE and block.linked < 0.5 and ends) or (width >= 2 * _SENTENCE and block.linked < 0.3)


def _until_last_sentence(blocks: list[_Block]) -> list[_Block]:
    """Without the blocks after the last sentence, but for a list that follows it at once. All blocks if none is a sentence."""
    last = max((place for place, block in enumerate(blocks) if _is_sentence(block)), default=len(blocks) - 1) + 1
    while last < len(blocks) and blocks[last].kind == "item" and blocks[last].linked < 0.3:
        last += 1
    return blocks[:last]


def _joined(blocks: list[_Block]) -> str:
    """Blank lines between blocks; none between list items, and none between bare lines."""
    pieces: list[str] = []
    before = None
    for block in blocks:
        close = block.kind == before and before in ("item", "line")
        pieces += ["\n" if close else "\n\n", block.text] if pieces else [block.text]
        before = block.kind
    return "".join(pieces)
