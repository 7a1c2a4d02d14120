"""The pool finds the nearest text without looking at most of them, and never another one than looking at all would."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import _score_lcs

from operators.synthesis.novelty import NoveltyPool, Vocabulary, rouge_l, rouge_l_matrix, tokenize
from operators.synthesis.novelty import tokens as tokens_module

# few words, so that most texts share tokens, many are equal, and ties abound
FEW = st.lists(st.sampled_from(["a", "b", "c", "dd", "写", "猫", "123", "é"]), max_size=12).map(" ".join)
ALIKE = st.integers(0, 140).map(lambda n: "a " * n)
MIXED = st.text(st.sampled_from("写一个 abc 关于猫12的故事\0🙂。,\n\ud800İK Σς"), max_size=40)
LONG = st.lists(st.sampled_from([f"w{i}" for i in range(12)]), min_size=60, max_size=200).map(" ".join)
TEXT = st.one_of(FEW, ALIKE, MIXED, LONG)


def reference(a: str, b: str) -> float:
    """F by rouge_score's own LCS and arithmetic over our tokens."""
    return float(_score_lcs(tokenize(a), tokenize(b)).fmeasure)


def brute(pool: list[str], text: str, floor: float = 0.0) -> tuple[float, int]:
    scores = [reference(text, other) for other in pool]
    best = max(scores, default=0.0)
    return (best, scores.index(best)) if best > 0 and best >= floor else (0.0, -1)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, max_size=12), st.lists(TEXT, max_size=6), st.sampled_from([0.01, 0.3, 0.5, 2 / 3, 0.7, 1.0]))
def test_the_nearest_is_that_of_looking_at_every_text(texts: list[str], candidates: list[str], floor: float) -> None:
    pool = NoveltyPool(threshold=1.0, floor=floor)
    pool.extend(texts)
    found = pool.matches(candidates)
    for at, text in enumerate(candidates):
        assert (found.similarity[at], found.nearest[at]) == brute(texts, text, floor)
        assert pool.nearest(text) == brute(texts, text)
        assert pool.scores(text).tolist() == [reference(text, other) for other in texts]


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, max_size=20), st.sampled_from([0.3, 0.5, 0.7, 1.0]), st.integers(1, 3), st.data())
def test_a_batch_is_decided_as_its_texts_one_by_one(texts: list[str], threshold: float, workers: int, data: st.DataObject) -> None:
    known = data.draw(st.integers(0, len(texts)))
    pool = NoveltyPool(threshold, floor=threshold / 2, workers=workers)
    pool.extend(texts[:known])
    found = pool.admit(texts[known:])
    accepted = texts[:known]
    for at, text in enumerate(texts[known:]):
        best, nearest = brute(accepted, text, threshold / 2)
        assert (found.accepted[at], found.similarity[at], found.nearest[at]) == (best < threshold, best, nearest)
        if best < threshold:
            accepted.append(text)
    assert len(pool) == len(accepted)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, max_size=8), st.lists(TEXT, max_size=8))
