"""What counts as the same word, in every script."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.dedup.normalise import CHARACTERS, UNSPACED, WORDS, code_table, normalised_tokens
from operators.dedup.reference import resolve_unit


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Héllo, WORLD!  don't", ["hello", "world", "don", "t"]),
        ("in 2024: 1,234.5 a1b22c", ["in", "0", "0", "0", "0", "a0b0c"]),
        ("co\u00adop\u200d and\u200bmore\ufeff", ["coop", "and", "more"]),
        ("ΣΊΣΥΦΟΣ σίσυφος İstanbul", ["σισυφοσ", "σισυφοσ", "istanbul"]),
        ("snake_case C++ x\x00y €5", ["snake", "case", "c", "x", "y", "0"]),
        ("", []),
        (" \n\t…!?", []),
    ],
)
def test_spaced_text_becomes_lower_case_words_without_accents(text: str, tokens: list[str]) -> None:
    assert normalised_tokens(text) == tokens


def test_chinese_text_becomes_characters() -> None:
    assert normalised_tokens("你好，世界！ 2024年 GPU。") == list("你好世界0年gpu")
    assert normalised_tokens("こんにちは世界") == list("こんにちは世界")


def test_ideographs_inside_english_are_words_of_their_own() -> None:
    text = "The word 中文 means the Chinese language"
    assert normalised_tokens(text) == ["the", "word", "中", "文", "means", "the", "chinese", "language"]


def test_digits_can_be_kept() -> None:
    assert normalised_tokens("May 2024", keep_digits=True) == ["may", "2024"]
    assert normalised_tokens("٣ ３", keep_digits=True) == ["3", "3"]


@pytest.mark.parametrize("text", ["안녕하세요 세계", "Tiếng Việt đây", "বাংলা কোষ", "ガギグゲゴ が", "Ångström café"])
def test_composed_and_decomposed_spellings_are_one(text: str) -> None:
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text
    assert normalised_tokens(decomposed) == normalised_tokens(unicodedata.normalize("NFC", text))


def test_the_unit_follows_the_script_that_has_more_tokens() -> None:
    assert resolve_unit("一篇关于 Kubernetes 和 Docker 的文章") == CHARACTERS
    assert resolve_unit("An article that mentions 北京 once in a while") == WORDS
    assert resolve_unit("ภาษาไทยเขียนติดกัน") == CHARACTERS
    assert resolve_unit("한국어는 띄어쓰기를 한다") == WORDS
    assert resolve_unit("“Quotes” — and dashes…") == WORDS
    assert resolve_unit("") == WORDS


_MIXED = st.text(st.sampled_from("ab1 .,é—中文字の日ก한δ😀\u0301\u200d\u4dc0€"), max_size=80)


@settings(max_examples=300, deadline=None)
@given(_MIXED | st.text(max_size=40), st.integers(1, 8))
def test_the_unit_is_that_of_a_count_of_every_token(text: str, times: int) -> None:
    text = unicodedata.normalize("NFC", text) * times
    tokens = normalised_tokens(text, WORDS, keep_digits=True)
    alone = sum(bool(code_table()[ord(character)] & UNSPACED) for character in text)
    assert resolve_unit(text) == (CHARACTERS if alone > len(tokens) - alone else WORDS)
