"""Repair of text: mojibake, Unicode form, control and zero-width characters, line ends.

Every step is one vectorised pass over the column, or a pass over the few rows that a cheap regular expression picks out.
Full-width Chinese punctuation and U+3000 are left alone (NFC does not touch them; `form: NFKC` would).
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis
from operators.text.language import set_column

# UTF-8 read as Latin-1 or Windows-1252: a lead byte's character, then a continuation byte's
_LATIN_MOJIBAKE = (
    r"[\x{C2}-\x{F4}\x{0102}\x{010E}\x{0111}][\x{80}-\x{BF}\x{0152}\x{0153}\x{0160}\x{0161}\x{0178}\x{017D}\x{017E}\x{0192}"
    r"\x{02C6}\x{02DC}\x{2013}-\x{203A}\x{20AC}\x{2122}]"
)
# UTF-8 read as GBK: what the commonest Chinese characters and punctuation marks become
_GBK_MOJIBAKE = "[锛銆鐨鏄鍦涓浜鏈杩鍜浠鎴]"
_CONTROL = r"[\x00-\x08\x0e-\x1f\x7f\x{80}-\x{84}\x{86}-\x{9f}]"
_ZERO_WIDTH = r"[\x{200B}\x{2060}\x{FEFF}\x{AD}\x{202A}-\x{202E}\x{2066}-\x{2069}]"
_LINE_ENDS = r"\r\n|[\r\v\f\x{85}\x{2028}\x{2029}]"
_ODD_SPACES = r"[\x{A0}\x{1680}\x{2000}-\x{200A}\x{202F}\x{205F}]"


class FixTextSettings(Settings):
    """What to repair. The order is: mojibake, line ends, control and zero-width characters, spaces, Unicode form."""

    mojibake: bool = Field(default=True, description="undo UTF-8 that was read as Latin-1, Windows-1252 (ftfy) or GBK")
    form: Literal["NFC", "NFKC", "none"] = Field(default="NFC", description="Unicode normalisation form")
    line_ends: bool = Field(default=True, description="make CRLF, CR, form feeds and U+2028/9 line feeds")
    controls: bool = Field(default=True, description="remove control characters other than tab and line feed")
    zero_width: bool = Field(default=True, description="remove zero-width spaces, soft hyphens, byte-order and direction marks")
    spaces: bool = Field(default=True, description="make no-break and typographic spaces plain ones; U+3000 stays")
    blank_lines: int | None = Field(default=2, ge=0, description="longest run of blank lines to leave; null leaves all")
    max_replacements: float | None = Field(
        default=0.05, description="highest share of U+FFFD characters; above it a document is rejected as `broken`"
    )


class FixText(Operator):
    """Repair encoding damage and clean up characters. Rejects texts that end up empty, or full of U+FFFD."""

    name: ClassVar[str] = "fix_text"
    settings = FixTextSettings
    changes_text = True

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        text = _one_chunk(table["text"])
        if self.config.mojibake:
            text = _on_hits(text, _LATIN_MOJIBAKE, _fix_latin)
            text = _on_hits(text, _GBK_MOJIBAKE, _fix_gbk)
        blank = self.config.blank_lines
        for wanted, pattern, replacement in (
            (self.config.line_ends, _LINE_ENDS, "\n"),
            (self.config.controls, _CONTROL, ""),
            (self.config.zero_width, _ZERO_WIDTH, ""),
            (self.config.spaces, _ODD_SPACES, " "),
            (blank is not None, r"[ \t]+\n", "\n"),
            (blank is not None, f"\n{{{(blank or 0) + 2},}}", "\n" * ((blank or 0) + 1)),
        ):
            if wanted:
                text = replace_on_hits(text, pattern, replacement)
        if self.config.form != "none":
            text = pc.utf8_normalize(text, form=self.config.form)
        text = pc.utf8_trim_whitespace(text)
        lengths = pc.utf8_length(text).to_numpy().astype(np.float64)
        broken = pc.count_substring(text, "\ufffd").to_numpy() / np.maximum(lengths, 1)
        empty = pa.array(lengths == 0)
        too_broken = pa.array(broken > self.config.max_replacements if self.config.max_replacements is not None else lengths < 0)
        reason = pc.if_else(empty, "empty", pc.if_else(too_broken, "broken", pa.scalar(None, pa.string())))
        value = pc.if_else(too_broken, pa.array(broken), pa.scalar(None, pa.float64()))
        return Verdict(set_column(table, "text", text), reason, value)


def _one_chunk(texts: pa.ChunkedArray) -> pa.Array:
    """The column as one large_string array without nulls."""
    array: Any = texts.cast(pa.large_string())
    array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    if isinstance(array, pa.ChunkedArray):
        array = pa.array([], pa.large_string())
    return array.fill_null("") if array.null_count else array


def replace_on_hits(text: pa.Array, pattern: str, replacement: str) -> pa.Array:
    """Replace a pattern, touching only the rows that match: finding is several times cheaper than replacing."""
    hits = pc.match_substring_regex(text, pattern)
    if not pc.any(hits).as_py():
        return text
    return put(text, hits, pc.replace_substring_regex(text.filter(hits), pattern, replacement))


def put(text: pa.Array, hits: pa.Array, values: pa.Array) -> pa.Array:
    """`text` with the rows where `hits` holds replaced by `values`, in order."""
    rows = np.flatnonzero(hits.to_numpy(zero_copy_only=False))
    order = np.arange(len(text))
    order[rows] = len(text) + np.arange(len(rows))
    return pa.chunked_array([text, values.cast(pa.large_string())]).take(pa.array(order)).combine_chunks()


def _on_hits(text: pa.Array, pattern: str, repair: Any) -> pa.Array:
    """Apply a function to the lines of the rows that match."""
    hits = pc.match_substring_regex(text, pattern)
    if not pc.any(hits).as_py():
        return text
    expression = re.compile(re.sub(r"\\x\{([0-9A-F]+)\}", lambda found: f"\\u{int(found[1], 16):04x}", pattern))
    repaired = []
    for item in text.filter(hits).to_pylist():  # sparse: the rows that match
        lines = item.split("\n")
        repaired.append("\n".join(repair(line) if expression.search(line) else line for line in lines))
    return put(text, hits, pa.array(repaired, pa.large_string()))


def _fix_latin(line: str) -> str:
    return line if len(line) > 1_000_000 else ftfy.fix_encoding(line)


def _fix_gbk(line: str) -> str:
    """Undo UTF-8 read as GBK. Chinese text whose GBK bytes happen to be valid UTF-8 is shorter than a few characters."""
    try:
        candidate = line.encode("gb18030").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return line
    return candidate if sum(character > "\x7f" for character in candidate) >= 3 else line
