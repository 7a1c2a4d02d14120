"""Lists of patterns as data files, matched over columns of text.

A file `patterns/LANG/NAME.txt` holds one RE2 expression a line, in sections begun by `[section]`; lines that begin with
`#` and empty lines say nothing. Expressions of all languages are looked for in every text: mixed text is common, and
the scripts keep them apart. English ones match in any case.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.config import SettingsError

LANGUAGES = ("en", "zh")
_FOLDER = Path(__file__).parent / "patterns"


_GROUP_CHARACTERS = 16_384  # RE2 refuses programs above a few megabytes; a long word list becomes several


class Patterns:
    """Alternatives as one expression, or as few as the engine takes."""

    def __init__(self, expressions: Sequence[str]) -> None:
        groups: list[list[str]] = []
        size = _GROUP_CHARACTERS
        for item in expressions:
            if size + len(item) > _GROUP_CHARACTERS:
                groups.append([])
                size = 0
            groups[-1].append(f"(?:{item})")
            size += len(item)
        self.expressions = ["(?i)(?:" + "|".join(group) + ")" for group in groups]

    def matches(self, text: pa.Array) -> np.ndarray:
        """bool[texts]"""
        found = np.zeros(len(text), bool)
        for expression in self.expressions:
            found |= np.asarray(pc.match_substring_regex(text, expression).to_numpy(zero_copy_only=False), bool)
        return found

    def counts(self, text: pa.Array) -> np.ndarray:
        """int64[texts]: matches that do not overlap (of one expression)."""
        found = np.zeros(len(text), np.int64)
        for expression in self.expressions:
            found += pc.count_substring_regex(text, expression).to_numpy(zero_copy_only=False)
        return found

    def found(self, text: pa.Array) -> pa.Array:
        """string[texts]: the first match of each, at most 120 characters, null where there is none."""
        found: Any = pa.nulls(len(text), pa.string())
        hits = np.flatnonzero(self.matches(text))
        if not len(hits):
            return found
        some = text.take(pa.array(hits))
        told: Any = pa.nulls(len(hits), pa.string())
        for expression in self.expressions:
            groups = pc.extract_regex(some, f"(?P<found>{expression})")
            match = pc.utf8_slice_codeunits(pc.struct_field(groups, "found"), 0, 120).cast(pa.string())
            told = pc.coalesce(told, pc.if_else(pc.is_valid(groups), match, pa.scalar(None, pa.string())))
        index = np.full(len(text), -1, np.int64)
        index[hits] = np.arange(len(hits))
        return told.take(pa.array(index, mask=index < 0))

    def place(self, text: str) -> int:
        """Characters of a text before the first match, all of them where there is none. For a few texts: Arrow tells no
        position, so the text before the match is taken as a group of its own."""
        places = [len(text)]
        for expression in self.expressions:
            groups = pc.extract_regex(pa.array([text]), f"(?s)^(?P<before>.*?)(?P<match>{expression})")
            if groups[0].is_valid:
                places.append(len(groups[0].as_py()["before"]))
        return min(places)


@functools.lru_cache(maxsize=64)
def sections(name: str) -> dict[str, tuple[str, ...]]:
    """The expressions of `NAME.txt` of all languages, by section. Raises SettingsError that names file and line of a bad one."""
    found: dict[str, tuple[str, ...]] = {}
    for lang in LANGUAGES:
        path = _FOLDER / lang / f"{name}.txt"
        if not path.is_file():
            continue
        section = ""
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if header := re.fullmatch(r"\[([a-z_]+)\]", line):
                section = header[1]
                continue
            check(line, f"{path}, line {number}")
            found[section] = (*found.get(section, ()), line)
    if not found:
        raise SettingsError(f"no patterns named {name!r} in {_FOLDER}")
    return found


def load(name: str, *wanted: str, extra: Sequence[str] = ()) -> Patterns:
    """The patterns of some sections of a file (of all without any), and `extra` ones of the user."""
    known = sections(name)
    for item in extra:
        check(item, f"pattern {item!r}")
    return Patterns([*(item for section in (wanted or tuple(known)) for item in known.get(section, ())), *extra])


def files(name: str) -> list[str]:
    """The files behind a name."""
    return [str(path) for lang in LANGUAGES if (path := _FOLDER / lang / f"{name}.txt").is_file()]


def check(expression: str, where: str) -> None:
    """Raises SettingsError, beginning with `where`, for what is no RE2 expression or matches the empty text."""
    try:
        empty = pc.match_substring_regex(pa.array([""]), f"(?i)(?:{expression})")[0].as_py()
    except pa.ArrowInvalid as error:
        raise SettingsError(f"{where}: not a regular expression of RE2: {error}") from None
    if empty:
        raise SettingsError(f"{where}: matches every text")
