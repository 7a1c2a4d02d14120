"""Novelty decides as rouge_score does for English, and works where rouge_score sees nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq
from rouge_score import tokenize as rouge_tokenize
from rouge_score.rouge_scorer import RougeScorer

from operators.synthesis.novelty import NoveltyPool, rouge_l, rouge_l_matrix, tokenize

SCORER = RougeScorer(["rougeL"])
LATIN = st.text(st.sampled_from("abcdeABCDE012 .,-'\n\t_éÉßçñİ²½ﬁ①™“”…—🙂"), max_size=120)
VOCABULARY = ["write", "a", "short", "story", "about", "the", "cat", "in", "two", "words"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=150).map(" ".join)
HAN = st.text(st.sampled_from("写一个关于猫的故事，请用两句话。a1 "), max_size=100)


@settings(deadline=None)
@given(LATIN)
def test_latin_text_has_exactly_rouge_scores_tokens(text: str) -> None:
    assert tokenize(text) == rouge_tokenize.tokenize(text, None)


@settings(max_examples=300, deadline=None)
@given(WORDS, WORDS)
def test_scores_equal_rouge_score_to_the_last_bit(a: str, b: str) -> None:
    assert rouge_l(a, b) == SCORER.score(a, b)["rougeL"].fmeasure


@settings(deadline=None)
@given(st.lists(HAN, min_size=1, max_size=6), HAN)
def test_chinese_and_mixed_scores_follow_the_lcs_of_their_tokens(pool: list[str], text: str) -> None:
    index = NoveltyPool()
    for other in pool:
        index.add(other)
    expected = []
    for other in pool:
        a, b = tokenize(text), tokenize(other)
        common = LCSseq.similarity(a, b)
        p, r = (common / len(a), common / len(b)) if common else (0.0, 0.0)
        expected.append(2 * p * r / (p + r) if common else 0.0)
    assert index.scores(text).tolist() == expected
    best, first = index.nearest(text)
    assert best == max(expected)
    assert first == (expected.index(best) if best else -1)


@pytest.mark.parametrize(("length", "common"), [(10, 7), (20, 14), (40, 28), (100, 70), (130, 91)])
def test_a_tie_at_the_threshold_falls_as_in_rouge_score(length: int, common: int) -> None:
    a = " ".join(f"w{i}" for i in range(length))
    b = " ".join(f"w{i}" if i < common else f"v{i}" for i in range(length))
    assert rouge_l(a, b) == SCORER.score(a, b)["rougeL"].fmeasure


def test_every_pair_of_real_seed_tasks_agrees_with_rouge_score(data_pack: Path) -> None:
    lines = (data_pack / "instruct/seed_tasks_en.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line)["instruction"] for line in lines]
    ours = rouge_l_matrix(rows)
    cached = [rouge_tokenize.tokenize(row, None) for row in rows]
    for i in range(0, len(rows), 3):
        for j in range(i):
            common = LCSseq.similarity(cached[i], cached[j])
            p, r = common / len(cached[i]), common / len(cached[j])
            assert ours[i, j] == (2 * p * r / (p + r) if common else 0.0)
    for i, j in [(0, 1), (5, 90), (33, 34), (100, 174)]:
        assert ours[i, j] == SCORER.score(rows[i], rows[j])["rougeL"].fmeasure


def test_identical_chinese_texts_are_identical_and_different_ones_are_not() -> None:
    assert rouge_l("给出三个保持健康的秘诀。", "给出三个保持健康的秘诀") == 1.0
    assert rouge_l("给出三个保持健康的秘诀。", "把下面的句子翻译成英文：") < 0.3
    assert tokenize("用Python写一个hello world程序") == ["用", "python", "写", "一", "个", "hello", "world", "程", "序"]
    assert tokenize("Привет, мир 2024") == ["привет", "мир", "2024"]


def test_text_without_tokens_resembles_nothing() -> None:
    pool = NoveltyPool()
    pool.add("...")
    pool.add("")
    assert pool.nearest("hello") == (0.0, -1)
    assert pool.nearest("!!!") == (0.0, -1)
    assert np.array_equal(pool.scores("hello"), np.zeros(2))
