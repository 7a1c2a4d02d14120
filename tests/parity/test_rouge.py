"""Decisions on novelty beside the rouge_score package's own, to the last bit, on pairs of real English instructions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from rouge_score import tokenize
from rouge_score.rouge_scorer import RougeScorer, _score_lcs

from operators.synthesis.novelty import NoveltyPool, rouge_l_matrix

_THRESHOLDS = [0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1.0]
_SETS = ("seed_tasks_en", "alpaca_gpt4_en_demo", "alpaca_en")


def texts_of(data_pack: Path, column: str = "instruction") -> list[str]:
    found = []
    for name in _SETS:
        rows = [json.loads(line) for line in (data_pack / "instruct" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        found += [row[column] if column in row else row["instances"][0][column] for row in rows]
    return found


def pairs_of(matrix: np.ndarray, count: int) -> np.ndarray:
    """int64[count, 2]: the most similar pairs (half of them at most), then others evenly through the rest."""
    rows, columns = np.triu_indices(len(matrix))
    order = np.argsort(-matrix[rows, columns], kind="stable")
    close = order[: min(count // 2, int((matrix[rows, columns] >= 0.3).sum()))]
    rest = order[len(close) :]
    chosen = np.concatenate([close, rest[np.linspace(0, len(rest) - 1, count - len(close)).astype(np.int64)]])
    return np.column_stack([rows[chosen], columns[chosen]])


def compare(texts: list[str], count: int) -> tuple[int, int]:
    """(pairs at or above 0.7, pairs exactly at a threshold), after every score and every decision was found equal."""
    matrix = rouge_l_matrix(texts)
    pairs = pairs_of(matrix, count)
    assert len(np.unique(pairs, axis=0)) == count
    tokens = [tokenize.tokenize(text, None) for text in texts]
    theirs = np.array([_score_lcs(tokens[i], tokens[j]).fmeasure for i, j in pairs.tolist()])
    ours = matrix[pairs[:, 0], pairs[:, 1]]
    assert np.array_equal(ours.view(np.uint64), theirs.view(np.uint64))
    for threshold in _THRESHOLDS:
        assert np.array_equal(ours >= threshold, theirs >= threshold)
        assert np.array_equal(ours > threshold, theirs > threshold)
    return int((theirs >= 0.7).sum()), int(np.isclose(theirs[:, None], _THRESHOLDS, rtol=0, atol=1e-12).any(axis=1).sum())


def test_scores_and_decisions_of_real_pairs_are_rouge_scores(data_pack: Path) -> None:
    similar, ties = compare(texts_of(data_pack)[::6], 20_000)
    assert similar > 400
    assert ties > 50


@pytest.mark.slow
def test_scores_and_decisions_of_a_million_real_pairs_are_rouge_scores(data_pack: Path) -> None:
    similar, ties = compare(texts_of(data_pack), 1_000_000)
    assert similar > 2000
    assert ties > 1000


@pytest.mark.slow
def test_pairs_of_long_answers_have_rouge_scores_too(data_pack: Path) -> None:
    compare([text for text in texts_of(data_pack, "output") if len(text.split()) > 60][:300], 3000)


def test_the_public_call_of_rouge_score_says_the_same(data_pack: Path) -> None:
    texts, scorer = texts_of(data_pack)[:80], RougeScorer(["rougeL"])
    matrix = rouge_l_matrix(texts)
    for i, j in itertools.combinations(range(len(texts)), 2):
        assert scorer.score(texts[i], texts[j])["rougeL"].fmeasure == matrix[i, j]


def test_a_pool_keeps_and_drops_what_a_loop_over_rouge_score_does(data_pack: Path) -> None:
    """The novelty step of Self-Instruct as its authors' code has it: the highest F against everything kept, at 0.7."""
    texts = texts_of(data_pack)[175:1275]
    tokens = [tokenize.tokenize(text, None) for text in texts]
    kept: list[int] = []
    expected = []
    for at, given in enumerate(tokens):
        near = [other for other in kept if 2 * min(len(given), len(tokens[other])) >= 0.69 * (len(given) + len(tokens[other]))]
        scores = [_score_lcs(tokens[other], given).fmeasure for other in near]
        best = max(scores, default=0.0)
        expected.append((best, near[scores.index(best)]) if best >= 0.7 else (0.0, -1))
        if best < 0.7:
            kept.append(at)
        if at == 550:  # the half of the texts is enough for pairs of each with all before
            break
    found = NoveltyPool(0.7, 0.7).admit(texts[: len(expected)])
    assert found.accepted.tolist() == [best < 0.7 for best, _ in expected]
    assert found.similarity.tolist() == [best for best, _ in expected]
    assert [kept[number] if number >= 0 else -1 for number in found.nearest.tolist()] == [other for _, other in expected]
    assert not found.accepted.all()