def test_a_matrix_has_the_score_of_every_pair(texts: list[str], others: list[str]) -> None:
    assert rouge_l_matrix(texts, others).tolist() == [[reference(a, b) for b in others] for a in texts]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and tails of a few texts, so that a few hundred texts go through everything that a million would."""
    monkeypatch.setattr("operators.synthesis.novelty.pool._CHUNK", 37)
    monkeypatch.setattr("operators.synthesis.novelty.pool._TAIL", 50)
    monkeypatch.setattr(tokens_module, "_BATCH_BYTES", 500)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("floor", [0.05, 0.7])
def test_postings_that_are_built_anew_change_nothing(small_chunks: None, workers: int, floor: float) -> None:
    draw = random.Random(5)
    words = [f"w{i}" for i in range(30)] + list("写一个关于猫的故事请用两句话")
    texts = [" ".join(draw.choices(words, [1 / (i + 1) for i in range(len(words))], k=draw.randint(0, 14))) for _ in range(260)]
    pool = NoveltyPool(0.7, floor, workers)
    found = pool.admit(texts)
    accepted: list[str] = []
    for at, text in enumerate(texts):
        best, nearest = brute(accepted, text, floor)
        assert (found.similarity[at], found.nearest[at]) == (best, nearest)
        if best < 0.7:
            accepted.append(text)
    assert pool._built > 60  # it did go through


def test_english_and_chinese_instructions_are_decided_as_by_looking_at_all(data_pack: Path, small_chunks: None) -> None:
    texts = []
    for name in ("seed_tasks_en", "seed_tasks_zh", "alpaca_gpt4_en_demo", "alpaca_gpt4_zh_demo"):
        lines = (data_pack / "instruct" / f"{name}.jsonl").read_text("utf-8").splitlines()
        texts += [json.loads(line)["instruction"] for line in lines]
    random.Random(1).shuffle(texts)
    matrix = rouge_l_matrix(texts)
    pool, numbers = NoveltyPool(0.6, 0.3), []
    found = pool.admit(texts)
    for at in range(len(texts)):
        scores = matrix[at, numbers] if numbers else np.zeros(1)
        best = float(scores.max())
        expected = (best, int(scores.argmax())) if best >= 0.3 else (0.0, -1)
        assert (found.similarity[at], found.nearest[at]) == expected
        if best < 0.6:
            numbers.append(at)
    assert 10 < len(texts) - len(numbers) < len(texts) / 2


@pytest.mark.parametrize("size", [63, 64, 65, 128, 256, 257, 4096, 4097, 9000])
def test_texts_at_the_edges_of_words_blocks_and_stripes_are_counted_right(size: int) -> None:
    draw = random.Random(size)
    a = [f"w{draw.randrange(300)}" for _ in range(size)]
    b = [word if draw.random() < 0.8 else "x" for word in a if draw.random() < 0.9]
    one, other = " ".join(a), " ".join(b)
    expected = _score_lcs(a, b).fmeasure if size < 1000 else _lcs_by_rapidfuzz(a, b)
    assert rouge_l(one, other) == rouge_l(other, one) == expected
    assert rouge_l_matrix([one], [other]).tolist() == [[expected]]
    pool = NoveltyPool()
    pool.extend(["nothing of it", other, other])
    assert pool.nearest(one) == (expected, 1)
    assert pool.admit([one]).nearest.tolist() == [1]
    assert pool.admit([one, other]).accepted.tolist() == [False, False]


def _lcs_by_rapidfuzz(a: list[str], b: list[str]) -> float:
    from rapidfuzz.distance import LCSseq

    common = LCSseq.similarity(a, b)
    precision, recall = common / len(a), common / len(b)
    return float(2 * precision * recall / (precision + recall))


def test_texts_of_a_hundred_thousand_tokens_need_no_memory_of_their_square() -> None:
    draw = random.Random(3)
    words = [f"w{i}" for i in range(50_000)]
    text = draw.choices(words, k=100_000)
    near = [word if draw.random() < 0.9 else "changed" for word in text]
    pool = NoveltyPool()
    assert pool.admit([" ".join(text), " ".join(near), "a " * 100_000, "a " * 90_000]).accepted.tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_texts_without_tokens_and_of_one_token_are_held_apart() -> None:
    pool = NoveltyPool()
    found = pool.admit(["", "...", "🙂\0", "hello", "HELLO!", "世", "世。", "hello 世"])
    assert found.accepted.tolist() == [True, True, True, True, False, True, False, True]
    assert found.nearest.tolist() == [-1, -1, -1, -1, 3, -1, 4, 3]
    assert len(pool) == 6


@pytest.mark.parametrize("length", [3, 10, 20, 39, 40, 100, 130])
def test_a_match_of_exactly_the_threshold_is_not_new_and_one_token_less_is(length: int) -> None:
    for common in range(1, length):
        texts = [" ".join(f"w{i}" for i in range(length)), " ".join(f"w{i}" if i < common else f"v{i}" for i in range(length))]
        score = reference(*texts)
        assert NoveltyPool(score, score).admit(texts).accepted.tolist() == [True, False]
        above = float(np.nextafter(score, 2))
        assert NoveltyPool(above, above).admit(texts).accepted.tolist() == [True, True]


def test_the_vocabulary_finds_the_tokens_of_the_definition_for_every_character() -> None:
    vocabulary = Vocabulary()
    texts = [f"a{chr(point)}b{chr(point)}{chr(point)} " for point in itertools.chain(range(0x3400), range(0xA000, 0x110000, 7))]
    numbers, offsets = vocabulary.encode(texts)
    seen: dict[str, int] = {}
    for at, text in enumerate(texts):
        expected = [seen.setdefault(token, len(seen)) for token in tokenize(text)]
        assert numbers[offsets[at] : offsets[at + 1]].tolist() == expected, hex(ord(text[1]))
    assert len(vocabulary) == len(seen)


@given(st.lists(st.text(max_size=30), max_size=8), st.lists(st.text(max_size=30), max_size=4))
@settings(deadline=None)
def test_tokens_are_numbered_as_they_come_and_strange_ones_have_no_number(texts: list[str], strange: list[str]) -> None:
    vocabulary, seen = Vocabulary(), {}
    for _ in range(2):
        numbers, _ = vocabulary.encode(texts)
        assert numbers.tolist() == [seen.setdefault(token, len(seen)) for text in texts for token in tokenize(text)]
    numbers, offsets = vocabulary.encode(strange, add=False)
    assert numbers.tolist() == [seen.get(token, -1) for text in strange for token in tokenize(text)]
    assert np.diff(offsets).tolist() == [len(tokenize(text)) for text in strange]


def test_tokens_with_equal_hashes_are_not_taken_for_each_other() -> None:
    """Thue-Morse words collide under any polynomial hash modulo 2**64."""
    word = "a"
    for _ in range(11):
        word += word.translate(str.maketrans("ab", "ba"))
    other = word.translate(str.maketrans("ab", "ba"))
    assert rouge_l(word, other) == 0.0
    assert NoveltyPool().admit([word, other, word]).accepted.tolist() == [True, True, False]


def test_settings_that_make_no_sense_are_refused() -> None:
    for threshold, floor, workers in [(0.7, 0.8, 1), (0.7, 0.0, 1), (1.1, 0.5, 1), (0.7, 0.5, 0)]:
        with pytest.raises(ValueError, match="must hold"):
            NoveltyPool(threshold, floor, workers)
