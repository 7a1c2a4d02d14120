"""A chunk of a document as the steps of the method see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from operators.synthesis.documents import wording
from operators.synthesis.documents.quoting import as_data
from operators.synthesis.documents.settings import DocumentSettings


@dataclass(frozen=True)
class Passage:
    """Characters [start, end) of a document. `text` is exactly what stands there."""

    document: str  # the document's id
    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    lang: Literal["en", "zh"]

    @cached_property
    def id(self) -> str:
        """Names the chunk: the document's id and the characters."""
        return f"{self.document}#{self.start}-{self.end}"

    @cached_property
    def quoted(self) -> str:
        """The chunk as it goes into prompts."""
        return as_data(self.text, self.headings)

    def domain(self, settings: DocumentSettings) -> str:
        """The field of the expert in the chunk's language."""
        named = settings.domain.get(self.lang) if isinstance(settings.domain, dict) else settings.domain
        return named or wording.NO_DOMAIN[self.lang]
