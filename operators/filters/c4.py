"""C4's cleaning (Raffel et al. 2020, arXiv:1910.10683, section 2.2), as datatrove 0.10 does it: lines are dropped one by one,
then documents with too few sentences. The text that stays is changed.

Sentences of spaced languages are counted by their end marks, as NLTK's Punkt does for all but abbreviations; Chinese and
Japanese ones by `。！？…；`. Chinese lines need no words between spaces: their characters count (two make a word).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.filters.thresholds import analysis_of, base_language, languages
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis
from operators.text.language import set_column
from operators.text.repair import replace_on_hits

_LINE_ENDS = r"\r\n|[\r\v\f\x1c-\x1e\x{85}\x{2028}\x{2029}]"  # with the line feed, those of str.splitlines
_CITATION = r"\[\d*\]|\[edit\]|\[citation needed\]"
_POLICY = (
    r"(?i)terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
    r"|隐私政策|隱私權政策|使用条款|使用\s*cookie"
)
_SENTENCE = r"[.?!]+[\"'”’)\]]*(?:\s+|$)|[。！？…]+[”’」』）]*|\S$"
_TERMINAL = r"[.?!\"'。！？…”’」』；：)）]$"
_ENGLISH_TERMINAL = r"[.?!\"']$"
_UNSPACED = ("zh", "ja")


class C4QualitySettings(Settings):
    """C4's rules."""

    max_word_characters: int | None = Field(default=1000, ge=1, description="lines with a longer word are dropped (not Chinese)")
    citations: bool = Field(default=True, description="remove `[1]`, `[edit]` and `[citation needed]`")
    terminal_punctuation: bool = Field(default=False, description="drop lines that do not end in a mark; C4 does, FineWeb does not")
    min_words: int | None = Field(default=3, ge=1, description="lines with fewer words are dropped")
    lorem_ipsum: bool = Field(default=True, description="drop documents with `lorem ipsum`")
    javascript: bool = Field(default=True, description="drop lines with `javascript`")
    curly_bracket: bool = Field(default=True, description="drop documents with `{`")
    policy: bool = Field(default=True, description="drop lines about cookies, privacy and terms of use")
    min_sentences: int | None = Field(default=5, ge=1, description="drop documents with fewer sentences in the lines that stay")


class C4Quality(Operator):
    """Clean lines as C4 does; drop documents with `lorem_ipsum`, `curly_bracket` or `few_sentences`."""

    name: ClassVar[str] = "c4_quality"
    settings = C4QualitySettings
    changes_text = True

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        column = table["text"].cast(pa.large_string())
        text = pc.fill_null(column.combine_chunks(), "") if table.num_rows else pa.array([], pa.large_string())
        text = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
        guess = analysis_of(table, analysis).language_guess
        codes = [base_language(code) for code in languages(table, guess).to_pylist()]
        unspaced = np.isin(np.array(codes, object).astype(str), _UNSPACED)

        split = pc.split_pattern(replace_on_hits(text, _LINE_ENDS, "\n"), "\n")
        first = np.asarray(split.offsets, np.int64)
        lines = pc.utf8_trim_whitespace(split.flatten())
        owner = np.repeat(np.arange(len(text)), np.diff(first))
        # of lines in order, those before the first that condemns its document; the others are never looked at
        drop, condemned = self._judge(lines, unspaced[owner])
        reason_code = np.zeros(len(text), np.int8)
        for code, mask in ((2, condemned[1]), (1, condemned[0])):
            reason_code[owner[mask]] = code
        for document in np.flatnonzero(reason_code):  # sparse: both in one document
            inside = slice(first[document] - first[0], first[document + 1] - first[0])
            at = [np.flatnonzero(mask[inside]) for mask in condemned]
            reason_code[document] = 1 if len(at[0]) and (not len(at[1]) or at[0][0] <= at[1][0]) else 2
        if self.config.citations:
            lines = replace_on_hits(lines, _CITATION, "")
        standing = lines.filter(pa.array(~drop))
        sentences = np.bincount(owner[~drop], pc.count_substring_regex(standing, _SENTENCE).to_numpy(), len(text))
        counts = np.bincount(owner[~drop], minlength=len(text))
        offsets = pa.array(np.r_[0, np.cumsum(counts)].astype(np.int64))
        kept = pa.LargeListArray.from_arrays(offsets, standing.cast(pa.large_string()))
        cleaned = pc.utf8_trim_whitespace(pc.binary_join(kept, pa.scalar("\n", pa.large_string())))
        few = sentences < self.config.min_sentences if self.config.min_sentences is not None else counts == 0
        names = pa.array(["lorem_ipsum", "curly_bracket", "few_sentences"])
        verdict = np.where(reason_code > 0, reason_code.astype(np.int64) - 1, np.where(few, 2, -1))
        reason = names.take(pa.array(verdict, pa.int64(), mask=verdict < 0))
        value = pa.array(sentences.astype(np.float64), mask=verdict != 2)
        return Verdict(set_column(table, "text", cleaned), reason, value)

    def _judge(self, lines: pa.Array, unspaced: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """(lines to drop, (lines with lorem ipsum, lines with a bracket) that condemn), by the order of datatrove's rules."""
        config = self.config

        def matches(pattern: str) -> np.ndarray:
            return pc.match_substring_regex(lines, pattern).to_numpy(zero_copy_only=False)

        drop = np.zeros(len(lines), bool)
        if config.max_word_characters is not None:
            long = np.flatnonzero((pc.utf8_length(lines).to_numpy() > config.max_word_characters) & ~unspaced)
            for line in long:  # sparse: lines of more characters than a word may have
                drop[line] = max(map(len, lines[int(line)].as_py().split()), default=0) > config.max_word_characters
        if config.terminal_punctuation:
            stripped = replace_on_hits(lines, _CITATION, "") if config.citations else lines
            ends = pc.match_substring_regex(stripped, _ENGLISH_TERMINAL).to_numpy(zero_copy_only=False)
            ends &= ~pc.ends_with(stripped, "...").to_numpy(zero_copy_only=False)
            any_script = pc.match_substring_regex(stripped, _TERMINAL).to_numpy(zero_copy_only=False)
            drop |= ~np.where(unspaced, any_script, ends)
        if config.min_words is not None:
            few = ~matches(rf"(?:\S+\s+){{{config.min_words - 1}}}\S")
            chinese = np.flatnonzero(few & unspaced)
            candidates = lines.take(pa.array(chinese))
            words = pc.count_substring_regex(candidates, r"\S+").to_numpy()
            han = pc.count_substring_regex(candidates, r"[\p{Han}\p{Hiragana}\p{Katakana}]").to_numpy()
            few[chinese] = words + han // 2 < config.min_words
            drop |= few
        lorem = matches("(?i)lorem ipsum") & ~drop if config.lorem_ipsum else np.zeros(len(lines), bool)
        if config.javascript:
            drop |= matches("(?i)javascript")
        bracket = matches(r"\{") & ~drop if config.curly_bracket else np.zeros(len(lines), bool)
        if config.policy:
            drop |= matches(_POLICY)
        return drop, (lorem, bracket)
