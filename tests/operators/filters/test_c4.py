"""C4's rules against a plain reading of datatrove's code, line by line."""

from __future__ import annotations

import re
import unicodedata

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.filters.c4 import CHINESE_POLICY_PHRASES, POLICY_PHRASES, C4Quality
from operators.text import characters
from operators.text.analysis import Analysis

PIECES = st.sampled_from(
    ["One two three.", " four five", "! ", "?  ", "...", "\n", "\n", "\r\n", "\u2028", "\t", "[1]", "[٣]", "[edit]", "[x]",
     "[citation needed]", "lorem ipsum", "JavaScript", "{", "Cookie Policy", "a",
      "中文句子。", "「好！」", " \x1f", "\x85", "é\u0301 "]
)  # fmt: skip
TEXTS = st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")


def tokens(text: str) -> list[tuple[str, int, int]]:
    """(word, first and last character) as spaCy cuts them, its tokens of white space included."""
    found = Analysis.of(pa.array([text], pa.large_string()))
    data, out, end = text.encode(), [], 0
    for start, length in zip(found.words.start.tolist(), found.words.length.tolist(), strict=True):
        gap = data[end:start].decode()
        if out and gap and gap != " ":
            out.append((gap, end, start))
        out.append((data[start : start + length].decode(), start, start + length))
        end = start + length
    return out


def sentences(line: str) -> int:
    table = characters.table()
    count, ended = 1, False
    for word, _, _ in tokens(line):
        is_end = len(word) == 1 and ord(word) < len(table) and bool(table[ord(word)] & characters.TERMINAL)
        if ended and not is_end and not all(unicodedata.category(c).startswith("P") for c in word):
            count, ended = count + 1, False
        elif is_end:
            ended = True
    return count


def naive(text: str, terminal: bool) -> tuple[str | None, str | None, int]:
    """(reason, the text that stays, sentences) as datatrove's filter does it for English."""
    kept, total = [], 0
    for raw in text.splitlines():
        line = raw.strip()
        words = line.split()
        if any(len(word) > 8 for word in words):
            continue
        line = CITATION.sub("", line)
        if terminal and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if len(words) < 2:
            continue
        low = line.lower()
        if "lorem ipsum" in low:
            return "lorem_ipsum", None, 0
        if "javascript" in low:
            continue
        if "{" in line:
            return "curly_bracket", None, 0
        if any(phrase in low for phrase in POLICY_PHRASES + CHINESE_POLICY_PHRASES):
            continue
        total += sentences(line)
        kept.append(line)
    return ("few_sentences" if total < 2 else None), "\n".join(kept).strip(), total


def test_lines_sentences_and_reasons_equal_a_plain_reading_of_the_rules() -> None:
    operators = {terminal: C4Quality(max_word_characters=8, min_words=2, min_sentences=2, terminal_punctuation=terminal)
                 for terminal in (False, True)}  # fmt: skip

    @settings(max_examples=120, deadline=None)
    @given(st.lists(TEXTS, max_size=3))
    def check(texts: list[str]) -> None:
        rows = pa.table({"text": pa.array(texts, pa.large_string()), "lang": pa.array(["en"] * len(texts), pa.string())})
        for terminal, operator in operators.items():
            verdict = operator.process(rows)
            assert verdict.reason is not None and verdict.value is not None
            for row, text in enumerate(texts):
                reason, left, total = naive(text, terminal)
                assert verdict.reason[row].as_py() == reason, text
                if left is not None:
                    assert verdict.table["text"][row].as_py() == left, text
                if reason == "few_sentences":
                    assert verdict.value[row].as_py() == total, text

    check()


def test_only_the_named_languages_are_judged_and_others_pass_byte_for_byte() -> None:
    texts = ["One two three.\n\nshort\n", "短\n\n菜单\n", "lorem ipsum dolor {", None]
    rows = pa.table({"text": pa.array(texts, pa.string()), "lang": ["en", "zh-Hant", "zh", "en"]})
    verdict = C4Quality(languages=["en"], min_sentences=1).process(rows)
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == [None, None, None, "few_sentences"]
    assert verdict.table["text"].to_pylist() == ["One two three.", texts[1], texts[2], ""]
    guessed = C4Quality(languages=["zh"]).process(rows.select(["text"]))
    assert guessed.reason is not None
    assert guessed.reason.to_pylist() == [None, "few_sentences", None, None]
    assert guessed.table["text"].to_pylist()[0] == texts[0]
