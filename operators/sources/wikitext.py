"""Wikitext to plain text, parsed by mwparserfromhell.

Kept: running text, headings (as Markdown, without those whose section is empty), the words of links, list items, tables (a
line a row), code, formulas, and the variant that a Chinese page shows by default in `-{...}-`. Left out: templates (what
they expand to is not in the dump), references, comments, files and categories, galleries, magic words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import mwparserfromhell
from mwparserfromhell import nodes

_DROPPED_TAGS = frozenset(
    "ref references gallery imagemap timeline mapframe maplink templatestyles score graph section indicator inputbox".split()  # noqa: SIM905
)
_VERBATIM_TAGS = frozenset("math chem code syntaxhighlight source pre nowiki poem".split())  # noqa: SIM905
_MEDIA = frozenset("file image category media 文件 档案 檔案 图像 圖像 图片 圖片 分类 分類 媒体 媒體".split())  # noqa: SIM905
_VARIANT = re.compile(r"-\{(?!\{)((?:[^{}]|\{(?!\{)|\}(?!-))*?)\}-")
_VARIANT_ORDER = ("zh-cn", "zh-hans", "zh", "zh-sg", "zh-my", "zh-tw", "zh-hant", "zh-hk", "zh-mo")
_MAGIC = re.compile(r"__[A-Z一-鿿]+__")
_HEADING = re.compile(r"^(#{1,6}) \S")
_LIST_MARKS = {"*": "- ", "#": "- ", ":": "", ";": ""}
_LIST_ITEM = re.compile(r"^(?:- +)+")


def plain_text(wikitext: str, tables: str = "keep", media: Iterable[str] = ()) -> str:
    """The page as text. `media` are the wiki's own names of the namespaces of files and categories.

    Markup nested deeper than mwparserfromhell's limit of 100 is text to it. Raises its ParserError, RecursionError.
    """
    dropped = _MEDIA | {name.lower() for name in media}
    code = mwparserfromhell.parse(_variants(wikitext), skip_style_tags=False)
    pieces: list[str] = []
    _render(code.nodes, pieces, tables == "keep", dropped)
    return _tidy(_MAGIC.sub("", "".join(pieces)))


def _render(found: Iterable[nodes.Node], out: list[str], tables: bool, media: frozenset[str]) -> None:
    for node in found:
        if isinstance(node, nodes.Text):
            out.append(str(node.value))
        elif isinstance(node, nodes.Heading):
            title: list[str] = []
            _render(node.title.nodes, title, tables, media)
            out.append(f"{'#' * node.level} {''.join(title).strip()}")
        elif isinstance(node, nodes.Wikilink):
            _link(node, out, tables, media)
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                _render(node.title.nodes, out, tables, media)
            elif not node.brackets:
                out.append(str(node.url))
        elif isinstance(node, nodes.HTMLEntity):
            out.append(_entity(node))
        elif isinstance(node, nodes.Tag):
            _tag(node, out, tables, media)


def _link(node: nodes.Wikilink, out: list[str], tables: bool, media: frozenset[str]) -> None:
    target = str(node.title).strip()
    space, colon, _ = target.partition(":")
    if colon and space.strip().lower() in media:
        return
    if node.text is not None:
        _render(node.text.nodes, out, tables, media)
    else:
        out.append(target.removeprefix(":"))


def _entity(node: nodes.HTMLEntity) -> str:
    try:
        return str(node.normalize())
    except (ValueError, OverflowError):  # a number that is no character
        return str(node)


def _tag(node: nodes.Tag, out: list[str], tables: bool, media: frozenset[str]) -> None:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return
    if name in _VERBATIM_TAGS:
        out.append(str(node.contents or ""))
    elif name == "table":
        if tables:
            _table(node, out, media)
    elif name in ("br", "hr"):
        out.append("\n")
    elif name in ("li", "dd", "dt") and node.wiki_markup:
        out.append(_LIST_MARKS.get(str(node.wiki_markup), ""))
    elif node.contents is not None:
        _render(node.contents.nodes, out, tables, media)


def _table(node: nodes.Tag, out: list[str], media: frozenset[str]) -> None:
    """A line a row, cells between `|`; a caption on a line of its own. Tables inside cells become part of the cell."""
    found: list[list[str]] = [[]]
    for row in node.contents.nodes if node.contents is not None else ():
        if not isinstance(row, nodes.Tag) or row.contents is None:
            continue
        name = str(row.tag).strip().lower()
        if name == "tr":
            found += [[_cell(cell, media) for cell in row.contents.nodes if isinstance(cell, nodes.Tag)], []]
        elif name in ("td", "th"):  # cells before the first |- stand in no row
            text = _cell(row, media)
            if text.startswith("+ ") and not any(found):
                out.append(f"\n{text[2:]}")  # the caption, |+
            else:
                found[-1].append(text)
        elif name == "caption":
            out.append(f"\n{_cell(row, media)}")
    out += [f"\n| {' | '.join(cells)} |" for cells in found if any(cells)]
    out.append("\n")


def _cell(node: nodes.Tag, media: frozenset[str]) -> str:
    pieces: list[str] = []
    if node.contents is not None:
        _render(node.contents.nodes, pieces, True, media)
    return " ".join("".join(pieces).split())


def _variants(text: str) -> str:
    """`-{zh-hans:软件;zh-hant:軟體}-` as one variant, `-{text}-` as text, rules (`-{H|...}-`) as nothing."""
    for _ in range(4):  # they may stand inside each other
        text, count = _VARIANT.subn(_variant, text)
        if not count:
            break
    return text


def _variant(found: re.Match[str]) -> str:
    flags, bar, content = found[1].partition("|")
    if bar and re.fullmatch(r"[A-Za-z;\- ]*", flags):
        if set(flags.upper()) & set("HTD-"):
            return ""
    else:
        content = found[1]
    choices: dict[str, str] = {}
    for rule in content.split(";"):
        language, colon, words = rule.partition(":")
        if colon and language.strip().lower().startswith("zh"):
            choices[language.split("=>")[-1].strip().lower()] = words.strip()
    if not choices:
        return content
    return next((choices[name] for name in _VARIANT_ORDER if name in choices), next(iter(choices.values())))


def _tidy(text: str) -> str:
    """No blanks at line ends, at most one blank line, no heading over an empty section, no empty list items or brackets."""
    lines = [line.strip() for line in re.sub(r"[(（]\s*[,，;；、]*\s*[)）]", "", text).split("\n")]
    lines = ["" if line in ("-", "|") else _LIST_ITEM.sub("- ", line) for line in lines]
    kept: list[str] = []
    for line in reversed(lines):
        heading = _HEADING.match(line)
        if heading:
            following = next((later for later in reversed(kept) if later), "")
            below = _HEADING.match(following)
            if not following or (below and len(below[1]) <= len(heading[1])):
                continue
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(reversed(kept)).strip("\n")
