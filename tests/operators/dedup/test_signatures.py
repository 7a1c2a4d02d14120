"""Signatures against datasketch, to the bit."""

from __future__ import annotations

import re
from pathlib import Path

import datasketch
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from operators.dedup.normalise import CHARACTERS, WORDS
from operators.dedup.reference import from_lean, shingles, sign_with_datasketch, to_lean
from operators.dedup.signatures import permutations, shingle_sets, sign

ENGLISH = "The quick brown fox jumps over the lazy dog, and then the dog jumps over the quick brown fox again."
CHINESE = "敏捷的棕色狐狸跳过了懒狗，然后狗又跳过了敏捷的棕色狐狸。"


def test_the_permutations_are_those_of_datasketch() -> None:
    a, b = permutations(112, 7)
    expected = datasketch.MinHash(112, 7).permutations
    assert (a == expected[0]).all()
    assert (b == expected[1]).all()


def test_datasketch_signatures_are_bit_equal_to_datasketch_alone() -> None:
    words = re.findall(r"[a-z]+", ENGLISH.lower())
    english = datasketch.MinHash(128, seed=3)
    english.update_batch([" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)])
    characters = re.sub(r"[，。]", "", CHINESE)
    chinese = datasketch.MinHash(128, seed=3)
    chinese.update_batch([characters[i : i + 5].encode() for i in range(len(characters) - 4)])
    signed = sign(pa.array([ENGLISH, CHINESE]), 128, seed=3, hashing="datasketch")
    assert (signed.values == np.stack([english.hashvalues, chinese.hashvalues])).all()


@pytest.mark.parametrize("hashing", ["fast", "datasketch"])
def test_both_back_ends_agree_on_real_text(data_pack: Path, hashing: str) -> None:
    for name in ("en", "zh", "other"):
        texts = pq.read_table(data_pack / "corpus" / f"{name}.parquet", columns=["text"])["text"]
        texts = texts.take(pa.array(np.arange(0, len(texts), len(texts) // 25)))
        ours, reference = sign(texts, hashing=hashing), sign_with_datasketch(texts, hashing=hashing)
        assert (ours.values == reference.values).all()
        assert (ours.signed == reference.signed).all()
        assert ours.signed.any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4), st.integers(1, 6))
@example(["a b c d e ", "e\u0301 \u1100\u1161 世", "\U0001f600 1 2 3"], 2)
def test_kernel_and_reference_agree_on_any_text(texts: list[str], n: int) -> None:
    column = pa.array(texts, pa.large_string())
    ours, reference = sign(column, 16, words=n, characters=n), sign_with_datasketch(column, 16, words=n, characters=n)
    assert (ours.values == reference.values).all()
    assert (ours.signed == reference.signed).all()


@pytest.mark.parametrize("length", [511, 512, 513, 515, 516, 517, 1024, 1030])
@pytest.mark.parametrize("unit", [WORDS, CHARACTERS])
def test_a_text_longer_than_the_kernels_buffer_loses_no_shingle(length: int, unit: int) -> None:
    generator = np.random.default_rng(length)
    words = ["".join(chr(97 + letter) for letter in generator.integers(0, 26, 6)) for _ in range(length)]
    text = " ".join(words) if unit == WORDS else "".join(words) + "世"
    hashes, offsets = shingle_sets(pa.array([text]), unit=unit)
    assert offsets.tolist() == [0, len(set(shingles(text, unit=unit)))]
    ours, reference = sign(pa.array([text]), 16, unit=unit), sign_with_datasketch(pa.array([text]), 16, unit=unit)
    assert (ours.values == reference.values).all()
    assert len(np.unique(hashes)) == len(hashes)


@pytest.mark.parametrize("mark", ["世", "๓", "é", "3", "ก์"])
@pytest.mark.parametrize("before", [510, 511, 512])
def test_a_character_that_meets_the_end_of_the_buffer_is_taken_once(mark: str, before: int) -> None:
    text = " ".join(["word"] * before) + mark + " and more words follow here"
    ours, reference = (make(pa.array([text]), 16, unit=WORDS, words=1) for make in (sign, sign_with_datasketch))
    assert (ours.values == reference.values).all()
    assert len(shingle_sets(pa.array([text]), unit=WORDS, words=1)[0]) == len(set(shingles(text, 1, unit=WORDS)))


def test_a_document_shorter_than_a_shingle_has_no_signature() -> None:
    texts = pa.array(["", None, "four words are few", "five words are just enough", "四个汉字", "五个汉字了", "...!!!"])
    assert sign(texts).signed.tolist() == [False, False, False, True, False, True, False]


def test_slices_and_chunks_sign_alike() -> None:
    texts = [ENGLISH, CHINESE, "", ENGLISH + " more words here", None, CHINESE * 2]
    whole = sign(pa.array(texts)).values
    assert (sign(pa.array(["x", *texts, "y"]).slice(1, 6)).values == whole).all()
    assert (sign(pa.chunked_array([texts[:2], texts[2:]])).values == whole).all()
    assert (sign(pa.array(texts, pa.large_string())).values == whole).all()
    assert sign(pa.chunked_array([], pa.string())).values.shape == (0, 112)


def test_the_language_column_decides_the_unit() -> None:
    langs = pa.array(["en", "zh-Hans", None, "ja"])
    signed = sign(pa.array([CHINESE, ENGLISH, CHINESE, CHINESE]), langs=langs).values
    by_word, by_character = sign(pa.array([CHINESE, ENGLISH]), unit=WORDS), sign(pa.array([CHINESE, ENGLISH]), unit=CHARACTERS)
    assert (signed[0] == by_word.values[0]).all()
    assert (signed[1] == by_character.values[1]).all()
    assert (signed[2] == by_character.values[0]).all()
    assert (signed[3] == by_character.values[0]).all()


def test_agreement_of_signatures_estimates_jaccard() -> None:
    generator = np.random.default_rng(5)
    words = np.array([f"w{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]}{'uvwxyzabcd'[i // 100]}" for i in range(1000)])
    left = words[generator.integers(0, 1000, 2000)]
    for changed in (0, 20, 100, 400):
        right = left.copy()
        right[generator.choice(2000, changed, replace=False)] = "changed"
        texts = [" ".join(left), " ".join(right)]
        a, b = (set(shingles(text)) for text in texts)
        exact = len(a & b) / len(a | b)
        values = sign(pa.array(texts), 1024).values
        assert abs((values[0] == values[1]).mean() - exact) < 4 * np.sqrt(0.25 / 1024)


def test_signatures_go_out_as_lean_minhashes_and_come_back() -> None:
    texts = pa.array([ENGLISH, "too short", CHINESE, CHINESE + ENGLISH])
    signed = sign(texts, 64, seed=5, hashing="datasketch")
    lean = to_lean(signed, seed=5)
    assert lean[1] is None
    words = re.findall(r"[a-z]+", ENGLISH.lower())
    english = datasketch.MinHash(64, seed=5)
    english.update_batch([" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)])
    assert lean[0] == datasketch.LeanMinHash(english)
    buffer = bytearray(lean[2].bytesize())
    lean[2].serialize(buffer)
    back = from_lean([lean[0], None, datasketch.LeanMinHash.deserialize(buffer), lean[3]], 64, seed=5)
    assert (back.values == signed.values).all()
    assert (back.signed == signed.signed).all()
    with pytest.raises(ValueError, match="MinHash 1 has 64 permutations, seed 5 and scheme 'affine32'; expected 64, 6"):
        from_lean([None, lean[0]], 64, seed=6)


def test_an_unknown_hash_is_refused() -> None:
    with pytest.raises(ValueError, match="fast"):
        sign(pa.array(["x"]), hashing="md5")
    with pytest.raises(TypeError, match="string column"):
        sign(pa.array([1, 2]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep_digits", [False, True])
def test_a_text_of_many_windows_with_words_of_any_length_signs_as_the_reference(seed: int, keep_digits: bool) -> None:
    generator = np.random.default_rng(seed)
    pieces = ["a", "Word", "é", "中", "ก์", "😀", " ", ", ", "\n", "7", "2024", "x" * 16, "y" * 15 + "1", "z" * 4096, "9" * 300, "٣"]
    pieces += ["q" * int(generator.integers(1, 9000)) + " "]
    text = "".join(pieces[i] for i in generator.integers(0, len(pieces), 25))
    for unit in (WORDS, CHARACTERS):
        ours, reference = (
            make(pa.array([text, text[7:]]), 16, unit=unit, keep_digits=keep_digits) for make in (sign, sign_with_datasketch)
        )
        assert (ours.values == reference.values).all()
        assert (ours.signed == reference.signed).all()
