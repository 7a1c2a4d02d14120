"""The shared analysis: word and line boundaries as offsets, in every script."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.text import characters
from operators.text.analysis import Analysis
from operators.text.words import HAS_ALPHA, NOT_SYMBOL, hash_text

TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("aZ0 .,\n\t-'’\"…!#•:/@=()+°$€%"),
        st.sampled_from("中国人民学习。，《》々〇ひらカナ한국ไทย\u3000\u00a0\u200b\u0301\x00😀𠀀é"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


def words_of(text: str) -> list[str]:
    found = Analysis.of(pa.array([text]))
    return [found.data[s : s + n].tobytes().decode() for s, n in zip(found.words.start, found.words.length, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", ["Hello", ",", "world", "!"]),
        ("I don't think it's Bob's.", ["I", "do", "n't", "think", "it", "'s", "Bob", "'s", "."]),
        ("well-known U.S. (e.g. 10km)...", ["well", "-", "known", "U.S.", "(", "e.g.", "10", "km", ")", "..."]),
        ("see www.example.com/a-b, now", ["see", "www.example.com/a-b", ",", "now"]),
        ("$5 and 20% of US$30", ["$", "5", "and", "20", "%", "of", "US$", "30"]),
        ("a  b\u3000c\u00a0d", ["a", "b", "c", "d"]),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_spaced_words_are_those_of_spacys_english_tokenizer(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


def test_chinese_words_are_segmented_and_punctuation_stands_alone() -> None:
    assert words_of("我来到北京清华大学，hello世界。") == ["我", "来到", "北京", "清华大学", "，", "hello", "世界", "。"]
    assert words_of("他來到了臺北市。")[-1] == "。"


def test_japanese_and_thai_words_are_characters_with_their_marks() -> None:
    assert words_of("日本語です。") == ["日", "本", "語", "で", "す", "。"]
    assert len(words_of("ที่นี่")) == 2


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_words_cover_all_that_is_no_space_in_order(text: str) -> None:
    assert "".join(words_of(text)) == "".join(text.split())


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_every_number_depends_on_the_text_alone(texts: list[str], mask: list[bool]) -> None:
    together = Analysis.of(pa.array(texts, pa.string()))
    for row, text in enumerate(texts):
        alone = Analysis.of(pa.array(["x", text], pa.large_string()).slice(1))
        words, own = together.words, alone.words
        inside, whole = slice(words.first[row], words.last[row]), slice(own.first[0], own.last[0])
        for name in ("length", "characters", "flags", "hash"):
            assert np.array_equal(getattr(words, name)[inside], getattr(own, name)[whole])
        assert together.characters[row] == len(text) == alone.characters[0]
        lines = together.lines
        assert lines.characters[lines.first[row] : lines.last[row]].tolist() == [len(line) for line in text.split("\n")]
        assert np.array_equal(together.scripts[row], alone.scripts[0])
    keep = np.array(mask[: len(texts)], bool)
    kept = together.filter(keep)
    fresh = Analysis.of(pa.array([text for text, wanted in zip(texts, keep, strict=True) if wanted], pa.string()))
    assert np.array_equal(kept.characters, fresh.characters)
    assert np.array_equal(kept.words.last - kept.words.first, fresh.words.last - fresh.words.first)


def test_flags_and_hashes_describe_the_word() -> None:
    found = Analysis.of(pa.array(["abc 12 -- 中文"]))
    assert found.words.flags.tolist() == [HAS_ALPHA | NOT_SYMBOL, NOT_SYMBOL, 0, HAS_ALPHA | NOT_SYMBOL]
    assert found.words.hash.tolist() == [hash_text(word) for word in ("abc", "12", "--", "中文")]


def test_character_classes_agree_with_python() -> None:
    table = characters.table()
    points = range(0, characters.TABLE_SIZE, 7)
    assert all(bool(table[point] & characters.ALPHA) == chr(point).isalpha() for point in points)
    assert all(bool(table[point] & characters.SPACE) == chr(point).isspace() for point in range(0x3100))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("A plain English text.", "en"),
        ("这是一个中文句子。", "zh"),
        ("這是一個中文句子。", "zh"),
        ("学而时习之，不亦说乎？", "zh"),
        ("これは日本語の文です。", "ja"),
        ("한국어 문장입니다.", "ko"),
        ("ภาษาไทย", "th"),
        ("使用 pip install numpy 安装这个软件包", "zh"),
        ("", "en"),
    ],
)
def test_the_script_suggests_a_language(text: str, language: str) -> None:
    assert Analysis.of(pa.array([text])).language_guess.to_pylist() == [language]


def test_odd_columns_are_read() -> None:
    chunked = pa.chunked_array([["a b"], [None, "中文"], []], pa.string())
    assert Analysis.of(chunked).characters.tolist() == [3, 0, 2]
    assert len(Analysis.of(pa.chunked_array([], pa.string()))) == 0
    assert len(Analysis.of(pa.array([], pa.large_string())).words.hash) == 0
    with pytest.raises(TypeError, match="must hold strings"):
        Analysis.of(pa.array([1, 2]))
