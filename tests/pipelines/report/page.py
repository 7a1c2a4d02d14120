"""A page taken apart with the standard library's parser: tags, attributes, and text by element."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass(repr=False)  # the tree refers to itself
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    pieces: list[str | Element] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.tag} {self.attributes}>"

    def text(self, language: str = "en") -> str:
        """Text of the element as a reader of that language sees it."""
        hidden = "zh" if language == "en" else "en"
        if hidden in self.attributes.get("class", "").split():
            return ""
        return "".join(piece if isinstance(piece, str) else piece.text(language) for piece in self.pieces)

    def all(self, tag: str | None = None, css: str | None = None) -> list[Element]:
        """Descendants by tag and class, in document order."""
        found = []
        for child in self.children:
            if (tag is None or child.tag == tag) and (css is None or css in child.attributes.get("class", "").split()):
                found.append(child)
            found += child.all(tag, css)
        return found

    def by_id(self, identity: str) -> Element:
        return next(element for element in self.all() if element.attributes.get("id") == identity)


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("#root", {})
        self.open = self.root

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open)
        self.open.children.append(element)
        self.open.pieces.append(element)
        if tag not in _VOID:
            self.open = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open)
        self.open.children.append(element)
        self.open.pieces.append(element)

    def handle_endtag(self, tag: str) -> None:
        if self.open.tag != tag:
            raise AssertionError(f"</{tag}> closes <{self.open.tag} {self.open.attributes}> at line {self.getpos()[0]}")
        assert self.open.parent is not None
        self.open = self.open.parent

    def handle_data(self, data: str) -> None:
        self.open.pieces.append(data)


def parse(html: str) -> Element:
    """The tree of a page. Raises AssertionError when a tag is closed out of order or left open."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    assert builder.open is builder.root, f"<{builder.open.tag}> is never closed"
    return builder.root
