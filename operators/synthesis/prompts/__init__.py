"""Prompt templates in English and Chinese, written for this project, as text files beside this module.

A template is a list of messages, each begun by a line `[system]`, `[user]` or `[assistant]`; a last assistant message is
the beginning of the reply that the model continues. `$name` is replaced by a value; values are never expanded again.
The hash of a template is part of the provenance of every row that it made.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import Template

from operators.synthesis.requests import Messages

LANGUAGES = ("en", "zh")
_HEADER = re.compile(r"^\[(system|user|assistant)\][ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """A template: `sections` are (role, text with `$name` places)."""

    name: str
    lang: str
    sections: Messages
    hash: str

    def render(self, **values: str) -> Messages:
        """The messages with values in place. Raises KeyError for a place without a value."""
        return tuple((role, Template(text).substitute(values) if "$" in text else text) for role, text in self.sections)


def with_system_line(messages: Messages, line: str) -> Messages:
    """The messages with one more line in their system message, or with a system message of that line before them."""
    if messages and messages[0][0] == "system":
        return (("system", f"{messages[0][1]}\n{line}"), *messages[1:])
    return (("system", line), *messages)


@lru_cache(maxsize=256)
def load(name: str, lang: str, directory: str | None = None) -> Prompt:
    """The template `<lang>/<name>.txt`, from `directory` when it has one, else the project's own.

    Raises ValueError when there is none in the language or the file has no section.
    """
    candidates = [Path(directory) / lang / f"{name}.txt"] if directory else []
    candidates.append(Path(__file__).parent / lang / f"{name}.txt")
    for path in candidates:
        if path.is_file():
            return parse(path.read_text("utf-8"), name, lang)
    raise ValueError(f"no prompt {name!r} in language {lang!r}; looked for {', '.join(map(str, candidates))}")


def parse(text: str, name: str, lang: str) -> Prompt:
    """A template from its text. Raises ValueError when it has no section."""
    pieces = _HEADER.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError(f"prompt {name!r} ({lang}) must begin with a line [system], [user] or [assistant]")
    sections = tuple((role, body.strip("\n")) for role, body in zip(pieces[1::2], pieces[2::2], strict=True))
    return Prompt(name, lang, sections, hashlib.blake2b(repr(sections).encode(), digest_size=8).hexdigest())
